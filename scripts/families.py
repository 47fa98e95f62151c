"""Write docs/families.md: what works for which model family, from the code itself.

python scripts/families.py            write the page
python scripts/families.py --check    exit with 1 if the page differs from the code
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from lrc.baselines.attention import check_observable
from lrc.baselines.pruning.shape import can_be_pruned
from lrc.cloning.shape.pruned_teacher import asked_shape, first_units, pruned_teacher
from lrc.model.families import FAMILIES, Family
from lrc.model.layout import Layout, layout_of
from lrc.model.pruned_shape import shape_of_config
from lrc.model.shapes import head_dim_of, layers_differ
from lrc.model.teacher import Teacher
from lrc.recipe.sections import StudentSection
from lrc.system.errors import UserError

PAGE = Path(__file__).parents[1] / "docs" / "families.md"

HEAD = """# Model families

The student is of the teacher's own class, whatever the family. Methods `lrc`, `slicegpt`, `scratch`
and `activation-clone` and the starts `closed-form`, `pca` and `random` work with all of them;
`tests/model/test_every_family.py` runs each. The text model of a multimodal checkpoint (Gemma 3
and 4, Qwen3.5, Mistral 3) is read out of it.

Quantized weights (mxfp4 and fp8; compressed-tensors and bitsandbytes with the extra `[quantized]`)
are read as plain numbers. Other kinds, such as AWQ and GPTQ, are refused. Of a hub model, this and
the family are checked from its configuration before its weights are downloaded.

* **Clone terms** are the names that `objective.clone` switches, in the order of the first use.
  Projections have the same names, and the experts of a layer share theirs. The readers of experts
  (*italic*) have no clone term, because they see only the tokens that are routed to them.
* **Start**: `norms` means that a norm follows each block. The closed-form start then fits the
  writer together with the gain of that norm.
* **Smaller** lists what a clone may have fewer of, besides a smaller hidden size: layers, FFN
  neurons (`student.intermediate_size`), heads (`student.kv_heads`), experts (`student.experts`).
  The row of Granite 4 is that of models with experts; without, they have the terms `gate_up` and
  `down`, and may have fewer neurons.
* **Pruning** means `minitron`, `sheared-llama`, `llm-pruner` and `lrc prune`; **attention** means
  `minilm` and `tinybert` with attention maps. Where a family cannot take them, they say so.
* **Documents**: `masked` if attention masks keep packed documents apart; `split` if the model
  cannot, so that `data.document_mask` makes every document a sequence of its own.
* **BOS**: whether every training sequence starts with BOS, because the models fail without.
* **GGUF**: llama.cpp's architecture, if `lrc export` can write it. `make test-gguf` runs each in
  llama.cpp; none is unverified with llama-cpp-python 0.3.36. `no`: llama.cpp takes hidden_size /
  heads for the width of a head (OLMo, EXAONE 4), or nobody has written it yet; run the folder in
  transformers or vLLM.
* **vLLM**: whether vLLM's own class takes a student's explicit head_dim (read in its source, not
  run). Where not, vLLM runs transformers' class with `--model-impl transformers`.

This page is written by `python scripts/families.py`.

| model type | clone terms | start | smaller | pruning | attention | documents | BOS | GGUF | vLLM |
|---|---|---|---|---|---|---|---|---|---|
"""


LAYERS = 12
"""Enough for every kind of layer."""
SETTINGS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"first_k_dense_replace": 1, "num_experts_per_tok": 6},
    "dots1": {
        "first_k_dense_replace": 1,
        "n_routed_experts": 128,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
    },
    "gemma4_text": {"hidden_size_per_layer_input": 0},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * (LAYERS // 2)},
    "granitemoeshared": {"shared_intermediate_size": 1024},
    "hunyuan_v1_moe": {"num_experts": 64, "moe_topk": 8},
}
"""Settings of families whose default configuration is not that of their models."""


def default_model(family: Family) -> PreTrainedModel:
    """A model of the family's default configuration, without weights."""
    config = CONFIG_MAPPING[family.model_type](
        num_hidden_layers=LAYERS, **SETTINGS.get(family.model_type, {})
    )
    if not layers_differ(config):
        config.head_dim = head_dim_of(config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def terms(layout: Layout) -> str:
    """The names of the linear maps."""
    observable = {site.name for site in layout.observable()}
    return ", ".join(n if n in observable else f"*{n}*" for n in layout.names())


def smaller(teacher: Teacher) -> str:
    """What a student may have fewer of."""
    whole = shape_of_config(teacher.config)
    found = []
    for name, sizes in {
        "layers": {"layers": whole.layers - 1},
        "neurons": {"intermediate_size": max(1, whole.neurons // 2)},
        "heads": {"kv_heads": whole.kv_heads // 2},
        "experts": {"experts": whole.experts // 2 or 1},
    }.items():
        student = StudentSection.model_validate(sizes)
        try:
            asked_shape(teacher, student)
            pruned_teacher(teacher, first_units(teacher, student))
        except UserError:
            continue
        found.append(name)
    return ", ".join(found)


def row(family: Family) -> str:
    """The table's row of a family."""
    model = default_model(family)
    layout = layout_of(model)
    try:
        check_observable(model, range(layout.num_layers))
        observed = "yes"
    except UserError:
        observed = "no"
    cells = [
        f"`{family.model_type}`",
        terms(layout),
        "norms" if layout.after_norms() else "yes",
        smaller(Teacher(model, None, family, family.model_type)) or "no",
        "yes" if can_be_pruned(model) else "no",
        observed,
        "masked" if family.keeps_documents_apart else "split",
        "yes" if family.needs_bos else "",
        f"`{family.gguf}`" if family.gguf else "no",
        {True: "yes", False: "no", None: "not checked"}[family.vllm],
    ]
    return f"| {' | '.join(cells)} |\n"


def page() -> str:
    """The whole page."""
    logging.disable()
    return HEAD + "".join(row(family) for family in FAMILIES.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    if parser.parse_args().check:
        sys.exit(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
