"""Peak memory of a closed-form start, by calibration tokens and by how the teacher is loaded.

Teachers are random. Every number comes from a separate process and is the difference from a start
with few tokens, or from one with a teacher of one layer. So it excludes the libraries and a batch's
activations.

    python benchmarks/init_memory.py
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LENGTH = 256
VOCABULARY = 4096

SHALLOW = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
DEEP = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 14}

CHILD = """
import sys
import torch
from lrc.cloning.start import calibration, initialize
from lrc.cloning.low_rank_clone import LowRankClone
from lrc.recipe.sections import (
    InitializeSection,
    ObjectiveSection,
    StudentSection,
    TeacherSection,
)
from lrc.model.teacher import load_teacher

folder, load, tokens, hidden_size, in_memory = sys.argv[1:]
calibration.IN_MEMORY = int(in_memory)
teacher = load_teacher(TeacherSection(model=folder, load=load))
student = StudentSection(hidden_size=int(hidden_size), fold_gains=False)
method = LowRankClone(teacher, student, ObjectiveSection())
ids = torch.randint(3, {vocabulary}, (int(tokens) // {length}, {length}))
initialize(method, InitializeSection(refine_epochs=0), ids)
method.student()
with open("/proc/self/status") as file:
    print(next(line.split()[1] for line in file if line.startswith("VmHWM")))
"""


def save_teacher(folder: Path, **shape: int) -> float:
    """Write a random Llama and return the size of its weights in float32, in MiB."""
    config = LlamaConfig(
        **shape,
        vocab_size=VOCABULARY,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="64MB")
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters()) * 4 / 2**20


def peak(folder: Path, load: str, tokens: int, hidden_size: int, in_memory: int) -> float:
    """Peak resident memory of a start in a new process, in MiB."""
    code = CHILD.format(vocabulary=VOCABULARY, length=LENGTH)
    arguments = map(str, (folder, load, tokens, hidden_size, in_memory))
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"TQDM_DISABLE": "1"},
    )
    return int(result.stdout) / 1024


def by_tokens(folder: Path) -> Table:
    """The peak for increasing numbers of tokens, with the streams in files and in memory."""
    save_teacher(folder, **SHALLOW)
    floor = peak(folder, "full", 2048, 64, 0)
    table = Table("calibration tokens", "streams", "in files: peak", "in memory: peak")
    for tokens in (4096, 16384, 65536):
        streams = tokens * (3 * SHALLOW["hidden_size"] + 64) * 4 / 2**20
        found = [peak(folder, "full", tokens, 64, bound) - floor for bound in (0, 2**40)]
        table.add_row(f"{tokens:,}", f"{streams:.0f}", *(f"{value:.0f}" for value in found))
    return table


def by_loading(folder: Path) -> Table:
    """The peak with the teacher loaded in full and layer by layer."""
    size = save_teacher(folder / "deep", **DEEP)
    save_teacher(folder / "flat", **DEEP | {"num_hidden_layers": 1})
    floor = peak(folder / "flat", "layers", 1024, 64, 2**40)
    table = Table("teacher.load", "teacher", "peak")
    for load in ("full", "layers"):
        found = peak(folder / "deep", load, 1024, 64, 2**40) - floor
        table.add_row(load, f"{size:.0f}", f"{found:.0f}")
    return table


def main() -> None:
    torch.manual_seed(0)
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        console.print("MiB above a start from 2,048 tokens:", by_tokens(Path(folder) / "shallow"))
        console.print("MiB above a teacher of one layer:", by_loading(Path(folder)))


if __name__ == "__main__":
    main()
