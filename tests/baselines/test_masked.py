"""A masked model against the model cut to its open units, and against scaled weights."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lrc.baselines.pruning.masked import MaskHooks, MaskValues
from lrc.data.batch import Batch
from lrc.model.kept_units import KeptUnits, cut
from lrc.model.teacher import Teacher
from tiny import FFN, HIDDEN, TINY_CASES, Case, tiny_batch, tiny_teacher

LAYERS, GROUPS = 3, 2
SHAPE = {"num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": GROUPS}
BATCHES = [tiny_batch(), tiny_batch(lengths=[9, 4]), tiny_batch(documents=[[4, 5], [2, 7]])]


pytestmark = pytest.mark.usefixtures("exact_norms")


def teacher_of(case: Case) -> Teacher:
    family, tied, changes = case
    return tiny_teacher(family, tied, **SHAPE, **changes)


def logits(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model(
            batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
        ).logits


def chosen(of: int, number: int, seed: int) -> list[int]:
    order = torch.randperm(of, generator=torch.Generator().manual_seed(seed))
    return sorted(order[:number].tolist())


def binary(size: int, units: list[int]) -> Tensor:
    mask = torch.zeros(size, dtype=torch.float64)
    mask[units] = 1
    return mask


@pytest.mark.parametrize("case", TINY_CASES)
def test_masks_of_0_and_1_are_the_cut_model(case: Case) -> None:
    teacher = teacher_of(case)
    layers, hidden = [0, 2], chosen(HIDDEN, 10, 0)
    groups = [chosen(GROUPS, 1, layer) for layer in range(LAYERS)]
    neurons = [chosen(FFN, 7, layer) for layer in range(LAYERS)]
    kept = KeptUnits(
        layers,
        torch.tensor(hidden),
        [torch.tensor(groups[i]) for i in layers],
        [torch.tensor(neurons[i]) for i in layers],
    )
    pruned = cut(teacher.model, kept)
    plain = [logits(teacher.model, batch) for batch in BATCHES]
    hooks = MaskHooks(teacher.model)
    hooks.values = MaskValues(
        binary(LAYERS, layers),
        binary(HIDDEN, hidden),
        torch.stack([binary(GROUPS, row) for row in groups]),
        torch.stack([binary(FFN, row) for row in neurons]),
    )
    for batch, before in zip(BATCHES, plain, strict=True):
        masked = logits(teacher.model, batch)
        torch.testing.assert_close(masked, logits(pruned, batch), rtol=1e-11, atol=1e-11)
        assert (masked - before).abs().max() > 0.1
    # Without values, with open masks, or after removal of the hooks it is the original model.
    ones = torch.ones(LAYERS, FFN, dtype=torch.float64)
    for values in (MaskValues(), MaskValues(ones[:, 0], ones[0, :HIDDEN], ones[:, :GROUPS], ones)):
        hooks.values = values
        torch.testing.assert_close(logits(teacher.model, BATCHES[0]), plain[0])
    hooks.values = MaskValues(hidden=binary(HIDDEN, hidden))
    hooks.remove()
    assert torch.equal(logits(teacher.model, BATCHES[0]), plain[0])


@pytest.mark.parametrize("case", TINY_CASES[::2])
def test_soft_masks_are_scaled_weights(case: Case) -> None:
    """Masks between 0 and 1 on hidden dimensions, heads and neurons, absorbed by weights, gains
    and epsilon."""
    teacher = teacher_of(case)
    generator = torch.Generator().manual_seed(3)

    def soft(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    hidden, groups, neurons = soft(HIDDEN), soft(LAYERS, GROUPS), soft(LAYERS, FFN)
    model = copy.deepcopy(teacher.model)
    head = model.lm_head.weight.detach().clone()
    share = (hidden**2).mean()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(hidden)
        model.lm_head.weight = nn.Parameter(head)
        for i, layer in enumerate(model.model.layers):
            width = layer.self_attn.o_proj.in_features // GROUPS
            layer.self_attn.o_proj.weight.mul_(groups[i].repeat_interleave(width))
            layer.mlp.down_proj.weight.mul_(neurons[i])
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight.mul_(hidden[:, None])
                if linear.bias is not None:
                    linear.bias.mul_(hidden)
        norms = [
            norm
            for layer in model.model.layers
            for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        ]
        for norm in (*norms, model.model.norm):
            norm.weight.mul_(share.sqrt())
            norm.variance_epsilon *= share.item()
    hooks = MaskHooks(teacher.model)
    hooks.values = MaskValues(hidden=hidden, groups=groups, neurons=neurons)
    masked = logits(teacher.model, BATCHES[0])
    torch.testing.assert_close(masked, logits(model, BATCHES[0]), rtol=1e-11, atol=1e-11)


def test_a_half_open_layer_is_between_its_input_and_its_output() -> None:
    teacher = tiny_teacher("llama", **SHAPE)
    hooks = MaskHooks(teacher.model)
    seen: list[Tensor] = []
    teacher.model.model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for openness in (0.0, 1.0, 0.3):
        hooks.values = MaskValues(layers=torch.tensor([openness, 0, 0], dtype=torch.float64))
        logits(teacher.model, BATCHES[0])
    before, after, between = seen
    assert torch.equal(before, teacher.model.model.embed_tokens(BATCHES[0].input_ids))
    torch.testing.assert_close(between, 0.3 * after + 0.7 * before)
