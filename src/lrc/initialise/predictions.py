"""The last layers and the head, refined together by gradients on the teacher's predictions.

The closed form aims at the teacher's residual stream, and so does `lrc.initialise.refine`. What the
last layers write is read by the head alone, or nearly so: they need not come near to the stream,
but to what is predicted from it. Here their projections and the head's are moved by Adam so that
KL(teacher || student) falls on the calibration tokens. The layers before them are as they were
solved, so that their part of the student runs no more. After every epoch the tokens that no solve
sees judge; the best projections are kept, be they the first.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lrc.families import LINEARS, READERS
from lrc.initialise.calibration import Calibration
from lrc.initialise.head import CHUNK, StudentHead, folded_head
from lrc.initialise.streams import Stream
from lrc.objective import VocabularyWeights, vocabulary_losses
from lrc.projection import project, projection_key

SHARE = 1 / 3
"""Share of the layers, from the last, that are refined. They are held at once."""

LEARNING_RATE = 0.12
"""Of Adam, times (d_T d_S)^(-1/2): 3e-4 for 576 to 288, near the best of what was tried."""

BETAS = 0.9, 0.99

STEP_TOKENS = 2048
"""Tokens of a step, in whole sequences."""

WARM_UP = 3
"""Steps that warm up."""


class LastLayers:
    """The last layers of a student, refined once all is solved.

    Args:
        calibration: the tokens.
    """

    def __init__(self, calibration: Calibration) -> None:
        self.calibration = calibration
        count = calibration.teacher.num_layers
        self.first = count - max(1, round(SHARE * count))
        """The first of them."""
        self._before = calibration.stream(calibration.hidden_size)
        self._layers: list[tuple[int, nn.Module, nn.Module]] = []
        """Each with its module in the teacher, and one of the student to run with weights of the
        projections."""

    def begin(self, stream: Stream) -> None:
        """Keep the student's residual stream before the first of the layers."""
        for part in self.calibration.batches():
            self._before[part] = stream[part]
        for index in self._indices():
            module = self.calibration.layer(index)
            layer = self.calibration.student_layer(index, module)
            self._layers.append((index, module, layer))

    def refine(
        self,
        solved: Mapping[str, Tensor],
        final: Stream,
        head: StudentHead,
        value: Tensor,
        epochs: int,
    ) -> dict[str, Tensor]:
        """These layers' projections by their keys, and what the head takes by its own, refined.

        Args:
            solved: the projections [d_T, d_S] by their keys, of these layers among others.
            final: the teacher's last residual stream, [sequences, length, d_T].
            head: the student's.
            value: what it takes.
            epochs: passes over the tokens.
        """
        calibration = self.calibration
        solved_on = calibration.solved_on
        teacher_head = folded_head(calibration)

        def divergence(part: slice, values: Mapping[str, Tensor]) -> Tensor:
            """Mean KL(teacher || student) over the tokens of some sequences."""
            z = calibration.normalise(self._run(part, values))
            states, rows = head(values[head.key], z)
            h = calibration.normalise(final[part])
            weights = VocabularyWeights(1.0, 0.0, 1.0, len(h), 1, len(rows), CHUNK)
            labels = torch.full((len(h),), -1, device=h.device)
            found = vocabulary_losses(states, rows, h, teacher_head, labels, None, weights)
            return found.weighted

        @torch.no_grad()
        def judge(values: Mapping[str, Tensor]) -> float:
            parts = calibration.batches(solved_on)
            return sum(float(divergence(p, values)) * (p.stop - p.start) for p in parts)

        keys = [projection_key(i, name) for i in self._indices() for name in LINEARS]
        start = {key: solved[key] for key in keys} | {head.key: value}
        values = {key: tensor.clone().requires_grad_() for key, tensor in start.items()}
        size = max(1, STEP_TOKENS // calibration.ids.shape[1])
        steps = [slice(i, min(i + size, solved_on)) for i in range(0, solved_on, size)]
        total = epochs * len(steps)
        rate = LEARNING_RATE * (calibration.teacher.hidden_size * calibration.hidden_size) ** -0.5
        optimizer = torch.optim.Adam(values.values(), lr=rate, betas=BETAS)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda done: min(1, (done + 1) / WARM_UP) * (1 - done / total)
        )
        least, best = judge(start), start
        for _ in range(epochs):
            for part in steps:
                with torch.enable_grad():
                    loss = divergence(part, values)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
            found = judge(values)
            if found < least:
                least, best = found, {key: v.detach().clone() for key, v in values.items()}
        return best

    def write(self, stream: Stream, solved: Mapping[str, Tensor]) -> None:
        """Overwrite the student's last residual stream by what these projections make it."""
        for part in self.calibration.batches():
            stream[part] = self._run(part, solved)

    def _indices(self) -> range:
        return range(self.first, self.calibration.teacher.num_layers)

    def _run(self, part: slice, values: Mapping[str, Tensor]) -> Tensor:
        """The student's last residual stream, [b, length, d_S].

        Args:
            part: sequences.
            values: the projections by their keys.
        """
        states = self._before[part]
        for index, module, layer in self._layers:
            weights = self._weights(index, module, values)
            arguments: dict[str, Any] = self.calibration.arguments[index]
            result = functional_call(layer, weights, (states,), arguments)
            states = result[0] if isinstance(result, tuple) else result
        return states

    def _weights(
        self, index: int, module: nn.Module, values: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The projected parameters of a student's layer, by their names in it."""
        calibration = self.calibration
        weights = {}
        for name, path in calibration.family.linears.items():
            projection = values[projection_key(index, name)]
            if name in READERS:
                weights[f"{path}.weight"] = (
                    calibration.folded_reader(index, module, name) @ projection
                )
                continue
            for own, value in module.get_submodule(path).named_parameters():
                weights[f"{path}.{own}"] = project(value, projection, writes=True)
        return weights
