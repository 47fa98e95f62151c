"""Text generation with a model."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lrc.model.tokenizer import end_tokens, plain_ids
from lrc.system.errors import UserError

logger = logging.getLogger(__name__)


def generate_text(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    whole: bool = False,
) -> str:
    """The continuation of a prompt, without the prompt; greedy if the temperature is 0.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        prompt: the text; empty: a new document.
        max_new_tokens: maximum number of generated tokens.
        temperature: sampling temperature.
        seed: sampling seed.
        whole: whether the prompt already contains its special tokens, as the output of a chat
            template does.
    """
    if whole:
        ids = list(tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"])
    else:
        ids = plain_ids(tokenizer, prompt)
    return continue_tokens(model, tokenizer, ids, max_new_tokens, temperature, seed)


def continue_tokens(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """The continuation of some tokens, as in `generate_text`, up to the end of the model's context;
    no tokens: a new document.

    Raises:
        UserError: if the tokens alone fill the context.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest and len(ids) + max_new_tokens > longest:
        if len(ids) >= longest:
            raise UserError(
                f"The prompt has {len(ids):,} tokens, and the model's context is {longest:,}: "
                "shorten it."
            )
        max_new_tokens = longest - len(ids)
        logger.warning("The model's context ends after %d more tokens.", max_new_tokens)
    start = torch.tensor([list(ids) or [eos if bos is None else bos]], device=model.device)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    with torch.no_grad(), own_settings(model, tokenizer):
        output = model.generate(
            start,
            attention_mask=torch.ones_like(start),
            max_new_tokens=max_new_tokens,
            **(sampling or {"do_sample": False}),
        )
    return tokenizer.decode(output[0, start.shape[1] :], skip_special_tokens=True)


@contextmanager
def own_settings(model: PreTrainedModel, tokenizer: Tokenizer) -> Iterator[None]:
    """Context in which a model ignores its own generation settings.

    Its beams, penalties and forced tokens would change a greedy sample.

    Args:
        model: the model; only its end-of-text tokens are kept.
        tokenizer: its tokenizer, whose EOS ends a text, too.
    """
    before = model.generation_config
    model.generation_config = GenerationConfig(
        eos_token_id=end_tokens(tokenizer, before) or None, pad_token_id=tokenizer.eos_token_id
    )
    try:
        yield
    finally:
        model.generation_config = before
