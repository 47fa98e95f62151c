"""The models to evaluate: where each one comes from and how to identify it."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from lrc.model.locate import locate
from lrc.model.teacher import model_files
from lrc.run import Run, is_run
from lrc.system.errors import UserError

RUNS_TEACHER = "teacher"
"""Stands for the teacher of the evaluated run."""


@dataclass(frozen=True)
class Subject:
    """A model to evaluate."""

    name: str
    """The name that the user gave."""
    source: str
    """The argument of `lrc.model.teacher.load_model`."""
    label: str
    """Its name in tables."""
    run: Run | None = None
    """The run, if the model is a run's student."""
    revision: str | None = None
    """Hub revision; for hub ids only."""

    def fingerprint(self) -> str:
        """`fingerprint_of` the source; it changes whenever the model's files change."""
        return fingerprint_of(self.source, self.revision)

    def training_tokens(self) -> int | None:
        """Training tokens, if the model is a run's student and the run has ended."""
        if self.run is None or not self.run.summary_file.is_file():
            return None
        return int(self.run.summary()["tokens"])


def find_subjects(name: str, others: list[str]) -> list[Subject]:
    """The evaluated model and the models to compare it with, without duplicates.

    Raises:
        UserError: if a run has no student yet, or `teacher` is requested and the model is not a
            run.
    """
    first = _subject(name)
    subjects = [first]
    for other in others:
        if other == RUNS_TEACHER:
            if first.run is None:
                raise UserError(f"{name} is not a run, so name the teacher to compare with.")
            section = first.run.recipe.teacher
            of_run = _subject(section.model)
            subjects.append(replace(of_run, label=RUNS_TEACHER, revision=section.revision))
        else:
            subjects.append(_subject(other))
    return list({(one.source, one.revision): one for one in subjects}.values())


def fingerprint_of(source: str, revision: str | None = None) -> str:
    """Digest of the names, sizes and modification times of a local model's files, or the commit of
    a hub model, which `revision` may name.

    Raises:
        UserError: if the model is not found.
    """
    files = [file for file in model_files(source) if file.suffix != ".md"]
    if not files:
        return str(locate(source, revision, "configuration").commit)
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]


def _subject(name: str) -> Subject:
    path = Path(name)
    label = path.resolve().name if path.exists() else name
    if not is_run(path):
        return Subject(name, name, label)
    run = Run.open(path)
    return Subject(name, str(run.need_student()), label, run)
