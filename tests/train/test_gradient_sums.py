"""Gradients of several processes, added up during the backward pass."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lrc.cloning.method import Leaf
from lrc.system.distributed import Wait, World
from lrc.train.gradient_sums import GradientSums

NAMES = "abcde"


@dataclass(frozen=True)
class Recorded(World):
    """A process whose peers have no gradient of `others`."""

    sums: dict[str, Any] = field(default_factory=dict)
    others: set[str] = field(default_factory=set)
    sent: list[tuple[str, bool]] = field(default_factory=list)
    """What was sent, and whether the backward pass still ran."""
    waited: list[str] = field(default_factory=list)

    def reduce(self, tensor: torch.Tensor, owner: int) -> Wait:
        sums: GradientSums = self.sums["of"]
        (place,) = (i for i, leaf in enumerate(sums.leaves) if leaf.value.grad is tensor)
        assert sums.leaves[place].owner == owner
        self.sent.append((sums.names[place], sums._open))
        return lambda: self.waited.append(sums.names[place])

    def gather(self, value: Any) -> list[Any]:
        names = self.sums["of"].names
        return [value, {place for place, name in enumerate(names) if name in self.others}]


def a_process(others: Sequence[str] = ()) -> tuple[Recorded, GradientSums]:
    world = Recorded(0, 2, others=set(others))
    leaves = {name: Leaf(nn.Parameter(torch.ones(2)), owner) for owner, name in enumerate(NAMES)}
    world.sums["of"] = sums = GradientSums(world, leaves)
    return world, sums


def step(sums: GradientSums, used: Sequence[str], before: Sequence[str] = ()) -> set[str]:
    """A step of two backward passes, through leaves in the order given."""
    leaves = dict(zip(sums.names, sums.leaves, strict=True))
    for number, names in enumerate((before, used)):
        if number:
            sums.begin()
        total = torch.zeros(2, requires_grad=True)
        for name in reversed(names):
            total = (total + leaves[name].value).sin()
        total.sum().backward()
    missing = sums.finish()
    for leaf in sums.leaves:
        leaf.value.grad = None
    return missing


@given(st.permutations(NAMES), st.sets(st.sampled_from(NAMES)), st.sets(st.sampled_from(NAMES)))
def test_all_processes_send_the_same_in_one_order(
    order: list[str], ours: set[str], theirs: set[str]
) -> None:
    """Whatever has a gradient here or in the other process, and in whatever order it completes."""
    sent = []
    for mine, other in ((ours, theirs), (theirs, ours)):
        world, sums = a_process([name for name in NAMES if name not in other])
        assert step(sums, NAMES) == set()  # from now on all may be sent early
        world.sent.clear()
        used = [name for name in (order if mine is ours else NAMES) if name in mine]
        assert step(sums, used) == set(NAMES) - ours - theirs
        sent.append([name for name, _ in world.sent])
        assert set(world.waited) >= set(sent[-1])
    assert sent[0] == sent[1] == list(reversed(NAMES))


def test_gradients_are_sent_during_the_last_backward_pass_alone() -> None:
    world, sums = a_process()
    assert step(sums, "edcba") == set()
    assert world.sent == [(name, False) for name in "edcba"]  # nothing is known before
    world.sent.clear()
    step(sums, "edcba", before="edcba")
    assert world.sent == [(name, True) for name in "edcba"]
    world.sent.clear()
    step(sums, "dcba", before="e")  # e is complete only when the pass has ended
    assert world.sent == [(name, False) for name in "edcba"]
    sums.remove()
    world.sent.clear()
    step(sums, "edcba")
    assert world.sent == [(name, False) for name in "edcba"]


def test_what_has_no_gradient_anywhere_keeps_none() -> None:
    """Then the optimizer leaves it alone, as in a single process."""
    world, sums = a_process(others="ab")
    assert step(sums, "edc") == {"a", "b"}
    assert [name for name, _ in world.sent] == ["e", "d", "c"]
    world.sent.clear()
    assert step(sums, "edcb") == {"a"}
    assert world.sent == [("e", True), ("d", True), ("c", True), ("b", False)]
