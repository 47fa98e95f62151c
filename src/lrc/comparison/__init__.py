"""Comparison of methods, ablations and initializations at one token budget."""

from lrc.comparison.plan import Comparison, load_comparison
from lrc.comparison.runner import compare

__all__ = ["Comparison", "compare", "load_comparison"]
