"""The model card of a student."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel

from lrc.data.shards import open_shards
from lrc.methods import METHODS
from lrc.model.locate import HUB_ID, PACKAGE_PREFIX, short_name
from lrc.model.shapes import shape_of
from lrc.model.teacher import Description, Teacher, describe_teacher
from lrc.recipe import Recipe
from lrc.run import Run
from lrc.system.errors import UserError

TEMPLATE = """---
{front}
---

# A smaller {teacher}

A model of the teacher's own class with {smaller}, made by {method}.

| | teacher | student |
|---|---|---|
{shapes}

## Results

| | |
|---|---|
{results}

## Intended use and limits

For research on small models, and as a start for fine-tuning. It was trained to behave like its
teacher, on far less text. It inherits the teacher's biases and what the text holds, knows less, and
states wrong facts as fluently as right ones. It has had no safety training of its own. Evaluate it
for your purpose before you rely on it.

## Use

{use}

## License

{license}

## Recipe

{recipe}
"""

SMALLER = {
    "hidden size": "a smaller hidden size",
    "layers": "fewer layers",
    "key/value heads": "fewer heads",
    "FFN width": "fewer FFN neurons",
    "experts": "fewer experts",
}
"""What a student may have less of, by the name of the size."""

FOLDED = """<details>
<summary>All settings of the {what}</summary>

```yaml
{settings}
```

</details>"""

PLACE = "path/of/this/folder"
"""Stands for the model in the examples of its card."""

LOADING = f"""from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{PLACE}")
tokenizer = AutoTokenizer.from_pretrained("{PLACE}")"""

TRANSFORMERS = f"""With transformers 4.57 or later:

```python
{LOADING}
```"""

CHAT = f"""With transformers 4.57 or later:

```python
{LOADING}

messages = [{{"role": "user", "content": "What is the capital of France?"}}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
output = model.generate(**inputs, max_new_tokens=256)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```"""

EXPORT = f"lrc export {PLACE} student.gguf"
SERVE = f"vllm serve {PLACE}"

GGUF = f"""With llama.cpp or Ollama, after `pip install low-rank-clone`:

```bash
{EXPORT} --dtype q8_0 --modelfile
llama-cli -m student.gguf
ollama create student -f Modelfile
```"""

VLLM = f"""With vLLM (not tested):

```bash
{SERVE}{{option}}
```"""

THROUGH_TRANSFORMERS = " --model-impl transformers"
"""vLLM's option for classes of its own that take no explicit head_dim."""


def model_card(
    run: Run,
    teacher: Teacher,
    student: PreTrainedModel,
    tokens: int,
    summary: dict[str, Any] | None = None,
) -> str:
    """Text of the card: front matter for hubs, then shapes, losses, use and recipe.

    Args:
        run: the run.
        teacher: its teacher.
        student: its student.
        tokens: the student's training tokens.
        summary: the final results; None: those of the run, if they are this student's.
    """
    section = run.recipe.teacher
    described = describe_teacher(section)
    before, after = shape_of(teacher.model).row, shape_of(student).row
    results = _results(run, tokens, summary)
    return TEMPLATE.format(
        front=yaml.safe_dump(front_matter(run, described), sort_keys=False).strip(),
        teacher=as_markdown(public_name(section.model)),
        smaller=_smaller(before, after),
        method=METHODS[run.recipe.method.name].title,
        shapes="\n".join(f"| {name} | {before[name]} | {after[name]} |" for name in before),
        results="\n".join(f"| {name} | {value} |" for name, value in results.items()),
        use=_use(teacher),
        license=_license(described),
        recipe=folded("run", public_recipe(run.recipe)),
    )


