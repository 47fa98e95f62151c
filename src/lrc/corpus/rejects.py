"""Collect malformed rows, and documents that overlap evaluation sets, for the user to inspect."""

import json
from collections import Counter

from lrc.corpus import filters
from lrc.corpus.mix import Mix
from lrc.corpus.pieces import Unit
from lrc.corpus.unit import SHOWN_BAD_ROWS, Report
from lrc.corpus.workspace import Workspace
from lrc.system.errors import UserError


class Rejects:
    """Collects malformed rows and overlaps unit by unit, in the order of the mix.

    Args:
        space: the build's workspace, where the overlapping documents are listed.
        mix: the mix.
    """

    def __init__(self, space: Workspace, mix: Mix) -> None:
        self._limit = mix.bad_rows
        self._path = space.overlaps
        self._rows: Counter[str] = Counter()
        self._bad: Counter[str] = Counter()
        self.shown: dict[str, list[str]] = {}
        """Descriptions of the first malformed rows of every source."""
        self.overlaps: Counter[str] = Counter()
        """Number of documents dropped for each evaluation set."""
        self._path.write_bytes(b"")

    def add(self, source: str, unit: Unit, report: Report) -> None:
        """Add the rejects of a unit's report.

        Raises:
            UserError: if the source has more malformed rows than the mix allows.
        """
        before = []
        for piece, rows in zip(unit.pieces, report.rows, strict=True):
            # For JSONL and text, only the main process knows how many rows came before.
            before.append(piece.first_row or self._rows[f"{source}:{piece.shown}"])
            self._rows[f"{source}:{piece.shown}"] += rows
        shown = self.shown.setdefault(source, [])
        for piece_index, row, problem in report.bad[: SHOWN_BAD_ROWS - len(shown)]:
            where = f"{unit.pieces[piece_index].shown}:{before[piece_index] + row + 1}"
            shown.append(f"{where} is {problem}")
        bad = report.dropped.get(filters.MALFORMED)
        self._bad[source] += bad.documents if bad else 0
        if self._bad[source] > self._limit:
            raise UserError(
                f"The source '{source}' has more than {self._limit} malformed rows "
                f"({'; '.join(shown)}): fix them, or raise bad_rows."
            )
        with self._path.open("a", encoding="utf-8") as file:
            for piece_index, row, name, run, begins in report.overlaps:
                self.overlaps[name] += 1
                entry = {
                    "source": source,
                    "file": unit.pieces[piece_index].shown,
                    "row": before[piece_index] + row + 1,
                    "evaluation_set": name,
                    "shared": run,
                    "begins": begins,
                }
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
