"""How the projections start: one small file a way."""

from lrc.initialise.random import initialise_random
from lrc.projection import Projections
from lrc.recipe import InitialiseSection

__all__ = ["initialise", "initialise_random"]


def initialise(projections: Projections, section: InitialiseSection) -> None:
    """Fill the projections in place, in the way that the recipe names."""
    initialise_random(projections, section.std, section.seed)
