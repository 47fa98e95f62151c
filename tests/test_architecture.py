"""docs/architecture.md says which package may import which."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "lrc"
APART = {"__init__", "__main__", "stories260k"}
"""The front door, and the converter of a data set, which imports nothing of ours."""


def imported(file: Path) -> set[str]:
    """The packages of ours that a file imports, anywhere in it."""
    modules = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            modules.append(node.module or "")
        elif isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
    return {module.split(".")[1] for module in modules if module.startswith("lrc.")}


def test_packages_import_only_from_below() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    lines = page.split("```")[1].strip().splitlines()
    places = {path.stem for path in SOURCE.iterdir() if path.suffix in ("", ".py")}
    floor = {word: number for number, line in enumerate(lines) for word in line[:34].split()}
    assert floor.keys() == places - APART - {"__pycache__"}
    for file in SOURCE.rglob("*.py"):
        mine = file.relative_to(SOURCE).parts[0].removesuffix(".py")
        for other in imported(file) - {mine} if mine not in APART else set():
            assert floor[other] > floor[mine], f"{mine} imports {other}: {file}"
