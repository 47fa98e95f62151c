"""Which heads, neurons and layers are kept, against direct computations."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lrc.cloning.shape.layers import choose_layers
from lrc.cloning.shape.units import choose_units, unit_costs
from lrc.model.kept_units import spread
from tiny import tiny_teacher, tiny_tokens


def problem(size: int, units: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs [tokens, n] that depend on each other, a writer [d, n] and a metric [d, d]."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    count = size * units
    inputs = draw(400, count) @ (torch.eye(count, dtype=torch.float64) + 0.4 * draw(count, count))
    root = draw(5, 5)
    return inputs, draw(5, count), root @ root.T


def loss_without(inputs: Tensor, writer: Tensor, metric: Tensor, kept: Tensor) -> float:
    """The squared error in the metric if the writer is solved again for the kept inputs."""
    wanted = inputs @ writer.T
    solution = torch.linalg.lstsq(inputs[:, kept], wanted).solution
    wrong = wanted - inputs[:, kept] @ solution
    return float(((wrong @ metric) * wrong).sum())


@pytest.mark.parametrize(("size", "units"), [(1, 7), (3, 4)])
def test_the_cost_of_a_unit_is_the_loss_without_it(size: int, units: int) -> None:
    inputs, writer, metric = problem(size, units)
    values, vectors = torch.linalg.eigh(metric)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    costs = unit_costs((inputs.T @ inputs).inverse(), root @ writer, size)
    for unit in range(units):
        others = spread(torch.tensor([u for u in range(units) if u != unit]), size)
        assert float(costs[unit]) == pytest.approx(loss_without(inputs, writer, metric, others))


@pytest.mark.parametrize(("size", "units", "count"), [(1, 9, 4), (2, 6, 3)])
def test_the_choice_is_close_to_the_best(size: int, units: int, count: int) -> None:
    """Of all choices of a few units, the loss of ours is among the lowest tenth."""
    ranks = []
    for seed in range(8):
        inputs, writer, metric = problem(size, units, seed)
        kept = choose_units(inputs.T @ inputs, writer, metric, size, count)
        own = loss_without(inputs, writer, metric, spread(kept, size))
        every = [
            loss_without(inputs, writer, metric, spread(torch.tensor(choice), size))
            for choice in itertools.combinations(range(units), count)
        ]
        ranks.append(sum(loss < own * (1 - 1e-9) for loss in every) / len(every))
        assert len(kept) == count
        assert torch.equal(kept, kept.sort().values)
    assert sum(ranks) / len(ranks) < 0.1


@pytest.mark.parametrize(("size", "units"), [(1, 60), (3, 30)])
def test_a_choice_asks_for_no_values(size: int, units: int) -> None:
    """A GPU would wait for each removed unit."""
    inputs, writer, metric = problem(size, units)

    class NoValues(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            assert func.overloadpacket.__name__ != "_local_scalar_dense"
            return func(*args, **(kwargs or {}))

    with NoValues():
        assert len(choose_units(inputs.T @ inputs, writer, metric, size, units // 3)) == units // 3


def test_a_unit_that_others_stand_in_for_goes_first() -> None:
    """However active it is."""
    inputs, writer, metric = problem(1, 6)
    inputs[:, 4] = 3 * inputs[:, 1]
    kept = choose_units(inputs.T @ inputs, writer, metric, 1, 5)
    assert {1, 4} - set(kept.tolist())


def test_layers_are_chosen_greedily_by_the_kl() -> None:
    teacher = tiny_teacher("llama", num_hidden_layers=5)
    with torch.no_grad():  # the last layers of a random model matter less
        for layer, scale in enumerate((1.0, 0.3, 1.0, 0.02, 0.6)):
            for path in ("self_attn.o_proj", "mlp.down_proj"):
                teacher.model.get_submodule(f"model.layers.{layer}.{path}").weight.mul_(scale)
    ids = tiny_tokens(8)
    whole = teacher.model(ids).logits.log_softmax(-1)
    layers = teacher.model.model.layers

    def kl(kept: list[int]) -> float:
        teacher.model.model.layers = torch.nn.ModuleList(layers[index] for index in kept)
        teacher.config.num_hidden_layers = len(kept)
        with torch.no_grad():
            own = teacher.model(ids, use_cache=False).logits.log_softmax(-1)
        teacher.model.model.layers = layers
        teacher.config.num_hidden_layers = 5
        return float((whole.exp() * (whole - own)).sum(-1).mean())

    kept = list(range(5))
    for count in (4, 3, 2):
        kept = min(([k for k in kept if k != gone] for gone in kept[1:]), key=kl)
        assert choose_layers(teacher, ids, count) == kept
