"""Comparing methods, ablations and starts at one token budget."""

from lrc.compare.plan import Comparison, load_comparison
from lrc.compare.runner import compare

__all__ = ["Comparison", "compare", "load_comparison"]
