"""``python -m defectlib``."""

from defectlib.cli import main

main()
