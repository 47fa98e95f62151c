"""TRL's trainers, with the held-out loss of all tunings and the loss with a teacher.

Without a teacher, the loss is TRL's. With one, it is lm_weight * LM + kl_weight * T^2 * KL on the
assistant's tokens, by the chunked loss of `lrc.cloning.objective.vocabulary`. On-policy, it is
TRL's `DistillationTrainer`, which is GKD (arXiv 2306.13649) with every answer written by the
student.
"""

import json
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers import PreTrainedTokenizerBase as Tokenizer
from trl import DistillationConfig, DistillationTrainer, SFTConfig, SFTTrainer

from lrc.cloning.activations import last_hidden, scaled_hidden
from lrc.cloning.objective.vocabulary import VocabularyWeights, vocabulary_losses
from lrc.data.batch import Batch
from lrc.evaluation.held_out import held_out_loss
from lrc.model.families import family_of
from lrc.model.teacher import Teacher
from lrc.system.distributed import ALONE, World
from lrc.system.errors import DivergedError, UserError
from lrc.system.metrics import keep_metrics_until
from lrc.train.signals import StopRequest, agree
from lrc.tuning.conversations import ASSISTANT, Conversations, Encoded, Messages
from lrc.tuning.settings import Tuning

logger = logging.getLogger(__name__)

TENSORBOARD = "tensorboard"

OnLog = Callable[[dict[str, Any]], None]
"""Gets a line of metrics."""


def make_trainer(
    tuning: Tuning,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    teacher: Teacher | None,
    conversations: Conversations,
    folder: Path,
    callback: TrainerCallback,
    world: World = ALONE,
) -> "SFTTrainer | DistillationTrainer":
    """TRL's trainer for a tuning.

    Args:
        tuning: the settings.
        model: the model to tune; changed in place.
        tokenizer: its tokenizer; TRL changes its padding.
        teacher: the teacher, on the model's device; None: none.
        conversations: training and held-out conversations.
        folder: where TRL writes its checkpoints.
        callback: called by the trainer after every step.
        world: the processes that share the micro-batches of every step.

    Raises:
        UserError: if the launcher asks for sharded models.
    """
    held_out = HeldOutLoss(conversations.held_out, tokenizer, tuning.micro_batch, world)
    shared = {
        "output_dir": str(folder),
        "num_train_epochs": tuning.epochs,
        "max_steps": tuning.steps or -1,
        "per_device_train_batch_size": tuning.micro_batch,
        "gradient_accumulation_steps": tuning.accumulate // world.size,
        "learning_rate": tuning.learning_rate,
        "lr_scheduler_type": tuning.schedule,
        "warmup_steps": tuning.warmup_ratio,  # a share if it is below 1
        "weight_decay": tuning.weight_decay,
        "max_grad_norm": tuning.grad_clip,
        "bf16": tuning.precision == "bfloat16",
        "activation_checkpointing": tuning.gradient_checkpointing,
        "use_cpu": tuning.device == "cpu",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "seed": tuning.seed,
        "logging_steps": tuning.log_every,
        "eval_strategy": "steps",
        "eval_steps": tuning.eval_every,
        "save_steps": tuning.checkpoint_every,
        "save_total_limit": tuning.keep_checkpoints,
        "report_to": [name for name in tuning.report_to if name != TENSORBOARD] or "none",
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,
        "logging_nan_inf_filter": False,
    }
    common: dict[str, Any] = {
        "model": model,
        "processing_class": tokenizer,
        "callbacks": [callback, *(_tensorboard(tuning, folder.parent) if world.leads else [])],
        "peft_config": _adapters(tuning),
    }
    if tuning.on_policy:
        assert teacher is not None
        tokenizer.padding_side = "left"
        prompts = _prompts(conversations.training_messages, tokenizer, tuning)
        config = DistillationConfig(
            **shared,
            beta=tuning.on_policy_beta,
            temperature=1.0,
            max_completion_length=tuning.max_new_tokens,
        )
        data = {"train_dataset": prompts, "eval_dataset": prompts.select(range(1))}
        return _made(OnPolicy, held_out, config, **common, **data, teacher_model=teacher.model)
    config = SFTConfig(**shared, max_length=tuning.max_length, packing=tuning.packing)
    data = {
        "train_dataset": _rows(conversations.training),
        "eval_dataset": _rows(conversations.held_out),
    }
    if teacher is None:
        return _made(Plain, held_out, config, **common, **data)
    return _made(WithTeacher, held_out, config, teacher=teacher, tuning=tuning, **common, **data)


