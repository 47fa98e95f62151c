"""Importance of a teacher's parts, from its activations over calibration text.

Source: Muralidharan et al., Compact Language Models via Pruning and Knowledge Distillation (arXiv
2407.14679, section 2.2). Only forward passes are needed. The score at every token is

* for a residual channel, its value in the output of a norm, summed over all norms,
* for a key/value head, the L2 norm of what its query heads pass to o,
* for an FFN neuron, its activation before down.

Scores are aggregated over the tokens of a sequence, then over sequences. The score of a layer is
its block influence 1 - E[cos(stream before it, stream after it)], a mean over all tokens (Men et
al., ShortGPT, arXiv 2403.03853).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lrc.cloning.activations import last_hidden, observe
from lrc.data.batch import Batch
from lrc.model.kept_units import KeptUnits
from lrc.model.layout import LinearSite
from lrc.model.precision import upcast
from lrc.model.pruned_shape import PrunedShape
from lrc.model.teacher import Teacher
from lrc.recipe.method_sections import Aggregation

ROWS = 8
"""Sequences of a forward pass."""


@dataclass(frozen=True)
class ActivationImportance:
    """Scores of a teacher's parts; a larger score means a more important part."""

    hidden: Tensor
    """Of the channels of the residual stream, [d_T]."""

    groups: Tensor
    """Of the key/value heads of every layer, [layers, heads]."""

    neurons: Tensor
    """Of the FFN neurons of every layer, [layers, neurons]."""

    layers: Tensor
    """Of the layers, [layers]."""

    def most_important(self, shape: PrunedShape) -> KeptUnits:
        """The parts with the highest scores that fill a shape, in their order in the teacher."""
        layers = largest(self.layers, shape.layers).tolist()
        return KeptUnits(
            layers,
            largest(self.hidden, shape.hidden),
            [largest(self.groups[layer], shape.kv_heads) for layer in layers],
            [largest(self.neurons[layer], shape.neurons) for layer in layers],
        )


@torch.no_grad()
def measure_importance(
    teacher: Teacher,
    batch: Batch,
    over_tokens: Aggregation,
    over_sequences: Aggregation,
    progress: Callable[[int, int], None] = lambda done, parts: None,
) -> ActivationImportance:
    """Score all parts of a teacher in one pass over calibration text.

    Args:
        teacher: the teacher.
        batch: the text; padding does not count.
        over_tokens: how to aggregate the scores of a sequence's tokens.
        over_sequences: how to aggregate the scores of the sequences.
        progress: function that gets the number of completed forward passes and the total.
    """
    watch = _Watch(teacher, over_tokens)
    parts = list(_parts(batch))
    with watch.open():
        for done, part in enumerate(parts):
            watch.mask = part.token_mask()
            last_hidden(teacher.model, part)
            progress(done + 1, len(parts))
    scores = {
        kind: torch.stack(
            [aggregate(torch.stack(rows), over_sequences) for rows in places.values()]
        )
        for kind, places in watch.rows.items()
    }
    influence = [torch.cat(values).mean() for values in watch.influence.values()]
    return ActivationImportance(
        scores["hidden"].sum(0), scores["groups"], scores["neurons"], torch.stack(influence)
    )


def aggregate(scores: Tensor, how: Aggregation) -> Tensor:
    """Reduce scores [n, parts] to one per part: the mean absolute value or the L2 norm."""
    if how == "l2":
        return torch.linalg.vector_norm(scores, dim=0)
    return scores.abs().mean(0)


class _Watch:
    """Hooks on a teacher that score its parts during forward passes."""

    def __init__(self, teacher: Teacher, over_tokens: Aggregation) -> None:
        self.teacher, self.over_tokens = teacher, over_tokens
        self.mask: Tensor | None = None
        """Tokens of the forward pass that count, bool [b, s]; None for all."""
        self.rows: dict[str, dict[Any, list[Tensor]]] = {"hidden": {}, "groups": {}, "neurons": {}}
        """The scores [parts] of every sequence, by kind of part and place."""
        self.influence: dict[int, list[Tensor]] = {}
        """1 - cos of every token, by layer."""

    @contextmanager
    def open(self) -> Iterator[None]:
        """Watch forward passes while the context is open."""
        model, layout = self.teacher.model, self.teacher.layout
        layers = range(layout.num_layers)
        hooks = [
            model.get_submodule(path).register_forward_hook(self._norm_hook(path))
            for path in layout.stream_norms()
        ]
        hooks += [
            model.get_submodule(layout.layer(layer)).register_forward_hook(self._layer_hook(layer))
            for layer in layers
        ]
        sites = [LinearSite(layer, name) for layer in layers for name in ("o", "down")]
        try:
            with observe(model, layout, sites, self._linear):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _norm_hook(self, path: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _module, _inputs, output: self._score("hidden", path, output)

    def _layer_hook(self, layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            change = 1 - functional.cosine_similarity(inputs[0], after, dim=-1)
            counted = change.flatten() if self.mask is None else change[self.mask]
            self.influence.setdefault(layer, []).append(upcast(counted))

        return hook

    def _linear(self, site: LinearSite, inputs: Tensor, output: Tensor) -> Tensor:
        layer, name = site
        if name == "down":
            self._score("neurons", layer, inputs)
        else:
            heads = self.teacher.config.num_key_value_heads
            groups = inputs.view(*inputs.shape[:-1], heads, -1)
            self._score("groups", layer, torch.linalg.vector_norm(groups, dim=-1))
        return output

    def _score(self, kind: str, place: Any, values: Tensor) -> None:
        """Aggregate scores [b, s, parts] over the tokens of each sequence."""
        rows = self.rows[kind].setdefault(place, [])
        for row, tokens in enumerate(values):
            counted = tokens if self.mask is None else tokens[self.mask[row]]
            rows.append(aggregate(upcast(counted), self.over_tokens))


def _parts(batch: Batch) -> Iterator[Batch]:
    """The sequences of a batch, a few at a time."""
    for start in range(0, len(batch.input_ids), ROWS):
        yield batch.rows(slice(start, start + ROWS))


def largest(scores: Tensor, count: int) -> Tensor:
    """Indices of the largest scores, ascending."""
    return scores.topk(count).indices.sort().values
