"""Members of a mixture: recipes that build them, and the files and functions that they come from."""
