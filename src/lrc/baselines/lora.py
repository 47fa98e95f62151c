"""Low-rank adapters on a student's linear maps (peft), and the equivalent plain model."""

from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from lrc.model.layout import layout_of
from lrc.system.errors import UserError

BASE = ".base_layer."
"""Infix that peft adds to the names of the parameters that it adapts."""


def add_adapters(model: PreTrainedModel, rank: int, alpha: float, seed: int) -> PreTrainedModel:
    """Add an adapter to every linear map of a model, in place, and freeze all other parameters.

    Args:
        model: the model; the adapters do not change its outputs at first.
        rank: rank of the adapters.
        alpha: numerator of the adapters' scale, alpha / rank.
        seed: seed of their first factors; the state of torch's generator does not change.

    Raises:
        UserError: if peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError(
            "method.recovery: lora needs peft; run `pip install 'low-rank-clone[peft]'`."
        ) from error
    layout = layout_of(model)
    paths = [layout.linear(site) for site in layout.sites()]
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=paths)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return inject_adapter_in_model(config, model)


def adapted_parameters(adapted: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The model's own parameters without its adapters, by their names in the plain model."""
    for name, value in adapted.named_parameters():
        if ".lora_" not in name:
            yield name.replace(BASE, "."), value


@torch.no_grad()
def write_base(adapted: nn.Module, plain: nn.Module) -> None:
    """Copy the weights of a plain model to a model with adapters; the adapters do not change."""
    for name, value in adapted_parameters(adapted):
        value.copy_(plain.get_parameter(name))


@torch.no_grad()
def write_merged(plain: nn.Module, adapted: nn.Module) -> None:
    """Merge a model with adapters into a plain model."""
    from peft.tuners.lora import LoraLayer

    for name, value in adapted_parameters(adapted):
        plain.get_parameter(name).copy_(value)
    for path, module in adapted.named_modules():
        if isinstance(module, LoraLayer):
            for adapter in module.active_adapters:
                weight = plain.get_submodule(path).get_parameter("weight")
                weight.add_(module.get_delta_weight(adapter))
