"""Ollama's Modelfile for a GGUF file."""

from typing import Any

from transformers import GenerationConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from lrc.model.tokenizer import RefusedConversation, chat_text
from lrc.system.errors import UserError

SYSTEM, PROMPT, RESPONSE = "SYSTEM-TEXT", "PROMPT-TEXT", "RESPONSE-TEXT"
"""Stand for the texts in a rendered conversation."""

PARAMETERS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
"""Ollama's names of sampling settings, by transformers' names."""


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
    if tokenizer.eos_token:
        lines.append(f'PARAMETER stop "{tokenizer.eos_token}"')
    settings: dict[str, Any] = {} if generation is None else generation.to_diff_dict()
    if settings.get("do_sample"):
        known = {PARAMETERS[name]: settings[name] for name in PARAMETERS if settings.get(name)}
    else:
        known = {"temperature": 0}
    lines += [f"PARAMETER {name} {value}" for name, value in known.items()]
    return "\n".join(lines) + "\n"


def ollama_template(tokenizer: Tokenizer) -> str:
    """The chat template in Ollama's language, read off rendered conversations. Ollama itself adds
    BOS.

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
    """What is rendered before and after a text, without BOS."""
    prompt = messages[-1]["role"] == "user"
    rendered = chat_text(tokenizer, messages, generation_prompt=prompt)
    if tokenizer.bos_token:
        rendered = rendered.removeprefix(tokenizer.bos_token)
    before, found, after = rendered.partition(text)
    if not found:
        raise UserError("The chat template changes what is said, so no Modelfile can be written.")
    return before, after