def _made(kind: Any, held_out: "HeldOutLoss", config: Any, **options: Any) -> Any:
    """A trainer that does not print its metrics itself, and uses one GPU in each process."""
    config._n_gpu = min(1, config.n_gpu)  # by itself, it would use DataParallel in a single process
    trainer = kind(held_out, args=config, **options)
    trainer.remove_callback(PrinterCallback)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise UserError(
            "Chat tuning keeps the whole model in every process: turn FSDP and DeepSpeed off in "
            "accelerate's configuration, or use torchrun."
        )
    return trainer


def _tensorboard(tuning: Tuning, folder: Path) -> list[TrainerCallback]:
    """Event files in the folder of the tuning; by itself, the trainer writes them elsewhere."""
    if TENSORBOARD not in tuning.report_to:
        return []
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    writer = SummaryWriter(folder / TENSORBOARD)
    return [TensorBoardCallback(writer)]


def _adapters(tuning: Tuning) -> Any:
    """peft's configuration; None to train all weights."""
    if not tuning.lora_rank:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=tuning.lora_rank,
        lora_alpha=tuning.lora_alpha,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def _rows(encoded: Sequence[Encoded]) -> Dataset:
    """Tokens and labels, which TRL takes as they are."""
    return Dataset.from_dict(
        {
            "input_ids": [one.input_ids for one in encoded],
            "labels": [one.labels() for one in encoded],
        }
    )


def _prompts(conversations: Sequence[Messages], tokenizer: Tokenizer, tuning: Tuning) -> Dataset:
    """The turns before the last answer of every conversation, if there is room for an answer."""
    prompts = []
    for messages in conversations:
        last = max(turn for turn, one in enumerate(messages) if one["role"] == ASSISTANT)
        if not last:
            continue  # there is no question
        prompt = [{"role": one["role"], "content": one["content"]} for one in messages[:last]]
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
        if len(ids) + tuning.max_new_tokens <= tuning.max_length:
            prompts.append(prompt)
    if left_out := len(conversations) - len(prompts):
        logger.warning(
            "%s conversations were left out: no question, or no room for %d new tokens.",
            f"{left_out:,}",
            tuning.max_new_tokens,
        )
    if not prompts:
        raise UserError(
            f"No prompt leaves room for max_new_tokens ({tuning.max_new_tokens}) in max_length "
            f"({tuning.max_length}): change one of them."
        )
    return Dataset.from_dict({"prompt": prompts})


class HeldOutLoss:
    """The loss on the assistant's tokens of held-out conversations: their mean, whatever the
    batches are."""

    def __init__(
        self, encoded: Sequence[Encoded], tokenizer: Tokenizer, rows: int, world: World = ALONE
    ) -> None:
        self._encoded = sorted(encoded, key=lambda one: len(one.input_ids))
        self._rows, self.world = rows, world
        self.vocab = max(tokenizer.get_vocab().values()) + 1
        """Number of token ids in use."""

    def measure(self, model: PreTrainedModel) -> float:
        """The loss in nats. All processes measure a share, and all get the result."""
        training = model.training
        model.eval()
        try:
            batches = self._batches(model.device)
            return held_out_loss(model, batches, self.vocab, world=self.world)
        finally:
            model.train(training)

    def _batches(self, device: torch.device) -> Iterator[Batch]:
        for start in range(0, len(self._encoded), self._rows):
            some = self._encoded[start : start + self._rows]
            length = max(len(one.input_ids) for one in some)
            ids = torch.zeros(len(some), length, dtype=torch.int64)
            mask, learned = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
            for row, one in enumerate(some):
                size = len(one.input_ids)
                ids[row, :size] = torch.from_numpy(one.input_ids)
                mask[row, :size] = 1
                learned[row, :size] = torch.from_numpy(one.learned)
            yield Batch(ids, attention_mask=mask, label_mask=learned).to(device)


class _Measured:
    """A trainer whose evaluation is the held-out loss on the assistant's tokens."""

    def __init__(self, held_out: HeldOutLoss, **options: Any) -> None:
        self._held_out = held_out
        super().__init__(**options)

    def evaluate(self: Any, *_: Any, **__: Any) -> dict[str, float]:
        """The held-out loss, logged as TRL logs its own."""
        found = {"eval_loss": self._held_out.measure(plain_model(self.model))}
        self.log(dict(found))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found


class Plain(_Measured, SFTTrainer):  # type: ignore[misc]
    """TRL's trainer and loss."""


class OnPolicy(_Measured, DistillationTrainer):  # type: ignore[misc]
    """TRL's GKD on answers that the student writes."""


