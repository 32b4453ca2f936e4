"""The networks of a student's step besides the student, on the meta device: teacher, critic, decoder."""

from collections.abc import Callable

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import nn

from dit4sr_pl.model import DiT4SRTransformer
from dit4sr_pl.model.lora import LoRA, LoRALayers, adapted
from dit4sr_pl.planning.step_cost import StudentStep
from dit4sr_pl.restoration.sampler import Sampler


def teacher_over(base: SD3Transformer2DModel) -> DiT4SRTransformer:
    """Returns a teacher as trainings hold it: its LR stream is merged and in the base's dtype."""
    with torch.device("meta"):
        teacher = DiT4SRTransformer(base)
    teacher.merge()
    nn.Module.to(teacher.lr_stream, base.dtype).requires_grad_(False)
    return teacher


def sequences(teaching: Sampler) -> list[int]:
    """Returns the sequences of each of a teacher's evaluations, per image: 2 with guidance."""
    evaluations = teaching.evaluations(*teaching.schedule(FlowMatchEulerDiscreteScheduler()), torch.device("cpu"))
    return [2 if each.guided else 1 for each in evaluations]


def guided_step(base: SD3Transformer2DModel, gradient_checkpointing: bool = False) -> StudentStep:
    """Returns the step of a student that takes the scale of guidance as an input."""
    return StudentStep(teacher_over(base), conditions=2, passes=1, teacher_first=True)


def trajectory_step(
    base: SD3Transformer2DModel,
    teaching: Sampler,
    windows: int,
    crop: int,
    perceptual: Callable[[], nn.Module] | None,
    gradient_checkpointing: bool = False,
) -> StudentStep:
    """Returns the step of a student of a teacher's trajectories, as if the teacher's LR stream ran every time.

    Args:
        base: the base.
        teaching: how the teacher restores.
        windows: number of the student's evaluations.
        crop: side of decoded crops in latents.
        perceptual: makes the perceptual network; None: nothing is decoded.
        gradient_checkpointing: it has no effect, since a teacher has no backward pass.
    """
    each, decodes = sequences(teaching), {}
    if perceptual is not None:
        decodes = {"crop": crop, "perceptual": frozen(perceptual)}
    passes = round(sum(each) / max(each))
    return StudentStep(teacher_over(base), max(each), passes, teacher_first=True, windows=windows, **decodes)


def frozen(perceptual: Callable[[], nn.Module]) -> nn.Module:
    """Returns a perceptual network without memory."""
    return perceptual().requires_grad_(False).to("meta")


def single_step(
    base: SD3Transformer2DModel,
    teaching: Sampler,
    losses: dict[str, float],
    critic: LoRA,
    crop: int,
    perceptual: Callable[[], nn.Module],
    gradient_checkpointing: bool = False,
) -> StudentStep:
    """Returns the step of a student of one step.

    Args:
        base: the base.
        teaching: how the teacher restores.
        losses: weights of the losses by name.
        critic: LoRA of the critic.
        crop: side of decoded crops in latents.
        perceptual: makes the perceptual network.
        gradient_checkpointing: whether the critic's blocks are computed again in the backward pass.
    """
    teacher, net = teacher_over(base), None
    if losses["score"]:
        with torch.device("meta"):
            layers = LoRALayers.over(base, critic)
            options = {"lr_stream": teacher.lr_stream, "gradient_checkpointing": gradient_checkpointing}
            net = DiT4SRTransformer(adapted(base, layers), **options)
        layers.requires_grad_(True)
    each = sequences(teaching) if losses["teacher"] else []
    conditions = 1 if teaching.guidance_scale == 1 else 2
    scores = bool(losses["score"] or losses["target_score"]) + bool(losses["target_score"])
    return StudentStep(
        teacher,
        conditions,
        scores + round(sum(each) / conditions),
        teacher_first=False,
        critic=net,
        crop=crop if losses["pixel"] or losses["perceptual"] else 0,
        perceptual=frozen(perceptual) if losses["perceptual"] else None,
    )
