"""Exported students in transformers 4.57, which lives apart from the version that lrc needs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gguf_helpers import byte_level_bpe
from lrc.exporting.plain import export_student
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

READER = """
import json, sys, pathlib
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
assert transformers.__version__.startswith("4."), transformers.__version__
found = {}
for folder in pathlib.Path(sys.argv[1]).iterdir():
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
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
    students = {}
    for family in LLAMAS:
        for name, rope in ROPES.items():
            teacher = tiny_teacher(
                family, dtype=torch.float32, vocab_size=len(tokenizer) + 3, rope_parameters=rope
            )
            student = students[f"{family}-{name}"] = tiny_method(teacher).student()
            export_student(student, tokenizer, None, tmp_path / f"{family}-{name}")
    read = subprocess.run(
        [sys.executable, "-c", READER, str(tmp_path), TEXT],
        env=os.environ | {"PYTHONPATH": str(transformers_4), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert read.returncode == 0, read.stderr
    found = json.loads(read.stdout)
    assert set(found) == set(students)
    for name, student in students.items():
        class_name, theirs, logits, eos, chat = found[name]
        assert class_name == type(student).__name__
        assert theirs == ids
        assert eos == tokenizer.eos_token
        assert chat == tokenizer.apply_chat_template(
            [{"role": "user", "content": "x"}], tokenize=False
        )
        with torch.no_grad():
            ours = student(torch.tensor([ids])).logits[0]
        torch.testing.assert_close(torch.tensor(logits), ours, rtol=1e-4, atol=1e-5)