class WithTeacher(_Measured, SFTTrainer):  # type: ignore[misc]
    """TRL's trainer with LM and KL to a teacher on the assistant's tokens."""

    def __init__(
        self, held_out: HeldOutLoss, *, teacher: Teacher, tuning: Tuning, **options: Any
    ) -> None:
        self._teacher, self._tuning = teacher, tuning
        self._sums: dict[str, list[float]] = defaultdict(list)
        self._first = 0
        """Number of steps before those in `_sums`."""
        super().__init__(held_out, **options)
        # The trainer counts the labels of a whole step and passes their number to the loss.
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **options: Any
    ) -> Tensor:
        """The weighted loss of a micro-batch; its share of the step's mean over labels."""
        plain, teacher, tuning = plain_model(self.model), self._teacher, self._tuning
        learned = inputs["labels"] >= 0
        batch = Batch(
            inputs["input_ids"],
            inputs.get("position_ids"),
            inputs.get("attention_mask"),
            label_mask=learned,
        )
        labels = batch.labels()
        kept = labels >= 0
        count = options.get("num_items_in_batch")
        count = int(kept.sum()) if count is None else int(count)
        weights = VocabularyWeights(
            kl_weight=tuning.kl_weight,
            lm_weight=tuning.lm_weight,
            temperature=tuning.temperature,
            tokens=max(1, count),
            labels=max(1, count),
            vocab=self._held_out.vocab,
            chunk_tokens=tuning.chunk_tokens,
            softcap=family_of(plain.config.model_type).logit_softcap(plain.config),
        )
        ours = _hidden_through(model, plain, batch)
        with torch.no_grad():
            theirs = last_hidden(teacher.model, batch)
        losses = vocabulary_losses(
            ours[kept],
            plain.get_output_embeddings().weight,
            theirs[kept],
            teacher.model.get_output_embeddings().weight,
            labels[kept],
            None,
            weights,
        )
        if not self._sums:
            self._first = self.state.global_step
        for name, value in (("lm", losses.lm), ("kl", losses.divergence)):
            self._sums[name].append(value.item())
        # With several processes, DDP averages gradients of losses that count everyone's labels.
        return losses.weighted * self.accelerator.num_processes

    def log(self, logs: dict[str, float], *rest: Any) -> None:
        """Add the terms of the loss to a line of training metrics, as means over its steps."""
        if "loss" in logs and self._sums:
            mine = {name: math.fsum(values) for name, values in self._sums.items()}
            of_all = self._held_out.world.gather(mine)
            terms = {name: math.fsum(one[name] for one in of_all) for name in mine}
            steps = max(1, self.state.global_step - self._first)
            logs |= {name: total / steps for name, total in terms.items()}
            self._sums.clear()
        super().log(logs, *rest)


def plain_model(model: Any) -> PreTrainedModel:
    """The transformers model, without peft around it."""
    found: PreTrainedModel = model.get_base_model() if hasattr(model, "peft_config") else model
    return found


def _hidden_through(model: Any, plain: PreTrainedModel, batch: Batch) -> Tensor:
    """`last_hidden` of a model, computed through the trainer's wrapper of it, so that data
    parallelism sees the pass. The logits of one position are computed and dropped."""
    found: list[Tensor] = []
    handle = plain.base_model.register_forward_hook(
        lambda _module, _inputs, output: found.append(output.last_hidden_state)
    )
    try:
        model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
            logits_to_keep=1,
        )
    finally:
        handle.remove()
    return scaled_hidden(plain, found[0])


def refuse_not_finite(loss: float, step: int) -> None:
    """Raises DivergedError if a loss after a step is not finite."""
    if not math.isfinite(loss):
        raise DivergedError(
            f"The loss is not finite at step {step}: start again, in another folder, with a lower "
            "learning_rate."
        )


class Reporter(TrainerCallback):  # type: ignore[misc]
    """Writes metrics.jsonl, shows progress, and stops the trainer on a signal or a bad loss."""

    def __init__(self, file: Path, stop: StopRequest, show: OnLog, world: World = ALONE) -> None:
        self._file, self._stop, self._show, self._world = file, stop, show, world

    def on_train_begin(self, _args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        """Drop the lines after the step that the trainer continues from."""
        if self._world.leads:
            keep_metrics_until(self._file, state.global_step)

    def on_log(
        self, _args: Any, state: TrainerState, _control: Any, logs: Any = None, **_: Any
    ) -> None:
        """Write and show a line."""
        for name in ("loss", "eval_loss"):
            refuse_not_finite((logs or {}).get(name, 0.0), state.global_step)
        if not self._world.leads:
            return
        line = {"step": state.global_step, "steps": state.max_steps, **(logs or {})}
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._show(line)

    def on_step_end(
        self, _args: Any, _state: Any, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Write a checkpoint and stop, if a signal asked any of the processes for it."""
        if agree(self._stop, self._world):
            control.should_save = control.should_training_stop = True
        return control
