"""Baselines that Low-Rank Clone is compared with."""
