"""Granite with experts and a shared one beside them, a module of its own."""

from dataclasses import replace

from lrc.model.families.base import ATTENTION, always
from lrc.model.families.granitemoe import GRANITEMOE
from lrc.model.families.granitemoehybrid import SHARED

GRANITEMOESHARED = replace(
    GRANITEMOE, model_type="granitemoeshared", branches=always(ATTENTION, SHARED)
)
