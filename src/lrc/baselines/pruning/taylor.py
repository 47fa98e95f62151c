"""Estimated change of the loss without a part of a model, by Taylor expansion.

Source: Ma et al., LLM-Pruner: On the Structural Pruning of Large Language Models (arXiv
2305.11627), sections 3.1 and 3.2. A group of coupled structures is removed as a whole: a key/value
head with its query heads (rows of q, k and v, columns of o), or an FFN neuron (a row of gate and of
up, a column of down). A row includes the bias of its output.

With w a weight, g the gradient of the mean LM loss, and F the mean over sequences of the squared
gradient of a sequence's own mean LM loss (the diagonal of the Fisher information, instead of the
Hessian's), the salience s of a weight is

* `param_first`, `vectorize`: w g
* `param_second`: w^2 F
* `param_mix`: w g - w^2 F / 2

The importance of a row or column is the sum of |s| over its weights, or |sum of s| for `vectorize`.
The importance of a linear map's share in a group is the sum over its rows or columns there. The
group's importance is `sum`, `prod` or `max` over its linear maps, or that of the `last` one (o,
down).

Cost: a forward and a backward pass over the calibration sequences, one sequence at a time if F is
needed. Memory in addition to the model: the gradients of the linear maps once, and their squares
once if F is needed.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lrc.cloning.activations import last_hidden
from lrc.cloning.objective import VocabularyWeights, vocabulary_losses
from lrc.data.batch import Batch
from lrc.model.layout import LinearSite
from lrc.model.precision import upcast, upcast_dtype
from lrc.model.teacher import Teacher
from lrc.recipe.method_sections import Grouping, Taylor

HEADS = ("q", "k", "v", "o")
NEURONS = ("gate", "up", "down")
"""Linear maps of a group, in execution order."""

PASS = 2048
"""Approximate tokens of a forward and backward pass; longer sequences run one at a time."""

CHUNK = 512
"""Tokens whose logits are held at once."""


@dataclass(frozen=True)
class TaylorImportance:
    """Importance of every group of a model, float64."""

    groups: Tensor
    """Of key/value heads with their query heads, [layers, key/value heads]."""

    neurons: Tensor
    """Of FFN neurons, [layers, FFN width]."""


def taylor_importance(
    teacher: Teacher,
    batch: Batch,
    taylor: Taylor,
    grouping: Grouping,
    progress: Callable[[int, int], None] | None = None,
) -> TaylorImportance:
    """Importance of a model's groups on calibration text.

    Args:
        teacher: the model; it keeps no gradients.
        batch: the sequences.
        taylor: the expansion (see above).
        grouping: how to combine the linear maps of a group.
        progress: function that gets the number of completed passes and the total.
    """
    gradients = lm_gradients(teacher, batch, taylor in ("param_second", "param_mix"), progress)

    def of_groups(layer: int, names: tuple[str, ...], groups: int) -> Tensor:
        shares = [
            _vectors(teacher, LinearSite(layer, name), gradients, taylor).view(groups, -1).sum(1)
            for name in names
        ]
        return _together(torch.stack(shares).double(), grouping)

    layers, config = range(teacher.num_layers), teacher.config
    return TaylorImportance(
        torch.stack([of_groups(i, HEADS, config.num_key_value_heads) for i in layers]),
        torch.stack([of_groups(i, NEURONS, config.intermediate_size) for i in layers]),
    )


@dataclass(frozen=True)
class Gradients:
    """Gradients of the LM loss by parameter, in the shapes of the parameters and in float32 at
    least."""

    mean: dict[str, Tensor]
    """Of the mean over all labels."""

    squared: dict[str, Tensor]
    """Mean over sequences of the squared gradient of the sequence's own mean; empty if not
    requested."""


def lm_gradients(
    teacher: Teacher,
    batch: Batch,
    squared: bool,
    progress: Callable[[int, int], None] | None = None,
) -> Gradients:
    """Gradients of the linear maps' weights, and of the biases that belong to their rows.

    Arguments are those of `taylor_importance`; `squared` requests the squared gradients.
    """
    parameters = _coupled_parameters(teacher)
    zeros = [
        {
            name: torch.zeros_like(value, dtype=upcast_dtype(value))
            for name, value in parameters.items()
        }
        for _ in range(1 + squared)
    ]
    found = Gradients(zeros[0], zeros[1] if squared else {})
    number, length = batch.input_ids.shape
    together = 1 if squared else max(1, PASS // length)
    parts = [batch.rows(slice(row, row + together)) for row in range(0, number, together)]
    labels = [int((part.labels() >= 0).sum()) for part in parts]
    share = 0.0  # share of the current part in all labels

    def gather(name: str, parameter: Tensor) -> None:
        """Add the gradient of a part's mean loss as soon as it is available, and free it."""
        assert parameter.grad is not None
        gradient = parameter.grad.to(upcast_dtype(parameter))
        parameter.grad = None
        found.mean[name].add_(gradient, alpha=share)
        if squared:
            found.squared[name].addcmul_(gradient, gradient, value=1 / number)

    with _differentiated(parameters, gather):
        for done, (part, count) in enumerate(zip(parts, labels, strict=True), 1):
            share = count / max(1, sum(labels))
            if count:
                _lm_loss(teacher, part, count).backward()  # type: ignore[no-untyped-call]
            if progress:
                progress(done, len(parts))
    return found