def _smaller(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """In what a student is smaller than its teacher, given the sizes of both."""
    found = [words for name, words in SMALLER.items() if before.get(name) != after.get(name)]
    *first, last = found or ["the teacher's shape"]
    return f"{', '.join(first)} and {last}" if first else last


def public_name(name: str) -> str:
    """The name of a model, file or folder in a card: a hub id as it is, a path's last part."""
    return name if is_public(name) else short_name(name)


def is_public(name: str) -> bool:
    """Whether a name means the same on any machine: a hub id or a Python package."""
    return name.startswith(PACKAGE_PREFIX) or (
        bool(HUB_ID.fullmatch(name)) and not Path(name).exists()
    )


def folded(what: str, settings: Mapping[str, Any]) -> str:
    """Settings as YAML, folded away."""
    text = yaml.safe_dump(settings, sort_keys=False).strip()
    return FOLDED.format(what=what, settings=text.replace("`" * 3, "~" * 3))


def public_recipe(recipe: Recipe) -> dict[str, Any]:
    """A recipe's settings, without paths of this machine."""
    settings = recipe.model_dump(mode="json")
    settings["teacher"]["model"] = public_name(recipe.teacher.model)
    for name in ("text", "shards", "held_out"):
        settings["data"][name] = file_names(settings["data"][name])
    if others := settings["data"]["also_held_out"]:
        settings["data"]["also_held_out"] = {name: file_names(of) for name, of in others.items()}
    if settings["data"]["stream"]:
        stream = settings["data"]["stream"]
        stream["dataset"] = public_name(stream["dataset"])
        stream["data_files"] = file_names(stream["data_files"])
    settings["data"]["cache"] = None
    if (evaluate := settings["train"]["evaluate"]) and evaluate["data"]:
        evaluate["data"] = Path(evaluate["data"]).name
    return settings


def file_names(paths: Iterable[str]) -> list[str]:
    """The last parts of paths."""
    return [Path(path).name for path in paths]


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
    if described.license_name:
        front["license_name"] = described.license_name
    if described.license_link:
        front["license_link"] = described.license_link
    if described.languages:
        front["language"] = list(described.languages)
    if not teacher.model.startswith(PACKAGE_PREFIX) and is_public(teacher.model):
        front |= {"base_model": teacher.model, "base_model_relation": "finetune"}
    if names := data_sets(run.recipe):
        front["datasets"] = names
    front["tags"] = ["low-rank-clone" if method == "lrc" else method, "distillation"]
    return front


def data_sets(recipe: Recipe) -> list[str]:
    """Hub ids of the data sets that a recipe reads, itself or through its shards."""
    data = recipe.data
    found = [data.stream.dataset] if data.stream else []
    for folder in data.shards:
        try:
            mix = open_shards(Path(folder).expanduser()).build.get("mix", {})
        except UserError:  # they may be gone when the student is exported later
            continue
        found += [source.get("hub") or "" for source in mix.get("sources", {}).values()]
    return list(dict.fromkeys(name for name in found if "/" in name and is_public(name)))


def _use(teacher: Teacher) -> str:
    """How to run the student, by what its family can."""
    family = teacher.family
    option = "" if family.vllm else THROUGH_TRANSFORMERS
    parts = [TRANSFORMERS, *([GGUF] if family.gguf else []), VLLM.format(option=option)]
    return "\n\n".join(parts)


def _license(described: Description) -> str:
    name = described.license_name or described.license
    if not name:
        return (
            "The teacher's license applies to the student; no license was found with the teacher."
        )
    link = f" ({described.license_link})" if described.license_link else ""
    return f"The teacher's license, {name}{link}, applies to the student."


def _results(run: Run, tokens: int, closing: dict[str, Any] | None) -> dict[str, str]:
    """The measurements: the final results, or the newest metrics up to a checkpoint."""
    if closing is None and run.summary_file.is_file():
        closing = run.summary()
    trained = {"training tokens": f"{tokens:,}"}
    if closing is not None and closing["tokens"] == tokens:
        return {
            **trained,
            "held-out LM loss of the teacher": f"{closing['teacher_held_out_lm']:.4f}",
            "held-out LM loss of the student": f"{closing['student_held_out_lm']:.4f}",
            "KL(teacher, student)": f"{closing['kl']:.4f}",
            "same top-1 prediction": f"{closing['top1_agreement']:.1%}",
            "held-out tokens": f"{closing['held_out_labels']:,}",
        }
    lines = [line for line in run.metrics() if "held_out_lm" in line]
    measured = [line for line in lines if line["tokens"] <= tokens]
    if not measured:
        return trained
    newest = measured[-1]
    after = "" if newest["tokens"] == tokens else f" after {newest['tokens']:,} tokens"
    return {
        **trained,
        "held-out LM loss of the teacher": f"{measured[0]['teacher_held_out_lm']:.4f}",
        f"held-out LM loss of the student{after}": f"{newest['held_out_lm']:.4f}",
    }
