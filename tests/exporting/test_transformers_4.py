"""Exported students in transformers 4.57, which lives apart from the version that lrc needs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gguf_helpers import byte_level_bpe
from lrc.exporting.plain import export_student
from lrc.model.families import FAMILIES
from tiny import LLAMAS, tiny_method, tiny_teacher

pytestmark = pytest.mark.slow

TEXT = "Once upon a time, it's 12 <think> x</s>"
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 100_000.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8,
    },
}  # fmt: skip

WITHOUT_HEAD_DIM = ("qwen2_moe", "granitemoe", "granitemoeshared", "granitemoehybrid")
"""Families whose classes in 4.57 take heads as wide as the hidden size has room for."""

CLOSE = {"apertus": 0.02}
"""Largest difference of the logits where 4.57 rounds numbers of its own to bfloat16."""

LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 500_000.0}
BY_KIND = {
    "gemma3_text": {
        "full_attention": LINEAR,
        "sliding_attention": {"rope_type": "default", "rope_theta": 30_000.0},
    },
    "olmo3": {  # whose kinds have one base
        "full_attention": LINEAR,
        "sliding_attention": {"rope_type": "default", "rope_theta": 500_000.0},
    },
}

READER = """
import json, sys, pathlib
import torch, transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer
assert transformers.__version__.startswith("4."), transformers.__version__
found = {}
for folder in pathlib.Path(sys.argv[1]).iterdir():
    if json.loads((folder / "config.json").read_text())["model_type"] not in CONFIG_MAPPING:
        continue
    # Gemma 2's default in 4.57 leaves out the softcap.
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode(sys.argv[2])
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits
    chat = tokenizer.chat_template and tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}], tokenize=False
    )
    found[folder.name] = [type(model).__name__, ids, logits[0].tolist(), tokenizer.eos_token, chat]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def transformers_4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with transformers 4.57 and what it needs; torch is the one that is here."""
    folder = tmp_path_factory.mktemp("transformers-4")
    command = ["pip", "install", "--quiet", "--target", str(folder), "transformers==4.57.*"]
    installed = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"pip cannot install transformers 4.57: {installed.stderr.strip()[-200:]}")
    return folder


def test_it_is_the_same_model(transformers_4: Path, tmp_path: Path) -> None:
    tokenizer = byte_level_bpe()
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    ids = tokenizer.encode(TEXT)
    students: dict[str, Any] = {}
    changes: list[tuple[str, dict[str, Any]]]
    changes = [
        *((family, {"rope_parameters": rope}) for family in LLAMAS for rope in ROPES.values()),
        *((family, {"rope_parameters": rope}) for family, rope in BY_KIND.items()),
        *((family, {}) for family in FAMILIES if family not in WITHOUT_HEAD_DIM),
    ]
    for number, (family, settings) in enumerate(changes):
        teacher = tiny_teacher(
            family, dtype=torch.float32, vocab_size=len(tokenizer) + 3, **settings
        )
        student = students[f"{number}-{family}"] = tiny_method(teacher).student()
        export_student(student, tokenizer, None, tmp_path / f"{number}-{family}")
    read = subprocess.run(
        [sys.executable, "-c", READER, str(tmp_path), TEXT],
        env=os.environ | {"PYTHONPATH": str(transformers_4), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert read.returncode == 0, read.stderr
    found = json.loads(read.stdout)
    assert len(found) > len(FAMILIES) / 2
    for name, (class_name, theirs, logits, eos, chat) in found.items():
        student = students[name]
        assert class_name == type(student).__name__
        assert theirs == ids
        assert eos == tokenizer.eos_token
        assert chat == tokenizer.apply_chat_template(
            [{"role": "user", "content": "x"}], tokenize=False
        )
        with torch.no_grad():
            ours = student(torch.tensor([ids])).logits[0]
        atol = CLOSE.get(student.config.model_type, 1e-5)
        torch.testing.assert_close(torch.tensor(logits), ours, rtol=1e-4, atol=atol)
