"""One small file a model family: where things live in it, and its quirks.

A family says *where things are*; nothing else in the project asks which family it works on.
To add one, write a file beside `llama.py` and name it in `FAMILIES`.
"""

from lrc.model.families.base import LINEARS, READERS, WRITERS, Family
from lrc.model.families.llama import LLAMA
from lrc.model.families.mistral import MISTRAL
from lrc.model.families.qwen2 import QWEN2
from lrc.model.families.qwen3 import QWEN3
from lrc.system.errors import UserError

FAMILIES: dict[str, Family] = {f.model_type: f for f in (LLAMA, MISTRAL, QWEN2, QWEN3)}

__all__ = ["FAMILIES", "LINEARS", "READERS", "WRITERS", "Family", "family_of"]


def family_of(model_type: str) -> Family:
    """Return the family whose `config.model_type` this is.

    Raises:
        UserError: the family is not known; the message lists those that are.
    """
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UserError(
            f"Teachers of model type '{model_type}' are not supported; choose one of: {known}."
        )
    return FAMILIES[model_type]
