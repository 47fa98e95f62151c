"""Models as GGUF files, for llama.cpp and the tools built on it (Ollama, LM Studio).

llama.cpp's `gguf` package writes the container, names the tensors and quantizes. transformers only
reads GGUF, and no package contains llama.cpp's converter script. So `gguf_architectures.py`,
`gguf_rope.py` and `gguf_tensors.py` decide which numbers go where. Every tensor is converted when
it is written, so memory never holds a second copy of the model.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter, LlamaFileType
from gguf.quants import quant_shape_to_byte_shape, quantize
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lrc.exporting.formats import LLAMA_NAMES, Dtype
from lrc.exporting.gguf_architectures import Architecture, add_shape, check_runs, sliding_layers
from lrc.exporting.gguf_rope import add_rope, rope_of
from lrc.exporting.gguf_tensors import Change, same, tensors_of
from lrc.exporting.gguf_vocabulary import add_vocabulary
from lrc.exporting.plain import check_range
from lrc.model.shapes import parameters_of
from lrc.model.teacher import describe_teacher, load_model, short_name
from lrc.recipe.sections import TeacherSection
from lrc.system.files import new_file
from lrc.system.progress import Progress

FILE_TYPES = {
    Kind.F32: LlamaFileType.ALL_F32,
    Kind.F16: LlamaFileType.MOSTLY_F16,
    Kind.BF16: LlamaFileType.MOSTLY_BF16,
    Kind.Q8_0: LlamaFileType.MOSTLY_Q8_0,
}
"""The supported element types, with their GGUF file types."""

TORCH_TYPES = {Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
"""The torch types of the element types that cannot hold every float32 value."""

LATENT_EPS = 1e-6
"""Epsilon of the norms inside transformers' latent attention, whatever the configuration says."""

K_BLOCK = 256
"""Elements per block of llama.cpp's K-quants."""


class StoredPlace(NamedTuple):
    """A tensor to write to the file."""

    name: str
    """Its name in the model, for messages."""
    tensor: Tensor
    shape: torch.Size
    """The stored shape."""
    kind: Kind
    """The stored element type."""
    change: Change = same
    """What is stored of the tensor."""

    def bytes_shape(self) -> tuple[int, ...]:
        """The stored shape in bytes."""
        return quant_shape_to_byte_shape(self.shape, self.kind)

    def stored(self) -> np.ndarray[Any, Any]:
        """The stored values."""
        values = self.change(self.tensor.detach())
        check_range([(self.name, values)], TORCH_TYPES.get(self.kind, torch.float32))
        return quantize(values.to("cpu", torch.float32).contiguous().numpy(), self.kind)


@dataclass(frozen=True)
class About:
    """The metadata of a GGUF file, with the terms of a model card."""

    name: str
    license: str | None = None
    base_model: str | None = None
    """Hub id of the teacher, or its name if it has no hub id."""
    tags: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    """Languages that the model writes, as the teacher's card names them."""
    license_name: str | None = None
    """As in a card whose license is `other`."""
    license_link: str | None = None


