"""One file a method, all behind the interface in `base.py`."""

from lrc.methods.activation_clone import ActivationClone
from lrc.methods.base import TOKEN_LM, Counts, Method
from lrc.methods.llm_pruner import LlmPruner
from lrc.methods.low_rank_clone import LowRankClone
from lrc.methods.minilm import MiniLm
from lrc.methods.minitron import Minitron
from lrc.methods.scratch import Scratch
from lrc.methods.sheared_llama import ShearedLlama
from lrc.methods.slicegpt import SliceGpt
from lrc.methods.tinybert import TinyBert

METHODS: dict[str, type[Method]] = {
    "lrc": LowRankClone,
    "scratch": Scratch,
    "tinybert": TinyBert,
    "minilm": MiniLm,
    "activation-clone": ActivationClone,
    "minitron": Minitron,
    "slicegpt": SliceGpt,
    "sheared-llama": ShearedLlama,
    "llm-pruner": LlmPruner,
}
"""Every method by its name in a recipe."""

__all__ = ["METHODS", "TOKEN_LM", "Counts", "LowRankClone", "Method"]
