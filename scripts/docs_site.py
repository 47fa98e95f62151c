"""Hook of mkdocs: pages that are made from the code, and links that leave docs/.

Generated are the reference of all settings (from the sections and the docstrings of their fields)
and of the command line (by typer). Pages outside of docs/ (benchmarks, changelog, CONTRIBUTING.md)
become pages of the site. A link to a source file leads to its reference, or to the repository if
`repo_url` is set.
"""

import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic_core import PydanticUndefined

from lrc.comparison.plan import Comparison
from lrc.corpus.mix import Mix
from lrc.recipe import Recipe
from lrc.recipe.method_sections import METHOD_SECTIONS
from lrc.recipe.sections import Section
from lrc.tuning.settings import Tuning

log = logging.getLogger("mkdocs.hooks.docs_site")  # of mkdocs, so that --strict counts warnings

ROOT = Path(__file__).parents[1]

REFERENCES = {
    "src/lrc/recipe/sections.py": "reference/recipe.md",
    "src/lrc/recipe/method_sections.py": "reference/recipe.md#method",
    "src/lrc/tuning/settings.py": "reference/sft.md",
    "README.md": "index.md",
}
"""Pages of the site that stand for files of the repository."""

OUTSIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/**/*.md", "benchmarks/**/*.png")
"""Files outside of docs/ that belong to the site."""

LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and those outside of docs/."""
    pages = {
        "reference/recipe.md": recipe_page(),
        "reference/mix.md": settings_page("Mix", Mix),
        "reference/sft.md": settings_page("Settings of `lrc sft`", Tuning),
        "reference/comparison.md": settings_page("Comparison", Comparison),
        "reference/cli.md": command_line_page(),
    }
    for uri, content in pages.items():
        files.append(File.generated(config, uri, content=content))
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            uri = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let every relative link lead to a page of the site or to the repository."""
    uri = page.file.src_uri
    inside = (ROOT / "docs" / uri).exists()
    source = PurePosixPath("docs" if inside else "", uri)

    def replaced(match: re.Match[str]) -> str:
        text, target = match["text"], match["target"]
        path, _, anchor = target.partition("#")
        if not path or "://" in path or uri.startswith("reference/"):
            return match[0]
        there = PurePosixPath(os.path.normpath(source.parent / path))
        page_uri = REFERENCES.get(str(there), str(there).removeprefix("docs/"))
        if files.get_file_from_path(page_uri.partition("#")[0]):
            where = os.path.relpath(page_uri, PurePosixPath(uri).parent)
            return f"[{text}]({where}{'#' + anchor if anchor else ''})"
        if not (ROOT / there).exists():
            log.warning("%s links to %s, which does not exist.", source, target)
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{there})"
        return text

    return LINK.sub(replaced, markdown)


def recipe_page() -> str:
    """The reference of a recipe's settings, with those of every method."""
    lines = list(page_of("Recipe", Recipe, skip=("method",)))
    lines += ["", "## method", "", "How the student is made and trained. `method: scratch` is "]
    lines[-1] += "short for `method: {name: scratch}`."
    for name, section in METHOD_SECTIONS.items():
        lines += ["", f"### {name}", "", prose(section.__doc__)]
        lines += settings_of(section, "method.", f"{name}-", skip=("name",))
    return "\n".join(lines)


def settings_page(title: str, section: type[Section]) -> str:
    """The reference of one kind of YAML file."""
    return "\n".join(page_of(title, section))


def page_of(title: str, section: type[Section], skip: tuple[str, ...] = ()) -> Iterator[str]:
    """The lines of such a page: single settings first, then the sections, each under its name."""
    yield from (f"# {title}", "", prose(section.__doc__))
    nested = {name: kind for name in section.model_fields if (kind := section_in(section, name))}
    yield from settings_of(section, "", skip=(*skip, *nested))
    for name, kind in nested.items():
        if name not in skip:
            item = {dict: ".NAME", list: "[]"}.get(container(section, name), "")
            yield from ("", f"## {name}", "", prose(kind.__doc__))
            yield from settings_of(kind, f"{name}{item}.")


