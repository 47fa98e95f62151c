"""The processes that train one run together, started by `torchrun` or `accelerate launch`.

`World` is what all other code knows of them. With a single process every operation does nothing, so
one process runs the same code. Transport is torch.distributed: NCCL between GPUs, gloo otherwise.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from lrc.system.errors import UserError, reason

if TYPE_CHECKING:
    from torch import Tensor

Value = TypeVar("Value")

Wait = Callable[[], None]
"""Waits until an exchange that has begun is over. Its tensors must not be used before."""

TIMEOUT = timedelta(hours=12)
"""How long a process waits for the others, for example while the first one solves the start."""


ENDED = (
    "Another process of this run has ended; its own output says why. The last checkpoint "
    "is intact: start all processes again with `lrc resume`."
)


class PeerError(UserError):
    """Another process of the run has ended."""


@dataclass(frozen=True)
class World:
    """All processes of a run, as seen from one of them."""

    rank: int = 0
    """Number of this process."""
    size: int = 1
    """Number of processes."""

    @property
    def leads(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def gather(self, value: Value) -> list[Value]:
        """The values of all processes, by rank. They are pickled."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        with peers():
            dist.all_gather_object(found, value)
        return found

    def from_first(self, value: Value) -> Value:
        """The value of the first process. It is pickled."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        found = [value]
        with peers():
            dist.broadcast_object_list(found, 0)
        return found[0]

    def first_then_others(self, make: Callable[[], Value]) -> Value:
        """Call a function in the first process, and after that in all others: what the first one
        leaves in a cache, the others find."""
        if self.leads:
            made = make()
            self.wait()
            return made
        self.wait()
        return make()

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.gather(None)

    def reduce(self, tensor: "Tensor", owner: int) -> Wait:
        """Begin to add up the tensors of all processes in their owner's, in place. The others' are
        undefined afterwards."""
        if self.size == 1:
            return _done
        import torch.distributed as dist

        with peers():
            return partial(_wait, dist.reduce(tensor, owner, async_op=True))

    def add_up(self, tensor: "Tensor") -> None:
        """Add up the tensors of all processes, in place and in all of them."""
        if self.size > 1:
            import torch.distributed as dist

            with peers():
                dist.all_reduce(tensor)

    def send(self, tensor: "Tensor", owner: int) -> Wait:
        """Begin to replace the tensors of all processes by their owner's, in place."""
        if self.size == 1:
            return _done
        import torch.distributed as dist

        with peers():
            return partial(_wait, dist.broadcast(tensor, owner, async_op=True))


ALONE = World()
"""A single process."""


def join() -> World:
    """Join the processes that a launcher started with this one. Only the first call does anything.

    Raises:
        UserError: if the launcher's variables or the network do not allow it.
    """
    if launched() == 1:
        return ALONE
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    if not dist.is_initialized():
        cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if cards:
            torch.cuda.set_device(local_rank() % cards)
        try:
            store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
            # torchrun keeps its store when it restarts processes, with the addresses of the former.
            own = PrefixStore(f"attempt-{restarts()}", store)
            backend = backend_for(_number("LOCAL_WORLD_SIZE", 1), cards)
            dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=TIMEOUT)
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"The processes of this run cannot find each other ({reason(error)}): start them "
                "with torchrun or accelerate launch (docs/scaling.md)."
            ) from error
    return World(dist.get_rank(), dist.get_world_size())


def backend_for(processes: int, cards: int) -> str:
    """The transport between processes. NCCL wants a GPU for each, gloo lets them share one.

    Args:
        processes: number of processes on a machine.
        cards: number of its GPUs.
    """
    return "cpu:gloo,cuda:nccl" if 0 < processes <= cards else "gloo"


def leave() -> None:
    """Leave the other processes, if any."""
    if joined():
        import torch.distributed as dist

        dist.destroy_process_group()


def joined() -> bool:
    """Whether this process has joined others."""
    if launched() == 1:
        return False
    import torch.distributed as dist

    return dist.is_initialized()


def launched() -> int:
    """Number of processes that the launcher has started."""
    return _number("WORLD_SIZE", 1)


def rank() -> int:
    """Number of this process among those that the launcher has started."""
    return _number("RANK", 0)


def restarts() -> int:
    """How often the launcher has started this process again."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0)


def may_restart() -> bool:
    """Whether the launcher would start this process again after a failure."""
    return _number("TORCHELASTIC_MAX_RESTARTS", 0) > 0


def local_rank() -> int:
    """Number of this process on its machine."""
    return _number("LOCAL_RANK", 0)


@dataclass(frozen=True)
class Owners:
    """Which process owns each of several named things."""

    world: World = ALONE
    ranks: Mapping[str, int] = field(default_factory=dict)
    """The process of each; the first one has the others."""

    def __getitem__(self, name: str) -> int:
        return self.ranks.get(name, 0)

    def has(self, name: str) -> bool:
        """Whether this process owns it."""
        return self[name] == self.world.rank


def assign(costs: Mapping[str, float], size: int) -> dict[str, int]:
    """Assign pieces of work to processes so that all have about the same: the most expensive piece
    first, each to the process with the least so far.

    Args:
        costs: cost of each piece by its name.
        size: number of processes.

    Returns:
        The process of each piece.
    """
    loads = [0.0] * size
    owners = {}
    for name, cost in sorted(costs.items(), key=lambda item: -item[1]):
        owner = loads.index(min(loads))
        owners[name] = owner
        loads[owner] += cost
    return owners


@contextmanager
def peers() -> Iterator[None]:
    """Turn a broken connection into a sentence.

    Raises:
        PeerError: if another process has ended.
    """
    try:
        yield
    except RuntimeError as error:
        raise PeerError(ENDED) from error


@contextmanager
def lost_peers() -> Iterator[None]:
    """`peers` around code that also computes: other errors stay what they are.

    Raises:
        PeerError: if another process has ended.
    """
    try:
        yield
    except RuntimeError as error:
        if joined():
            import torch.distributed as dist

            if isinstance(error, dist.DistError) or "gloo" in str(error):
                raise PeerError(ENDED) from error
        raise


def _done() -> None:
    """There is nothing to wait for."""


def _wait(work: Any) -> None:
    with peers():
        work.wait()


def _number(name: str, default: int) -> int:
    """A number that the launcher has set.

    Raises:
        UserError: if it is not a number.
    """
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise UserError(f"The variable {name} is '{text}', which is not a number.") from None
