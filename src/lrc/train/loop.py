"""The training loop: optimizer steps, metrics, held-out measurements and checkpoints.

It uses a method only through the interface in `lrc.cloning.method`.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch

from lrc.cloning.method import CLONE_LAYERS, Counts, WeighsSources, stages_of
from lrc.data import Reader, Share
from lrc.data.batch import Batch, separated
from lrc.data.by_source import SourceLosses
from lrc.data.held_out import also_held_out
from lrc.data.stream import merged_state
from lrc.evaluation.along import Benchmarks
from lrc.evaluation.held_out import held_out_loss
from lrc.recipe.learning_rate import share_of_rate
from lrc.run import Run
from lrc.system.distributed import ALONE, World
from lrc.system.errors import DivergedError, UserError
from lrc.system.files import disk_errors
from lrc.system.metrics import keep_metrics_until
from lrc.system.progress import Task, task
from lrc.train.accuracy import accuracy
from lrc.train.batches import BatchReader
from lrc.train.checkpoint import checkpoint_folder, list_checkpoints, save_checkpoint
from lrc.train.cuda_graph import Passes
from lrc.train.gradient_sums import GradientSums
from lrc.train.parameter_sends import ParameterSends
from lrc.train.setup import (
    Setup,
    calibration_sequences,
    describe_compute,
    new_state,
)
from lrc.train.signals import StopRequest, agree, stop_on_signals
from lrc.train.trackers import Tracker, open_trackers, tracked_values

logger = logging.getLogger(__name__)

LAYERWISE_LINES = 100
"""Approximate number of metrics lines with clone terms by layer; more would dominate the file."""


TEACHER_BY_SOURCE = "teacher_held_out_lm_by_source"
"""Key of the teacher's held-out losses in the first line of metrics, if the text has sources."""


OnStep = Callable[[dict[str, Any]], None]
"""Gets the metrics of every optimizer step, as in metrics.jsonl."""


