"""Granite with experts and a shared one beside them, a module of its own."""

from dataclasses import replace
from typing import Any

from lrc.model.families.base import ATTENTION, Branch
from lrc.model.families.granitemoe import EXPERTS, GRANITEMOE
from lrc.model.families.granitemoehybrid import SHARED


def branches(config: Any, _layer: int) -> tuple[Branch, Branch]:
    """The branches of a layer."""
    return ATTENTION, SHARED if config.shared_intermediate_size else EXPERTS


GRANITEMOESHARED = replace(GRANITEMOE, model_type="granitemoeshared", branches=branches)
