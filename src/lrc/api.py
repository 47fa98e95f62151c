"""The Python interface: what the command line does, as functions.

Warnings, results and progress are logged by the logger `lrc`:

    logging.basicConfig(level=logging.INFO)
"""

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrc.exporting.formats import Dtype, Format
from lrc.model.teacher import Teacher, as_teacher
from lrc.preflight import check_recipe, need_whole_teacher
from lrc.recipe import Recipe, make_recipe
from lrc.run import Run, default_folder
from lrc.system.checksums import cache_root
from lrc.system.distributed import join
from lrc.system.errors import UserError
from lrc.system.files import new_file
from lrc.train import train
from lrc.train.loop import OnStep
from lrc.train.prune import prune_recipe
from lrc.train.session import initialize_only

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lrc.comparison.results import Results
    from lrc.evaluation.results import Evaluation

StrPath = str | os.PathLike[str]

Text = StrPath | Sequence[StrPath] | Iterable[str] | Iterable[Mapping[str, Any]]
"""Training text: a path or `stdlib-docs`; a list or tuple of these; a data set of `datasets` (a
`Dataset` or an `IterableDataset`); or any other iterable of documents as strings."""

CHARACTERS_PER_TOKEN, CHARACTERS = 16, 1_000_000
"""Text objects are read up to this many characters for every token that a run trains on, far more
than any tokenizer needs, and at least up to this many in all. They may be endless."""


def clone(
    teacher: "StrPath | Teacher | PreTrainedModel",
    *,
    hidden_size: int | None = None,
    text: Text | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    out: StrPath | None = None,
    settings: Mapping[str, Any] | None = None,
    on_step: OnStep | None = None,
) -> Run:
    """Clone a teacher into a student of a smaller hidden size.

    Args:
        teacher: a hub id, a folder, a .gguf file, `package:NAME`, a loaded `lrc.Teacher`, or a
            loaded transformers model, which needs its `tokenizer`.
        hidden_size: d_S; even, and smaller than the teacher's. None: the teacher's, if `settings`
            have fewer layers, heads or neurons (`{"student.intermediate_size": 4096}`).
        text: the training text (`Text`). None: `settings` names shards or a stream.
        tokenizer: the tokenizer of a teacher that is a transformers model.
        out: the run's folder; default: a new one in `runs/`.
        settings: other settings of the recipe by dotted key, `{"train.tokens": 500_000}`.
        on_step: called after every optimizer step.

    Returns:
        The run; `run.student()` is the model and `run.summary()` its figures.

    Raises:
        UserError: if a setting, the teacher or the text is not usable.
    """
    run, loaded = _new_run(teacher, hidden_size, text, tokenizer, out, settings)
    need_whole_teacher(run.recipe)
    train(run, loaded, on_step=on_step)
    return run


