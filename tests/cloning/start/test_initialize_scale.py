"""Starts that need little memory: streams in files, teachers on disk or in low precision."""

import errno
import os
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from command_line import Command
from lrc.api import clone
from lrc.cloning.low_rank_clone import LowRankClone
from lrc.cloning.start import calibration
from lrc.cloning.start.closed_form import head
from lrc.cloning.start.streams import ActivationStore
from lrc.model.teacher import Teacher, load_teacher
from lrc.recipe.sections import ObjectiveSection, StudentSection, TeacherSection
from lrc.run import Run
from lrc.system.errors import UserError
from prepared import Prepared
from tiny import (
    HIDDEN,
    STUDENT_HIDDEN,
    TINY_CASES,
    Case,
    initialize_from_text,
    tiny_teacher,
    tiny_tokens,
)
from tiny_runs import file_settings, save_teacher


def started(
    teacher: Teacher, way: str = "closed-form", hidden_size: int = STUDENT_HIDDEN, **student: bool
) -> dict[str, Tensor]:
    """The weights of a student that was started from 26 sequences."""
    section = StudentSection(hidden_size=hidden_size, **student)
    method = LowRankClone(teacher, section, ObjectiveSection())
    initialize_from_text(method, way, tiny_tokens(26))
    return {name: value.clone() for name, value in method.student().state_dict().items()}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def saved(teacher: Teacher, folder: Path, shards: bool = True) -> Path:
    """A model folder, by default with several weight files."""
    teacher.model.save_pretrained(folder, max_shard_size=6000 if shards else "1GB")
    teacher.tokenizer.save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").exists() == shards
    return folder


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "BATCH_TOKENS", 60)  # five sequences


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder for temporary files, where all streams are written."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(calibration, "IN_MEMORY", 0)
    return folder


@settings(deadline=None, max_examples=30)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 4)),
    cuts=st.lists(st.integers(1, 4), min_size=1, max_size=12),
    wide=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_stream_in_a_file_is_the_tensor(
    shape: tuple[int, int, int], cuts: list[int], wide: bool, seed: int
) -> None:
    dtype = torch.float64 if wide else torch.float32
    generator = torch.Generator().manual_seed(seed)
    expected = torch.zeros(shape, dtype=dtype)
    streams = [ActivationStore(shape, dtype, on_disk=on_disk) for on_disk in (False, True)]
    everything = slice(0, shape[0])
    for stream in streams:
        stream[everything] = expected
    first = 0
    for cut in cuts:
        part = slice(first % shape[0], min(first % shape[0] + cut, shape[0]))
        first += cut
        value = torch.randn(expected[part].shape, dtype=dtype, generator=generator)
        turned = value.transpose(0, 2).contiguous().transpose(0, 2)  # not contiguous
        expected[part] += turned
        for stream in streams:
            stream[part] += turned
            assert torch.equal(stream[part], expected[part])
    for stream in streams:
        assert torch.equal(stream[everything], expected)
        stream.close()


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("way", ["closed-form", "pca"])
@pytest.mark.parametrize("case", TINY_CASES)
def test_streams_in_files_give_the_same_student(
    case: Case, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, tied, changes = case
    teacher = tiny_teacher(family, tied, **changes)
    in_memory = started(teacher, way)
    monkeypatch.setattr(calibration, "IN_MEMORY", 0)
    assert_equal(started(teacher, way), in_memory)


def test_the_heads_metric_does_not_depend_on_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        head, "METRIC_TOKENS", 40
    )  # every seventh token is used: no batch size is a multiple
    found = []
    for batch in (60, 10_000):
        monkeypatch.setattr(calibration, "BATCH_TOKENS", batch)
        teacher = tiny_teacher("llama")
        with (
            torch.no_grad(),
            calibration.Calibration(teacher, tiny_tokens(26), STUDENT_HIDDEN) as ours,
        ):
            *_, last = ours.teacher_layers()
            found.append(head.head_metric(ours, last.after))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


