"""Collect the activations to clone from both models with hooks on their linear maps.

The clone loss needs the outputs of q, k, v, gate and up before rotary embedding and activation
function, and the outputs of the attention block (after o) and of the FFN (after down). All of them
are outputs of linear maps, so one kind of hook on the modules of both models collects them.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext

from torch import Tensor, nn
from transformers import PreTrainedModel, masking_utils

from lrc.data.batch import Batch
from lrc.model.families import family_of
from lrc.model.layout import Layout, LinearSite

Observer = Callable[[LinearSite, Tensor, Tensor], Tensor]
"""Called with the site and with the linear map's input and output, each [batch, sequence, width].
Returns the output that the model continues with."""


@contextmanager
def observe(
    model: nn.Module, layout: Layout, sites: Iterable[LinearSite], observer: Observer
) -> Iterator[None]:
    """While the context is open, observe every forward pass of the given linear maps."""
    handles = []
    try:
        for site in sites:
            module = model.get_submodule(layout.linear(site))
            handles.append(module.register_forward_hook(_hook(site, observer)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(
    site: LinearSite, observer: Observer
) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
    def hook(_module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return observer(site, inputs[0], output)

    return hook


Output = Tensor | tuple[Tensor, ...]
"""What a linear map returns. Routers return more than their logits."""


def activation_of(output: Output) -> Tensor:
    """The activation in the output of a linear map, [batch, sequence, width]. Inside a mixture of
    experts it is [batch * sequence, width]."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def known_padding(batch: Batch) -> Iterator[None]:
    """Tell transformers how a batch is packed and padded, while the context is open.

    Otherwise transformers checks in every forward pass whether position ids restart and whether
    anything is padded, and the CPU waits for the device. A batch that packs documents has position
    ids, one with padding has a mask, and no other batch has any.
    """
    names = vars(masking_utils)
    asked = {name: names[name] for name in ("is_tracing", "find_packed_sequence_indices")}
    names["is_tracing"] = lambda *_: True  # while it traces, it asks for no value
    if batch.position_ids is None:
        names["find_packed_sequence_indices"] = lambda _: None
    try:
        yield
    finally:
        names.update(asked)


def last_hidden(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The hidden state after the final norm, [batch, sequence, hidden size].

    It includes the model's logit scale: its products with the rows of the LM head are the logits,
    before the softcap if the model has one.
    """
    with nullcontext() if batch.input_ids.device.type == "cpu" else known_padding(batch):
        output = model.base_model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
        )
    return scaled_hidden(model, output.last_hidden_state)


def scaled_hidden(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Hidden states after the final norm, times the model's logit scale."""
    scale = family_of(model.config.model_type).logit_scale(model.config)
    return hidden if scale == 1 else hidden * scale
