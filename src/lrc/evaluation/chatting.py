"""A conversation with a model, in its own chat template."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, TextStreamer
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.generation import StoppingCriteria

from lrc.model.tokenizer import RefusedConversation, chat_text, end_tokens, need_template
from lrc.system.errors import UserError


class Chat:
    """The turns so far, and how the model answers the next one."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        system: str | None = None,
    ) -> None:
        """
        Args:
            model: the model.
            tokenizer: its tokenizer.
            max_new_tokens: maximum length of an answer; None: 512, or half of the model's context
                if that is shorter.
            temperature: sampling temperature, 0 for greedy; None: the model's generation config.
            system: the system message; None: none.

        Raises:
            UserError: if the tokenizer has no chat template.
        """
        need_template(tokenizer)
        self._model, self._tokenizer = model, tokenizer
        self._longest: int | None = getattr(model.config, "max_position_embeddings", None)
        default = min(512, self._longest // 2) if self._longest else 512
        self._max_new_tokens, self._temperature = max_new_tokens or default, temperature
        self.system = system
        self.turns: list[dict[str, str]] = []

    def reset(self) -> None:
        """Forget the turns, but not the system message."""
        self.turns = []

    def answer(self, text: str, show: Callable[[str], None], stopped: Callable[[], bool]) -> str:
        """The model's answer to the user's next turn.

        Args:
            text: the user's turn.
            show: called with every piece of the answer.
            stopped: asked after every token whether to end the answer.

        Raises:
            UserError: if the turn does not fit into the model's context, or the chat template
                refuses it; the turn is then forgotten.
        """
        self.turns.append({"role": "user", "content": text})
        try:
            ids = self._prompt()
        except UserError:
            self.turns.pop()
            raise
        start = torch.tensor([ids], device=self._model.device)
        with torch.no_grad():
            output = self._model.generate(
                start,
                attention_mask=torch.ones_like(start),
                max_new_tokens=self._max_new_tokens,
                streamer=_Pieces(self._tokenizer, show),
                stopping_criteria=[_Stopped(stopped)],
                **self._settings(),
            )
        answer = self._tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True).strip()
        self.turns.append({"role": "assistant", "content": answer})
        return answer

    def _settings(self) -> dict[str, Any]:
        """Sampling, and every token that ends an answer."""
        ends = end_tokens(self._tokenizer, self._model.generation_config)
        settings: dict[str, Any] = {
            "eos_token_id": ends or None,
            "pad_token_id": self._tokenizer.eos_token_id,
        }
        if self._temperature is not None:
            settings |= {"do_sample": self._temperature > 0}
        if self._temperature:
            settings["temperature"] = self._temperature
        return settings

    def _prompt(self) -> list[int]:
        """The conversation as tokens; the oldest turns are forgotten if it is too long."""
        longest, turns = self._longest, list(self.turns)
        while True:
            system = [{"role": "system", "content": self.system}] if self.system else []
            try:
                text = chat_text(self._tokenizer, system + turns, generation_prompt=True)
            except RefusedConversation as error:
                raise UserError(f"The chat template refuses this turn ({error}).") from error
            # The template writes the special tokens, BOS included.
            ids = list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            if not longest or len(ids) + self._max_new_tokens <= longest:
                self.turns = turns
                return ids
            if len(turns) == 1:
                raise UserError(
                    f"This turn and an answer of {self._max_new_tokens} tokens do not fit into the "
                    f"model's {longest} tokens: write less, or lower --max-new-tokens."
                )
            del turns[:2]


class _Pieces(TextStreamer):  # type: ignore[misc]
    """Passes on an answer as it is written."""

    def __init__(self, tokenizer: Tokenizer, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._show(text)


class _Stopped(StoppingCriteria):  # type: ignore[misc]
    """Ends an answer when it is asked to."""

    def __init__(self, stopped: Callable[[], bool]) -> None:
        self._stopped = stopped

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self._stopped(), device=input_ids.device)