def _coupled_parameters(teacher: Teacher) -> dict[str, nn.Parameter]:
    """The parameters that belong to groups, by name."""
    found = {}
    for site in teacher.layout.sites():
        path = teacher.layout.linear(site)
        for kind, value in teacher.model.get_submodule(path).named_parameters():
            if kind == "weight" or not teacher.layout.writes(site):
                found[f"{path}.{kind}"] = value
    return found


@contextmanager
def _differentiated(
    parameters: dict[str, nn.Parameter], gather: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Give gradients to frozen parameters while the context is open. As soon as a gradient is
    available, call `gather` with the name and the parameter."""
    with ExitStack() as undo:
        for name, value in parameters.items():
            undo.callback(value.requires_grad_, value.requires_grad)
            value.requires_grad_(True)
            hook = value.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                lambda p, name=name: gather(name, p)
            )
            undo.callback(hook.remove)
        with torch.enable_grad():
            yield


def _lm_loss(teacher: Teacher, batch: Batch, labels: int) -> Tensor:
    """Mean LM loss of sequences with this many labels."""
    hidden = last_hidden(teacher.model, batch).flatten(0, 1)
    nothing = hidden.new_empty(0, hidden.shape[1])
    return vocabulary_losses(
        hidden,
        teacher.model.get_output_embeddings().weight,
        nothing,
        nothing,
        batch.labels().flatten(),
        None,
        VocabularyWeights(
            0.0, 1.0, 1.0, labels, labels, teacher.vocab_size, CHUNK, softcap=teacher.logit_softcap
        ),
    ).weighted


def _vectors(teacher: Teacher, site: LinearSite, gradients: Gradients, taylor: Taylor) -> Tensor:
    """Importance of the rows of a reader, or of the columns of a writer."""
    path = teacher.layout.linear(site)
    module = teacher.model.get_submodule(path)
    salience = _salience(module.get_parameter("weight"), f"{path}.weight", gradients, taylor)
    salience = salience.T if teacher.layout.writes(site) else salience
    if f"{path}.bias" in gradients.mean:
        bias = _salience(module.get_parameter("bias"), f"{path}.bias", gradients, taylor)
        salience = torch.cat([salience, bias[:, None]], 1)
    return salience.sum(1).abs() if taylor == "vectorize" else salience.abs().sum(1)


def _salience(weight: Tensor, name: str, gradients: Gradients, taylor: Taylor) -> Tensor:
    """Salience of every weight of a parameter, in float32 at least."""
    weight = upcast(weight.detach())
    if taylor == "param_second":
        return weight.square() * gradients.squared[name]
    first = weight * gradients.mean[name]
    if taylor == "param_mix":
        return first - weight.square() * gradients.squared[name] / 2
    return first


def _together(shares: Tensor, grouping: Grouping) -> Tensor:
    """Importance of groups from that of their linear maps, [linear maps, groups]."""
    if grouping == "sum":
        return shares.sum(0)
    if grouping == "prod":
        return shares.prod(0)
    return shares.amax(0) if grouping == "max" else shares[-1]
