"""The Python interface: what the command line does, as functions.

Warnings, results and progress are logged by the logger `lrc`:

    logging.basicConfig(level=logging.INFO)
"""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from lrc.exporting.formats import Dtype, Format
from lrc.model.teacher import Teacher
from lrc.objects import (
    StrPath,
    Text,
    are_paths,
    as_before,
    loaded_teacher,
    paths_of,
    refuse_loading,
    written_text,
)
from lrc.preflight import check_recipe, need_whole_teacher
from lrc.recipe import make_recipe
from lrc.recipe.recipe import combine
from lrc.recipe.shipped import find_yaml
from lrc.run import Run, default_folder
from lrc.system.distributed import join
from lrc.system.errors import UserError
from lrc.system.yaml_files import read_yaml
from lrc.train import train
from lrc.train.loop import OnStep
from lrc.train.prune import prune_recipe
from lrc.train.session import initialize_only

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lrc.comparison.results import Results
    from lrc.evaluation.results import Evaluation
    from lrc.planning.plan import Plan


P = ParamSpec("P")
Result = TypeVar("Result")


def _leaves_no_trace(function: Callable[P, Result]) -> Callable[P, Result]:
    """Let a function leave random numbers and a loaded teacher as they were."""

    @wraps(function)
    def call(*args: P.args, **named: P.kwargs) -> Result:
        with as_before(named.get("teacher", args[0] if args else None)):
            return function(*args, **named)

    return call


@_leaves_no_trace
def plan(
    teacher: StrPath,
    *,
    parameters: float | None = None,
    ratio: float | None = None,
    memory: float | None = None,
    dtype: str = "q4_k_m",
    context: int = 4096,
    tokens: int | None = None,
    gpu: str = "h100",
    gpus: int = 1,
    mfu: float = 0.35,
    probe: bool = False,
    probe_tokens: int = 0,
    calibration_tokens: int = 4096,
    text: StrPath | Sequence[StrPath] | None = None,
    out: StrPath | None = None,
    choose: int = 1,
    settings: Mapping[str, Any] | None = None,
) -> "Plan":
    """Compare shapes of a student by size, speed and training cost (docs/shapes.md).

    Args:
        teacher: a hub id, a folder, a .gguf file or `package:NAME`; no weights are needed.
        parameters: parameters of the student. One of this, `ratio` and `memory` is given.
        ratio: share of the teacher's parameters to keep.
        memory: bytes for running it: weights in `dtype`, and a cache of `context` tokens.
        dtype: element type for `memory`: `bf16`, `q8_0` or `q4_k_m`.
        context: tokens in the cache while decoding.
        tokens: training tokens; None: those of `settings`, or ten billion.
        gpu: GPU to train and decode on.
        gpus: how many of them train.
        mfu: share of the GPU's peak that training is assumed to reach.
        probe: whether to solve each start on `text`, and rank by its held-out loss.
        probe_tokens: training tokens of each candidate in the probe.
        calibration_tokens: tokens that the probe solves each start from.
        text: the training text.
        out: a new YAML file for the recipe of one candidate.
        choose: this candidate's number, from 1.
        settings: other settings of the recipe by dotted key.

    Raises:
        UserError: if the teacher is not found or not supported, no candidate fits, or a setting is
            not usable.
    """
    from lrc.planning.figures import Conditions
    from lrc.planning.gpus import find_gpu
    from lrc.planning.plan import PlanSettings, make_plan

    given = _given(settings, text=("data.text", paths_of(text)), tokens=("train.tokens", tokens))
    wanted = PlanSettings(
        teacher=os.fspath(teacher),
        parameters=parameters,
        ratio=ratio,
        memory=memory,
        dtype=dtype,
        conditions=Conditions(find_gpu(gpu), gpus, mfu, context),
        recipe=given,
        probe=probe,
        probe_tokens=probe_tokens,
        calibration_tokens=calibration_tokens,
    )
    return make_plan(wanted, None if out is None else Path(out), choose)


