"""Model families, one small file each: where their parts are, and their quirks.

Nothing else in the project asks which family it works on. To add a family, write a file beside
`llama.py` and add it to `FAMILIES`.
"""

from typing import Any

from lrc.model.families.afmoe import AFMOE
from lrc.model.families.apertus import APERTUS
from lrc.model.families.arcee import ARCEE
from lrc.model.families.base import Branch, Family
from lrc.model.families.cwm import CWM
from lrc.model.families.deepseek_v2 import DEEPSEEK_V2
from lrc.model.families.deepseek_v3 import DEEPSEEK_V3
from lrc.model.families.dots1 import DOTS1
from lrc.model.families.ernie4_5 import ERNIE4_5
from lrc.model.families.ernie4_5_moe import ERNIE4_5_MOE
from lrc.model.families.exaone import EXAONE
from lrc.model.families.exaone4 import EXAONE4
from lrc.model.families.exaone_moe import EXAONE_MOE
from lrc.model.families.falcon_h1 import FALCON_H1
from lrc.model.families.gemma import GEMMA
from lrc.model.families.gemma2 import GEMMA2
from lrc.model.families.gemma3 import GEMMA3
from lrc.model.families.gemma4 import GEMMA4, GEMMA4_UNIFIED
from lrc.model.families.glm import GLM
from lrc.model.families.glm4 import GLM4
from lrc.model.families.glm4_moe import GLM4_MOE
from lrc.model.families.glm4_moe_lite import GLM4_MOE_LITE
from lrc.model.families.gpt_oss import GPT_OSS
from lrc.model.families.granite import GRANITE
from lrc.model.families.granite_swa import GRANITE_SWA
from lrc.model.families.granitemoe import GRANITEMOE
from lrc.model.families.granitemoehybrid import GRANITEMOEHYBRID
from lrc.model.families.granitemoeshared import GRANITEMOESHARED
from lrc.model.families.hunyuan_v1_dense import HUNYUAN_V1_DENSE
from lrc.model.families.hunyuan_v1_moe import HUNYUAN_V1_MOE
from lrc.model.families.hy_v3 import HY_V3
from lrc.model.families.hyperclovax import HYPERCLOVAX
from lrc.model.families.internlm3 import INTERNLM3
from lrc.model.families.llama import LLAMA
from lrc.model.families.mellum import MELLUM
from lrc.model.families.minimax_m2 import MINIMAX_M2
from lrc.model.families.ministral import MINISTRAL
from lrc.model.families.ministral3 import MINISTRAL3
from lrc.model.families.mistral import MISTRAL
from lrc.model.families.mixtral import MIXTRAL
from lrc.model.families.nemotron_h import NEMOTRON_H
from lrc.model.families.olmo2 import OLMO2
from lrc.model.families.olmo3 import OLMO3
from lrc.model.families.olmo_hybrid import OLMO_HYBRID
from lrc.model.families.phi3 import PHI3
from lrc.model.families.qwen2 import QWEN2
from lrc.model.families.qwen2_moe import QWEN2_MOE
from lrc.model.families.qwen3 import QWEN3
from lrc.model.families.qwen3_5 import QWEN3_5
from lrc.model.families.qwen3_5_moe import QWEN3_5_MOE
from lrc.model.families.qwen3_moe import QWEN3_MOE
from lrc.model.families.qwen3_next import QWEN3_NEXT
from lrc.model.families.seed_oss import SEED_OSS
from lrc.model.families.smollm3 import SMOLLM3
from lrc.model.families.solar_open import SOLAR_OPEN
from lrc.model.families.youtu import YOUTU
from lrc.system.errors import UserError

_FAMILIES = (
    LLAMA,
    MISTRAL,
    MINISTRAL,
    MINISTRAL3,
    QWEN2,
    QWEN2_MOE,
    QWEN3,
    QWEN3_MOE,
    QWEN3_NEXT,
    QWEN3_5,
    QWEN3_5_MOE,
    GEMMA,
    GEMMA2,
    GEMMA3,
    GEMMA4,
    GEMMA4_UNIFIED,
    PHI3,
    GPT_OSS,
    SMOLLM3,
    OLMO2,
    OLMO3,
    OLMO_HYBRID,
    GRANITE,
    GRANITE_SWA,
    GRANITEMOE,
    GRANITEMOESHARED,
    GRANITEMOEHYBRID,
    MIXTRAL,
    MINIMAX_M2,
    MELLUM,
    DEEPSEEK_V3,
    DEEPSEEK_V2,
    YOUTU,
    GLM,
    GLM4,
    GLM4_MOE,
    GLM4_MOE_LITE,
    DOTS1,
    SOLAR_OPEN,
    AFMOE,
    EXAONE,
    EXAONE4,
    EXAONE_MOE,
    INTERNLM3,
    ERNIE4_5,
    ERNIE4_5_MOE,
    SEED_OSS,
    HUNYUAN_V1_DENSE,
    HUNYUAN_V1_MOE,
    HY_V3,
    APERTUS,
    ARCEE,
    CWM,
    HYPERCLOVAX,
    NEMOTRON_H,
    FALCON_H1,
)

FAMILIES: dict[str, Family] = {family.model_type: family for family in _FAMILIES}

__all__ = ["FAMILIES", "Branch", "Family", "check_supported", "family_of"]


def check_supported(config: Any) -> Family:
    """The family of a configuration, in which lists of equal numbers by layer become one number.

    Raises:
        UserError: if its family is unknown, or it has something that cannot be cloned.
    """
    family = family_of(config.model_type)
    for name in family.numbers_by_layer:
        if isinstance(values := getattr(config, name, None), list):
            if len(set(values)) != 1:
                raise UserError(
                    f"The layers of this {family.model_type} model differ in {name}, so it cannot "
                    "be cloned."
                )
            setattr(config, name, values[0])
    if reason := family.unsupported(config):
        raise UserError(f"This {family.model_type} model has {reason}, which cannot be cloned.")
    return family


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