def compress(
    teacher: "StrPath | Teacher | PreTrainedModel",
    *,
    hidden_size: int | None = None,
    text: Text | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    out: StrPath | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Run:
    """Compress a teacher without training: only the start of a clone.

    Arguments, return value and errors are those of `clone`. `resume` trains the run further.
    """
    run, loaded = _new_run(teacher, hidden_size, text, tokenizer, out, settings)
    initialize_only(run, loaded)
    return run


def resume(
    run: Run | StrPath,
    *,
    teacher: "Teacher | PreTrainedModel | None" = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    on_step: OnStep | None = None,
) -> Run:
    """Continue a run from its newest intact checkpoint, exactly where it stopped.

    Args:
        run: the run or its folder.
        teacher: the loaded teacher, if the run began with one.
        tokenizer: its tokenizer, if the teacher is a transformers model.
        on_step: called after every optimizer step.

    Raises:
        UserError: if the run cannot be continued.
    """
    opened = run if isinstance(run, Run) else Run.open(run)
    loaded = None if teacher is None else _loaded(teacher, tokenizer, opened.recipe.teacher.model)
    train(opened, loaded, on_step=on_step)
    return opened


def export(
    model: Run | StrPath,
    out: StrPath,
    *,
    dtype: str | None = None,
    format: str | None = None,
) -> Path:
    """Write the student of a run as a plain transformers folder, or as a GGUF file.

    Args:
        model: a run or its folder, finished or not; for GGUF also any model, named like a teacher.
        out: a new folder, or a new file whose name ends in .gguf.
        dtype: element type of the weights, as torch or llama.cpp names it; None: as trained.
        format: `safetensors` or `gguf`; None: as the name of `out` says.

    Raises:
        UserError: if the run has no checkpoint, or the output cannot be written.
    """
    from lrc.train.export_run import export_model

    name = _name(model)
    kinds = _choice(Dtype, dtype, "dtype"), _choice(Format, format, "format")
    export_model(name, Path(out), *kinds)
    return Path(out)


def evaluate(
    model: Run | StrPath,
    *,
    tasks: Sequence[str] | None = None,
    compare: Sequence[str] = (),
    out: StrPath | None = None,
    limit: int | None = None,
    data: StrPath | None = None,
    batch_size: int = 16,
    device: str = "auto",
    apply_chat_template: bool = False,
) -> "Evaluation":
    """Evaluate a model on benchmarks of lm-evaluation-harness, alone or with other models.

    Args:
        model: a run, its folder, or a model named like a teacher.
        tasks: names, tags and patterns of the harness, `paper` (default) and `heldout`.
        compare: more models, or `teacher` for the run's teacher.
        out: the folder for the results; default: `evaluation/` in the run's folder, or one in
            `evaluations/`.
        limit: rows of each task; None: all.
        data: folder of JSONL files that replace the harness's data sets.
        batch_size: sequences per forward pass.
        device: `auto`, or a device as in torch.
        apply_chat_template: whether to ask in each model's chat template.

    Raises:
        UserError: if a model, a task or its data is not found or not usable.
    """
    from lrc.evaluation.evaluation import EvaluationSettings, results_folder
    from lrc.evaluation.evaluation import evaluate as run_evaluation
    from lrc.evaluation.published import PAPER
    from lrc.train.setup import find_device

    name = _name(model)
    settings = EvaluationSettings(
        tasks=tuple(tasks or (PAPER,)),
        limit=limit,
        data=None if data is None else Path(data),
        batch_size=batch_size,
        device=str(find_device(device)),
        apply_chat_template=apply_chat_template,
    )
    folder = Path(out) if out else results_folder(name, "evaluation", "evaluations")
    return run_evaluation(name, list(compare), settings, folder)


def prune(
    model: Run | StrPath,
    *,
    ratio: float,
    text: StrPath | Sequence[StrPath] | None = None,
    recover: str | None = None,
    tokens: int | None = None,
    out: StrPath | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Run:
    """Remove the least important attention heads and FFN neurons of a model (LLM-Pruner).

    Args:
        model: a run, its folder, or a model named like a teacher.
        ratio: share of all parameters to remove.
        text: text for calibration and recovery; None: the run's.
        recover: what to train afterwards: `full`, `lora`, or None for nothing.
        tokens: training tokens of the recovery.
        out: folder of the new run; default: a new one in `runs/`.
        settings: other settings of the recipe by dotted key.

    Raises:
        UserError: if the model or the text is not found, or a setting is not usable.
    """
    from lrc.model.teacher import short_name

    name = _name(model)
    recipe = prune_recipe(name, ratio, _paths(text), recover, tokens, settings or {})
    folder = Path(out) if out else default_folder(recipe, f"{short_name(name)}-pruned")
    run = Run.create(folder, recipe, join())
    check_recipe(recipe)
    (train if recover else initialize_only)(run)
    return run


def sft(
    model: Run | StrPath,
    *,
    data: StrPath | Sequence[StrPath] | None = None,
    teacher: str | None = None,
    recipe: StrPath | None = None,
    out: StrPath | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Tune a model on conversations (supervised fine-tuning with TRL).

    Args:
        model: a run, its folder, or a model named like a teacher.
        data: JSONL files of conversations, or data sets of the hub; None: the recipe's.
        teacher: a model whose predictions for the answers are learned as well.
        recipe: a YAML file with settings, or a shipped one (`ultrachat-sft`).
        out: the folder, new or of an earlier call that was stopped; default: a new one in `runs/`.
        settings: other settings (`lrc.tuning.settings`) by name, `{"epochs": 2}`.

    Returns:
        The folder of the tuned model, a plain transformers model.

    Raises:
        UserError: if the model, the teacher or the data is not usable.
    """
    from lrc.tuning.settings import load_tuning
    from lrc.tuning.sft import STUDENT, default_folder
    from lrc.tuning.sft import sft as tune

    name = _name(model)
    given = {"model": name, "data": _paths(data) or None, "teacher": teacher}
    chosen = {key: value for key, value in given.items() if value is not None}
    tuning = load_tuning(recipe, {**chosen, **(settings or {})})
    folder = Path(out) if out else default_folder(name)
    tune(tuning, folder)
    return folder / STUDENT


def push(
    model: Run | StrPath,
    repo: str,
    *,
    private: bool = False,
    gguf: str | None = None,
    dry_run: bool = False,
) -> str | None:
    """Publish a model on the hub, with a card of what was measured.

    Args:
        model: a run, its folder, the folder of a tuning, or a model folder.
        repo: the hub id of the repository, which is created if it does not exist.
        private: whether a new repository is private.
        gguf: element type of a GGUF file to add, as llama.cpp names it; None: none.
        dry_run: whether to show what would be sent, and send nothing.

    Returns:
        The address of the repository; None for a dry run.

    Raises:
        UserError: if there is no login, or the hub refuses.
    """
    from lrc.train.push import push as send

    kind = _choice(Dtype, gguf, "gguf")
    return send(_name(model), repo, private=private, gguf=kind, dry_run=dry_run)


def compare(
    comparison: StrPath,
    *,
    out: StrPath | None = None,
    only: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    minutes: float | None = None,
    parallel: int | None = None,
    results_only: bool = False,
) -> "Results":
    """Train several systems on the same budget, each at its best learning rate.

    Args:
        comparison: a comparison's YAML file, or a shipped one by its name.
        out: the comparison's folder, new or from an earlier start; default: one in `runs/`.
        only: names of the entries to run now; none: all.
        settings: settings of the base recipe by dotted key.
        minutes: stop after this time, with checkpoints to continue from; None: at the end.
        parallel: number of processes that run entries side by side; None: this one alone, unless
            there is a time limit.
        results_only: keep only the results of runs that have ended, no students and checkpoints.

    Raises:
        UserError: if the comparison or one of its recipes has mistakes.
    """
    from lrc.comparison import compare as run_comparison
    from lrc.comparison import load_comparison
    from lrc.comparison.side_by_side import SideBySide

    folder = Path(out) if out else Path("runs") / f"compare-{Path(comparison).stem}"
    loaded = load_comparison(comparison, settings or {})
    alone = minutes is None and parallel is None
    side_by_side = None if alone else SideBySide(parallel or 1, minutes)
    return run_comparison(loaded, folder, only, results_only, side_by_side)


def _new_run(
    teacher: "StrPath | Teacher | PreTrainedModel",
    hidden_size: int | None,
    text: Text | None,
    tokenizer: "PreTrainedTokenizerBase | None",
    out: StrPath | None,
    settings: Mapping[str, Any] | None,
) -> tuple[Run, Teacher | None]:
    """A new run, and its teacher if that is loaded already."""
    loaded = None if isinstance(teacher, str | os.PathLike) else _loaded(teacher, tokenizer)
    name = loaded.name if loaded else os.fspath(teacher)  # type: ignore[arg-type]
    base = {"teacher": {"model": name}, "student": {"hidden_size": hidden_size}}
    given = dict(settings or {})
    is_object = not (text is None or isinstance(text, str | os.PathLike | list | tuple))
    data = {"text": ["-"]} if is_object else {"text": _paths(text)}  # type: ignore[arg-type]
    recipe = make_recipe({**base, "data": data}, given)
    if is_object:
        file = _written(text, recipe)  # type: ignore[arg-type]
        recipe = make_recipe({**base, "data": {"text": [str(file)]}}, given)
    run = Run.create(Path(out) if out else default_folder(recipe), recipe, join())
    if loaded is None:
        check_recipe(recipe)
    return run, loaded


def _loaded(
    teacher: "Teacher | PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    name: str | None = None,
) -> Teacher:
    """A loaded teacher, wrapped if it is a transformers model."""
    from transformers import PreTrainedModel

    if isinstance(teacher, Teacher):
        return teacher
    if not isinstance(teacher, PreTrainedModel):
        raise UserError(
            f"The teacher is a {type(teacher).__name__}: give its name or folder, a transformers "
            "model with its tokenizer, or a loaded lrc.Teacher."
        )
    if tokenizer is None:
        raise UserError("A teacher that is a transformers model needs its tokenizer: give both.")
    known = name or getattr(teacher.config, "_name_or_path", "") or type(teacher).__name__
    return as_teacher(teacher, tokenizer, known)


def _name(model: Run | StrPath) -> str:
    """How the command line names a model: a run by its folder."""
    return str(model.folder) if isinstance(model, Run) else os.fspath(model)


def _paths(text: StrPath | Sequence[StrPath] | None) -> list[str]:
    """Paths of text as strings."""
    if text is None:
        return []
    paths = [text] if isinstance(text, str | os.PathLike) else text
    return [os.fspath(path) for path in paths]


def _written(text: Iterable[Any], recipe: Recipe) -> Path:
    """A text object as a JSONL file in the cache, named by its content."""
    field, train = recipe.data.text_field, recipe.train
    wanted = train.tokens + recipe.initialize.calibration_tokens
    wanted += train.eval_sequences * recipe.data.sequence_length
    needed = CHARACTERS_PER_TOKEN * wanted / (1 - recipe.data.held_out_fraction)
    left = max(CHARACTERS, needed)
    folder = cache_root(recipe.data.cache) / "texts"
    digest, written = hashlib.sha256(), folder / f"{secrets.token_hex(8)}.jsonl"
    with new_file(written) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in text:
            document = row.get(field) if isinstance(row, Mapping) else row
            if not isinstance(document, str):
                raise UserError(
                    f"The text holds a {type(document).__name__}: give strings, or rows with text "
                    f"in '{field}' (data.text_field)."
                )
            line = json.dumps({field: document}) + "\n"
            digest.update(line.encode())
            file.write(line)
            left -= len(document)
            if left < 0:
                break
    return written.replace(folder / f"{digest.hexdigest()[:16]}.jsonl")


def _choice(kind: Any, value: str | None, name: str) -> Any:
    """A member of an enumeration.

    Raises:
        UserError: if there is none of that name.
    """
    if value is None:
        return None
    try:
        return kind(value)
    except ValueError:
        names = ", ".join(member.value for member in kind)
        raise UserError(f"{name} is '{value}': choose one of {names}.") from None
