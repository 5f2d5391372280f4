"""One file per system or baseline. A file added to this folder that calls ``@register("name")`` is a method."""
