"""How wide attention and FFN may be for a number of parameters, when nothing else is pruned."""

from dataclasses import dataclass, replace

from lrc.baselines.pruning.shape import PrunedShape, group_size, pruned_config, teacher_shape
from lrc.baselines.pruning.size import parameter_count
from lrc.model.teacher import Teacher


@dataclass(frozen=True)
class Budget:
    """Parameters of a teacher's class by key/value heads and FFN neurons, the same in all layers.

    The count is a linear function of the two.
    """

    teacher: Teacher
    tied: bool
    """Whether the LM head is the embedding."""

    def count(self, shape: PrunedShape) -> int:
        """Parameters of a model of a shape."""
        return parameter_count(self.teacher, pruned_config(self.teacher, shape, tied=self.tied))

    @property
    def smallest(self) -> PrunedShape:
        """One key/value head and one neuron a layer."""
        return replace(teacher_shape(self.teacher), kv_heads=1, neurons=1)

    def widths(self, parameters: int) -> PrunedShape | None:
        """The shape for so many parameters; None where even the smallest has more.

        LLM-Pruner takes the same share of heads and of neurons. Of the key/value heads only whole
        ones can go, so the shape is the one in which both shares are nearest to each other, and the
        neurons make up for the rest.
        """
        whole = teacher_shape(self.teacher)
        total = self.count(whole)
        of_neuron = total - self.count(replace(whole, neurons=whole.neurons - 1))
        if self.count(self.smallest) - parameters > of_neuron / 2:
            return None
        others = whole.kv_heads - 1  # one head is what every configuration accepts
        of_others = total - self.count(replace(whole, kv_heads=1))
        found: list[tuple[int, float, PrunedShape]] = []
        for heads in filter(self._takes, range(1, whole.kv_heads + 1)):
            gone = of_others * (whole.kv_heads - heads) // max(1, others)
            surplus = total - gone - parameters
            asked = whole.neurons - round(surplus / of_neuron)
            neurons = min(max(asked, 1), whole.neurons)
            apart = abs(heads / whole.kv_heads - neurons / whole.neurons)
            shape = replace(whole, kv_heads=heads, neurons=neurons)
            found.append((abs(asked - neurons), apart, shape))
        return min(found, key=lambda candidate: candidate[:2])[2]

    def _takes(self, kv_heads: int) -> bool:
        """Whether the family's configuration accepts so many heads at the teacher's hidden size."""
        heads = kv_heads * group_size(self.teacher.config)
        return not self.teacher.family.divides_by_heads or self.teacher.hidden_size % heads == 0
