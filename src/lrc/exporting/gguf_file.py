"""Models as GGUF files, for llama.cpp and the tools built on it (Ollama, LM Studio).

llama.cpp's `gguf` package writes the container, names the tensors and quantizes. transformers only
reads GGUF, and no package contains llama.cpp's converter script. So this module does the part in
between: it decides which numbers go where. Every tensor is converted when it is written, so memory
never holds a second copy of the model.
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
from gguf import GGUFWriter, LlamaFileType, RopeScalingType
from gguf.quants import quant_shape_to_byte_shape, quantize
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lrc.exporting.gguf_vocabulary import add_vocabulary
from lrc.exporting.plain import check_range
from lrc.model.families import family_of
from lrc.model.layout import LinearSite, layout_of
from lrc.model.shapes import head_dim_of
from lrc.model.teacher import describe_teacher, load_model, short_name
from lrc.recipe.sections import TeacherSection
from lrc.system.errors import UserError
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

K_BLOCK = 256
"""Elements per block of llama.cpp's K-quants."""


class StoredPlace(NamedTuple):
    """A tensor to write to the file."""

    name: str
    """Its name in the model, for messages."""
    tensor: Tensor
    kind: Kind
    """The stored element type."""
    heads: int | None = None
    """Number of heads, if `neighbors_from_halves` must reorder the rows."""

    def shape(self) -> tuple[int, ...]:
        """The stored shape in bytes."""
        return quant_shape_to_byte_shape(self.tensor.shape, self.kind)

    def stored(self) -> np.ndarray[Any, Any]:
        """The stored values."""
        values = self.tensor.detach()
        check_range([(self.name, values)], TORCH_TYPES.get(self.kind, torch.float32))
        if self.heads is not None:
            values = neighbors_from_halves(values, self.heads)
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
    family = family_of(model.config.model_type)
    if family.gguf is None:
        raise UserError(f"{family.model_type} models cannot be written as GGUF; use safetensors.")
    tensors = dict(_tensors(model, kind))
    with new_file(path) as temporary:
        writer = GGUFWriter(temporary, family.gguf)
        try:
            _add_about(writer, model, about, kind)
            factors = _add_shape(writer, model)
            notes = add_vocabulary(writer, tokenizer, model.config.vocab_size)
            if factors is not None:
                tensors["rope_freqs.weight"] = StoredPlace("rope_freqs", factors, Kind.F32)
            for name, place in tensors.items():
                shape = place.shape()
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
    return [*notes, *_notes(model, kind, [place.kind for place in tensors.values()])]


def convert_to_gguf(
    name: str,
    path: Path,
    kind: Kind | None = None,
    progress: Progress = lambda done, total: None,
) -> list[str]:
    """Write any model, named like a teacher (hub id, folder, .gguf file or `package:NAME`).

    If `kind` is None, the model's own element type is kept. The other arguments, the return value
    and the errors are those of `write_gguf`.
    """
    model, tokenizer = load_model(name)
    described = describe_teacher(TeacherSection(model=name))
    about = About(short_name(name), described.license, languages=described.languages)
    return write_gguf(model, tokenizer, path, kind or kind_of(model.dtype), about, progress)


def kind_of(dtype: torch.dtype) -> Kind:
    """The GGUF element type that keeps a model's own; float32 for wider types."""
    return {torch.float16: Kind.F16, torch.bfloat16: Kind.BF16}.get(dtype, Kind.F32)


def _tensors(model: PreTrainedModel, kind: Kind) -> Iterator[tuple[str, StoredPlace]]:
    """llama.cpp's name of every parameter and the tensor to store; tied parameters appear once."""
    layout, config = layout_of(model), model.config
    family = layout.family
    architecture = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == family.gguf)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    heads = {}
    if family.gguf_neighbors:
        for layer in range(layout.num_layers):
            heads[layout.linear(LinearSite(layer, "q"))] = config.num_attention_heads
            heads[layout.linear(LinearSite(layer, "k"))] = config.num_key_value_heads
    for path, parameter in model.named_parameters():
        name = names.get_name(path, try_suffixes=(".weight", ".bias"))
        no_bias = family.gguf != "llama" and path.endswith(".bias")  # llama has all of them
        if name is None or no_bias:
            raise UserError(f"llama.cpp's {family.gguf} has no place for the parameter '{path}'.")
        module = path.rpartition(".")[0]
        yield name, StoredPlace(path, parameter, _stored(parameter, kind), heads.get(module))


def neighbors_from_halves(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of q or k, or its bias, for rotary embedding of neighboring rows.

    Args:
        weight: [heads * head_dim, width] or [heads * head_dim]; row i of a head is rotated with row
            i + head_dim / 2.
        heads: number of heads.

    Returns:
        The same rows, with each rotated pair side by side.
    """
    return weight.view(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _stored(parameter: Tensor, kind: Kind) -> Kind:
    """The stored type of a parameter in a file of type `kind`."""
    if parameter.ndim == 1:
        return Kind.F32
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return kind if parameter.shape[-1] % block == 0 else Kind.F16


def _add_about(writer: GGUFWriter, model: PreTrainedModel, about: About, kind: Kind) -> None:
    size = sum(p.numel() for p in model.parameters())
    metadata = gguf.Metadata(
        name=about.name,
        license=about.license,
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


def _add_shape(writer: GGUFWriter, model: PreTrainedModel) -> Tensor | None:
    """Write the model's shape, with explicit head widths, since they are not hidden_size / heads.

    Returns:
        The divisor of each rotary frequency, [head_dim / 2], if the model needs one.

    Raises:
        UserError: if llama.cpp cannot compute this model.
    """
    config = model.config
    if config.hidden_act != "silu":
        raise UserError(
            f"llama.cpp runs this model class only with silu, not {config.hidden_act}; use "
            "safetensors."
        )
    head_dim = head_dim_of(config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    return _add_rope(writer, config, head_dim)


def _add_rope(writer: GGUFWriter, config: Any, head_dim: int) -> Tensor | None:
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
        return None
    if kind == "llama3" and writer.arch == "llama":
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        return 1.0 / (rope["rope_theta"] ** exponents) / scaled
    raise UserError(f"Rotary scaling of type '{kind}' cannot be written as GGUF; use safetensors.")


def _notes(model: PreTrainedModel, kind: Kind, stored: list[Kind]) -> list[str]:
    """Notes for the user about a written file."""
    notes = []
    config = model.config
    kept = sum(found == Kind.F16 != kind for found in stored)
    if kept:
        block, _ = gguf.GGML_QUANT_SIZES[kind]
        matrices = sum(found != Kind.F32 for found in stored)
        notes.append(
            f"{kept} of {matrices} matrices are f16 because their row length is not a multiple of "
            f"{block}, the block size of {kind.name.lower()} (hidden size {config.hidden_size}, "
            f"FFN width {config.intermediate_size})."
        )
    uneven = [w for w in (config.hidden_size, config.intermediate_size) if w % K_BLOCK]
    if uneven:
        widths = " and ".join(map(str, uneven))
        notes.append(
            f"llama.cpp's K-quants (q4_k_m and others) need row lengths that are a multiple of "
            f"{K_BLOCK}; for matrices with rows of {widths}, llama.cpp falls back to other types."
        )
    window = getattr(config, "sliding_window", None)
    if window and window < config.max_position_embeddings:
        notes.append(
            f"llama.cpp attends to the whole context here, not to a window of {window} tokens: "
            "longer texts give other results than in transformers."
        )
    return notes
