"""Changes to the card of a finished model: chat tuning, accuracy, and what publishing adds."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index

from lrc.evaluation.results import HELD_OUT, Evaluation, ModelResult
from lrc.exporting.card import (
    CHAT,
    EXPORT,
    LOADING,
    PLACE,
    SERVE,
    TRANSFORMERS,
    as_markdown,
    folded,
    is_public,
    public_name,
)
from lrc.model.locate import HUB_ID
from lrc.model.teacher import model_files
from lrc.system.files import reading

TUNED = """Tuned on {conversations:,} conversations ({tokens:,} tokens of answers) of
{data}{teacher}, in {steps:,} steps, with `lrc sft` and [TRL](https://github.com/huggingface/trl).

| | before | after |
|---|---|---|
| held-out loss on answers ({held_out:,} conversations) | {before:.4f} | {after:.4f} |

{settings}"""

CARD = "README.md"

PUBLISHED = ("Accuracy", "Curves", "GGUF")
"""Sections that publishing adds. They are about that very model, not about one made from it."""


def card_of(name: str) -> str | None:
    """The card of a local model, named as in a recipe's `teacher.model`; None if there is none."""
    path = next((file for file in model_files(name) if file.name == CARD), None)
    if path is None:
        return None
    with reading(path, "write it in UTF-8"):
        return path.read_text(encoding="utf-8")


def new_card(title: str) -> str:
    """A card with a title and how to load it, for a model that has none."""
    front = "library_name: transformers\npipeline_tag: text-generation"
    return f"---\n{front}\n---\n\n# {as_markdown(title)}\n\n## Use\n\n{TRANSFORMERS}\n"


def tuned_card(name: str, settings: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """The card of a model, with a section about its chat tuning and one that shows how to chat.

    The sections of earlier tunings remain.

    Args:
        name: the model that was tuned, named as in a recipe's `teacher.model`.
        settings: all settings of the tuning.
        summary: the final table of the tuning.
    """
    known = card_of(name)
    data, teacher = summary["data"], summary["teacher"]
    public = {
        **settings,
        "model": public_name(settings["model"]),
        "data": [public_name(source) for source in data],
        "teacher": teacher and public_name(teacher),
    }
    section = TUNED.format(
        conversations=summary["training_conversations"],
        tokens=summary["training_answer_tokens"],
        data=as_markdown(", ".join(public_name(source) for source in data)),
        steps=summary["steps"],
        teacher=f", with KL to {as_markdown(public_name(teacher))}" if teacher else "",
        held_out=summary["held_out_conversations"],
        before=summary["held_out_lm_before"],
        after=summary["held_out_lm"],
        settings=folded("tuning", public),
    )
    more: dict[str, Any] = {
        "tags": ["trl", "sft", "conversational"],
        "datasets": [source for source in data if is_public(source)],
    }
    if known is None:
        known = new_card(f"{public_name(name)}, tuned on conversations")
        if HUB_ID.fullmatch(name) and is_public(name):
            more |= {"base_model": name, "base_model_relation": "finetune"}
    known = _unpublished(known)
    earlier = len(re.findall(r"(?m)^## Chat tuning\b", known))
    title = f"Chat tuning {earlier + 1}" if earlier else "Chat tuning"
    return changed(known, more, {title: section, "Chat": CHAT})


def published_card(
    text: str, repo: str, evaluation: Evaluation | None, curves: bool, gguf: str | None
) -> str:
    """A card as it is published.

    Args:
        text: the card.
        repo: the hub id, which replaces the folder in its examples.
        evaluation: the evaluation of the model, as its first one; None: none was made.
        curves: whether `curves.png` is beside the card.
        gguf: the name of the GGUF file beside it; None: none.
    """
    front: dict[str, Any] = {}
    sections = {}
    if evaluation is not None:
        if results := _results(evaluation.models[0]):
            index = eval_results_to_model_index(repo.rpartition("/")[2], results)
            front["model-index"] = index
        if table := _accuracy(evaluation):
            sections["Accuracy"] = table
    if curves:
        sections["Curves"] = "![Losses over training tokens](curves.png)"
    if gguf is not None:
        front["tags"] = ["gguf"]
        sections["GGUF"] = f"`{gguf}` is the same model for llama.cpp: `llama-cli -m {gguf}`."
    return changed(_in_a_folder(text).replace(PLACE, repo), front, sections)


def _unpublished(text: str) -> str:
    """A card without what publishing the model added."""
    front, body = _parts(_in_a_folder(text))
    front.pop("model-index", None)
    if front.get("tags"):
        front["tags"] = [tag for tag in front["tags"] if tag != "gguf"]
    for title in PUBLISHED:
        body = _without(body, title)
    return _card(front, body)


def _in_a_folder(text: str) -> str:
    """A card whose examples name the model's folder, also if it was published before."""
    for example in (LOADING, EXPORT, SERVE):
        before, after = re.escape(PLACE), r"[^\s\"]+"
        text = re.sub(re.escape(example).replace(before, after), example, text)
    return text


def changed(text: str, front: Mapping[str, Any], sections: Mapping[str, str]) -> str:
    """A card with more front matter and sections.

    Args:
        text: the card.
        front: front matter; lists are added to, other entries replace.
        sections: text by title; it replaces a section of that title, or comes before `Use`.
    """
    known, body = _parts(text)
    for name, value in front.items():
        if name in ("tags", "datasets"):
            value = list(dict.fromkeys([*(known.get(name) or []), *value]))
        if value:
            known[name] = value
    for title, section in sections.items():
        head, use, rest = _without(body, title).partition("\n## Use\n")
        body = f"{head.rstrip()}\n\n## {title}\n\n{section}\n{use}{rest}"
    return _card(known, body)


def _parts(text: str) -> tuple[dict[str, Any], str]:
    """Front matter and body of a card."""
    card = ModelCard(text, ignore_metadata_errors=True)
    return card.data.to_dict(), card.text.strip() + "\n"  # type: ignore[no-untyped-call]


def _card(front: Mapping[str, Any], body: str) -> str:
    return f"---\n{yaml.safe_dump(front, sort_keys=False).strip()}\n---\n\n{body.lstrip()}"


def _without(body: str, title: str) -> str:
    """A card's body without a section."""
    return re.sub(rf"(?ms)^## {re.escape(title)}\n.*?(?=^## |\Z)", "", body)


def _results(model: ModelResult) -> list[EvalResult]:
    """Every metric of the harness's tasks, for a model-index."""
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Text Generation",
            dataset_type=name,
            dataset_name=name,
            metric_type=metric,
            metric_name=metric,
            metric_value=round(score.value, 4),
            source_name=f"lm-evaluation-harness, {_shots(result.shots)}, {result.rows} rows",
            source_url="https://github.com/EleutherAI/lm-evaluation-harness",
        )
        for name, result in model.tasks.items()
        if name != HELD_OUT
        for metric, score in result.metrics.items()
    ]


def _shots(shots: int | None) -> str:
    return "mixed shots" if shots is None else f"{shots}-shot"


def _accuracy(evaluation: Evaluation) -> str:
    """The metrics of all evaluated models, side by side."""
    models = evaluation.models
    lines = [
        "| task | metric | rows | " + " | ".join(as_markdown(one.label) for one in models) + " |",
        "|---|---|---|" + "---|" * len(models),
    ]
    for name, result in models[0].tasks.items():
        for metric in result.metrics:
            scores = [one.tasks[name].metrics.get(metric) for one in models if name in one.tasks]
            values = " | ".join("" if score is None else f"{score.value:.4f}" for score in scores)
            lines.append(f"| {name} | {metric} | {result.rows:,} | {values} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def read_evaluation(folder: Path) -> Evaluation | None:
    """The evaluation in a results folder; None if there is no intact one."""
    try:
        return Evaluation.model_validate_json((folder / "results.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
