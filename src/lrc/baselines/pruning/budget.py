"""Widths of attention and FFN that fit a number of parameters when nothing else is pruned."""

from dataclasses import dataclass, replace

from lrc.baselines.pruning.shape import teacher_shape
from lrc.baselines.pruning.size import parameter_count
from lrc.model.pruned_shape import PrunedShape, group_size, pruned_config
from lrc.model.teacher import Teacher


@dataclass(frozen=True)
class Budget:
    """Parameters of a teacher's class by key/value heads and FFN neurons, equal in all layers.

    The count is a linear function of the two numbers.
    """

    teacher: Teacher
    tied: bool
    """Whether the LM head is the embedding."""

    def count(self, shape: PrunedShape) -> int:
        """Parameters of a model of a shape."""
        return parameter_count(self.teacher, pruned_config(self.teacher, shape, tied=self.tied))

    @property
    def smallest(self) -> PrunedShape:
        """One key/value head and one neuron per layer."""
        return replace(teacher_shape(self.teacher), kv_heads=1, neurons=1)

    def widths(self, parameters: int) -> PrunedShape | None:
        """The shape with this many parameters; None if even the smallest shape has more.

        LLM-Pruner removes the same share of heads and of neurons. Key/value heads can only be
        removed whole. So the result is the shape in which both shares are closest to each other,
        and the number of neurons makes up the difference.
        """
        whole = teacher_shape(self.teacher)
        total = self.count(whole)
        of_neuron = total - self.count(replace(whole, neurons=whole.neurons - 1))
        if self.count(self.smallest) - parameters > of_neuron / 2:
            return None
        others = whole.kv_heads - 1  # every configuration accepts one head
        of_others = total - self.count(replace(whole, kv_heads=1))
        found: list[tuple[float, float, PrunedShape]] = []
        for heads in filter(self._takes, range(1, whole.kv_heads + 1)):
            gone = of_others * (whole.kv_heads - heads) // max(1, others)
            surplus = total - gone - parameters
            neurons = min(max(whole.neurons - round(surplus / of_neuron), 1), whole.neurons)
            miss = abs(surplus - (whole.neurons - neurons) * of_neuron)
            apart = abs(heads / whole.kv_heads - neurons / whole.neurons)
            shape = replace(whole, kv_heads=heads, neurons=neurons)
            found.append((max(miss, of_neuron / 2), apart, shape))  # half a neuron cannot be helped
        return min(found, key=lambda candidate: candidate[:2])[2]

    def _takes(self, kv_heads: int) -> bool:
        """Whether the family's configuration accepts this many heads at the teacher's width."""
        heads = kv_heads * group_size(self.teacher.config)
        return not self.teacher.family.divides_by_heads or self.teacher.hidden_size % heads == 0
