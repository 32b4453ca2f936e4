"""The training of a student after its teacher. Classes that derive from this one say what a student learns."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from dit4sr_pl.backbone.sd3 import Backbone
from dit4sr_pl.backbone.text_encoder import Embeddings
from dit4sr_pl.model import TrainedPart
from dit4sr_pl.model.trained_part import flat_config
from dit4sr_pl.restoration.sampler import Sampler
from dit4sr_pl.training.module import SuperResolutionModule, start_from_checkpoint
from dit4sr_pl.training.students.perceptual import PerceptualLoss
from dit4sr_pl.training.students.teacher import Teacher

NEW = ("guidance.", "lora.")  # weights that a student may have in addition to its teacher's


class StudentModule(SuperResolutionModule):
    """A module that trains a student over its teacher's base, whose weights are in memory once.

    The teacher is no submodule: it is neither trained nor averaged nor saved. A step's prompts are those of restoring,
    captions followed by `added_prompt`.

    Args:
        backbone: the frozen pipeline.
        network: makes the student's network over the backbone's transformer, given the teacher's variant.
        checkpoint: file of a trained part to start from, of a teacher or a student; None: the student's teacher.
        teacher: checkpoint of the teacher, see `Teacher`.
        teaching: options of `Sampler` in which the teacher restores what the student learns differs from `sampler`.
        sampler: how a validation restores, except for what the student fixes.
        compile: whether the blocks of student and teacher are compiled.
        training: further arguments of `SuperResolutionModule`.

    Attributes:
        teacher: the teacher.
        teaching: how the teacher restores what the student learns.
        perceptual: the perceptual loss; None: there is none.
    """

    perceptual: PerceptualLoss | None = None

    def __init__(
        self,
        backbone: Backbone,
        network: Callable[..., nn.Module],
        checkpoint: str | None,
        teacher: str,
        teaching: Mapping[str, Any],
        sampler: Sampler,
        compile: bool,
        **training: Any,
    ):
        frozen = Teacher(backbone, teacher, compile)  # before the base is quantized
        network = partial(network, variant=frozen.net.variant)
        start = checkpoint or teacher
        super().__init__(backbone, network, start, sampler=sampler, compile=compile, **training)
        self.teacher, self.taught_by = frozen, frozen.weights_hash
        self.teaching = replace(sampler, start="noise", tiling="overlapping", **teaching)
        self.step_inputs = replace(self.step_inputs, prompt=self.teaching.prompt)

    def start_from(self, net: nn.Module, checkpoint: str) -> TrainedPart:
        """Loads the weights of a teacher or a student, which may restore in another way and lack what is new here."""
        own = tuple(key for key in flat_config(net.network_config()) if key.startswith(("student.", "lora.")))
        return start_from_checkpoint(net, checkpoint, ("injection_scale", *own), NEW)

    def setup(self, stage: str) -> None:
        """Moves the teacher and the perceptual network, which Lightning does not know, to the device."""
        super().setup(stage)
        self.teacher.to(self.device)
        if self.perceptual is not None:
            self.perceptual.to(self.device)

    def prompts(self, captions: set[str]) -> set[str]:
        """Returns all prompts whose embeddings steps over these captions need, the negative prompt included."""
        return self.teaching.prompts(captions)

    def conditions(self, prompts: Embeddings) -> list[Embeddings]:
        """Returns the embeddings of the prompts and, if the teacher is guided, of the negative prompt."""
        if not self.teaching.runs_negative_prompt:
            return [prompts]
        return self.teacher.conditions(prompts, self.teaching.negative_prompt)
