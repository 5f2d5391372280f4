"""Long results -> the papers' tables, figures, and one self-contained page."""
