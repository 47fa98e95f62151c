"""`lrc data build`: build shards from a mix with many processes, and resume stopped builds.

1. The sources are divided into units, which processes filter and tokenize (`unit`).
2. The main process reads the results in the order of the mix, drops near-duplicates and ends
   sources whose budget is met (`selection`). It waits for the next unit in order while processes
   work ahead on others, so nothing depends on which process is faster.
3. The selected documents are drawn into shards, which processes write (`assemble`).
4. The summary is written, then the index.

Unit results and finished shards stay on disk until the end; they are about as large as the shards
themselves. A build can be killed at any moment: when restarted, it reuses them and produces shards
that are identical to the byte.
"""

import json
import logging
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from lrc.corpus import filters, unit
from lrc.corpus.assemble import ShardPlan, made_shard, make_shard, place_documents
from lrc.corpus.chat import require_template
from lrc.corpus.duplicates import SeenDocuments
from lrc.corpus.mix import Mix
from lrc.corpus.overlap import evaluation_files, write_index
from lrc.corpus.pieces import Unit
from lrc.corpus.pool import Pool
from lrc.corpus.progress import BuildProgress, build_progress
from lrc.corpus.rejects import Rejects
from lrc.corpus.selection import SourceSelection
from lrc.corpus.splitting import Splitter, local_files
from lrc.corpus.summary import summarize, write_summary
from lrc.corpus.workspace import FOLDER, BuildPlan, Workspace
from lrc.data.identity import token_dtype, tokenizer_identity
from lrc.data.shards import (
    INDEX,
    SPLITS,
    TOKENIZER_FOLDER,
    Shard,
    Shards,
    Split,
    open_shards,
    write_shards_index,
)
from lrc.data.sources import left_out_note, source_files, state_of
from lrc.system.checksums import json_sha256
from lrc.system.errors import UserError
from lrc.system.files import (
    disk_errors,
    hold,
    is_left_over,
    is_taken,
    new_folder,
    read_json,
    remove,
)

logger = logging.getLogger(__name__)

FORMAT = 2
"""Increase it when the same mix would give other shards; builds of other formats cannot resume."""

AHEAD = 4
"""Units per process that may be in progress, or finished, before their turn."""


def build_shards(mix: Mix, tokenizer: Tokenizer, out: Path, workers: int) -> Shards:
    """Build the shards of a mix, or resume a stopped build.

    Args:
        mix: the mix.
        tokenizer: the tokenizer of the mix's teacher.
        out: shards folder; new, empty, or with a stopped build of the same mix.
        workers: number of processes; the result does not depend on it.

    Raises:
        UserError: if the folder is in use, a source cannot be read or is empty, too many rows are
            malformed, the tokenizer does not fit, or the disk is full.
    """
    plan = make_plan(mix, tokenizer)
    if (out / INDEX).is_file():
        return _finished(plan, out)
    space = Workspace(out / FOLDER)
    _check_place(space, plan, out)
    files = [name for source in mix.sources.values() for name in local_files(mix, source)]
    if (note := left_out_note(files, "files")) is not None:
        logger.info(note)
    with disk_errors(out):
        with hold(space.folder, f"Another process is building {out}: wait until it is done."):
            _clear(space)
            _begin(space, plan, tokenizer)
            with Pool(workers) as pool, build_progress() as progress:
                build = _Build(space, plan, out, pool, progress)
                shards = build.run()
        space.remove()
    return shards


def make_plan(mix: Mix, tokenizer: Tokenizer) -> BuildPlan:
    """Collect everything that determines the build.

    Raises:
        UserError: if an input is missing or the tokenizer does not fit.
    """
    identity = tokenizer_identity(tokenizer)
    if any(source.chat for source in mix.sources.values()):
        require_template(tokenizer)
    files = [
        list(file)
        for source in mix.sources.values()
        for file in source_files(local_files(mix, source))
    ]
    for folder in (Path(source.hub) for source in mix.sources.values() if source.hub):
        files += [list(state_of(path)) for path in sorted(folder.rglob("*")) if path.is_file()]
    if mix.decontaminate:
        sets = evaluation_files(mix.path(mix.decontaminate.folder))
        files += [list(state_of(path)) for path in sets]
    versions = {name: metadata.version(name) for name in ("tokenizers", "rensa")}
    if any(source.chat for source in mix.sources.values()):
        versions["chat template"] = json_sha256(tokenizer.chat_template)
    return BuildPlan(
        mix, identity, token_dtype(tokenizer), files, versions | {"build": str(FORMAT)}
    )


