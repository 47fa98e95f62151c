"""Which rows of a source are kept, and the summary's name for each filter."""

import operator
import re
from collections.abc import Callable
from typing import Any

from lrc.corpus.mix import Bounds, Filters, Source, comparisons
from lrc.system.errors import UserError

MALFORMED = "malformed"
BLANK = "blank"
DIVIDED = "long ones divided"
OVERLAP = "overlap with evaluation sets"
NO_TOKENS = "no tokens"
NEAR_DUPLICATES = "near-duplicates"
BUDGET = "budget"

_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}

Test = tuple[str, Callable[[Any], bool]]
"""The summary's name for a filter, and the test itself."""


def field_tests(filters: Filters) -> list[Test]:
    """The filters on a row's fields, in order.

    The tests raise KeyError (with the field's name) if the row lacks the field, and UserError if
    the field should be a number but is not.
    """
    tests = [_number_test(field, text) for field, text in filters.numbers.items()]
    return tests + [_value_test(field, values) for field, values in filters.values.items()]


def text_tests(filters: Filters) -> list[Test]:
    """The filters on a text, in order."""
    tests: list[Test] = []
    if filters.characters != Bounds():
        bounds = filters.characters
        tests.append((f"characters {bounds}", lambda text: bounds.contain(len(text))))
    if filters.keep_matching is not None:
        search = re.compile(filters.keep_matching).search
        tests.append((f"keep /{filters.keep_matching}/", lambda text: search(text) is not None))
    if filters.drop_matching is not None:
        found = re.compile(filters.drop_matching).search
        tests.append((f"drop /{filters.drop_matching}/", lambda text: found(text) is None))
    return tests


def steps_of(source: Source, decontaminate: bool, deduplicate: bool) -> list[str]:
    """The summary's names for the steps that can drop documents of a source, in order."""
    filters = source.filters
    bounds = [f"tokens {filters.tokens}"] if filters.tokens != Bounds() else []
    return [
        MALFORMED,
        BLANK,
        *(name for name, _ in field_tests(filters) + text_tests(filters)),
        DIVIDED,
        *([OVERLAP] if decontaminate else []),
        NO_TOKENS,
        *bounds,
        *([NEAR_DUPLICATES] if deduplicate else []),
        *([BUDGET] if source.tokens or source.weight else []),
    ]


def columns_of(source: Source) -> set[str]:
    """The fields that a source's rows must have."""
    filters = source.filters
    return {source.chat or source.text, *filters.numbers, *filters.values}


def field_of(row: dict[str, Any], name: str) -> Any:
    """A field of a row; `meta.language` is looked up in `meta` if no field has that name.

    Raises:
        KeyError: if there is no such field; the error contains the name.
    """
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            raise KeyError(name)
        value = value[part]
    return value


def _number_test(field: str, text: str) -> Test:
    wanted = [(_OPERATORS[sign], number) for sign, number in comparisons(text)]

    def passes(row: dict[str, Any]) -> bool:
        value = field_of(row, field)
        if value is None:
            return False
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            raise UserError(
                f"the field '{field}' is {value!r}, which is not a number; filter it by "
                "`values`, or use another field"
            ) from None
        return all(compare(number, limit) for compare, limit in wanted)

    return f"{field} {text}", passes


def _value_test(field: str, values: list[Any]) -> Test:
    kept = set(values)
    shown = ", ".join(map(str, values))
    return f"{field} in [{shown}]", lambda row: _hashable(field_of(row, field)) in kept


def _hashable(value: Any) -> Any:
    """The value, or None for lists and mappings, which never match any of the values."""
    return None if isinstance(value, list | dict) else value