@_leaves_no_trace
def clone(
    teacher: "StrPath | Teacher | PreTrainedModel | None" = None,
    *,
    hidden_size: int | None = None,
    parameters: float | None = None,
    ratio: float | None = None,
    text: Text | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    recipe: StrPath | None = None,
    out: StrPath | None = None,
    settings: Mapping[str, Any] | None = None,
    on_step: OnStep | None = None,
) -> Run:
    """Clone a teacher into a smaller student.

    Args:
        teacher: a hub id, a folder, a .gguf file, `package:NAME`, a loaded `lrc.Teacher`, or a
            loaded transformers model, which needs its `tokenizer`. None: the recipe's. A loaded one
            moves to the run's device and, with `train.kernels`, keeps liger-kernel's modules.
        hidden_size: d_S; even, and smaller than the teacher's. None: the recipe's, or the teacher's
            if `settings` have fewer layers, heads, neurons or experts (`{"student.kv_heads": 4}`).
        parameters: instead of a shape, parameters of the student: its shape is the one that `plan`
            ranks first.
        ratio: the same as a share of the teacher's parameters.
        text: the training text (`Text`). None: the recipe's, or `settings` name shards or a stream.
        tokenizer: the tokenizer of a teacher that is a transformers model.
        recipe: a recipe's YAML file, or the name of a shipped one; the other arguments and
            `settings` override it.
        out: the run's folder; default: a new one in `runs/`.
        settings: other settings of the recipe by dotted key, `{"train.tokens": 500_000}`.
        on_step: called after every optimizer step.

    Returns:
        The run; `run.student()` is the model and `run.summary()` its figures.

    Raises:
        UserError: if a setting, the teacher or the text is not usable.
        KeyboardInterrupt: if Ctrl-C or SIGTERM stopped the run, after it wrote a checkpoint.
    """
    size = hidden_size, parameters, ratio
    run, loaded = _new_run(teacher, size, text, tokenizer, recipe, out, settings)
    need_whole_teacher(run.recipe)
    train(run, loaded, on_step=on_step)
    return run