class _Build:
    """A running build."""

    def __init__(
        self, space: Workspace, plan: BuildPlan, out: Path, pool: Pool, progress: BuildProgress
    ) -> None:
        self._space = space
        self._plan = plan
        self._mix = plan.mix
        self._out = out
        self._pool = pool
        self._progress = progress
        self._names = list(plan.mix.sources)
        self._worker = unit.UnitWorker(space) if pool.workers == 1 else None
        self._rejects = Rejects(space, self._mix)
        seen = SeenDocuments(self._mix.deduplicate) if self._mix.deduplicate else None
        self._seen = seen
        self._selections = [
            SourceSelection(source, self._mix.budgets()[name], seen, space.selection(index))
            for index, (name, source) in enumerate(self._mix.sources.items())
        ]

    def run(self) -> Shards:
        """Run all steps, from the units to the index."""
        self._select()
        plans = self._place()
        shards = Shards(
            folder=self._out,
            dtype=self._plan.dtype,
            teacher=self._mix.teacher,
            tokenizer=self._plan.tokenizer,
            sources=tuple(self._names),
            shards=tuple(self._make(plans)),
            build=self._plan.to_json(),
        )
        write_summary(self._space, self._out, self._summary())
        with new_folder(self._out / TOKENIZER_FOLDER) as temporary:
            for path in self._space.tokenizer.iterdir():
                (temporary / path.name).write_bytes(path.read_bytes())
        write_shards_index(shards)
        return shards

    def _summary(self) -> dict[str, Any]:
        tallies = {n: s.tally for n, s in zip(self._names, self._selections, strict=True)}
        found = self._space.overlap / "found.json"
        sets = json.loads(found.read_text()) if found.is_file() else {}
        mistakes = self._seen.mistakes if self._seen else 0.0
        return summarize(self._mix, tallies, self._rejects, sets, mistakes)

    def _select(self) -> None:
        """Steps 1 and 2: process units, and select from them in order."""
        waiting: deque[tuple[Unit, Future[None] | None]] = deque()
        units = self._units()
        # A single process runs each unit as soon as it is submitted, so it must not get ahead of
        # the budgets.
        ahead = AHEAD * self._pool.workers if self._worker is None else 1
        while True:
            while len(waiting) < ahead and (u := next(units, None)):
                waiting.append((u, self._start(u)))
            if not waiting:
                break
            first, future = waiting.popleft()
            selection = self._selections[first.source]
            if selection.is_full:
                if future is not None:
                    future.cancel()
                continue
            if future is not None:
                self._pool.wait(future)
            self._take(first)
        for name, selection in zip(self._names, self._selections, strict=True):
            if not selection.tally.read.documents:
                raise UserError(f"The source '{name}' is empty: give it text, or remove it.")
            selection.finish()

    def _units(self) -> Iterator[Unit]:
        """The units of all sources in order; a source ends once its budget is met."""
        for index, source in enumerate(self._mix.sources.values()):
            columns = filters.columns_of(source)
            copies, is_done = self._space.copies, self._space.is_done
            for found in Splitter(self._mix, index, columns, copies, is_done).units():
                if self._selections[index].is_full:
                    break
                yield found

    def _start(self, wanted: Unit) -> "Future[None] | None":
        if self._space.is_done(wanted.name):
            return None
        if self._worker is not None:
            return self._pool.submit(self._worker.process, wanted)
        return self._pool.submit(unit.process_unit, self._space.folder, wanted)

    def _take(self, done: Unit) -> None:
        """Select from a finished unit."""
        result = unit.read_result(self._space, done)
        name = self._names[done.source]
        self._rejects.add(name, done, result.report)
        self._selections[done.source].add(done.number, result)
        self._progress.unit(name, self._selections[done.source].tally, self._mix.budgets()[name])

    def _place(self) -> list[ShardPlan]:
        """Step 3a: draw the documents into shards."""
        tallies = [selection.tally for selection in self._selections]
        tokens: dict[Split, int] = {
            "train": sum(tally.train.tokens for tally in tallies),
            "held_out": sum(tally.held_out.tokens for tally in tallies),
        }
        if not tokens["train"]:
            raise UserError(
                "No document passed the filters: loosen them, or check the counts with fewer "
                "filters."
            )
        assert tuple(tokens) == SPLITS
        mix = self._mix
        return place_documents(self._space, len(self._names), tokens, mix.shard_tokens, mix.seed)

    def _make(self, plans: list[ShardPlan]) -> Iterator[Shard]:
        """Step 3b: write the missing shards."""
        self._progress.shards(len(plans))
        dtype = self._plan.dtype
        missing = [p for p in plans if made_shard(self._space, self._out, p, dtype) is None]
        arguments = (dtype, self._names)
        futures = {
            p.stem: self._pool.submit(make_shard, self._space.folder, self._out, p, *arguments)
            for p in missing
        }
        for plan in plans:
            if plan.stem in futures:
                self._pool.wait(futures[plan.stem])
            shard = made_shard(self._space, self._out, plan, dtype)
            assert shard is not None
            self._progress.shard(shard)
            yield shard


