"""The systems that Low-Rank Clone is measured against."""
