"""Refinement of the last layers and the head together, by gradients on the teacher's predictions.

The closed form and `lrc.cloning.start.closed_form.refine` fit the teacher's residual stream. But
only the head reads the output of the last layers, or nearly so: they need not approximate the
stream, only the predictions from it. Here Adam moves their projections and the head's to lower
KL(teacher || student) and, with a smaller weight, the LM loss on the calibration tokens. The
earlier layers keep their solved values, so that part of the student does not run again. As in
training, the student's weights are leaves whose gradients are mapped to the projections, one layer
of the teacher at a time (`lrc.cloning.projection`). Only the predictions of every other token
count, and the next epoch uses the others: logits are half of the work. After every epoch the KL on
tokens that no solve sees is measured, and the best projections are kept, possibly the initial ones:
a student as wide as its teacher remains the teacher.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lrc.cloning.objective import VocabularyLosses, VocabularyWeights, vocabulary_losses
from lrc.cloning.projection import add_projection_gradients, layer_weights, write_weights
from lrc.cloning.start.calibration import Calibration
from lrc.cloning.start.closed_form.descent import descend
from lrc.cloning.start.closed_form.head import CHUNK, StudentHead, folded_head
from lrc.cloning.start.streams import ActivationStore
from lrc.data.batch import Batch

SHARE = 1 / 2
"""Share of the layers, counted from the last, that are refined."""

LEARNING_RATE = 0.052
"""Learning rate of Adam, times (d_T d_S)^(-1/2): 1.3e-4 for 576 to 288, close to the best rate
tried."""

LM_WEIGHT = 0.3
"""Weight of the LM loss next to the KL. For SmolLM2-135M it lowers the student's LM loss by 0.04
and does not change its KL on other text; a weight of 1 raises the KL."""

STEP_TOKENS = 2048
"""Tokens of a step, in whole sequences."""


class LastLayers:
    """The last layers of a student, refined once everything is solved.

    Args:
        calibration: the tokens.
    """

    def __init__(self, calibration: Calibration) -> None:
        self.calibration = calibration
        count = calibration.source.num_layers
        self.first = count - max(1, round(SHARE * count))
        """Index of the first of them."""
        self._before = calibration.stream(calibration.hidden_size)
        self._layers: list[nn.Module] = []
        self._parameters: dict[str, nn.Parameter] = {}
        """The layers' parameters by their names in the student."""
        self._weights = layer_weights(calibration.source, fold=True, first=self.first)
        self._gains = calibration.source.layout.after_norms(self.first)
        """Module paths of the layers' norms after blocks, whose gains are refined too."""

    def begin(self, stream: ActivationStore) -> None:
        """Keep the student's residual stream before the first of the layers."""
        calibration = self.calibration
        for part in calibration.batches():
            self._before[part] = stream[part]
        layout = calibration.source.layout
        for index in range(self.first, layout.num_layers):
            layer = calibration.student_layer(index)
            self._layers.append(layer)
            for name, parameter in layer.named_parameters():
                self._parameters[f"{layout.layer(index)}.{name}"] = parameter
        for name in (*(weight.name for weight in self._weights), *map(_weight_of, self._gains)):
            self._parameters[name].requires_grad_()

    def refine(
        self,
        solved: Mapping[str, Tensor],
        final: ActivationStore,
        head: StudentHead,
        value: Tensor,
        epochs: int,
    ) -> dict[str, Tensor]:
        """These layers' projections by their keys, the gains of norms after their blocks by path,
        and the head's value by its own key, refined.

        Args:
            solved: the projections [d_T, d_S] and gains, including those of these layers.
            final: the teacher's last residual stream, [sequences, length, d_T].
            head: the student's head.
            value: the head's value.
            epochs: passes over the tokens.
        """
        calibration = self.calibration
        teacher_head = folded_head(calibration)

        def losses(part: slice, value: Tensor, first: int = 0) -> VocabularyLosses:
            """The losses of some sequences, means over every other token."""
            counted = slice(first, None, 2)
            states, rows = head(value, calibration.normalize(self._run(part))[counted])
            h = calibration.normalize(final[part])[counted]
            labels = Batch(calibration.ids[part]).labels().flatten()[counted]
            learned = int((labels >= 0).sum())
            cap = calibration.source.logit_softcap
            weights = VocabularyWeights(
                1.0, LM_WEIGHT, 1.0, len(h), learned, len(rows), CHUNK, softcap=cap
            )
            return vocabulary_losses(states, rows, h, teacher_head, labels, None, weights)

        def differentiate(part: slice, epoch: int) -> None:
            self._project(values)
            found = losses(part, values[head.key], epoch % 2)
            found.weighted.backward()  # type: ignore[no-untyped-call]
            self._gather(values)

        def judge(reached: Mapping[str, Tensor]) -> float:
            self._project(reached)
            return sum(
                float(losses(part, reached[head.key]).divergence) * (part.stop - part.start)
                for part in calibration.batches(calibration.solved_on)
            )

        keys = dict.fromkeys((*(weight.projection for weight in self._weights), *self._gains))
        start = {key: solved[key] for key in keys} | {head.key: value}
        values = {key: tensor.clone().requires_grad_() for key, tensor in start.items()}
        return descend(
            calibration,
            values.values(),
            LEARNING_RATE * (calibration.source.hidden_size * calibration.hidden_size) ** -0.5,
            STEP_TOKENS,
            epochs,
            differentiate,
            lambda: {key: tensor.detach().clone() for key, tensor in values.items()},
            judge,
            start,
        )

    @torch.no_grad()
    def write(self, stream: ActivationStore, solved: Mapping[str, Tensor], first: int = 0) -> None:
        """Overwrite the student's last residual stream, from sequence `first` on, with the output
        of these projections."""
        self._project(solved)
        for part in self.calibration.batches(first):
            stream[part] = self._run(part)

    def _run(self, part: slice) -> Tensor:
        """The student's last residual stream of some sequences, [b, length, d_S]."""
        states = self._before[part]
        for index, layer in enumerate(self._layers, self.first):
            states = self.calibration.run_student(layer, index, states)
        return states

    @torch.no_grad()
    def _project(self, values: Mapping[str, Tensor]) -> None:
        """Write the layers' weights and gains, from projections by their keys and gains by path."""
        write_weights(self.calibration.source, self._weights, values, self._parameters.__getitem__)
        for norm in self._gains:
            parameter = self._parameters[_weight_of(norm)]
            parameter.copy_(values[norm] - self.calibration.family.gain_offset)

    def _gather(self, values: Mapping[str, Tensor]) -> None:
        """Add the gradients of the layers' weights to those of the projections, by their keys."""
        add_projection_gradients(
            self.calibration.source, self._weights, values, self._parameters.__getitem__
        )
        for norm in self._gains:
            gradient = self._parameters[_weight_of(norm)].grad
            assert gradient is not None
            values[norm].grad = gradient.clone()
        for parameter in self._parameters.values():
            parameter.grad = None


def _weight_of(norm: str) -> str:
    """Name of the weight of a norm."""
    return f"{norm}.weight"
