"""Teach lrc a model family that it does not know: VaultGemma, of which no file of lrc has heard.

python examples/custom_family.py --teacher google/vaultgemma-1b --text corpus.jsonl.gz

A family says where the parts of a decoder layer are, and what is unusual. VaultGemma is Gemma 2
without the norms after its blocks. All methods, starts and exports to transformers then work. To
make it permanent, and to have every test run for it, see CONTRIBUTING.md.
"""

import argparse
from dataclasses import replace

import lrc
from lrc.model.families import FAMILIES
from lrc.model.families.base import ATTENTION, FFN, Family, always
from lrc.model.families.gemma import root_of_width

VAULT_GEMMA = Family(
    "vaultgemma",  # `model_type` in config.json
    branches=always(ATTENTION, replace(FFN, norm="pre_feedforward_layernorm")),
    gain_offset=1.0,  # the norms' weights are stored around zero
    embedding_scale=root_of_width,
    needs_bos=True,
)


def main() -> None:
    options = argparse.ArgumentParser(description="Clone a model of a new family.")
    options.add_argument("--teacher", default="google/vaultgemma-1b")
    options.add_argument("--hidden-size", type=int, default=576)
    options.add_argument("--text", required=True)
    options.add_argument("--tokens", type=int, default=1_000_000)
    options.add_argument("--out", default="runs/vaultgemma")
    given = options.parse_args()

    FAMILIES[VAULT_GEMMA.model_type] = VAULT_GEMMA  # for this process
    run = lrc.clone(
        given.teacher,
        hidden_size=given.hidden_size,
        text=given.text,
        out=given.out,
        settings={"train.tokens": given.tokens},
    )
    print(f"held-out LM loss {run.summary()['student_held_out_lm']:.3f}")


if __name__ == "__main__":
    main()
