"""Read YAML settings files, more strictly than YAML itself.

A key that appears twice in one mapping is an error (YAML would silently take the last). Aliases
must not expand a small file to a huge one.
"""

from pathlib import Path
from typing import Any

import yaml

from lrc.system.errors import UserError, reason

LARGEST_FILE = 1 << 18
"""Maximum bytes of a file. Real files have a few thousand."""

LARGEST_TREE = 100_000
"""Maximum values in a file, counting each as often as aliases repeat it."""


class _Refused(Exception):
    """An error in a text that YAML itself accepts."""


def parse_yaml(text: str) -> Any:
    """Parse a YAML text.

    Raises:
        UserError: if it is not YAML, a key appears twice in a mapping, or aliases make it huge or
            endless; the message is a sentence fragment.
    """
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > LARGEST_TREE:
            raise _Refused(f"its aliases make it larger than {LARGEST_TREE:,} values")
        return loader.construct_document(node)
    except _Refused as error:
        raise UserError(str(error)) from error
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        where = " ".join(str(error).split()) if isinstance(error, yaml.YAMLError) else reason(error)
        raise UserError(where) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        UserError: if the file cannot be read, or is not a YAML mapping.
    """
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise UserError(f"it has {size:,} bytes, far more than a settings file needs")
        settings = parse_yaml(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, UserError) as error:
        raise UserError(f"{path} is not valid YAML ({reason(error)}); fix it and try again.") from (
            error
        )
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds no settings; it must be a mapping of sections.")
    return settings


def _size(node: yaml.Node, known: dict[int, int | None]) -> int:
    """Count the values below a node, each as often as it is repeated.

    Raises:
        _Refused: if a key appears twice in a mapping, or a value contains itself.
    """
    if id(node) in known:
        size = known[id(node)]
        if size is None:
            raise _Refused(f"the value in line {node.start_mark.line + 1} contains itself")
        return size
    known[id(node)] = None
    if isinstance(node, yaml.MappingNode):
        _refuse_repeated_keys(node)
        children = [part for pair in node.value for part in pair]
    else:
        children = node.value if isinstance(node, yaml.SequenceNode) else []
    size = min(1 + sum(_size(child, known) for child in children), 10 * LARGEST_TREE)
    known[id(node)] = size
    return size


def _refuse_repeated_keys(node: yaml.MappingNode) -> None:
    seen: set[tuple[str, str]] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        name = (key.tag, key.value)
        if name in seen:
            line = key.start_mark.line + 1
            raise _Refused(f"'{key.value}' appears twice in one mapping, again in line {line}")
        seen.add(name)
