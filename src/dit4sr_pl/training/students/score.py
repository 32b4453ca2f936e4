"""Score distillation: a student's results move towards what its teacher holds for likely.

A result is noised, and both networks predict from it the clean latent that they hold for likely: the teacher, and a
critic that is trained beside the student on the student's own results. Their difference is the gradient of the result:

    variational (OSEDiff, arXiv 2406.08177)       critic(z_t) - teacher(z_t)
    target score (TSD-SR, arXiv 2411.18263)       teacher(z_t) - teacher(HR latent with the same noise)

The critic is LoRA on the teacher's base with the teacher's LR stream, so it takes little memory.
"""

import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from torch import Tensor

from dit4sr_pl.backbone.flow import per_image
from dit4sr_pl.model import DiT4SRTransformer
from dit4sr_pl.model.compilation import compile_blocks
from dit4sr_pl.model.lora import LoRA, LoRALayers, adapted

SMALLEST = 1e-3  # of the number that a gradient is divided by


class Critic:
    """A network that is trained on a student's results; a training module has `layers` as its submodule.

    Args:
        teacher: the teacher, whose frozen LR stream the critic shares.
        base: the base without LoRA, whose weights the critic shares.
        lora: rank, scale and targets of the critic's LoRA.
        gradient_checkpointing: see `DiT4SRTransformer`.
        compile: whether its blocks are compiled.

    Raises:
        ValueError: the rank is 0.
    """

    def __init__(
        self,
        teacher: DiT4SRTransformer,
        base: SD3Transformer2DModel,
        lora: LoRA,
        gradient_checkpointing: bool = False,
        compile: bool = False,
    ):
        layers = LoRALayers.over(base, lora)
        if layers is None:
            raise ValueError("student.critic.rank=0: a critic needs LoRA; give a rank, or student.loss.score=0")
        shared = {"lr_stream": teacher.lr_stream, "gradient_checkpointing": gradient_checkpointing}
        self.layers, self.net = layers, DiT4SRTransformer(adapted(base, layers), **shared)
        layers.requires_grad_(True)  # a network freezes its base
        if compile:
            compile_blocks(self.net)

    def __deepcopy__(self, memo: dict) -> "Critic":
        return self  # Lightning's weight averaging copies the module around it; frozen weights exist once


def predicted_clean(noisy: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """Returns the clean latents `z_t - sigma v`, `(B, C, h, w)`, of noisy ones and their velocity at sigmas `(B,)`."""
    return noisy - per_image(sigma) * velocity


def loss_with_gradient(restored: Tensor, gradient: Tensor, real: Tensor) -> Tensor:
    """Returns a loss whose gradient for every restored latent is `gradient`, divided by the mean distance between
    restored latents and the teacher's prediction, as distribution matching distillation does (arXiv 2311.18828).

    Args:
        restored: the student's results, `(B, C, h, w)`.
        gradient: likewise; no gradient passes through it.
        real: the teacher's prediction, likewise.
    """
    distance = (restored.detach() - real).abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=SMALLEST)
    wanted = restored.detach() - gradient.detach() / distance
    return F.mse_loss(restored, wanted) / 2
