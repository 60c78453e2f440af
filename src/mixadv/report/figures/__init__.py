"""Figures, one file for each family; all of them in one style."""
