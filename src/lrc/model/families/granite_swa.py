"""Granite with sliding-window attention in some layers."""

from dataclasses import replace

from lrc.model.families.granite import GRANITE

GRANITE_SWA = replace(GRANITE, model_type="granite_swa", gguf="granite_swa")
