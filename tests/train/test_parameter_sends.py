"""Updated parameters on their way to other processes."""

from dataclasses import dataclass, field

import torch

from lrc.cloning.method import Counts
from lrc.system.distributed import Owners, Wait, World
from lrc.train.parameter_sends import ParameterSends
from tiny import tiny_batch, tiny_method, tiny_teacher


@dataclass(frozen=True)
class Recorded(World):
    """A process that notes what happens, in order."""

    happened: list[str] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)

    def send(self, tensor: torch.Tensor, owner: int) -> Wait:
        name = self.names[tensor.data_ptr()]
        self.happened.append(f"send {name} from {owner}")
        return lambda: self.happened.append(f"wait {name}")


def test_they_arrive_between_the_teacher_and_the_student() -> None:
    method = tiny_method(
        tiny_teacher("llama"), objective={"alignment": "explicit"}, steps=4, release_at=0.0
    )
    method.next_stage()
    world = Recorded(0, 2)
    parameters = method.parameters()
    world.names.update({value.data_ptr(): name for name, value in parameters.items()})
    inside = {name for name, _ in method.model.named_parameters()}
    assert parameters.keys() > inside  # and the alignment
    method.owners = Owners(world, dict.fromkeys(parameters, 1))
    sends = ParameterSends(world, method)
    for model, name in ((method.teacher.model, "teacher"), (method.model, "student")):
        norm = model.base_model.norm  # the last module of a pass
        norm.register_forward_hook(lambda *_, name=name: world.happened.append(name))

    sends.wait()
    sends.begin()
    assert not world.happened  # nothing has changed
    sends.updated()
    assert not world.happened
    sends.begin()
    expected = [f"send {name} from 1" for name in parameters]
    expected += [f"wait {name}" for name in parameters if name not in inside]
    assert world.happened == expected
    world.happened.clear()
    batch = tiny_batch(2)
    tokens = batch.input_ids.numel()
    method.losses(batch, Counts(tokens, tokens))
    waits = [f"wait {name}" for name in parameters if name in inside]
    assert world.happened == ["teacher", *waits, "student"]

    world.happened.clear()
    sends.updated()
    sends.wait()  # before anything else looks
    assert len(world.happened) == 2 * len(parameters)
    sends.updated()
    sends.remove()
    world.happened.clear()
    method.losses(batch, Counts(tokens, tokens))
    assert world.happened == ["teacher", "student"]
