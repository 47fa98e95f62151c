"""Base class of the methods whose student starts from selected parts of the teacher."""

from abc import abstractmethod

from transformers import PreTrainedModel

from lrc.baselines.plain import PLAIN_SETTINGS, PlainStudent, SamePasses, random_student
from lrc.baselines.pruning.shape import target_shape
from lrc.baselines.pruning.size import size_notes
from lrc.cloning.method import StartReport
from lrc.data.batch import Batch
from lrc.model.kept_units import KeptUnits, write_kept
from lrc.model.pruned_shape import PrunedShape, pruned_config, shape_of_config
from lrc.model.student import ties_weights
from lrc.recipe.method_sections import PrunedShapeSection
from lrc.system.progress import Progress

PRUNED_SETTINGS = PLAIN_SETTINGS | {"initialize.calibration_tokens"}
"""Recipe settings that every pruned student uses. Its start has no randomness, but setting the seed
is not an error: comparisons set it for all methods."""


class PrunedStudent(SamePasses, PlainStudent):
    """A student that is cut out of the teacher based on training text, then trained on KL + LM.

    Subclasses choose what to keep.
    """

    used_settings = PRUNED_SETTINGS
    cuts_teacher = True

    @property
    def section(self) -> PrunedShapeSection:
        """The method's own settings."""
        assert isinstance(self.recipe.method, PrunedShapeSection)
        return self.recipe.method

    @property
    def shape(self) -> PrunedShape:
        """The student's shape."""
        return shape_of_config(self.model.config)

    def make_student(self) -> PreTrainedModel:
        teacher, student = self.teacher, self.recipe.student
        shape = target_shape(teacher, student, self.section)
        tied = ties_weights(teacher, student)
        return random_student(teacher, pruned_config(teacher, shape, tied=tied), seed=0)

    def notes(self) -> list[str]:
        return size_notes(self.teacher, self.recipe.student, self.model.config)

    def calibration_tokens(self) -> int:
        return self.recipe.initialize.calibration_tokens

    def initialize(self, calibration: Batch, progress: Progress) -> StartReport:
        kept = self.choose(calibration, progress)
        assert kept.shape == self.shape
        write_kept(self.model, self.teacher.model, kept)
        return StartReport()

    @abstractmethod
    def choose(self, calibration: Batch, progress: Progress) -> KeptUnits:
        """The parts of the teacher to keep, in the student's shape. Arguments are those of
        `initialize`."""
