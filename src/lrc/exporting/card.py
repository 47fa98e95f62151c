"""The model card of a student."""

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from transformers import PreTrainedModel

from lrc.methods import METHODS
from lrc.model.locate import HUB_ID, PACKAGE_PREFIX, short_name
from lrc.model.shapes import shape_of
from lrc.model.teacher import Description, Teacher, describe_teacher, model_files
from lrc.recipe import Recipe
from lrc.run import Run

TEMPLATE = """---
{front}
---

# A smaller {teacher}

A model of the teacher's own class with a hidden size of {hidden_size}, made by {method}.

| | teacher | student |
|---|---|---|
{shapes}

## Results

| | |
|---|---|
{results}

## Use

With transformers 4.57 or later:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/of/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder")
```

## License

{license}

## Recipe

```yaml
{recipe}
```
"""


def model_card(
    run: Run, teacher: Teacher, student: PreTrainedModel, summary: dict[str, Any] | None = None
) -> str:
    """Text of the card: front matter for hubs, then shapes, losses, use and recipe.

    Args:
        run: the run.
        teacher: its teacher.
        student: its student.
        summary: the final results; None: those of the run, if it has ended.
    """
    section = run.recipe.teacher
    described = describe_teacher(section)
    before, after = shape_of(teacher.model).row, shape_of(student).row
    results = _results(run, summary)
    return TEMPLATE.format(
        front=yaml.safe_dump(front_matter(run, described), sort_keys=False).strip(),
        teacher=as_markdown(public_name(section.model)),
        hidden_size=student.config.hidden_size,
        method=METHODS[run.recipe.method.name].title,
        shapes="\n".join(f"| {name} | {before[name]} | {after[name]} |" for name in before),
        results="\n".join(f"| {name} | {value} |" for name, value in results.items()),
        license=_license(described.license),
        recipe=public_recipe(run.recipe),
    )


TUNED = """## Chat tuning

Tuned on {conversations:,} conversations ({tokens:,} tokens of answers) of {data}{teacher}, in
{steps:,} steps, with `lrc sft` and [TRL](https://github.com/huggingface/trl).

| | before | after |
|---|---|---|
| held-out loss on answers ({held_out:,} conversations) | {before:.4f} | {after:.4f} |
"""


def tuned_card(name: str, summary: dict[str, Any]) -> str:
    """The card of a model, with a section about its chat tuning.

    Args:
        name: the model that was tuned, named as in a recipe's `teacher.model`.
        summary: the final table of the tuning.
    """
    path = next((file for file in model_files(name) if file.name == "README.md"), None)
    card = ModelCard("" if path is None else path.read_text(encoding="utf-8"))
    data, teacher = summary["data"], summary["teacher"]
    section = TUNED.format(
        conversations=summary["training_conversations"],
        tokens=summary["training_answer_tokens"],
        data=as_markdown(", ".join(public_name(source) for source in data)),
        steps=summary["steps"],
        teacher=f", with KL to {as_markdown(public_name(teacher))}" if teacher else "",
        held_out=summary["held_out_conversations"],
        before=summary["held_out_lm_before"],
        after=summary["held_out_lm"],
    )
    front: dict[str, Any] = card.data.to_dict()  # type: ignore[no-untyped-call]
    front.setdefault("library_name", "transformers")
    front.setdefault("pipeline_tag", "text-generation")
    if path is None and HUB_ID.fullmatch(name) and is_public(name):
        front |= {"base_model": name, "base_model_relation": "finetune"}
    front["tags"] = list(
        dict.fromkeys([*(front.get("tags") or []), "trl", "sft", "conversational"])
    )
    known = [*(front.get("datasets") or []), *(source for source in data if is_public(source))]
    if known:
        front["datasets"] = list(dict.fromkeys(known))
    text = card.text if path is not None else f"\n# {public_name(name)}, tuned on conversations\n"
    head, use, rest = text.partition("\n## Use\n")
    body = f"{head.rstrip()}\n\n{section}{use}{rest}"
    return f"---\n{yaml.safe_dump(front, sort_keys=False).strip()}\n---\n\n{body.lstrip()}"


def public_name(name: str) -> str:
    """The name of a model, file or folder in a card: a hub id as it is, a path's last part."""
    return name if is_public(name) else short_name(name)


def is_public(name: str) -> bool:
    """Whether a name means the same on any machine: a hub id or a Python package."""
    return name.startswith(PACKAGE_PREFIX) or (
        bool(HUB_ID.fullmatch(name)) and not Path(name).exists()
    )


def public_recipe(recipe: Recipe) -> str:
    """A recipe as YAML, without paths of this machine."""
    settings = recipe.model_dump(mode="json")
    settings["teacher"]["model"] = public_name(recipe.teacher.model)
    for name in ("text", "shards", "held_out"):
        settings["data"][name] = [Path(source).name for source in settings["data"][name]]
    if settings["data"]["stream"]:
        stream = settings["data"]["stream"]
        stream["dataset"] = public_name(stream["dataset"])
        stream["data_files"] = [Path(file).name for file in stream["data_files"]]
    settings["data"]["cache"] = None
    text = yaml.safe_dump(settings, sort_keys=False).strip()
    return text.replace("`" * 3, "~" * 3)


def as_markdown(text: str) -> str:
    """The text on one line, with Markdown characters escaped."""
    line = " ".join(text.split())
    return re.sub(r"([\\`*_\[\]<>#|])", r"\\\1", line)


def front_matter(run: Run, described: Description) -> dict[str, Any]:
    """The front matter for hubs. It omits a teacher that is a local folder or a package."""
    teacher, method = run.recipe.teacher, run.recipe.method.name
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if described.license:
        front["license"] = described.license
    if described.languages:
        front["language"] = list(described.languages)
    if not teacher.model.startswith(PACKAGE_PREFIX) and is_public(teacher.model):
        front["base_model"] = teacher.model
    front["tags"] = ["low-rank-clone" if method == "lrc" else method, "distillation"]
    return front


def _license(name: str | None) -> str:
    if name:
        return f"The teacher's license, {name}, applies to the student."
    return "The teacher's license applies to the student; no license was found with the teacher."


def _results(run: Run, closing: dict[str, Any] | None) -> dict[str, str]:
    """The measurements: the final results, or the newest metrics of a run that has not ended."""
    if closing is None and run.summary_file.is_file():
        closing = run.summary()
    if closing is not None:
        return {
            "training tokens": f"{closing['tokens']:,}",
            "held-out LM loss of the teacher": f"{closing['teacher_held_out_lm']:.4f}",
            "held-out LM loss of the student": f"{closing['student_held_out_lm']:.4f}",
            "KL(teacher, student)": f"{closing['kl']:.4f}",
            "same top-1 prediction": f"{closing['top1_agreement']:.1%}",
            "held-out tokens": f"{closing['held_out_labels']:,}",
        }
    measured = [line for line in run.metrics() if "held_out_lm" in line]
    if not measured:
        return {"training tokens": "none measured"}
    return {
        "training tokens": f"{measured[-1]['tokens']:,}",
        "held-out LM loss of the teacher": f"{measured[0]['teacher_held_out_lm']:.4f}",
        "held-out LM loss of the student": f"{measured[-1]['held_out_lm']:.4f}",
    }
