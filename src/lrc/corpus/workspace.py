"""The folder in which a build works, inside the folder of the shards, and its plan."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lrc.corpus.mix import Mix
from lrc.data.identity import TokenizerIdentity
from lrc.system.files import write_text

FOLDER = "build"


@dataclass(frozen=True)
class BuildPlan:
    """All that decides what a build gives; a build that was stopped goes on with the same one."""

    mix: Mix
    tokenizer: TokenizerIdentity
    dtype: str
    """Element type of the tokens."""

    files: list[list[Any]]
    """Every input file on the disk: path, size in bytes, time of change [ns]."""

    versions: dict[str, str]
    """Versions of the libraries that the result depends on."""

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return asdict(self) | {"mix": self.mix.model_dump(mode="json")}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "BuildPlan":
        """The plan out of its JSON values."""
        identity = TokenizerIdentity(**values["tokenizer"])
        mix = Mix.model_validate(values["mix"], strict=False)
        return cls(**values | {"mix": mix, "tokenizer": identity})


@dataclass(frozen=True)
class Workspace:
    """Where the files of a build lie while it goes on."""

    folder: Path

    @property
    def plan(self) -> Path:
        """File of the plan."""
        return self.folder / "plan.json"

    @property
    def copies(self) -> Path:
        """Folder of the parts of inputs that cannot be read from the middle."""
        return self.folder / "copies"

    @property
    def overlap(self) -> Path:
        """Folder of the index of the evaluation sets."""
        return self.folder / "evaluation"

    @property
    def tokenizer(self) -> Path:
        """Folder of the tokenizer."""
        return self.folder / "tokenizer"

    def tokens(self, name: str) -> Path:
        """File of a unit's token ids."""
        return self.folder / "units" / f"{name}.bin"

    def result(self, name: str) -> Path:
        """File of a unit's other results; it is written last."""
        return self.folder / "units" / f"{name}.npz"

    def is_done(self, name: str) -> bool:
        """Whether a unit has its result."""
        return self.result(name).is_file()

    def documents(self, stem: str) -> Path:
        """File of the documents that a shard is made of."""
        return self.folder / "shards" / f"{stem}.documents"

    def shard(self, stem: str) -> Path:
        """File of a finished shard's entry in the index."""
        return self.folder / "shards" / f"{stem}.json"

    def selection(self, source: int) -> Path:
        """File of the documents that a source gives, in order."""
        return self.folder / f"selection-{source:03d}"

    @property
    def overlaps(self) -> Path:
        """File of the documents that overlap evaluation sets."""
        return self.folder / "decontamination.jsonl"

    def write_plan(self, plan: BuildPlan) -> None:
        """Keep the plan, after which the build counts as begun."""
        write_text(self.plan, json.dumps(plan.to_json(), indent=1))

    def read_plan(self) -> BuildPlan:
        """The plan of a build that has begun."""
        return BuildPlan.from_json(json.loads(self.plan.read_text(encoding="utf-8")))

    def clear_copies(self) -> None:
        """Remove the copied parts that a stopped build left; they are made again where needed."""
        self.copies.mkdir(parents=True, exist_ok=True)
        for path in self.copies.iterdir():
            if not path.name.endswith(".state.json"):
                path.unlink()

    def remove(self) -> None:
        """Remove the whole folder, at the end of a build."""
        shutil.rmtree(self.folder)
