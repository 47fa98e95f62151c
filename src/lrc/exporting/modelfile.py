"""Ollama's Modelfile for a GGUF file."""

from typing import Any

from transformers import GenerationConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from lrc.model.tokenizer import RefusedConversation, chat_text, end_tokens, framing
from lrc.system.errors import UserError

GREEDY = {"temperature": 0, "top_p": None, "top_k": None, "min_p": None}
"""Sampling settings of a model that does not sample."""

SYSTEM, PROMPT, RESPONSE = "SYSTEM-TEXT", "PROMPT-TEXT", "RESPONSE-TEXT"
"""Stand for the texts in a rendered conversation."""

PARAMETERS = {
    "temperature": ("temperature", 1.0),
    "top_p": ("top_p", 1.0),
    "top_k": ("top_k", 50),
    "min_p": ("min_p", 0.0),
    "repetition_penalty": ("repeat_penalty", 1.0),
}
"""Ollama's names of sampling settings, and transformers' defaults, by transformers' names. Ollama
has other defaults."""


def modelfile(gguf: str, tokenizer: Tokenizer, generation: GenerationConfig | None) -> str:
    """The text of a Modelfile.

    Args:
        gguf: name of the GGUF file beside it.
        tokenizer: the model's tokenizer.
        generation: the model's sampling settings; None: none.
    """
    lines = [f"FROM ./{gguf}"]
    if tokenizer.chat_template:
        lines.append(f'TEMPLATE """{ollama_template(tokenizer)}"""')
    ends = tokenizer.convert_ids_to_tokens(end_tokens(tokenizer, generation))
    lines += [f'PARAMETER stop "{token}"' for token in ends if token]
    settings: dict[str, Any] = {} if generation is None else generation.to_diff_dict()
    if not settings.get("do_sample"):
        settings = {**settings, **GREEDY}
    for name, (ollamas, default) in PARAMETERS.items():
        value = settings.get(name)
        lines.append(f"PARAMETER {ollamas} {default if value is None else value}")
    return "\n".join(lines) + "\n"


def ollama_template(tokenizer: Tokenizer) -> str:
    """The chat template in Ollama's language, read off rendered conversations. Ollama itself adds
    the BOS that the tokenizer adds.

    Raises:
        UserError: if the template does not render the texts as they are.
    """
    user = {"role": "user", "content": PROMPT}
    before, after = _around(tokenizer, [user], PROMPT)
    _, end = _around(tokenizer, [user, {"role": "assistant", "content": RESPONSE}], RESPONSE)
    try:
        head, rest = _around(tokenizer, [{"role": "system", "content": SYSTEM}, user], SYSTEM)
    except RefusedConversation:
        opening = before
    else:
        between = rest.partition(PROMPT)[0]
        opening = f"{{{{ if .System }}}}{head}{{{{ .System }}}}{between}"
        opening += f"{{{{ else }}}}{before}{{{{ end }}}}"
    return f"{opening}{{{{ .Prompt }}}}{after}{{{{ .Response }}}}{end}"


def _around(tokenizer: Tokenizer, messages: list[dict[str, str]], text: str) -> tuple[str, str]:
    """What is rendered before and after a text, without the BOS that Ollama adds."""
    prompt = messages[-1]["role"] == "user"
    rendered = chat_text(tokenizer, messages, generation_prompt=prompt)
    if framing(tokenizer)[0]:
        rendered = rendered.removeprefix(tokenizer.bos_token)
    before, found, after = rendered.partition(text)
    if not found:
        raise UserError("The chat template changes what is said, so no Modelfile can be written.")
    return before, after