def _finished(plan: BuildPlan, out: Path) -> Shards:
    """Open shards that were built earlier from this plan; remove leftovers of the build."""
    shards = open_shards(out)
    differences = _differences(shards.build, plan)
    if differences:
        raise UserError(
            f"{out} already contains shards of another mix (other {', '.join(differences)}): "
            "choose another folder."
        )
    space = Workspace(out / FOLDER)
    if space.folder.is_dir() and not space.is_foreign():
        space.remove()
    return shards


def _check_place(space: Workspace, plan: BuildPlan, out: Path) -> None:
    """Reject a folder that is in use, or contains a stopped build of another plan."""
    if space.plan.is_file():
        found = read_json(space.plan, f"remove {out} to start over")
        differences = _differences(found, plan)
        if differences:
            raise UserError(
                f"{out} contains an unfinished build of another mix "
                f"(other {', '.join(differences)}): choose another folder, or remove it to start "
                "over."
            )
    elif is_taken(out, lambda name: name == FOLDER or is_left_over(name)) or space.is_foreign():
        raise UserError(f"{out} already exists and is not empty: choose another folder.")


def _differences(found: dict[str, Any], plan: BuildPlan) -> list[str]:
    """Describe the differences between a plan on disk and another plan."""
    words = {
        "mix": "settings",
        "files": "input files",
        "dtype": "token size",
        "versions": "libraries or chat template",
    }
    wanted = json.loads(json.dumps(plan.to_json()))
    names = [words.get(key, key) for key in wanted if found.get(key) != wanted[key]]
    if "settings" in names:
        changed = [k for k in wanted["mix"] if wanted["mix"][k] != found.get("mix", {}).get(k)]
        names[names.index("settings")] = f"settings: {' and '.join(changed)}"
    return names


def _begin(space: Workspace, plan: BuildPlan, tokenizer: Tokenizer) -> None:
    """Write what processes need, then the plan; do nothing if a stopped build already did."""
    if space.plan.is_file():
        return
    with new_folder(space.tokenizer) as temporary:
        tokenizer.save_pretrained(temporary)
    if plan.mix.decontaminate:
        sets, words = plan.mix.path(plan.mix.decontaminate.folder), plan.mix.decontaminate.words
        found = write_index(sets, words, space.overlap)
        text = json.dumps({name: asdict(one) for name, one in found.items()})
        (space.overlap / "found.json").write_text(text, encoding="utf-8")
    space.write_plan(plan)


def _clear(space: Workspace) -> None:
    """Remove partial files of a killed build."""
    space.clear_copies()
    for path in list(space.folder.rglob(".*.tmp")):
        remove(path)
