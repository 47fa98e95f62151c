"""A teacher: a frozen model with its tokenizer and family, loaded from any source."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from huggingface_hub import ModelCard
from torch import Tensor, nn
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.integrations.accelerate import load_offloaded_parameter

from lrc.model.families import Family, check_supported, family_of
from lrc.model.gguf import read_header
from lrc.model.layout import Layout, LinearSite
from lrc.model.loading import (
    FLOATING,
    load_config,
    load_skeleton_of,
    load_weights,
    quantization_kind,
    settle_tie,
)
from lrc.model.locate import PACKAGE_PREFIX, ModelFiles, locate, locate_locally, short_name
from lrc.model.tokenizer import load_tokenizer_files, tokens_of_its_own
from lrc.recipe.sections import TeacherSection
from lrc.system.errors import UserError

__all__ = [
    "PACKAGE_PREFIX",
    "Teacher",
    "as_teacher",
    "describe_teacher",
    "load_model",
    "load_skeleton",
    "load_teacher",
    "load_tokenizer",
    "model_files",
    "short_name",
]


@dataclass(frozen=True)
class Teacher:
    """A frozen causal language model with its tokenizer, family and files."""

    model: Model
    tokenizer: Tokenizer
    family: Family
    name: str
    """The teacher's name in the recipe, for cards and reports."""

    files: ModelFiles | None = None
    """The files it was loaded from; None if it was passed in as a loaded model."""

    notes: tuple[str, ...] = ()
    """Notes for the user about how it was read, one sentence each."""

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    @cached_property
    def layout(self) -> Layout:
        """Where the model's parts are."""
        return Layout(self.family, self.config)

    @property
    def hidden_size(self) -> int:
        """d_T, the width of the residual stream."""
        return int(self.config.hidden_size)

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return int(self.config.num_hidden_layers)

    @property
    def whole(self) -> "Teacher":
        """The teacher that a pruned teacher was pruned from; of any other, itself."""
        return self

    @property
    def kept_layers(self) -> Sequence[int]:
        """Of each layer, its index in the whole teacher."""
        return range(self.num_layers)

    @property
    def writers(self) -> dict[str, nn.Parameter]:
        """The trained writers of a pruned teacher, [d_T, kept], by name; of any other, none."""
        return {}

    def whole_site(self, site: LinearSite) -> LinearSite:
        """The linear map of the whole teacher that a linear map belongs to."""
        return site

    def kept_outputs(self, site: LinearSite) -> Tensor | None:
        """Which outputs of the whole teacher's linear map are kept, int64; None: all."""
        return None

    @property
    def first_token(self) -> int | None:
        """The token that every sequence must start with; None if any will do."""
        return self.tokenizer.bos_token_id if self.family.needs_bos else None

    @property
    def logit_softcap(self) -> float | None:
        """c if the logits are c tanh(logits / c), also the student's; None if they are not."""
        return self.family.logit_softcap(self.config)

    @cached_property
    def vocab_size(self) -> int:
        """Number of token ids in use; further rows of the embedding are padding."""
        rows = int(self.model.get_input_embeddings().weight.shape[0])
        return min(rows, max(self.tokenizer.get_vocab().values()) + 1)

    @cached_property
    def on_disk(self) -> bool:
        """Whether the decoder layers' weights stay in their files (`teacher.load: layers`)."""
        return any(parameter.is_meta for parameter in self.model.parameters())

    @property
    def sharded(self) -> bool:
        """Whether the decoder layers are divided among processes (`teacher.shard`). All of them
        must then run the model equally often."""
        return False

    def parameter(self, name: str) -> Tensor:
        """Return a parameter by its name in the model, whole, read from its file if it stays on
        disk."""
        value = self.model.get_parameter(name)
        return load_offloaded_parameter(self.model, name) if value.is_meta else value

    def keep(self, names: Iterable[str]) -> None:
        """Keep these parameters, and no others, whole in this process. Those of a teacher that is
        not sharded always are."""

    def gain(self, norm: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return the factor [d_T] by which the norm at a module path multiplies.

        It is computed in `dtype`; None means the weight's element type.
        """
        weight = self.parameter(f"{norm}.weight")
        return weight.to(dtype or weight.dtype) + self.family.gain_offset


def load_teacher(
    section: TeacherSection | str | os.PathLike[str], device: torch.device | str = "cpu"
) -> Teacher:
    """Load a teacher in evaluation mode, without gradients.

    Args:
        section: a recipe's section, or just the teacher's name (as in `teacher.model`).
        device: device for its weights.

    Raises:
        UserError: if it is not found, cannot be read, its files do not fill it, or its family is
            not supported.
    """
    if not isinstance(section, TeacherSection):
        section = TeacherSection(model=os.fspath(section))
    files = locate(section.model, section.revision, "configuration")
    options: dict[str, Any] = {}
    if section.attention != "auto":
        options["attn_implementation"] = section.attention
    by_layers = section.load == "layers"
    setting, instead = "teacher.load: layers", "set teacher.load to full"
    if section.shard:
        setting, instead = "teacher.shard", "set teacher.shard to false"
    if by_layers and files.gguf:
        raise UserError(
            f"{setting} reads safetensors, but '{section.model}' is a GGUF file: give a model "
            f"folder or a hub id, or {instead}."
        )
    config = load_config(files)
    if by_layers and (kind := quantization_kind(files)):
        raise UserError(
            f"{setting} cannot read the weights of '{section.model}', which are quantized "
            f"({kind}): {instead}."
        )
    files = locate(section.model, files.commit or section.revision)
    tokenizer = load_tokenizer_files(files)
    if by_layers:
        family = family_of(config.model_type)
        options["device_map"] = _layers_on_disk(family, config.num_hidden_layers, str(device))
        options["use_safetensors"] = True
    try:
        loaded = load_weights(
            files, element_type(section.dtype, device), section.tie_head, **options
        )
    except UserError as error:
        if by_layers and "offload_folder" in str(error):  # transformers would write them anew
            raise UserError(
                f"{setting} cannot read the weights of '{section.model}', which holds experts one "
                f"by one: {instead}."
            ) from error
        raise
    model = loaded.model if by_layers else loaded.model.to(device)
    return as_teacher(model, tokenizer, section.model, files, loaded.notes)


def element_type(name: str, device: torch.device | str) -> torch.dtype:
    """The element type that a recipe names, for a device."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def _layers_on_disk(family: Family, layers: int, device: str) -> dict[str, str]:
    """Return the device map of a model whose decoder layers stay on disk.

    accelerate reads a layer's weights when the layer runs and frees them afterwards, so the model
    can be measured like any other.
    """
    places = dict.fromkeys((family.embedding, family.final_norm, family.head), device)
    return places | {f"{family.layers}.{layer}": "disk" for layer in range(layers)}


def load_model(
    name: str, dtype: str = "auto", revision: str | None = None
) -> tuple[Model, Tokenizer]:
    """Load any causal language model and its tokenizer.

    Args:
        name: model name, as in a recipe's `teacher.model`.
        dtype: element type of the weights; `auto` keeps the stored one.
        revision: hub revision; for hub ids only.

    Raises:
        UserError: if it is not found, cannot be read, or its files do not fill it.
    """
    files = locate(name, revision, "configuration")
    load_config(files, any_family=True)  # report its errors before anything else is read
    files = locate(name, files.commit)
    tokenizer = load_tokenizer_files(files)
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    return load_weights(files, wanted).model, tokenizer


def model_files(name: str) -> list[Path]:
    """List the local files of a model, named as in `teacher.model`; none for a hub id.

    Raises:
        UserError: if it is not found.
    """
    files = locate_locally(name)
    if files is None:
        return []
    if files.gguf_path is not None:
        return [files.gguf_path]
    return sorted(file for file in files.folder.glob("*") if file.is_file())


def load_tokenizer(name: str, revision: str | None = None) -> Tokenizer:
    """Load the tokenizer of a model, named as in `teacher.model`, without the model.

    Raises:
        UserError: if it is not found or cannot be read.
    """
    files = locate(name, revision, "settings")
    if files.gguf_path is not None:
        read_header(files.gguf_path)
    return load_tokenizer_files(files)


def load_skeleton(name: str, revision: str | None = None) -> Model:
    """Load a model without its weights (on the meta device), to read its shape.

    The files of a local model are checked against it. For a hub id, only the configuration is
    downloaded.

    Raises:
        UserError: if it is not found, cannot be read, or its files do not fill it.
    """
    files = locate(name, revision, "configuration")
    return load_skeleton_of(files, check=files.commit is None)


def as_teacher(
    model: Model,
    tokenizer: Tokenizer,
    name: str,
    files: ModelFiles | None = None,
    notes: list[str] | None = None,
) -> Teacher:
    """Freeze a loaded model and wrap it as a teacher.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        name: its name in cards and reports.
        files: the files it was loaded from; None if unknown.
        notes: notes for the user about how it was read.

    Raises:
        UserError: if its family is not supported, it is quantized or has adapters, its LM head has
            a bias, or its tokenizer does not fit its embedding.
    """
    family = check_supported(model.config)
    _refuse_packed(model, family, name)
    rows = model.get_input_embeddings().weight.shape[0]
    if (tokens := tokens_of_its_own(tokenizer)) > rows:
        raise UserError(
            f"The tokenizer of '{name}' has {tokens} tokens but the model embeds only "
            f"{rows}; give the tokenizer that the model was trained with."
        )
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise UserError(
            f"The LM head of '{name}' has a bias, which cannot be cloned: choose another teacher."
        )
    model.requires_grad_(False)
    model.eval()
    found = [*(notes or ()), *settle_tie(name, model)]
    return Teacher(model, tokenizer, family, name, files, tuple(found))


def _refuse_packed(model: Model, family: Family, name: str) -> None:
    """Refuse a loaded model whose linear maps do not multiply by their weights alone.

    Raises:
        UserError: if it is quantized, or another library has replaced parts of it, as peft does.
    """
    packed = any(str(parameter.dtype) not in FLOATING for parameter in model.parameters())
    if packed or getattr(model, "hf_quantizer", None) is not None:
        raise UserError(
            f"The loaded model '{name}' is quantized: give its name or folder, or load it without "
            "quantization."
        )
    layout = Layout(family, model.config)
    paths = [layout.linear(site) for site in layout.sites() if not layout.is_stack(site)]
    for path in (family.embedding, family.head, *paths):
        if "weight" not in dict(model.get_submodule(path).named_parameters(recurse=False)):
            raise UserError(
                f"The loaded model '{name}' has no {path}.weight, so another library has replaced "
                "parts of it: merge adapters first (peft's merge_and_unload)."
            )


@dataclass(frozen=True)
class Description:
    """What a teacher's files say about it, for cards."""

    license: str | None = None
    """License identifier; None if unknown."""

    languages: tuple[str, ...] = ()
    """Codes of its languages."""

    license_name: str | None = None
    """Name of a license that has no identifier of its own (`license` is then `other`)."""

    license_link: str | None = None
    """Where that license is."""

    base_model: str | None = None
    """Hub id of the model that it was made from."""

    tags: tuple[str, ...] = ()
    """Tags of its card."""


def describe_teacher(section: TeacherSection) -> Description:
    """Return a teacher's license and languages, from its card or its GGUF file.

    A license in the recipe wins. What cannot be read is left out: a run must not fail because of
    anything but the weights.
    """
    try:
        files = locate(section.model, section.revision, "settings")
        if files.gguf_path is not None:
            fields = GGUFReader(files.gguf_path).fields
            found = {
                "license": _contents(fields, "general.license"),
                "license_name": _contents(fields, "general.license.name"),
                "license_link": _contents(fields, "general.license.link"),
                "language": _contents(fields, "general.languages"),
            }
        else:
            card = files.folder / "README.md"
            found = ModelCard.load(card).data.to_dict() if card.is_file() else {}
    except Exception:
        found = {}
    languages = found.get("language")
    if isinstance(languages, str):
        languages = [languages]
    name, long_name, link = (
        value if isinstance(value := found.get(f"license{part}"), str) else None
        for part in ("", "_name", "_link")
    )
    if section.license and section.license != name:
        long_name = link = None  # they belong to the license of the teacher's card
    base, tags = found.get("base_model"), found.get("tags")
    return Description(
        section.license or name,
        _texts(languages),
        long_name,
        link,
        next(iter(_texts([base] if isinstance(base, str) else base)), None),
        _texts(tags),
    )


def _texts(values: Any) -> tuple[str, ...]:
    """The texts in a list that somebody wrote."""
    return tuple(one for one in values if isinstance(one, str)) if isinstance(values, list) else ()


def _contents(fields: Any, name: str) -> Any:
    return fields[name].contents() if name in fields else None
