"""Settings in YAML, with stricter rules than YAML's."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lrc.recipe import parse_overrides
from lrc.recipe.recipe import apply_overrides
from lrc.system.errors import UserError
from lrc.system.yaml_files import parse_yaml, read_yaml

SCALARS = st.one_of(st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.none())
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(min_size=1), inner)),
    max_leaves=20,
)


@given(VALUES)
def test_valid_yaml_is_read_as_by_pyyaml(value: Any) -> None:
    text = yaml.safe_dump(value)
    assert parse_yaml(text) == yaml.safe_load(text)


@given(st.text(st.characters(categories=["Ll"]), min_size=1, max_size=5), st.integers(0, 3))
def test_duplicate_keys_are_refused_at_any_depth(key: str, depth: int) -> None:
    pad = ["  " * level for level in range(depth + 1)]
    above = "".join(f"{pad[level]}above{level}:\n" for level in range(depth))
    text = f"{above}{pad[-1]}'{key}': 1\n{pad[-1]}other: 2\n{pad[-1]}'{key}': 3\n"
    with pytest.raises(UserError, match=rf"'{key}' appears twice .*line {depth + 3}"):
        parse_yaml(text)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "aliases make it larger"),
        ("a: &a [*a]\n", "contains itself"),
        ("a: &a {b: *a}\n", "contains itself"),
        ("[" * 5000, "nested too deeply"),
        ("a: [", "expected"),
        ("a:\n\t- b", "cannot start any token"),
        ("!!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("\x00", "special characters"),
    ],
)
def test_hostile_and_broken_texts_are_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_yaml(text)
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=r"a\.yaml is not valid YAML") as error:
        read_yaml(tmp_path / "a.yaml")
    assert "\n" not in str(error.value)


def test_files_without_settings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    for content in (b"", b"[1]", b"words"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="holds no settings"):
            read_yaml(path)
    for content in (b"\xff\xfe", b"# " + b"x" * (1 << 20)):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is not valid YAML"):
            read_yaml(path)
    path.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_yaml(path) == {"a": 1}


def test_a_setting_is_given_only_once() -> None:
    flags = {"teacher.model": ("--teacher", "x"), "method": ("--method", None)}
    found = parse_overrides(["train.tokens=5", "method=scratch"], flags)
    assert found == {"teacher.model": "x", "train.tokens": 5, "method": "scratch"}
    for texts, words in (
        (["train.tokens=5", "train.tokens=6"], "train.tokens twice"),
        (["teacher.model=y"], "--teacher and --set teacher.model"),
        (["method=scratch", "method.name=lrc"], "'method.name' is given more than once"),
        (["method.layers=1", "method=minitron"], "replaces all of 'method', also method.layers"),
    ):
        with pytest.raises(UserError, match=words):
            parse_overrides(texts, flags)


def test_a_short_form_keeps_the_other_settings_of_a_start() -> None:
    for texts in (
        ["initialize.calibration_tokens=256", "initialize=pca"],
        ["initialize=pca", "initialize.calibration_tokens=256"],
    ):
        found = apply_overrides({"initialize": {"std": 0.5}}, parse_overrides(texts, {}))
        assert found == {"initialize": {"std": 0.5, "calibration_tokens": 256, "method": "pca"}}
    found = apply_overrides({"method": {"name": "minitron", "layers": 1}}, {"method": "scratch"})
    assert found == {"method": "scratch"}
