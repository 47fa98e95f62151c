"""Numbers with units on the command line."""

import re

from lrc.system.errors import UserError

COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
BYTES = {
    **{f"{prefix}B": factor for prefix, factor in COUNTS.items() if prefix != "B"},
    **{f"{prefix}iB": 1 << 10 * (power + 1) for power, prefix in enumerate("KMGT")},
}

MAX_SEED = (1 << 32) - 1
"""The largest seed of a command: every generator takes it."""


def quantity(text: str, units: dict[str, int], option: str) -> float:
    """A number with a unit, such as 1.5B.

    Raises:
        UserError: if it is not one.
    """
    thousands = r"\d{1,3}(?:,\d{3})+|\d{1,3}(?:_\d{3})+|\d*"
    match = re.fullmatch(rf"((?:{thousands})(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    known = {unit.lower(): factor for unit, factor in units.items()}
    if match is None or not match[1] or match[2].lower() not in known:
        names = ", ".join(unit for unit in units if unit)
        raise UserError(f"{option} is '{text}': give a number with one of the units {names}.")
    value = float(match[1].replace(",", "").replace("_", "")) * known[match[2].lower()]
    if value <= 0:
        raise UserError(f"{option} is '{text}': give a number above 0.")
    return value
