"""Prune a teacher before its weights are projected, from a short calibration pass.

Layers are chosen first (`layers`). Then the pruned teacher is built layer by layer on its own
residual stream x_S [tokens, d_T]. In each branch, heads or neurons are chosen by what their loss
costs (`units`), and the writer is solved for the others: with a [tokens, kept], the kept inputs of
the writer on the pruned teacher's stream,

    fit a (W_T C)^T to x_T(after) - x_S(before), shrunk toward W_T[:, kept],

so that what is kept also writes what the removed units wrote, and corrects the error so far. Before
removed layers, x_T(after) is the teacher's stream after them. If a norm follows the writer, its
target is what the whole teacher's writer gives on the same stream. Weights of tokens and the
strength of each fit are those of the closed-form start (`lrc.cloning.start.closed_form.solve`).
Experts are chosen likewise (`experts`); nothing is solved for those that stay.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from lrc.cloning.shape.experts import Read, choose_experts, expert_costs
from lrc.cloning.shape.layers import choose_layers
from lrc.cloning.shape.pruned_teacher import PrunedTeacher, pruned_teacher, set_buffers
from lrc.cloning.shape.units import choose_units
from lrc.cloning.start.basis import StreamStatistics, stream_statistics
from lrc.cloning.start.calibration import Block, Calibration, TeacherLayer
from lrc.cloning.start.closed_form.least_squares import Rows, regress
from lrc.cloning.start.closed_form.refine import Target
from lrc.cloning.start.closed_form.solve import cut_sequences
from lrc.cloning.start.streams import ActivationStore
from lrc.model.families.base import Branch, Experts
from lrc.model.kept_units import spread
from lrc.model.pruned_shape import expert_groups
from lrc.recipe.sections import Keep, StudentSection
from lrc.system.progress import Progress


@torch.no_grad()
def prune(
    unsolved: PrunedTeacher, student: StudentSection, ids: Tensor, progress: Progress | None = None
) -> tuple[PrunedTeacher, StreamStatistics]:
    """Choose what to keep of a teacher, as far as the recipe does not say, and solve its writers.
    Also return the statistics of the whole teacher's stream that this needed.

    Args:
        unsolved: a pruned teacher of the recipe's shape.
        student: the recipe's section.
        ids: calibration tokens, int64 [sequences, length], at least two sequences.
        progress: gets the number of completed layers and their total.

    Raises:
        UserError: if the chosen layers cannot be those of a plain model, or the disk has no room
            for the streams.
    """
    sequences, restart = cut_sequences(ids, unsolved)
    kept = unsolved.kept
    if isinstance(student.layers, int) and student.layers < unsolved.whole.num_layers:
        chosen = choose_layers(unsolved.whole, sequences, student.layers, restart)
        kept = replace(kept, layers=chosen)
    pruned = pruned_teacher(unsolved.whole, kept)
    with Calibration(pruned, sequences, pruned.hidden_size, restart) as calibration:
        solver = _Pruner(calibration, pruned, student)
        for layer in calibration.student_layers():
            solver.layer(layer)
            if progress:
                progress(layer.index + 1, pruned.num_layers)
    return pruned, solver.statistics


class _Pruner:
    """Prunes the layers in order; `stream` is the pruned teacher's residual stream so far."""

    def __init__(
        self, calibration: Calibration, pruned: PrunedTeacher, student: StudentSection
    ) -> None:
        self.calibration, self.pruned, self.student = calibration, pruned, student
        self.statistics = stream_statistics(calibration)
        self.basis = torch.eye(
            pruned.hidden_size, dtype=calibration.dtype, device=calibration.ids.device
        )
        self.metrics = self.statistics.fisher_after_layers(self.basis, pruned.num_layers)
        self.stream = calibration.stream(pruned.hidden_size)
        self._inputs: dict[int, ActivationStore] = {}
        for part in calibration.batches():
            self.stream[part] = calibration.embedded(part)

    def layer(self, layer: TeacherLayer) -> None:
        """Prune the branches of a layer, and run it."""
        calibration, pruned, index = self.calibration, self.pruned, layer.index
        prefix = pruned.layout.layer(index)
        whole = calibration.layer(pruned.kept_layers[index])
        for number, branch in enumerate(pruned.layout.branches[index]):
            written, after = layer.streams[number : number + 2]
            target = Target(
                after,
                self.basis,
                self.metrics[index],
                calibration.residual_scale,
                calibration.layer_scale(whole) if after is layer.after else 1.0,
            )
            block = calibration.block(whole, index, branch)
            gain = calibration.gain(f"{prefix}.{branch.norm}") if branch.norm else 1.0
            if branch.has_experts and pruned.kept.experts is not None:
                self._choose_experts(index, branch, block, gain, target)
                block = calibration.block(calibration.layer(index, pruned), index, branch)
            path = str(next(iter(branch.writers.values())))
            solved = pruned.solved.get(f"{prefix}.{path}.weight")
            if solved is None:
                for part in calibration.batches():
                    written[part] = block(gain * calibration.block_input(self.stream[part], branch))
            else:
                writer = whole.get_submodule(path)
                inputs = self._store(writer.get_parameter("weight").shape[1])
                for part in calibration.batches():
                    read = gain * calibration.block_input(self.stream[part], branch)
                    inputs[part], written[part] = _with_input(block, writer, read)
                solved.copy_(self._solve(index, branch, writer, inputs, written, target))
            self._add(prefix, branch, written, target)

    def _choose_experts(
        self, index: int, branch: Branch, block: Block, gain: Tensor | float, target: Target
    ) -> None:
        """Choose the experts of a layer, unless the recipe names them, given the whole block."""
        calibration, pruned = self.calibration, self.pruned
        if isinstance(self.student.experts, Keep):
            return
        down = next(linear for linear in branch.writers.values() if isinstance(linear, Experts))
        path = down.module.removeprefix(f"{branch.block}.")

        def reads() -> Iterator[Read]:
            for part in calibration.batches():
                _, weights = target.lacking(calibration, part, self.stream[part])
                yield gain * calibration.block_input(self.stream[part], branch), weights

        experts, metric = block.module.get_submodule(path), self.metrics[index].double()
        costs = expert_costs(block, experts, reads(), metric)
        kept, groups = pruned.kept.experts, expert_groups(pruned.whole.config)
        assert kept is not None
        kept[index] = choose_experts(costs, len(kept[index]), groups).cpu()
        set_buffers(pruned, index)

    def _solve(
        self,
        index: int,
        branch: Branch,
        writer: nn.Module,
        inputs: ActivationStore,
        written: ActivationStore,
        target: Target,
    ) -> Tensor:
        """Choose the kept units of a branch and solve its writer, [d_T, kept]. `written` gets what
        it writes."""
        calibration = self.calibration
        weight = writer.get_parameter("weight").to(calibration.dtype)
        bias = getattr(writer, "bias", None)
        offset = torch.zeros_like(weight[:, 0]) if bias is None else bias.to(calibration.dtype)
        scale = branch.writer_scale * branch.output_scale

        def rows(start: int, stop: int | None, kept: Tensor | None) -> Iterator[Rows]:
            for part in calibration.batches(start, stop):
                ours = inputs[part] if kept is None else inputs[part][..., kept]
                if branch.after is not None:
                    wanted = written[part]
                    weights = 1 / calibration.rms(wanted)
                else:
                    wanted, weights = target.lacking(calibration, part, self.stream[part])
                    wanted = wanted / target.residual_scale
                wanted = wanted / scale - offset
                yield ours.flatten(0, 1), wanted.flatten(0, 1), weights.flatten(0, 1)

        solved_on, columns = calibration.solved_on, None
        units = self.pruned.units(index, branch)
        if units is not None:
            kept, size = units
            if not self._named(branch):
                gram = _gram(rows(0, solved_on, None))
                metric = self.metrics[index].double()
                kept = choose_units(gram, weight.double(), metric, size, len(kept))
                own = self.pruned.kept.groups if "o" in branch.writers else self.pruned.kept.neurons
                own[index] = kept.cpu()
            columns = spread(kept.to(weight.device), size)
        prior = weight if columns is None else weight[:, columns]
        solved = regress(
            rows(0, solved_on, columns), rows(solved_on, None, columns), prior.double().T
        ).to(calibration.dtype)
        for part in calibration.batches():
            ours = inputs[part] if columns is None else inputs[part][..., columns]
            written[part] = scale * (ours @ solved + offset)
        return solved.T

    def _named(self, branch: Branch) -> bool:
        """Whether the recipe names the units of a branch."""
        student = self.student
        return isinstance(
            student.kv_heads if "o" in branch.writers else student.intermediate_size, Keep
        )

    def _add(self, prefix: str, branch: Branch, written: ActivationStore, target: Target) -> None:
        """Add what a block writes to the stream."""
        calibration = self.calibration
        for part in calibration.batches():
            output = written[part]
            if branch.after is not None:
                gain = calibration.gain(f"{prefix}.{branch.after}")
                output = gain * output / calibration.rms(output)
            added = self.stream[part] + target.residual_scale * output
            self.stream[part] = added * target.layer_scale

    def _store(self, width: int) -> ActivationStore:
        """A store for the inputs of a writer, which the next writer of this width reuses."""
        if width not in self._inputs:
            self._inputs[width] = self.calibration.stream(width)
        return self._inputs[width]


def _with_input(block: Block, writer: nn.Module, read: Tensor) -> tuple[Tensor, Tensor]:
    """What a block's writer reads, [b, length, width], and what the block writes."""
    found: list[Tensor] = []
    hook = writer.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    try:
        written = block(read)
    finally:
        hook.remove()
    return found[0], written


def _gram(rows: Iterator[Rows]) -> Tensor:
    """sum (w a)^T (w a) [n, n], in float64."""
    total: Tensor = torch.zeros(())
    for inputs, _, weights in rows:
        weighted = inputs if weights is None else inputs * weights
        total = total + (weighted.T @ weighted).double()
    return total
