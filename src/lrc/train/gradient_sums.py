"""Adds up the gradients of several processes while the last backward pass of a step still runs."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lrc.cloning.method import Leaf
from lrc.system.distributed import Wait, World


class GradientSums:
    """Adds up the gradients of all processes in the owners of their leaves.

    A gradient is sent when it and all before it in a fixed order are complete: the processes must
    send the same ones at the same time. Nothing is sent early of a leaf that had no gradient in the
    step before, since it may have none in any process.

    Args:
        world: the processes.
        leaves: what has gradients, by name; backward passes complete them from the last to the
            first.
    """

    def __init__(self, world: World, leaves: Mapping[str, Leaf]) -> None:
        self.world = world
        self.names = list(leaves)[::-1]
        self.leaves = [leaves[name] for name in self.names]
        self._early: set[int] = set()
        """Places of the leaves that are sent as soon as possible."""
        self._complete: set[int] = set()
        self._next = 0
        """The first place that may still have to be sent."""
        self._open = False
        self._waits: list[Wait] = []
        self._hooks: list[RemovableHandle] = []
        for place, leaf in enumerate(self.leaves if world.size > 1 else []):
            hook = leaf.value.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                partial(self._is_complete, place)
            )
            self._hooks.append(hook)

    def begin(self) -> None:
        """Send gradients from now on. Call it before the last backward pass of a step."""
        self._complete.clear()
        self._next, self._open = 0, True

    def finish(self) -> set[str]:
        """Send the other gradients and wait for all sums. Call it after that backward pass.

        Returns:
            The names of the leaves that have no gradient in any process.
        """
        if self.world.size == 1:
            return set()
        self._open = False
        places = range(len(self.leaves))
        without = {place for place in places if self.leaves[place].value.grad is None}
        for place in places[self._next :]:
            if place in self._early:
                self._send(place)
        missing = set.intersection(*self.world.gather(without))
        for place in places:
            if place not in self._early and place not in missing:
                self._send(place)
        for wait in self._waits:
            wait()
        self._waits.clear()
        for place in missing:
            self.leaves[place].value.grad = None
        self._early = set(places) - missing
        return {self.names[place] for place in missing}

    def remove(self) -> None:
        """Leave the leaves without the hooks of this object."""
        for hook in self._hooks:
            hook.remove()

    def _is_complete(self, place: int, _leaf: Tensor) -> None:
        if not self._open:
            return
        self._complete.add(place)
        while self._next < len(self.leaves):
            if self._next in self._early:
                if self._next not in self._complete:
                    return
                self._send(self._next)
            self._next += 1

    def _send(self, place: int) -> None:
        leaf = self.leaves[place]
        if leaf.value.grad is None:
            leaf.value.grad = torch.zeros_like(leaf.value)
        self._waits.append(self.world.reduce(leaf.value.grad, leaf.owner))
