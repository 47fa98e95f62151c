"""Convert stories260K, a real trained Llama with 260 thousand parameters, for transformers.

    python -m lrc.stories260k SOURCE FOLDER

writes a model folder with its tokenizer, and `stories.jsonl` with stories sampled from the model:
text of its own domain, for comparisons small enough to run anywhere (docs/compare.md). SOURCE holds
`stories260K.bin` and `tok512.bin` of llama2.c: a header with float32 tensors, and the tokens with
their scores. The files are not part of the repository.
"""

import argparse
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

MODEL, TOKENS = "stories260K.bin", "tok512.bin"
"""Files of llama2.c."""

STORIES, STORY_TOKENS, SEED = 4_000, 255, 0
"""Number of stories, maximum tokens per story, and the seed: a million tokens in four minutes on
two cores."""

BATCH = 500
"""Stories to sample at a time."""

SPECIAL = 3
"""Number of tokens before the raw bytes: unknown, BOS, EOS."""


def save_stories(source: Path, folder: Path) -> None:
    """Write the model and its tokenizer as a transformers model folder."""
    read_model(source / MODEL).save_pretrained(folder)
    read_tokenizer(source / TOKENS).save_pretrained(folder)


def tell(folder: Path, stories: int, tokens: int, seed: int) -> Iterator[str]:
    """Sample stories from the model in a folder, at temperature 1."""
    model = LlamaForCausalLM.from_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    torch.manual_seed(seed)
    for first in range(0, stories, BATCH):
        start = torch.full((min(BATCH, stories - first), 1), tokenizer.bos_token_id)
        written = model.generate(
            start,
            attention_mask=torch.ones_like(start),
            max_new_tokens=tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            pad_token_id=tokenizer.eos_token_id,
        )
        yield from tokenizer.batch_decode(written, skip_special_tokens=True)


def write_stories(path: Path, stories: Iterator[str]) -> None:
    """Write stories as JSONL."""
    lines = [json.dumps({"text": story}) + "\n" for story in stories]
    path.write_text("".join(lines), encoding="utf-8")


def read_model(path: Path) -> LlamaForCausalLM:
    """Read the model from llama2.c's file."""
    data = path.read_bytes()
    dim, ffn, layers, heads, kv_heads, vocab, length = struct.unpack_from("<7i", data)
    numbers = torch.from_numpy(np.frombuffer(data, "<f4", offset=28).copy())
    head_dim = dim // heads
    offset = 0

    def take(*shape: int) -> Tensor:
        nonlocal offset
        size = int(np.prod(shape))
        offset += size
        return numbers[offset - size : offset].view(shape)

    state = {"model.embed_tokens.weight": take(vocab, dim)}
    for name, shape in (
        ("input_layernorm", (dim,)),
        ("self_attn.q_proj", (dim, dim)),
        ("self_attn.k_proj", (kv_heads * head_dim, dim)),
        ("self_attn.v_proj", (kv_heads * head_dim, dim)),
        ("self_attn.o_proj", (dim, dim)),
        ("post_attention_layernorm", (dim,)),
        ("mlp.gate_proj", (ffn, dim)),
        ("mlp.down_proj", (dim, ffn)),
        ("mlp.up_proj", (ffn, dim)),
    ):
        for layer, weight in enumerate(take(layers, *shape)):
            rotated = name in ("self_attn.q_proj", "self_attn.k_proj")
            value = halves_from_pairs(weight, head_dim) if rotated else weight
            state[f"model.layers.{layer}.{name}.weight"] = value
    state["model.norm.weight"] = take(dim)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    config = LlamaConfig(
        hidden_size=dim,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    return model


def halves_from_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of q or k [heads * head_dim, dim] to transformers' rotary layout.

    llama2.c rotates neighboring rows together. transformers rotates row i with row
    i + head_dim / 2.
    """
    heads = weight.view(-1, head_dim // 2, 2, weight.shape[1])
    return heads.transpose(1, 2).reshape(weight.shape)


def read_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Read the tokenizer from llama2.c's file: a BPE that merges the pair with the top score."""
    tokens = list(read_tokens(path.read_bytes()))
    vocabulary = {token: i for i, (token, _) in enumerate(tokens)}
    by_score = sorted(tokens[SPECIAL + 256 :], key=lambda entry: -entry[1])
    merges = [
        (token[:i], token[i:])
        for token, _ in by_score
        for i in range(1, len(token))
        if token[:i] in vocabulary and token[i:] in vocabulary
    ]
    unknown, bos, eos = (token for token, _ in tokens[:SPECIAL])
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, byte_fallback=True))
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unknown, bos_token=bos, eos_token=eos
    )


def read_tokens(data: bytes) -> Iterator[tuple[str, float]]:
    """Yield tokens and scores; special tokens are on their own lines in the file."""
    offset = 4
    while offset < len(data):
        score, length = struct.unpack_from("<fi", data, offset)
        offset += 8
        text = data[offset : offset + length].decode()
        yield (text if text.isspace() else text.strip("\n")), score
        offset += length


def main() -> None:
    """Convert the model and sample stories from it."""
    parser = argparse.ArgumentParser(description="stories260K for transformers, with stories.")
    parser.add_argument("source", type=Path, help="folder with stories260K.bin and tok512.bin")
    parser.add_argument("folder", type=Path, help="folder to write")
    parser.add_argument("--stories", type=int, default=STORIES, help="number of stories")
    arguments = parser.parse_args()
    for name in (MODEL, TOKENS):
        if not (arguments.source / name).is_file():
            parser.error(f"there is no {arguments.source / name}, a file of llama2.c's stories260K")
    logging.disable_progress_bar()
    save_stories(arguments.source, arguments.folder)
    print(f"The model is in {arguments.folder}. Sampling {arguments.stories:,} stories ...")
    stories = tell(arguments.folder, arguments.stories, STORY_TOKENS, SEED)
    write_stories(arguments.folder / "stories.jsonl", stories)
    print(f"The stories are in {arguments.folder / 'stories.jsonl'}.")


if __name__ == "__main__":
    main()
