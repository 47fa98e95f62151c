"""Continuing a text with a model."""

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer


def generate_text(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """The continuation of a prompt, without the prompt; greedy where the temperature is 0."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    if inputs["input_ids"].shape[1] == 0:  # an empty prompt: start a document
        start = tokenizer.bos_token_id or tokenizer.eos_token_id
        inputs = {
            "input_ids": torch.tensor([[start]], device=model.device),
            "attention_mask": torch.ones(1, 1, dtype=torch.long, device=model.device),
        }
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
    torch.manual_seed(seed)
    with torch.no_grad():
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.eos_token_id,
            **(sampling or {"do_sample": False}),
        )
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