def test_the_files_have_no_name_and_are_closed(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a process leaves no files, even if it is killed."""
    made: list[Any] = []
    make = tempfile.TemporaryFile

    def keep(**options: Any) -> Any:
        made.append(make(**options))
        return made[-1]

    monkeypatch.setattr(tempfile, "TemporaryFile", keep)
    method = LowRankClone(
        tiny_teacher("llama"), StudentSection(hidden_size=STUDENT_HIDDEN), ObjectiveSection()
    )

    def look(done: int, layers: int) -> None:
        assert len(made) == 4
        assert not any(file.closed for file in made)
        assert sum(os.fstat(file.fileno()).st_size for file in made) > 0
        assert not list(scratch.iterdir())
        if done == layers:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        initialize_from_text(method, "closed-form", tiny_tokens(26), look)
    assert all(file.closed for file in made)


def test_a_full_disk_is_reported_before_the_work(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_arguments: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=f"disk is full while writing {scratch}"):
        started(tiny_teacher("llama"))


class FullFile:
    """A file on a disk that is full."""

    def seek(self, _position: int) -> None: ...

    def write(self, _data: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_fills_up_is_reported(scratch: Path) -> None:
    stream = ActivationStore((2, 3, 4), torch.float32, on_disk=True)
    stream._file = FullFile()  # type: ignore[assignment]
    with pytest.raises(UserError, match=f"disk is full while writing {scratch}"):
        stream[slice(0, 1)] = torch.zeros(1, 3, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["closed-form", "pca"])
@pytest.mark.parametrize("case", TINY_CASES)
def test_a_low_precision_teacher_gives_the_student_of_its_float32_copy(
    case: Case, way: str, dtype: torch.dtype
) -> None:
    family, tied, changes = case
    low = tiny_teacher(family, tied, dtype=dtype, **changes)
    copy = tiny_teacher(family, tied, dtype=dtype, **changes)
    copy.model.float()
    student = started(low, way)
    assert {value.dtype for value in student.values()} == {torch.float32}
    assert_equal(student, started(copy, way))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", TINY_CASES)
def test_the_full_hidden_size_reproduces_a_low_precision_teacher(
    case: Case, dtype: torch.dtype
) -> None:
    family, tied, changes = case
    teacher = tiny_teacher(family, tied, dtype=dtype, **changes)
    method = LowRankClone(teacher, StudentSection(hidden_size=HIDDEN), ObjectiveSection())
    initialize_from_text(method, "closed-form", tiny_tokens(26))
    ids = tiny_tokens(3)
    with torch.no_grad():
        ours = method.student()(ids).logits
        theirs = teacher.model(ids).logits.float()
        exact = teacher.model.float()(ids).logits
    largest = exact.abs().max()
    assert (ours - exact).abs().max() < 3e-4 * largest
    assert (ours - theirs).abs().max() < 16 * torch.finfo(dtype).eps * largest


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("way", ["closed-form", "pca"])
@pytest.mark.parametrize("case", TINY_CASES)
def test_a_teacher_on_the_disk_gives_the_same_student(case: Case, way: str, tmp_path: Path) -> None:
    family, tied, changes = case
    folder = saved(tiny_teacher(family, tied, **changes), tmp_path / "teacher")
    whole, on_disk = (
        load_teacher(TeacherSection(model=str(folder), dtype="float64", load=load))
        for load in ("full", "layers")
    )
    assert on_disk.on_disk
    assert not whole.on_disk
    assert_equal(started(on_disk, way), started(whole, way))
    for name, value in on_disk.model.named_parameters():
        assert value.is_meta == (".layers." in name), name  # as before


@pytest.mark.parametrize(("stored", "loaded"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_teacher_on_the_disk_has_the_requested_dtype(
    stored: str, loaded: str, tmp_path: Path
) -> None:
    teacher = tiny_teacher("qwen2", tied=True, dtype=getattr(torch, stored))
    folder = saved(teacher, tmp_path / "teacher", shards=False)
    whole, on_disk = (
        load_teacher(TeacherSection(model=str(folder), dtype=loaded, load=load))
        for load in ("full", "layers")
    )
    path = "model.layers.1.mlp.down_proj.weight"
    assert on_disk.parameter(path).dtype == getattr(torch, loaded)
    assert torch.equal(on_disk.parameter(path), whole.parameter(path))
    assert_equal(started(on_disk), started(whole))


def test_what_cannot_be_read_by_layers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(UserError, match=r"is a GGUF file: .*set teacher\.load to full"):
        load_teacher(TeacherSection(model=str(tmp_path / "model.gguf"), load="layers"))
    folder = saved(tiny_teacher("llama"), tmp_path / "teacher", shards=False)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        load_teacher(TeacherSection(model=str(folder), load="layers"))


def test_init_by_layers_then_train_with_the_whole_teacher(tmp_path: Path, lrc: Command) -> None:
    folder = saved(tiny_teacher("qwen3", tied=True, dtype=torch.float32), tmp_path / "teacher")
    recipe = file_settings(
        tmp_path,
        initialize={"method": "closed-form", "calibration_tokens": 256},
        train={"tokens": 96, "micro_batch": 2},
    )
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(recipe))
    whole, layers = Run(tmp_path / "whole", None), Run(tmp_path / "layers", None)
    lrc.printed("compress", file, "--out", whole.folder)
    printed = lrc.printed("compress", file, "--set", "teacher.load=layers", "--out", layers.folder)
    assert "calibration / teacher forward" in printed
    assert_equal(layers.student().state_dict(), whole.student().state_dict())
    ours, theirs = layers.summary(), whole.summary()
    same = ("teacher_held_out_lm", "student_held_out_lm", "kl", "teacher_parameters", "shapes")
    assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}
    assert "not written" in ours["samples"]["teacher"]
    assert ours["samples"]["student"] == theirs["samples"]["student"]
    for summary in (ours, theirs):  # the teacher runs twice, and other work takes time too
        seconds = summary["calibration_forward_seconds"]
        assert summary["calibration_seconds"] > 2 * seconds > 0
        assert summary["calibration_forwards"] > 2

    low = Run(tmp_path / "low", None)
    low_layers = ["--set", "teacher.load=layers", "--set", "teacher.dtype=bfloat16"]
    lrc.printed("compress", file, *low_layers, "--out", low.folder)
    assert low.student().dtype == torch.float32
    assert abs(low.summary()["student_held_out_lm"] - theirs["student_held_out_lm"]) < 0.05

    untouched = tmp_path / "untouched"
    assert "set teacher.load to full" in lrc.refusal(
        "train", file, "--set", "teacher.load=layers", "--out", untouched
    )
    assert not untouched.exists()
    with pytest.raises(UserError, match=r"set teacher\.load to full"):
        clone(
            str(folder),
            hidden_size=8,
            text=recipe["data"]["text"],
            out=untouched,
            settings={"teacher.load": "layers"},
        )
    assert not untouched.exists()

    assert "needs the whole teacher in memory: set teacher.load to full" in lrc.refusal(
        "resume", layers.folder
    )
    resolved = layers.folder / "recipe.yaml"
    resolved.write_text(resolved.read_text().replace("load: layers", "load: full"))
    lrc.printed("resume", layers.folder)
    assert layers.summary()["tokens"] == 96
    key = "calibration_forward_seconds"
    assert layers.summary()[key] == ours[key]


PEAK = """
import ctypes
import torch
from lrc.cloning.start import calibration, initialize
from lrc.cloning.low_rank_clone import LowRankClone
from lrc.recipe.sections import (
    InitializeSection, ObjectiveSection, StudentSection, TeacherSection
)
from lrc.model.teacher import load_teacher

# Every block of 1 MiB or more has a map of its own, which goes back to the system when it is freed:
# otherwise, holes between blocks count too. -3 is glibc's M_MMAP_THRESHOLD.
ctypes.CDLL(None).mallopt(-3, 2**20)

def peak():  # not ru_maxrss, which a process inherits from the one that starts it
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM"))

def start(load, tokens, in_memory=2**30, folder="teacher"):
    calibration.IN_MEMORY = in_memory
    teacher = load_teacher(TeacherSection(model=folder, load=load))
    method = LowRankClone(teacher, StudentSection(hidden_size=32), ObjectiveSection())
    ids = torch.randint(3, 33, (tokens // 256, 256))
    initialize(method, InitializeSection(refine_epochs=1), ids)
    method.student()
    return peak()
"""


def peaks(prepared: Prepared, folder: Path, code: str) -> list[float]:
    """Peak memory in MiB, as another process prints it."""
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc")
    quiet = {"TQDM_DISABLE": "1"}
    ended, output, errors = prepared.run(
        code=PEAK + textwrap.dedent(code), cwd=folder, environment=quiet
    )
    assert ended == 0, errors
    return [float(word) for word in output.split()]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_calibration_tokens(
    tmp_path: Path, prepared: Prepared
) -> None:
    teacher = tiny_teacher("llama", dtype=torch.float32, hidden_size=256, head_dim=16)
    saved(teacher, tmp_path / "teacher")
    few, many, held = peaks(
        prepared,
        tmp_path,
        """
        start("full", 2048, in_memory=0)  # memory that torch allocates once
        print(start("full", 4096, in_memory=0))
        print(start("full", 16384, in_memory=0))
        print(start("full", 16384))
        """,
    )
    streams = 16384 * (3 * 256 + 2 * 32) * 4 / 2**20
    assert many - few < 0.2 * streams
    assert held - many > 0.7 * streams  # some of it reuses freed memory


@pytest.mark.slow
def test_a_teacher_on_the_disk_is_never_whole_in_memory(tmp_path: Path, prepared: Prepared) -> None:
    shape = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 8}
    teacher = tiny_teacher("llama", tied=True, dtype=torch.float32, **shape)
    size = sum(p.numel() for p in teacher.model.parameters()) * 4 / 2**20
    saved(teacher, tmp_path / "teacher", shards=False)
    save_teacher(tmp_path / "small", "llama", **shape | {"num_hidden_layers": 1})
    before, by_layers, whole = peaks(
        prepared,
        tmp_path,
        """
        print(start("layers", 512, folder="small"))  # one layer and the libraries
        print(start("layers", 512))
        print(start("full", 512))
        """,
    )
    student = 8 * 7 * 384 * 32 * 4 / 2**20 + size * 32 / 384  # projections and weights
    moments = 2 * (16 - 3) * 384**2 * 4 / 2**20  # of all groups of norms; one layer has three
    # The last four layers are refined (one of one): five numbers per entry of their projections,
    # and the student's weights with their gradients.
    refined = 3 * (5 * 7 * 384 * 32 * 4 / 2**20 + 2 * size / 8 * 32 / 384)
    assert by_layers - before < student + moments + refined + 0.5 * size
    assert whole - before > 0.8 * size  # `before` contains some of it
