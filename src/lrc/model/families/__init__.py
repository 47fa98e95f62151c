"""Model families, one small file each: where their parts are, and their quirks.

Nothing else in the project asks which family it works on. To add a family, write a file beside
`llama.py` and add it to `FAMILIES`.
"""

from lrc.model.families.base import Branch, Family
from lrc.model.families.llama import LLAMA
from lrc.model.families.mistral import MISTRAL
from lrc.model.families.qwen2 import QWEN2
from lrc.model.families.qwen3 import QWEN3
from lrc.system.errors import UserError

FAMILIES: dict[str, Family] = {f.model_type: f for f in (LLAMA, MISTRAL, QWEN2, QWEN3)}

__all__ = ["FAMILIES", "Branch", "Family", "family_of"]


def family_of(model_type: str) -> Family:
    """Return the family with this `config.model_type`.

    Raises:
        UserError: if the family is unknown; the message lists the known ones.
    """
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UserError(
            f"Teachers of model type '{model_type}' are not supported; choose one of: {known}."
        )
    return FAMILIES[model_type]
