"""Sends updated parameters to the other processes while the teacher runs in the next step."""

from lrc.cloning.method import Method
from lrc.system.distributed import Wait, World


class ParameterSends:
    """Sends what the passes of a method use from the owners of its parameters to all processes.

    Processes exchange one thing after the other, so this begins after what the next step needs
    first. What belongs to the student's model may arrive until the model runs. The rest arrives at
    once, since a method may compute with it before.

    Args:
        world: the processes.
        method: the method, in its present stage.
    """

    def __init__(self, world: World, method: Method) -> None:
        self.world, self.method = world, method
        self._inside = {id(value) for value in method.model.parameters()}
        self._updated = False
        self._arriving: list[Wait] = []
        self._hook = None
        if world.size > 1:
            base = method.model.base_model
            self._hook = base.register_forward_pre_hook(lambda *_: self.wait())

    def updated(self) -> None:
        """Parameters have new values. Until `wait`, only owners may read them."""
        self._updated = self.world.size > 1

    def begin(self) -> None:
        """Begin to send updated parameters."""
        if not self._updated:
            return
        self._updated = False
        projected = self.method.projected()
        first: list[Wait] = []
        for name, value in self.method.parameters().items():
            if name not in projected:
                wait = self.world.send(value.data, self.method.owners[name])
                (self._arriving if id(value) in self._inside else first).append(wait)
        for wait in first:
            wait()

    def wait(self) -> None:
        """Wait until all have arrived."""
        self.begin()
        for wait in self._arriving:
            wait()
        self._arriving.clear()

    def remove(self) -> None:
        """Leave the model without the hook of this object."""
        if self._hook is not None:
            self._hook.remove()
