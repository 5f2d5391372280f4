"""Few-shot industrial defect image generation: the helper package behind the nine notebooks.

Rooms are imported by name (``from defectlib import data, sampling``); importing the package alone loads nothing heavy.
"""

__version__ = "0.1.0"
