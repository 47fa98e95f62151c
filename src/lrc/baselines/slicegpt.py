"""SliceGPT: rotate the residual stream into its principal directions, and cut the small ones.

Source: Ashkboos et al., SliceGPT: Compress Large Language Models by Deleting Rows and Columns
(arXiv 2401.15024). The teacher's gains are fused into the maps that read its norms. A rotation of
the residual stream can then move into the weights without changing the model. The rotation is a PCA
of the normalized stream over calibration tokens, and the student keeps the first d_S directions
(`lrc.baselines.pruning.rotate`). Recovery training on KL + LM follows, of all the student's
weights.

Deviation: one rotation for all blocks, from the teacher's own stream at all its norms. The paper
has one rotation per block, Q_l, which it finds in order on the cut network. It therefore needs a
matrix Q_l^T Q_(l+1) in every skip connection. No weight of a plain model can absorb that matrix,
because its skips are the identity. With one rotation the student has exactly the plain class and
LRC's shape. The paper's student needs two more matrices [d_S, d_S] per layer, and its own code to
run. The cost of one rotation, in nats of held-out loss of the cut and untrained stories260K (d_T =
64, teacher at 1.22): 2.77 instead of 2.59 at d_S = 48, 4.84 instead of 4.56 at d_S = 32
(`test_what_one_rotation_costs`).

The student of `lrc` with `initialize: pca` starts from the same basis, but with gains of 1. It
loses less before training when much is cut. It trains projections into the teacher's weights, while
this method trains the student's own weights.
"""

from transformers import PreTrainedModel

from lrc.baselines.plain import PlainStudent, SamePasses, random_student
from lrc.baselines.pruned import PRUNED_SETTINGS
from lrc.baselines.pruning.rotate import write_rotated
from lrc.cloning.method import StartReport
from lrc.cloning.start.basis import principal_basis
from lrc.cloning.start.calibration import Calibration
from lrc.data.batch import Batch
from lrc.model.student import check_hidden_size, derive_config
from lrc.system.progress import Progress


class SliceGpt(SamePasses, PlainStudent):
    """The teacher's leading directions, trained on KL + LM."""

    title = "SliceGPT with one rotation for all blocks (arXiv 2401.15024)"
    used_settings = PRUNED_SETTINGS
    cuts_teacher = True

    def make_student(self) -> PreTrainedModel:
        student = self.recipe.student
        width = student.hidden_size or self.teacher.hidden_size
        check_hidden_size(self.teacher, width, largest=self.teacher.hidden_size)
        config = derive_config(self.teacher, student.hidden_size_alone())
        return random_student(self.teacher, config, seed=0)

    def calibration_tokens(self) -> int:
        return self.recipe.initialize.calibration_tokens

    def initialize(self, calibration: Batch, progress: Progress) -> StartReport:
        hidden_size = self.recipe.student.hidden_size or self.teacher.hidden_size
        with Calibration(self.teacher, calibration.input_ids, hidden_size) as pass_over:
            basis = principal_basis(pass_over, progress)
        write_rotated(self.model, self.teacher, basis)
        return StartReport(pass_over.forward_seconds)
