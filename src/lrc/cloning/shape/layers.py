"""Which layers to keep: those whose removal changes the teacher's predictions most.

Layers are removed one by one. Each time, it is the layer whose removal changes the predictions on a
few calibration tokens least, in KL(teacher || without it). Each removal nearly always makes the
others costlier, so an earlier measurement is a lower bound of the present cost. Only the layer that
seems cheapest is measured again.
"""

import heapq

import torch
from torch import Tensor

from lrc.cloning.objective import VocabularyWeights, vocabulary_losses
from lrc.cloning.start.calibration import Calibration
from lrc.cloning.start.closed_form.head import CHUNK, folded_head
from lrc.model.shapes import attention_layers
from lrc.model.teacher import Teacher

TOKENS = 1024
"""Tokens on which removals are measured, in whole sequences."""


@torch.no_grad()
def choose_layers(teacher: Teacher, ids: Tensor, count: int, restart: int = 0) -> list[int]:
    """The layers to keep, ascending. The first layer always stays: it reads the embedding. So does
    the last one with attention: transformers' cache needs it.

    Args:
        teacher: the teacher.
        ids: calibration tokens, int64 [sequences, length].
        count: number of layers to keep.
        restart: as for `Calibration`.
    """
    sequences = ids[: max(1, TOKENS // ids.shape[1])]
    with Calibration(teacher, sequences, teacher.hidden_size, restart) as calibration:
        head = folded_head(calibration)
        part = slice(0, len(sequences))
        states = list(calibration.teacher_states(part))
        final = calibration.normalize(states[-1])
        kept = list(range(teacher.num_layers))

        def cost(removed: int) -> float:
            """KL of the predictions without one more layer, per token."""
            place = kept.index(removed)
            stream = states[place]
            for index in kept[place + 1 :]:
                stream = calibration.run(calibration.layer(index), index, stream)
            weights = VocabularyWeights(
                1.0, 0.0, 1.0, len(final), 1, len(head), CHUNK, softcap=teacher.logit_softcap
            )
            labels = torch.full((len(final),), -100, device=ids.device)
            hidden = calibration.normalize(stream)
            return float(
                vocabulary_losses(hidden, head, final, head, labels, None, weights).divergence
            )

        costs = [(cost(layer), layer, len(kept)) for layer in kept[1:]]
        heapq.heapify(costs)
        attention = attention_layers(teacher.config)
        while len(kept) > count:
            _, layer, measured = heapq.heappop(costs)
            if {layer} == set(kept).intersection(attention):
                continue
            if measured == len(kept):
                place = kept.index(layer)
                kept.remove(layer)
                stream = states[place]
                del states[place + 1]
                for index, later in enumerate(kept[place:], place):
                    stream = calibration.run(calibration.layer(later), later, stream)
                    states[index + 1] = stream
            else:
                heapq.heappush(costs, (cost(layer), layer, len(kept)))
        return kept