@dataclass
class Loop:
    """The part of a run that one process trains."""

    run: Run
    setup: Setup
    text: Reader
    calibration_seconds: float = 0.0
    """Seconds that initializing the method took, if this process did it."""
    forward_seconds: float = 0.0
    """Seconds of them in which the teacher's layers alone ran once over the calibration tokens; 0
    if not known."""
    world: World = ALONE
    """The processes that train the run together."""
    seconds_before: float = 0.0
    """Training seconds of earlier processes."""
    step_seconds: float = 0.0
    """Seconds of optimizer steps alone, over all processes."""
    started: float = field(default_factory=time.perf_counter)
    first_step: int = 0
    """The step that this process continued from."""
    trackers: list[Tracker] = field(default_factory=list)
    share: float = 1.0
    """The share that the run takes of the rate of `train.learning_rate: auto`."""
    benchmarks: Benchmarks | None = None
    """What `train.evaluate` names; None: nothing."""
    on_step: OnStep | None = None
    """Called after every step, once its metrics are written."""
    reads_ahead: bool | None = None
    """Whether to read the next step's text in a thread; None: if the device is not the CPU, which
    has nothing to spare."""
    batches: BatchReader = field(init=False)
    sums: GradientSums = field(init=False)
    sends: ParameterSends = field(init=False)
    _saved: float = field(default_factory=time.perf_counter)
    """When the last checkpoint was written."""

    def __post_init__(self) -> None:
        setup = self.setup
        self.passes = Passes(setup.method, self.run.recipe, setup.teacher, setup.device, self.world)
        self.sums = GradientSums(self.world, self.setup.method.leaves())
        self.sends = ParameterSends(self.world, self.setup.method)

    def go(self, steps: int, stop: StopRequest | None = None) -> StopRequest:
        """Train up to a step, or until a signal asks to stop. Then write a checkpoint.

        Args:
            steps: number of the step.
            stop: where to note a signal; None: in a new request.

        Returns:
            The request.

        Raises:
            DivergedError: if the loss or its gradient is not finite.
            UserError: if the disk is full.
        """
        recipe, setup = self.run.recipe, self.setup
        self.first_step = setup.state.step
        self._resume_metrics()
        if self._weigher() and not self.text.sources:
            logger.warning("The text has no sources to weigh, so it is read in its own order.")
        work = "Training" if steps else "Measuring the start"
        logger.info("%s on %s.", work, describe_compute(recipe.train, setup.device))
        with (
            closing(self.open_batches()) as self.batches,
            stop_on_signals(stop) as stop,
            open_trackers(self.run, self.first_step, self.world) as self.trackers,
            task(work, steps, self.first_step) as progress,
        ):
            changed = {} if setup.restored else self._change_stage(progress)
            first = self.world.from_first(self.run.metrics()[:1])
            if not first:
                start = {**self._measure(progress), **self._measure_teacher()}
                start |= accuracy(self)
                self._log({**start, **self.calibration(), **changed})
                first = self.world.from_first([start])
            self.share = share_of_rate(recipe, first[0])
            if not setup.state.step:  # also after `lrc compress`, which trains nothing
                self._slow_down(steps)
            if not setup.restored:
                self._weigh_sources(first[0])
                self._save()  # the start may have taken long
            while setup.state.step < steps and not agree(stop, self.world):
                line = self._step(progress)
                if not self._goes_on():
                    self.sends.wait()
                changed = self._change_stage(progress)
                if self._due(recipe.train.eval_every):
                    line |= self._measure(progress)
                    line |= self._weigh_sources(line)
                elif not self._due(max(1, recipe.steps() // LAYERWISE_LINES)):
                    # Only measurements and a few other lines hold the many numbers by layer.
                    line = {k: value for k, value in line.items() if k != CLONE_LAYERS}
                line |= (measured := accuracy(self))
                if (
                    self._due(recipe.train.log_every)
                    or "held_out_lm" in line
                    or changed
                    or measured
                ):
                    self._log(line | changed)
                if self.on_step is not None and self.world.leads:
                    self.on_step(line | changed)
                if self._due(recipe.train.checkpoint_every) or self._minutes_are_over():
                    self._save()
            self.sends.wait()
            newest = checkpoint_folder(self.run.checkpoints, setup.state.step)
            if self.world.from_first(not newest.exists()):
                self._save()
        return stop

    def open_batches(self) -> BatchReader:
        """A reader of the batches of every step."""
        setup = self.setup
        ahead = setup.device.type != "cpu" if self.reads_ahead is None else self.reads_ahead
        return BatchReader(
            self.text,
            self.run.recipe.train,
            Share(self.world.rank, self.world.size),
            self._calibration_sequences(),
            setup.device,
            setup.teacher.family.keeps_documents_apart,
            reads_ahead=ahead and not isinstance(setup.method, WeighsSources),
        )

    def _minutes_are_over(self) -> bool:
        minutes = self.run.recipe.train.checkpoint_minutes
        over = time.perf_counter() - self._saved > 60 * minutes
        return bool(minutes) and self.world.from_first(over)

    def _due(self, every: int) -> bool:
        """Whether something is due that happens every `every` steps and at the end."""
        step = self.setup.state.step
        return step % every == 0 or step == self.run.recipe.steps()

    def _goes_on(self) -> bool:
        """Whether another step follows at once. Until then, nothing looks at the student."""
        step, method = self.setup.state.step, self.setup.method
        looks = self.on_step is not None or self.benchmarks is not None
        ends = step in stages_of(method).stage_ends()
        return not (looks or ends or self._due(self.run.recipe.train.eval_every))

    def _step(self, progress: Task) -> dict[str, Any]:
        """Make one optimizer step and return its line of metrics.

        Raises:
            DivergedError: if the loss or its gradient is not finite; nothing is updated.
        """
        start = time.perf_counter()
        setup = self.setup
        method, state = setup.method, setup.state
        with method.clock.part("data"):
            read = self.batches.take(state.step, state.step + 1 == self.run.recipe.steps())
        counts = add_counts(self.world.gather(read.counts))
        self.sends.begin()
        method.begin_step(state.step)
        sums: dict[str, torch.Tensor] = {}
        clone_layers: dict[str, torch.Tensor] = {}
        by_source = SourceLosses(self.text.sources)
        for number, batch in enumerate(read.batches, 1):
            if number == len(read.batches):
                self.sums.begin()
            losses = self.passes.run(batch, counts)
            by_source.add_batch(losses.token_lm, batch)
            for total, found in ((sums, losses.scalars()), (clone_layers, losses.clone_layers)):
                for name, value in (found or {}).items():
                    total[name] = total.get(name, 0) + value
        missing = self._collect_gradients()
        method.end_step()
        with method.clock.part("optimizer"):
            found = {"norm": self._clip(missing), **by_source.totals}
            found |= {f"term.{name}": value for name, value in sums.items()}
            found |= {f"layers.{name}": value for name, value in clone_layers.items()}
            found = add_found(self.world.gather(fetch(found)))
            by_source.totals = {name: found[name] for name in by_source.totals}
            norm, loss = found["norm"].item(), found["term.loss"].item()
            self._refuse_nan(loss, norm)
            state.optimizer.step()
            rate = state.scheduler.get_last_lr()[0]
            state.scheduler.step()
            for parameter in state.parameters.values():
                parameter.grad = None
            self.sends.updated()
        state.step += 1
        seconds = time.perf_counter() - start
        tokens_per_second = counts.tokens / seconds
        self.step_seconds += seconds
        scalars = {name: found[f"term.{name}"].item() for name in sums}
        progress.update(state.step, detail=describe(scalars, tokens_per_second))
        layers = {name: _rounded(found[f"layers.{name}"].tolist()) for name in clone_layers}
        return {
            "step": state.step,
            "tokens": self.tokens(),
            "seconds": round(self.seconds(), 3),
            "step_seconds": round(self.step_seconds, 3),
            **scalars,
            **({CLONE_LAYERS: layers} if layers else {}),
            "grad_norm": norm,
            "learning_rate": rate,
            "tokens_per_second": round(tokens_per_second, 1),
            **by_source.report(),
        }

    def _change_stage(self, progress: Task) -> dict[str, Any]:
        """Start the method's next stage, if one starts here; return its entries for the metrics."""
        setup, step = self.setup, self.setup.state.step
        if step not in stages_of(setup.method).stage_ends():
            return {}
        entries = stages_of(setup.method).next_stage()
        setup.state = new_state(setup.method, self.run.recipe, step, self.world, self.share)
        self.sums.remove()
        self.sums = GradientSums(self.world, setup.method.leaves())
        self.sends.remove()
        self.sends = ParameterSends(self.world, setup.method)
        others = ", ".join(f"{name} {value}" for name, value in entries.items() if name != "stage")
        change = f"{entries['stage']} ({others})" if others else entries["stage"]
        if step:  # at step 0, nothing was trained before
            trained = stages_of(setup.method).then_trained
            steps, left = self.run.recipe.steps(), time_left(progress)
            logger.info("step %d of %d: %s; now training %s%s", step, steps, change, trained, left)
        return entries

    def _slow_down(self, steps: int) -> None:
        """Take a lower rate for a student that starts near its teacher."""
        if self.share < 1 and steps:
            setup, recipe = self.setup, self.run.recipe
            setup.state = new_state(setup.method, recipe, 0, self.world, self.share)
            logger.info(
                "The student starts near its teacher, so it trains at %.2g of the rate of auto.",
                self.share,
            )

    def _calibration_sequences(self) -> int:
        """Number of sequences at the beginning of the text that initialized the method. Training
        begins after them, because there is more to learn from text that the start does not already
        fit."""
        return calibration_sequences(self.setup.method, self.run.recipe, self.text)

    def _collect_gradients(self) -> set[str]:
        """Add up the gradients of all processes in their owners.

        Returns:
            The names of the parameters that have no gradient in any process.
        """
        method = self.setup.method
        with method.clock.part("optimizer"):
            missing = self.sums.finish()
        for name, value in self.setup.state.parameters.items():
            if not method.owners.has(name):
                value.grad = None
        return missing - method.projected()

    def _clip(self, missing: Collection[str]) -> torch.Tensor:
        """Clip the gradients as the recipe says; return their norm before clipping.

        Args:
            missing: names of the parameters without a gradient.
        """
        limit = self.run.recipe.train.grad_clip or math.inf
        method, parameters = self.setup.method, self.setup.state.parameters
        if self.world.size == 1:
            return torch.nn.utils.clip_grad_norm_(parameters.values(), limit)
        trained = [(name, value) for name, value in parameters.items() if value.requires_grad]
        named = [(name, value) for name, value in trained if name not in missing]
        dtype = next(iter(parameters.values())).dtype
        norms = torch.zeros(len(named), dtype=dtype, device=self.setup.device)
        for place, (_, value) in enumerate(named):
            if value.grad is not None:
                norms[place] = torch.linalg.vector_norm(value.grad)
        self.world.add_up(norms)  # each is zero but in its owner
        total: torch.Tensor = torch.linalg.vector_norm(norms)
        own = [value for name, value in named if method.owners.has(name)]
        torch.nn.utils.clip_grads_with_norm_(own, limit, total)
        return total

    def _refuse_nan(self, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        kept = list_checkpoints(self.run.checkpoints)
        rate = stages_of(self.setup.method).rate_setting()
        if getattr(self.run.recipe.train, rate) is None:
            rate = "learning_rate"
        where = f"the last good checkpoint is {kept[0]}" if kept else "there is no checkpoint yet"
        raise DivergedError(
            f"The loss or its gradient is not finite at step {self.setup.state.step + 1} "
            f"({where}). Start a new run with a lower train.{rate}."
        )

    def _measure(self, progress: Task) -> dict[str, Any]:
        """Measure the held-out loss of the current student."""
        by_source = SourceLosses(self.text.sources)
        with self.setup.method.clock.part("evaluation"):
            loss = held_out_loss(
                self.setup.method.student(),
                self.held_out(),
                self.setup.teacher.vocab_size,
                by_source,
                self.world,
            )
        step, tokens = self.setup.state.step, self.tokens()
        if progress.total:
            of = f"step {step} of {progress.total}, {tokens:,} tokens"
            logger.info("%s: held-out LM loss %.4f%s", of, loss, time_left(progress))
        else:
            logger.info("Held-out LM loss %.4f.", loss)
        return {
            "step": step,
            "tokens": tokens,
            "held_out_lm": loss,
            **by_source.report("held_out_"),
        }

    def _measure_teacher(self) -> dict[str, Any]:
        teacher = self.setup.teacher
        by_source = SourceLosses(self.text.sources)
        loss = held_out_loss(
            teacher.model, self.held_out(), teacher.vocab_size, by_source, self.world
        )
        if not math.isfinite(loss):
            raise UserError(
                f"The held-out loss of the teacher {teacher.name} is not finite. Its weights are "
                "damaged or too large for teacher.dtype; download it again, or use another teacher."
            )
        means = by_source.means()
        return {"teacher_held_out_lm": loss, **({TEACHER_BY_SOURCE: means} if means else {})}

    def _weigher(self) -> WeighsSources | None:
        """The method, if it sets how much of the text comes from each source."""
        method = self.setup.method
        return method if isinstance(method, WeighsSources) and method.weighs_sources() else None

    def _weigh_sources(self, line: dict[str, Any]) -> dict[str, Any]:
        """Let the method set the sources' shares after a measurement; return them for the metrics.

        Args:
            line: the measurement.
        """
        weigher, text = self._weigher(), self.text
        if weigher is None or not text.sources:
            return {}
        teacher = self.world.from_first(self.run.metrics()[:1])[0][TEACHER_BY_SOURCE]
        shares = weigher.source_shares(text.shares(), line["held_out_lm_by_source"], teacher)
        done = self.setup.state.step * self.run.recipe.train.step_sequences()
        text.set_shares(self._calibration_sequences() + done, shares)
        return {"source_shares": shares}

    def calibration(self) -> dict[str, Any]:
        """Tokens and seconds of the method's initialization and, if known, the seconds of the
        teacher's layers alone over these tokens."""
        sequences = self._calibration_sequences()
        found = {
            "calibration_tokens": sequences * self.run.recipe.data.sequence_length,
            "calibration_seconds": round(self.calibration_seconds, 3),
        }
        if self.forward_seconds:
            found["calibration_forward_seconds"] = round(self.forward_seconds, 3)
        return found

    def held_out(self) -> list[Batch]:
        """The held-out batches to measure, the same throughout the run."""
        train = self.run.recipe.train
        batches = self.text.held_out_batches(train.eval_sequences, train.micro_batch)
        apart = self.setup.teacher.family.keeps_documents_apart
        return [batch.to(self.setup.device) for batch in separated(batches, apart)]

    def also_held_out(self) -> Iterator[tuple[str, list[Batch]]]:
        """The batches of `data.also_held_out`, by name."""
        train, teacher = self.run.recipe.train, self.setup.teacher
        apart = teacher.family.keeps_documents_apart
        for name, batches in also_held_out(
            self.run.recipe.data,
            teacher.tokenizer,
            train.eval_sequences,
            train.micro_batch,
            teacher.first_token,
        ):
            yield name, [batch.to(self.setup.device) for batch in separated(batches, apart)]

    def tokens(self) -> int:
        """Training tokens so far, over all processes."""
        return self.setup.state.step * self.run.recipe.step_tokens()

    def seconds(self) -> float:
        """Seconds of training so far, over all processes."""
        return self.seconds_before + time.perf_counter() - self.started

    def _resume_metrics(self) -> None:
        """Truncate the metrics to the step that the run continues from, and restore the clock."""
        if not self.world.leads:
            return
        keep_metrics_until(self.run.metrics_file, self.setup.state.step)
        lines = self.run.metrics()
        self.seconds_before = max((line.get("seconds", 0.0) for line in lines), default=0.0)
        self.step_seconds = max((line.get("step_seconds", 0.0) for line in lines), default=0.0)
        if lines:
            self.calibration_seconds = lines[0].get("calibration_seconds", 0.0)
            self.forward_seconds = lines[0].get("calibration_forward_seconds", 0.0)

    def _log(self, line: dict[str, Any]) -> None:
        if not self.world.leads:
            return
        path = self.run.metrics_file
        with disk_errors(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        values = tracked_values(line)
        for tracker in self.trackers:
            tracker.log(values, line["step"])

    def _save(self) -> None:
        train = self.run.recipe.train
        self.setup.state.text = merged_state(self.world.gather(self.batches.text_state()))
        self.setup.state.method = stages_of(self.setup.method).state()
        with self.setup.method.clock.part("checkpoint"):
            save_checkpoint(
                self.run.checkpoints,
                self.setup.state,
                self.run.recipe.fingerprint(),
                train.keep_checkpoints,
                self.world,
            )
        self._saved = time.perf_counter()


def describe(losses: dict[str, float], tokens_per_second: float) -> str:
    """A step's rate and losses for people."""
    terms = (f"{name} {value:.3f}" for name, value in losses.items())
    return ", ".join([f"{tokens_per_second:,.0f} tokens/s", *terms])


def time_left(progress: Task) -> str:
    """The time left as the end of a line; empty if it is not known."""
    left = progress.left()
    return f"; {left} left" if left else ""


def add_counts(counts: Sequence[Counts]) -> Counts:
    """The counts of all processes together."""
    return Counts(sum(c.tokens for c in counts), sum(c.labels for c in counts))


def add_found(found: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Add up what all processes found, by rank; the norm of the gradient is the same in all."""
    total = dict(found[0])
    for other in found[1:]:
        for name, value in other.items():
            if name != "norm":
                total[name] = total[name] + value if name in total else value
    return total


def fetch(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy tensors to the CPU in one transfer, the only time in a step that the CPU waits.

    Args:
        values: tensors by name, of any shape; integers below 2^53.
    """
    flat = torch.cat([value.detach().flatten().double() for value in values.values()]).cpu()
    parts = torch.split(flat, [value.numel() for value in values.values()])
    return {
        name: part.to(value.dtype).view(value.shape)
        for (name, value), part in zip(values.items(), parts, strict=True)
    }


def _rounded(values: list[float]) -> list[float | None]:
    """Values with five digits, more than a plot shows, and None for NaN."""
    return [None if math.isnan(value) else float(f"{value:.5g}") for value in values]
