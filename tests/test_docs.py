"""README, docs and the site: links lead somewhere, numbers and references are the code's."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.main import get_command

from lrc.cli import app
from lrc.comparison.plan import Comparison
from lrc.corpus.mix import Mix
from lrc.recipe import Recipe, flatten, make_recipe
from lrc.recipe.method_sections import METHOD_SECTIONS
from lrc.recipe.shipped import shipped
from lrc.tuning.settings import Tuning

ROOT = Path(__file__).parents[1]
PAGES = [
    page
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/**/*.md")
    for page in sorted(ROOT.glob(pattern))
]


@pytest.fixture(scope="module")
def site() -> ModuleType:
    """The hook that makes pages of the site."""
    pytest.importorskip("mkdocs")
    sys.path.insert(0, str(ROOT / "scripts"))
    import docs_site

    return docs_site


def anchors(page: Path) -> set[str]:
    """The anchors of a page: those that GitHub gives its headings, and those written out."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}
    return slugs | set(re.findall(r'<a id="([^"]+)">', text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in path or path.startswith("mailto:"):
            continue
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


def test_every_shipped_comparison_is_described() -> None:
    rows = [line for line in (ROOT / "docs/compare.md").read_text().splitlines() if line[:1] == "|"]
    missing = [
        name for name in shipped("comparison") if not any(f"`{name}`" in row for row in rows)
    ]
    assert not missing


def commands() -> Iterator[tuple[str, str]]:
    """Every `lrc` command in a block of shell commands or a help page: where, and the command."""
    for page in PAGES:
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                if found := re.search(r"(?:^|-m )(lrc .*)", line.strip()):
                    yield str(page.relative_to(ROOT)), found[1]
    groups = [app, *(group.typer_instance for group in app.registered_groups)]
    for command in (one for group in groups for one in group.registered_commands):
        help_page = (command.callback and command.callback.__doc__) or ""
        for line in re.findall(r"^ *\* `(lrc [^`]*)`", help_page, re.MULTILINE):
            yield "--help", line


@pytest.mark.parametrize(("page", "line"), list(commands()))
def test_commands_are_the_command_lines(page: str, line: str) -> None:
    """Commands, arguments and options exist, and values have the right type."""
    given = [part for part in shlex.split(line, comments=True)[1:] if part != "..."]
    command: Any = get_command(app)
    while hasattr(command, "commands") and not given[0].startswith("-"):
        command = command.commands[given.pop(0)]
    command.make_context(line, given)


def test_the_readmes_table_is_the_datas() -> None:
    """If this fails, run `python scripts/readme.py`."""
    command = [sys.executable, str(ROOT / "scripts" / "readme.py"), "--check"]
    assert subprocess.run(command).returncode == 0


def test_every_setting_is_in_the_reference(site: ModuleType) -> None:
    headings = set(re.findall(r"^#### `(.*?)`", site.recipe_page(), re.MULTILINE))
    base = {"teacher": {"model": "x"}, "student": {"hidden_size": 2}, "data": {"text": ["x"]}}
    shown = make_recipe(base, {}).model_dump(mode="json")
    for key in flatten(shown):
        assert key in headings or key == "method.name", key
    for section in METHOD_SECTIONS.values():
        assert {f"method.{name}" for name in section.model_fields if name != "name"} <= headings
    assert "data.stream.dataset" in headings
    assert "train.evaluate.tasks" in headings
    for section in (Mix, Tuning, Comparison):
        page = site.settings_page("", section)
        assert all(f"`{name}" in page or f"## {name}" in page for name in section.model_fields)
    assert "`sources.NAME.filters.keep_matching`" in site.settings_page("", Mix)
    assert "`entries[].set`" in site.settings_page("", Comparison)


def test_settings_are_described(site: ModuleType) -> None:
    """With their type, default and meaning."""
    page = site.recipe_page()
    start = page.index("#### `train.tokens`")
    text = page[start : page.index("####", start + 4)]
    assert "integer · default `1_000_000`" in text
    assert "Total training tokens, rounded up to whole steps." in text
    assert "number, or empty · default empty" in page
    assert "true or false · default `true`" in page
    assert f"`{'`, `'.join(['kl', 'reverse_kl', 'jsd'])}` · default `kl`" in page
    for section in Recipe.model_fields:
        assert f"\n## {section}\n" in page


def test_the_site_is_built_without_a_warning(site: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    page = (tmp_path / "site" / "reference" / "cli" / "index.html").read_text()
    assert "lrc data inspect" in page
    assert "lrc.api.clone" in (tmp_path / "site" / "python" / "index.html").read_text()