@_leaves_no_trace
def compress(
    teacher: "StrPath | Teacher | PreTrainedModel | None" = None,
    *,
    hidden_size: int | None = None,
    parameters: float | None = None,
    ratio: float | None = None,
    text: Text | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    recipe: StrPath | None = None,
    out: StrPath | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Run:
    """Compress a teacher without training: only the start of a clone.

    Arguments, return value and errors are those of `clone`. `resume` trains the run further.
    """
    size = hidden_size, parameters, ratio
    run, loaded = _new_run(teacher, size, text, tokenizer, recipe, out, settings)
    initialize_only(run, loaded)
    return run


@_leaves_no_trace
def resume(
    run: Run | StrPath,
    *,
    teacher: "Teacher | PreTrainedModel | None" = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    on_step: OnStep | None = None,
) -> Run:
    """Continue a run from its newest intact checkpoint, exactly where it stopped.

    Args:
        run: the run or its folder. A tuning goes on by calling `sft` again.
        teacher: the loaded teacher, if the run began with one.
        tokenizer: its tokenizer, if the teacher is a transformers model.
        on_step: called after every optimizer step.

    Raises:
        UserError: if the run cannot be continued.
        KeyboardInterrupt: if Ctrl-C or SIGTERM stopped it, after it wrote a checkpoint.
    """
    from lrc.tuning.settings import is_tuning

    if not isinstance(run, Run) and is_tuning(Path(run)):
        raise UserError(f"{run} is a tuning: call lrc.sft again, with out='{run}', to continue it.")
    opened = run if isinstance(run, Run) else Run.open(run)
    loaded = (
        None if teacher is None else loaded_teacher(teacher, tokenizer, opened.recipe.teacher.model)
    )
    train(opened, loaded, on_step=on_step)
    return opened


@_leaves_no_trace
def export(
    model: Run | StrPath,
    out: StrPath,
    *,
    dtype: str | None = None,
    format: str | None = None,
    modelfile: bool = False,
    teacher: "Teacher | PreTrainedModel | None" = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> Path:
    """Write the student of a run as a plain transformers folder, or as a GGUF file.

    Args:
        model: a run or its folder, finished or not; for GGUF also any model, named like a teacher.
        out: a new folder, or a new file whose name ends in .gguf.
        dtype: element type of the weights, as torch or llama.cpp names it; None: as trained.
        format: `safetensors` or `gguf`; None: as the name of `out` says.
        modelfile: whether to write Ollama's Modelfile beside the GGUF file.
        teacher: the loaded teacher, if `model` is a run that began with one.
        tokenizer: its tokenizer, if the teacher is a transformers model.

    Raises:
        UserError: if the run has no checkpoint or began with another teacher, or the output cannot
            be written.
    """
    from lrc.train.export_run import export_model

    name = _name(model)
    kinds = _choice(Dtype, dtype, "dtype"), _choice(Format, format, "format")
    loaded = None if teacher is None else loaded_teacher(teacher, tokenizer)
    export_model(name, Path(out), *kinds, modelfile, loaded)
    return Path(out)


@_leaves_no_trace
def evaluate(
    model: Run | StrPath,
    *,
    tasks: str | Sequence[str] | None = None,
    compare: str | Sequence[str] = (),
    out: StrPath | None = None,
    limit: int | None = None,
    data: StrPath | None = None,
    batch_size: int = 16,
    dtype: str = "auto",
    device: str = "auto",
    teacher: str | None = None,
    text: StrPath | Sequence[StrPath] | None = None,
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
        dtype: element type of the models, as torch names it; `auto`: as stored.
        device: `auto`, or a device as in torch.
        teacher: for `heldout`, the teacher; None: the run's.
        text: for `heldout`, the held-out text; None: the run's.
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
        tasks=tuple(_listed(tasks) or (PAPER,)),
        limit=limit,
        data=None if data is None else Path(data),
        teacher=teacher,
        text=tuple(paths_of(text)),
        batch_size=batch_size,
        dtype=dtype,
        device=str(find_device(device)),
        apply_chat_template=apply_chat_template,
    )
    folder = Path(out) if out else results_folder(name, "evaluation", "evaluations")
    return run_evaluation(name, _listed(compare), settings, folder)


@_leaves_no_trace
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
    given = _given(
        settings,
        text=("data.text", paths_of(text)),
        tokens=("train.tokens", tokens),
        ratio=("method.ratio", ratio),
        recover=("method.recovery", recover),
    )
    recipe = prune_recipe(name, recover, tokens, given)
    folder = Path(out) if out else default_folder(recipe, f"{short_name(name)}-pruned")
    run = Run.create(folder, recipe, join())
    check_recipe(recipe)
    (train if recover else initialize_only)(run)
    return run


@_leaves_no_trace
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
    given = _given(
        settings,
        model=("model", name),
        data=("data", paths_of(data)),
        teacher=("teacher", teacher),
    )
    tuning = load_tuning(recipe, given)
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


@_leaves_no_trace
def compare(
    comparison: StrPath,
    *,
    out: StrPath | None = None,
    only: str | Sequence[str] = (),
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
        settings: by dotted key, settings of the base recipe, and `tokens`, `seeds`, `grid` and
            `thresholds` of the comparison.
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
    return run_comparison(loaded, folder, _listed(only), results_only, side_by_side)


def write_report(
    runs: Run | StrPath | Sequence[Run | StrPath],
    *,
    out: StrPath | None = None,
    prompts: str | Sequence[str] = (),
) -> Path:
    """Write one HTML page about one or several runs, about a comparison, or about a tuning.

    Args:
        runs: runs or their folders, finished or not, or the folder of one comparison or of one
            tuning on conversations.
        out: the page; default: `report.html` in the run's folder, or in the current folder for
            several runs.
        prompts: texts for the students to continue.

    Returns:
        The page's path.

    Raises:
        UserError: if a folder is not a run's, or a comparison or tuning is not alone.
    """
    from lrc.comparison.page import is_comparison, write_comparison_page
    from lrc.report.page import write_report as write_page
    from lrc.system.progress import task
    from lrc.tuning.report import write_tuning_page
    from lrc.tuning.settings import is_tuning

    every = [runs] if isinstance(runs, Run | str | os.PathLike) else list(runs)
    if not every:
        raise UserError("There is no run to report: give one or several.")
    folders = [Path(_name(run)) for run in every]
    path = folders[0] / "report.html" if len(folders) == 1 else Path("report.html")
    path = Path(out) if out else path
    own_pages = ((is_comparison, write_comparison_page), (is_tuning, write_tuning_page))
    alone = [(one, write) for one in folders for has, write in own_pages if has(one)]
    if alone and (len(folders) > 1 or prompts):
        raise UserError(
            f"{alone[0][0]} is a comparison or a tuning, which has its own page: give it alone and "
            "without --prompt."
        )
    prompts = _listed(prompts)
    opened = [] if alone else [Run.open(folder) for folder in folders]
    with task(f"Writing {path}") as shown:
        for folder, write in alone:
            write(folder, path, shown.describe)
        if opened:
            write_page(opened, path, prompts, shown.describe)
    return path


def build_shards(
    mix: StrPath,
    out: StrPath,
    *,
    teacher: str | None = None,
    root: StrPath | None = None,
    evaluation: StrPath | None = None,
    workers: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Mix, filter, deduplicate and tokenize text into shards (`lrc data build`, docs/data.md).

    Args:
        mix: a mix's YAML file, or the name of a shipped one.
        out: folder of the shards, new or of a stopped build of the same mix.
        teacher: the teacher whose tokenizer and chat template to use; None: the mix's.
        root: base folder of the mix's relative paths; None: the mix's.
        evaluation: folder of evaluation sets (JSONL) that no document may overlap.
        workers: number of processes; None: one per core.
        settings: other settings of the mix by dotted key.

    Returns:
        The folder, for `data.shards` in a recipe.

    Raises:
        UserError: if the mix has mistakes, or a source is not found or not usable.
    """
    from lrc.corpus.mix import absolute, load_mix
    from lrc.corpus.pool import default_workers
    from lrc.corpus.run import build_shards as build
    from lrc.model.teacher import load_tokenizer

    given = _given(
        settings,
        teacher=("teacher", teacher),
        root=("root", root and os.fspath(root)),
        evaluation=("decontaminate.folder", evaluation and absolute(evaluation)),
    )
    loaded = load_mix(os.fspath(mix), given)
    tokenizer = load_tokenizer(loaded.teacher, loaded.revision)
    build(loaded, tokenizer, Path(out), workers or default_workers())
    return Path(out)


def _listed(names: str | Sequence[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or ())


def _given(settings: Mapping[str, Any] | None, **arguments: tuple[str, Any]) -> dict[str, Any]:
    """Settings by dotted key: those of a function's own arguments, and further ones.

    Args:
        settings: the further settings.
        **arguments: by name, a setting's key and its value; None or an empty list: not given.

    Raises:
        UserError: if a setting is given twice, or a section would replace one that is given.
    """
    own = [(n, key, value) for n, (key, value) in arguments.items() if value not in (None, [])]
    others = [(f"settings['{key}']", key, value) for key, value in (settings or {}).items()]
    return combine([*own, *others])


def _new_run(
    teacher: "StrPath | Teacher | PreTrainedModel | None",
    size: tuple[int | None, float | None, float | None],
    text: Text | None,
    tokenizer: "PreTrainedTokenizerBase | None",
    recipe: StrPath | None,
    out: StrPath | None,
    settings: Mapping[str, Any] | None,
) -> tuple[Run, Teacher | None]:
    """A new run, and its teacher if that is loaded already. `size` is the hidden size, the
    parameters and the ratio, as far as they are given."""
    hidden_size, parameters, ratio = size
    is_name = teacher is None or isinstance(teacher, str | os.PathLike)
    if is_name and tokenizer is not None:
        raise UserError("The tokenizer goes with a loaded teacher: leave it out.")
    loaded = None if is_name else loaded_teacher(teacher, tokenizer)
    name = loaded.name if loaded else teacher and os.fspath(teacher)  # type: ignore[arg-type]
    named = are_paths(text)
    overrides = _given(
        settings,
        teacher=("teacher.model", name),
        hidden_size=("student.hidden_size", hidden_size),
        text=("data.text", paths_of(text) if named else ["-"]),  # type: ignore[arg-type]
    )
    base = read_yaml(find_yaml(recipe, "recipe")) if recipe else {}
    if parameters is not None or ratio is not None:
        from lrc.planning.recommend import with_shape

        overrides = with_shape(base, overrides, parameters, ratio, loaded)
    resolved = make_recipe(base, overrides)
    if loaded is not None:
        refuse_loading(resolved.teacher, loaded)
    if not named:
        overrides["data.text"] = [str(written_text(text, resolved))]  # type: ignore[arg-type]
        resolved = make_recipe(base, overrides)
    stem = Path(recipe).stem if recipe else None
    run = Run.create(Path(out) if out else default_folder(resolved, stem), resolved, join())
    if loaded is None:
        check_recipe(resolved)
    return run, loaded


def _name(model: Run | StrPath) -> str:
    """How the command line names a model: a run by its folder."""
    return str(model.folder) if isinstance(model, Run) else os.fspath(model)


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