def write_gguf(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    path: Path,
    kind: Kind,
    about: About,
    progress: Progress = lambda done, total: None,
) -> list[str]:
    """Write a model, its tokenizer and its chat template as one GGUF file.

    Args:
        model: a model of a supported family.
        tokenizer: its tokenizer.
        path: the file; an existing one is replaced when the new one is complete.
        kind: element type of the matrices. Norms and biases are always float32. Matrices whose rows
            do not fill whole blocks of the type are float16.
        about: the file's metadata.
        progress: gets the number of written tensors and their total.

    Returns:
        Notes about the file for the user, one sentence each.

    Raises:
        UserError: if llama.cpp cannot run the model or its tokenizer, or the disk is full.
    """
    arch, architecture = check_runs(model.config)
    tensors = dict(_tensors(model, kind))
    with new_file(path) as temporary:
        writer = GGUFWriter(temporary, arch)
        try:
            _add_about(writer, model, about, kind)
            add_shape(writer, model, architecture)
            divisors = add_rope(writer, model.config, architecture)
            notes = add_vocabulary(writer, tokenizer, model.config.vocab_size)
            if divisors is not None:
                place = StoredPlace("rope_freqs", divisors, divisors.shape, Kind.F32)
                tensors["rope_freqs.weight"] = place
            for name, place in tensors.items():
                shape = place.bytes_shape()
                byte = np.dtype(np.uint8)
                writer.add_tensor_info(name, shape, byte, math.prod(shape), place.kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for done, place in enumerate(tensors.values()):
                writer.write_tensor_data(place.stored())
                progress(done + 1, len(tensors))
        finally:
            writer.close()
    return [*notes, *_notes(model.config, architecture, kind, list(tensors.values()))]


def convert_to_gguf(
    name: str,
    path: Path,
    kind: Kind | None = None,
    progress: Progress = lambda done, total: None,
    title: str | None = None,
) -> list[str]:
    """Write any model, named like a teacher (hub id, folder, .gguf file or `package:NAME`).

    If `kind` is None, the model's own element type is kept. `title` is its name in the file; None:
    the last part of `name`. The other arguments, the return value and the errors are those of
    `write_gguf`.
    """
    model, tokenizer = load_model(name)
    about = about_model(name, title)
    return write_gguf(model, tokenizer, path, kind or kind_of(model.dtype), about, progress)


def about_model(name: str, title: str | None = None) -> About:
    """The metadata of any model, from its card."""
    found = describe_teacher(TeacherSection(model=name))
    return About(
        title or short_name(name),
        found.license,
        found.base_model,
        found.tags,
        found.languages,
        found.license_name,
        found.license_link,
    )


def kind_of(dtype: torch.dtype) -> Kind:
    """The GGUF element type that keeps a model's own; float32 for wider types."""
    return {torch.float16: Kind.F16, torch.bfloat16: Kind.BF16}.get(dtype, Kind.F32)


def gguf_kind(dtype: Dtype) -> Kind:
    """The GGUF element type of that name."""
    return Kind[LLAMA_NAMES.get(dtype, dtype).upper()]


def _tensors(model: PreTrainedModel, kind: Kind) -> Iterator[tuple[str, StoredPlace]]:
    """The name of every tensor of the file, and what to store."""
    for found in tensors_of(model):
        # The device `meta` computes shapes without numbers.
        shape = found.change(torch.empty_like(found.tensor, device="meta")).shape
        stored = stored_kind(found.name, shape, kind)
        yield found.name, StoredPlace(found.path, found.tensor, shape, stored, found.change)


EXACT = (
    ".bias",
    "ffn_gate_inp.weight",
    "ffn_gate_inp_shexp.weight",
    "ssm_conv1d.weight",
    "ssm_norm.weight",
    "ssm_a",
    "ssm_d",
)
"""Ends of the names of matrices that are always float32: llama.cpp has no other code for them, or
they are small and decide much."""


def stored_kind(name: str, shape: torch.Size, kind: Kind) -> Kind:
    """The stored type of a tensor in a file of type `kind`."""
    if len(shape) == 1 or name.endswith(EXACT):
        return Kind.F32
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return kind if shape[-1] % block == 0 else Kind.F16


def _add_about(writer: GGUFWriter, model: PreTrainedModel, about: About, kind: Kind) -> None:
    size = parameters_of(model)
    metadata = gguf.Metadata(
        name=about.name,
        license=about.license,
        license_name=about.license_name,
        license_link=about.license_link,
        tags=list(about.tags) or None,
        languages=list(about.languages) or None,
        size_label=gguf.size_label(size, 0, 0, 0),
    )
    if about.base_model:
        organization, _, name = about.base_model.rpartition("/")
        metadata.base_models = [{"name": name}]
        if organization:
            metadata.base_models[0]["organization"] = organization
            url = f"https://huggingface.co/{about.base_model}"
            metadata.base_models[0]["repo_url"] = url
    generation = model.generation_config
    if generation is not None and generation.do_sample:
        metadata.sampling_temp = generation.temperature
        metadata.sampling_top_k = generation.top_k
        metadata.sampling_top_p = generation.top_p
    writer.add_type("model")
    metadata.set_gguf_meta_model(writer)
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _notes(
    config: Any, architecture: Architecture, kind: Kind, places: list[StoredPlace]
) -> list[str]:
    """Notes for the user about a written file."""
    notes = []
    matrices = [place for place in places if place.kind != Kind.F32]
    kept = sum(place.kind == Kind.F16 != kind for place in matrices)
    if kept:
        block, _ = gguf.GGML_QUANT_SIZES[kind]
        notes.append(
            f"{kept} of {len(matrices)} matrices are f16 because their row length is not a "
            f"multiple of {block}, the block size of {kind.name.lower()}."
        )
    uneven = sorted(
        {place.shape[-1] for place in places if len(place.shape) > 1 and place.shape[-1] % K_BLOCK}
    )
    if uneven:
        notes.append(
            f"llama.cpp's K-quants (q4_k_m and others) need row lengths that are a multiple of "
            f"{K_BLOCK}; for matrices with rows of {', '.join(map(str, uneven))}, llama.cpp falls "
            "back to other types."
        )
    if architecture.window is None and any(sliding_layers(config)):
        window = config.sliding_window
        if window < config.max_position_embeddings:
            notes.append(
                f"llama.cpp attends to the whole context here, not to a window of {window} "
                "tokens: longer texts give other results than in transformers."
            )
    if architecture.latent and config.rms_norm_eps != LATENT_EPS:
        notes.append(
            f"llama.cpp computes the norms of the latents with epsilon {config.rms_norm_eps}, "
            f"transformers with {LATENT_EPS}: logits differ a little."
        )
    if low := getattr(config, "time_step_min", 0):
        notes.append(
            f"llama.cpp does not bound the time steps of Mamba layers from below by {low}, as "
            "transformers does for this model: logits differ a little."
        )
    rope = rope_of(config)
    if rope.get("rope_type") == "dynamic" and not rope.get("alpha"):
        notes.append(
            f"llama.cpp does not stretch the rotary embedding of texts beyond "
            f"{config.max_position_embeddings:,} tokens: they give other results than in "
            "transformers."
        )
    if rope.get("rope_type") == "yarn" and not rope.get("truncate", True):
        notes.append(
            "llama.cpp rounds the limits of YaRN's ramp, which transformers does not for this "
            "model: logits differ a little, as in every GGUF file of this family."
        )
    return notes
