"""Text sources, tokenising and packing to a cache, and reading it back."""
