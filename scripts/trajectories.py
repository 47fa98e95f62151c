"""Record the losses of every step, and the student, of tiny runs that cover the whole package.

Use it to check that a refactoring changes no number. Its output must be the same before and after:

    python scripts/trajectories.py before.json                  on the commit before
    python scripts/trajectories.py after.json --compare before.json

It runs every family, method, start, release, shape and switch of the objective on random teachers
of two layers, for six steps of two micro-batches, through the real command line, on one thread.
Compare on one machine with the same versions, because others sum in another order. It takes two
minutes.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from lrc.cli import main as lrc

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
METHODS = ("scratch", "tinybert", "minilm", "activation-clone", "minitron", "slicegpt")
METHODS += ("sheared-llama",)
STARTS = ("closed-form", "pca", "random")
STEPS, SEQUENCE, WORDS = 6, 16, 61

OBJECTIVES: dict[str, dict[str, Any]] = {
    "alpha-0": {"alpha": 0},
    "alpha-linear": {"alpha_schedule": "linear", "alpha_zero_at": 0.5},
    "alpha-cosine": {"alpha_schedule": "cosine", "alpha_zero_at": 1},
    "plain-clone": {"clone_scale": "none"},
    "teacher-space": {"attn_out": "teacher"},
    "explicit": {"alignment": "explicit"},
    "hot": {"temperature": 40, "kl_weight": 1.28},
    "no-kl": {"kl_weight": 0},
    "no-lm": {"lm_weight": 0},
    "small-chunks": {"chunk_tokens": 5},
    "no-ffn-terms": {"clone": {"gate": False, "up": False, "down": False}},
    "no-attention-terms": {"clone": dict.fromkeys("qkvo", False)},
}
TRAINING: dict[str, dict[str, Any]] = {
    "unclipped": {"token_grad_clip": 0, "grad_clip": 0},
    "decayed": {"weight_decay": 0.1, "schedule": "cosine"},
    "checkpointed": {"gradient_checkpointing": True},
    "release-0": {"release_at": 0},
    "release-half": {"release_at": 0.5, "release_learning_rate": 3e-3},
    "muon": {"optimizer": "muon", "release_at": 0.5, "weight_decay": 0.1},
}
STUDENTS: dict[str, dict[str, Any]] = {
    "not-folded": {"fold_gains": False},
    "projections-tied": {"tie_projections": True},
    "projections-apart": {"tie_projections": False},
    "fewer-layers": {"layers": 1},
    "fewer-heads": {"kv_heads": 1},
    "fewer-neurons": {"intermediate_size": 20},
    "smaller-shape": {
        "layers": 1,
        "kv_heads": 1,
        "intermediate_size": {"keep": [*range(0, 40, 2)]},
    },
}


def cases() -> Iterator[tuple[str, str, bool, dict[str, Any]]]:
    """Name, family, whether the teacher ties its embedding, and settings of each run."""
    for family in FAMILIES:
        for tied in (False, True):
            for start in STARTS:
                settings = {"initialize": {"method": start}}
                yield f"lrc {family} {start} {'tied' if tied else 'untied'}", family, tied, settings
        for method in METHODS:
            yield f"{method} {family}", family, family == "qwen2", {"method": method}
        pruned = {"method": {"name": "llm-pruner", "ratio": 0.1}, "student": {"hidden_size": 24}}
        yield f"llm-pruner {family}", family, family == "qwen2", pruned
    for section, group in (
        ("objective", OBJECTIVES),
        ("train", TRAINING),
        ("student", STUDENTS),
    ):
        for name, settings in group.items():
            for family in ("llama", "qwen3"):
                yield f"lrc {family} {name}", family, family == "qwen3", {section: settings}
    for name in ("explicit", "teacher-space", "alpha-linear", "alpha-0"):
        settings = {"objective": OBJECTIVES[name], "train": TRAINING["release-half"]}
        yield f"lrc llama release-half {name}", "llama", False, settings
    masked = {"data": {"document_mask": True}}
    yield "lrc llama documents", "llama", True, masked


def teacher(family: str, tied: bool, folder: Path) -> None:
    """Save a random teacher in a folder. All its widths are different."""
    config = CONFIG_MAPPING[family](
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        vocab_size=WORDS + 6,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
        **({"sliding_window": 5} if family == "mistral" else {}),
    )
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(("norm" in name) + 0.3 * noise)
    model.save_pretrained(folder)
    words = ["<s>", "</s>", "<unk>", *(f"w{i}" for i in range(3, WORDS))]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def text(path: Path) -> None:
    """Write documents of different lengths."""
    lines = (
        " ".join(f"w{3 + (7 * d + i * i) % (WORDS - 3)}" for i in range(20 + 3 * (d % 17)))
        for d in range(60)
    )
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The sections with changed settings."""
    found = dict(base)
    for name, value in changes.items():
        found[name] = {**base.get(name, {}), **value} if isinstance(value, dict) else value
    return found


def go(family: str, tied: bool, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run a case; return the losses of every step and a checksum of the student."""
    place = folder / f"{family}-{tied}"
    if not place.exists():
        teacher(family, tied, place)
    base = {
        "teacher": {"model": str(place)},
        "student": {"hidden_size": 12},
        "initialize": {"calibration_tokens": 128},
        "objective": {"alpha": 0.2, "alpha_schedule": "constant"},
        "data": {
            "text": [str(folder / "text.jsonl")],
            "held_out_fraction": 0.2,
            "sequence_length": SEQUENCE,
            "cache": str(folder / "cache"),
        },
        "train": {
            "tokens": STEPS * 2 * 2 * SEQUENCE,
            "micro_batch": 2,
            "accumulate": 2,
            "learning_rate": 1e-2,
            "warmup_ratio": 0.2,
            "optimizer": "adamw",
            "release_at": 1,
            "eval_every": 3,
            "device": "cpu",
        },
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(merged(base, settings)))
    run = Path(tempfile.mkdtemp(dir=folder)) / "run"
    sys.argv = ["lrc", "train", str(recipe), "--out", str(run)]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            lrc()
        except SystemExit as end:
            if end.code:
                raise SystemExit(said.getvalue()) from None
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = ("loss", "kl", "lm", "clone", "grad_norm", "learning_rate", "held_out_lm")
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(run / "student" / "model.safetensors").items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return {
        "steps": [{key: line[key] for key in kept if key in line} for line in lines],
        "student": digest.hexdigest(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("--compare", type=Path, help="JSON file of another commit to compare with")
    parser.add_argument("--only", default="", help="run only the cases whose name contains this")
    arguments = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        text(folder / "text.jsonl")
        for name, family, tied, settings in cases():
            if arguments.only in name:
                found[name] = go(family, tied, settings, folder)
                print(name, found[name]["student"][:12], flush=True)
    arguments.out.write_text(json.dumps(found, indent=1))
    if arguments.compare:
        theirs = json.loads(arguments.compare.read_text())
        changed = [name for name, value in found.items() if theirs.get(name) != value]
        print(f"{len(found) - len(changed)} of {len(found)} runs are bit-identical.")
        if changed:
            raise SystemExit("Different: " + ", ".join(changed))


if __name__ == "__main__":
    main()
