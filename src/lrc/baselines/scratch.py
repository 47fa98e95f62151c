"""The plain baseline: a random student of the same shape, trained on LM + KL.

Source: the ordinary distillation that LRC is compared with (arXiv 2505.12781), after Hinton et al.,
Distilling the Knowledge in a Neural Network (arXiv 1503.02531). The weights start from
transformers' initialization for the teacher's class. Losses, weights and temperature are LRC's, so
that the only difference is the cloning. `objective.kl_weight: 0` is ordinary pre-training, without
a teacher forward pass.
"""

from lrc.baselines.plain import PLAIN_SETTINGS, SHAPE_SETTINGS, RandomStudent, SamePasses


class Scratch(SamePasses, RandomStudent):
    """LM + KL from random weights."""

    title = "knowledge distillation from random weights (arXiv 1503.02531)"
    used_settings = PLAIN_SETTINGS | SHAPE_SETTINGS
