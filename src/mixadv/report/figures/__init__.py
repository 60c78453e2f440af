"""Figures, one module for each family, in the style of `style.py`."""
