"""The working folder of a build, inside the shards folder, and the build's plan."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lrc.corpus.mix import Mix
from lrc.data.identity import TokenizerIdentity
from lrc.system.files import LOCK, is_left_over, is_taken, write_text

FOLDER = "build"


@dataclass(frozen=True)
class BuildPlan:
    """Everything that determines a build's result; a stopped build resumes with the same plan."""

    mix: Mix
    tokenizer: TokenizerIdentity
    dtype: str
    """Element type of the tokens."""

    files: list[list[Any]]
    """Every input file on disk: path, size in bytes, modification time [ns]."""

    versions: dict[str, str]
    """Versions of the libraries that the result depends on."""

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return asdict(self) | {"mix": self.mix.model_dump(mode="json")}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "BuildPlan":
        """Load a plan from its JSON values."""
        identity = TokenizerIdentity(**values["tokenizer"])
        mix = Mix.model_validate(values["mix"], strict=False)
        return cls(**values | {"mix": mix, "tokenizer": identity})


@dataclass(frozen=True)
class Workspace:
    """The files of a running build."""

    folder: Path

    @property
    def plan(self) -> Path:
        """Path of the plan."""
        return self.folder / "plan.json"

    @property
    def copies(self) -> Path:
        """Folder with copied parts of inputs without random access."""
        return self.folder / "copies"

    @property
    def overlap(self) -> Path:
        """Folder of the evaluation set index."""
        return self.folder / "evaluation"

    @property
    def tokenizer(self) -> Path:
        """Folder of the tokenizer."""
        return self.folder / "tokenizer"

    def tokens(self, name: str) -> Path:
        """Path of a unit's token ids."""
        return self.folder / "units" / f"{name}.bin"

    def result(self, name: str) -> Path:
        """Path of a unit's other results; written last."""
        return self.folder / "units" / f"{name}.npz"

    def is_done(self, name: str) -> bool:
        """Whether a unit has a result."""
        return self.result(name).is_file()

    def documents(self, stem: str) -> Path:
        """Path of the list of a shard's documents."""
        return self.folder / "shards" / f"{stem}.documents"

    def shard(self, stem: str) -> Path:
        """Path of a finished shard's index entry."""
        return self.folder / "shards" / f"{stem}.json"

    def selection(self, source: int) -> Path:
        """Path of the documents selected from a source, in order."""
        return self.folder / f"selection-{source:03d}"

    @property
    def overlaps(self) -> Path:
        """Path of the documents that overlap evaluation sets."""
        return self.folder / "decontamination.jsonl"

    def write_plan(self, plan: BuildPlan) -> None:
        """Write the plan, which marks the build as started."""
        write_text(self.plan, json.dumps(plan.to_json(), indent=1))

    def read_plan(self) -> BuildPlan:
        """Read the plan of a started build."""
        return BuildPlan.from_json(json.loads(self.plan.read_text(encoding="utf-8")))

    def is_foreign(self) -> bool:
        """Whether the folder holds anything that no build makes."""
        paths = (self.plan, self.copies, self.overlap, self.tokenizer, self.overlaps)
        names = {LOCK, "units", "shards", *(path.name for path in paths)}
        return is_taken(
            self.folder,
            lambda name: name in names or name.startswith("selection-") or is_left_over(name),
        )

    def clear_copies(self) -> None:
        """Remove copied parts that a stopped build left; they are recreated when needed."""
        self.copies.mkdir(parents=True, exist_ok=True)
        for path in self.copies.iterdir():
            if not path.name.endswith(".state.json"):
                path.unlink()

    def remove(self) -> None:
        """Remove the whole folder at the end of a build."""
        shutil.rmtree(self.folder)