def settings_of(
    section: type[Section], prefix: str, anchor: str = "", skip: tuple[str, ...] = ()
) -> Iterator[str]:
    """The lines about each setting: key, type, default, meaning."""
    for name, field in section.model_fields.items():
        if name in skip:
            continue
        key = f"{prefix}{field.alias or name}"
        nested = section_in(section, name)
        yield from ("", f"#### `{key}` {{ #{anchor}{key} }}", "")
        default = field.get_default(call_default_factory=True, validated_data={})
        facts = [type_text(field.annotation)]
        if field.is_required() or default is PydanticUndefined:
            facts.append("required")
        elif not isinstance(default, Section):
            facts.append(f"default {yaml_text(default)}")
        yield from (" · ".join(facts), "", prose(field.description))
        if nested is not None:
            yield from settings_of(nested, f"{key}.", anchor)


def section_in(section: type[Section], name: str) -> type[Section] | None:
    """The section that a field holds, if its values are sections only."""
    kinds = list(parts_of(section.model_fields[name].annotation))
    sections = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]
    others = [kind for kind in kinds if kind not in (*sections, NoneType, str)]
    return sections[0] if len(sections) == 1 and not others else None


def container(section: type[Section], name: str) -> Any:
    """dict or list, if a field holds several sections."""
    return get_origin(section.model_fields[name].annotation)


def parts_of(kind: Any) -> Iterator[Any]:
    """The types in a union, and of the values in a list or dict."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for part in inner:
            yield from parts_of(part)
    elif origin in (list, tuple, dict):
        yield from parts_of(inner[-1] if inner[-1] is not Ellipsis else inner[0])
    elif hasattr(kind, "__metadata__"):
        yield from parts_of(kind.__origin__)
    else:
        yield kind


def type_text(kind: Any) -> str:
    """A type for people."""
    origin, inner = get_origin(kind), get_args(kind)
    if hasattr(kind, "__metadata__"):
        return type_text(kind.__origin__)
    if origin in (Union, UnionType):
        words = [type_text(part) for part in inner if part is not NoneType]
        return " or ".join(words) + (", or empty" if NoneType in inner else "")
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (list, tuple):
        return f"list of {type_text(inner[0])}"
    if origin is dict:
        return f"{type_text(inner[1])} by name"
    if isinstance(kind, type) and issubclass(kind, Section):
        return (
            "section"
            if len(kind.model_fields) > 1
            else f"`{{{next(iter(kind.model_fields))}: ...}}`"
        )
    return {bool: "true or false", int: "integer", float: "number", str: "text"}.get(kind, "value")


def yaml_text(value: Any) -> str:
    """A default as YAML writes it."""
    if value is None:
        return "empty"
    if isinstance(value, tuple):
        value = list(value)
    text = f"{value:,}".replace(",", "_") if isinstance(value, int) and value is not True else ""
    plain = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
    return f"`{text if text and not isinstance(value, bool) else plain}`"


def prose(text: str | None) -> str:
    """A docstring as one paragraph for each of its own."""
    paragraphs = re.split(r"\n\s*\n", (text or "").strip())
    whole = "\n\n".join(re.sub(r"\s*\n\s*", " ", part) for part in paragraphs)
    return re.sub(r"\b(?:docs/)?(?P<page>(?:benchmarks/)?[\w/]+)\.md\b", linked, whole)


def linked(match: re.Match[str]) -> str:
    """A link to a page that a docstring names by its file."""
    return f"[{match['page']}](../{match['page']}.md)"


def command_line_page() -> str:
    """The reference of the command line, as typer writes it."""
    command = [sys.executable, "-m", "typer", "lrc.cli", "utils", "docs", "--name", "lrc"]
    command += ["--title", "Command line"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
