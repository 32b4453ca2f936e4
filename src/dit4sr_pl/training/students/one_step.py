"""One evaluation in the place of many: `z_0 = z_L - sigma v(z_L, z_L)`, from the LR latent straight to a clean one."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import Optimizer

from dit4sr_pl.backbone.flow import interpolate
from dit4sr_pl.backbone.text_encoder import Embeddings
from dit4sr_pl.model.lora import LoRA
from dit4sr_pl.training.students.module import StudentModule
from dit4sr_pl.training.students.perceptual import PerceptualLoss, crop_window, decoded
from dit4sr_pl.training.students.score import Critic, loss_with_gradient, predicted_clean


@dataclass(frozen=True)
class LossWeights:
    """Weights of the losses of a student of one step. Of a loss with weight 0 nothing is computed or kept in memory.

    Args:
        latent: mean squared distance from the HR latent.
        teacher: likewise, from what the teacher restores, which takes all of the teacher's evaluations.
        pixel: mean absolute distance of decoded crops.
        perceptual: perceptual distance of decoded crops.
        score: variational score distillation, with a critic.
        target_score: target score distillation, with the HR latent in the place of the critic.

    Raises:
        ValueError: a weight is negative or not finite, or all are 0.
    """

    latent: float = 0.0
    teacher: float = 0.0
    pixel: float = 0.0
    perceptual: float = 0.0
    score: float = 0.0
    target_score: float = 0.0

    def __post_init__(self) -> None:
        weights = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, weight in weights.items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"student.loss.{name}={weight}; give a number of at least 0")
        if not any(weights.values()):
            raise ValueError("student.loss: all weights are 0; give one")


class OneStepStudent(StudentModule):
    """A module that trains a student of one step, and its critic beside it.

    Student and critic are groups of one optimizer. Neither's loss has a gradient for the other, so a backward pass
    of the sum serves both, and gradients are clipped apart.

    Args:
        losses: weights of the losses.
        critic: LoRA of the critic.
        critic_learning_rate: learning rate of the critic, as a factor of the optimizer's.
        perceptual: makes the perceptual network, see `PerceptualLoss`.
        crop: side of decoded crops in pixels.
        training: further arguments of `StudentModule`.

    Raises:
        ValueError: the student does not start from the LR latent, or has several sigmas.
    """

    def __init__(
        self,
        losses: LossWeights,
        critic: LoRA,
        critic_learning_rate: float,
        perceptual: Callable[[], nn.Module],
        crop: int,
        **training: Any,
    ):
        super().__init__(**training)
        student = self.net.student
        if student.start != "lr_latent" or len(student.sigmas) != 1:
            raise ValueError(
                f"student.sigmas={student.sigmas}, student.start={student.start}: a student of one step starts from "
                "the LR latent at one sigma, such as student.sigmas=[0.5]"
            )
        (self.sigma,) = student.sigmas
        self.losses, self.critic_learning_rate = losses, critic_learning_rate
        self.crop = max(1, crop // self.backbone.coder.factor)
        self.perceptual = PerceptualLoss(perceptual) if losses.perceptual else None
        self.critic = None
        if losses.score:
            options = self.net.gradient_checkpointing, training["compile"]
            self.critic = Critic(self.teacher.net, self.backbone.transformer, critic, *options)
            self.critic_lora = self.critic.layers

    @property
    def bases(self) -> list[SD3Transformer2DModel]:
        """The bases of student and critic."""
        return [*super().bases, *([] if self.critic is None else [self.critic.net.base])]

    def loss(self, batch: dict) -> Tensor:
        """Returns the weighted sum of the losses of a batch, and of the critic's, and logs each."""
        clean, lr_latent = self.latents(batch)
        prompts = self.embeddings(batch)
        restored = self.restored(lr_latent, prompts)
        parts = self.regressions(restored, clean, lr_latent, batch["noise"], prompts)
        if self.losses.pixel or self.losses.perceptual:
            parts |= self.of_decoded(restored, clean, batch.get("hr"))
        if self.losses.score or self.losses.target_score:
            parts |= self.of_scores(restored, clean, lr_latent, batch, prompts)
        for name, part in parts.items():
            self.log(f"train/{name}", part.detach())
        return sum(getattr(self.losses, name, 1.0) * part for name, part in parts.items())

    def restored(self, lr_latent: Tensor, prompts: Embeddings) -> Tensor:
        """Returns the student's results `(B, C, h, w)`, float32."""
        timestep = lr_latent.new_full(
            (len(lr_latent),), self.sigma * self.backbone.scheduler.config.num_train_timesteps
        )
        return lr_latent - self.sigma * self.velocity(lr_latent, lr_latent, timestep, *prompts).float()

    def regressions(
        self, restored: Tensor, clean: Tensor, lr_latent: Tensor, noise: Tensor, prompts: Embeddings
    ) -> dict[str, Tensor]:
        """Returns the losses of latents by name; all latents are `(B, C, h, w)`."""
        parts = {}
        if self.losses.latent:
            parts["latent"] = F.mse_loss(restored, clean)
        if self.losses.teacher:
            taught = self.teacher.states(self.teaching, lr_latent, noise, self.conditions(prompts))[-1]
            parts["teacher"] = F.mse_loss(restored, taught)
        return parts

    def of_decoded(self, restored: Tensor, clean: Tensor, hr: Tensor | None) -> dict[str, Tensor]:
        """Returns the losses of decoded crops by name.

        Args:
            restored: the student's results, `(B, C, h, w)`.
            clean: HR latents, likewise.
            hr: HR images `(B, 3, H, W)`; None: the decoded HR latents take their place.
        """
        coder, losses = self.backbone.coder, {}
        rows, columns = crop_window(restored.shape[-2:], self.crop, self.seed, self.global_step)
        images = decoded(coder, restored[..., rows, columns])
        if hr is None:
            reference = coder.decode(clean[..., rows, columns])
        else:
            rows, columns = (slice(coder.factor * each.start, coder.factor * each.stop) for each in (rows, columns))
            reference = hr[..., rows, columns]
        if self.losses.pixel:
            losses["pixel"] = F.l1_loss(images, reference)
        if self.perceptual is not None:
            losses["perceptual"] = self.perceptual(images, reference)
        return losses

    def of_scores(
        self, restored: Tensor, clean: Tensor, lr_latent: Tensor, batch: dict, prompts: Embeddings
    ) -> dict[str, Tensor]:
        """Returns the losses of score distillation by name, and the critic's; `score.py` has the formulas."""
        noise, sigma, timestep = batch["noise"], batch["sigma"], batch["timestep"]
        result, parts = restored.detach(), {}
        noisy = interpolate(result, noise, sigma)
        conditions = self.conditions(prompts)
        real = predicted_clean(noisy, self.taught_velocity(noisy, lr_latent, timestep, conditions), sigma)
        if self.critic is not None:
            velocity = self.critic.net(noisy, lr_latent, timestep, *prompts).float()
            parts["critic"] = F.mse_loss(velocity, noise - result)
            held = predicted_clean(noisy, velocity.detach(), sigma)
            parts["score"] = loss_with_gradient(restored, held - real, real)
        if self.losses.target_score:
            target = interpolate(clean, noise, sigma)
            velocity = self.taught_velocity(target, lr_latent, timestep, conditions)
            parts["target_score"] = loss_with_gradient(restored, real - predicted_clean(target, velocity, sigma), real)
        return parts

    @torch.no_grad()
    def taught_velocity(
        self, noisy: Tensor, lr_latent: Tensor, timestep: Tensor, conditions: list[Embeddings]
    ) -> Tensor:
        """Returns the teacher's velocity, with its guidance, `(B, C, h, w)`, float32."""
        if len(conditions) == 1:
            return self.teacher.net(noisy, lr_latent, timestep, *conditions[0]).float()
        scale = timestep.new_full(timestep.shape, self.teaching.guidance_scale)
        return self.teacher.guided(noisy, lr_latent, timestep, conditions, scale)

    def parameter_groups(self) -> list[tuple[float, list[nn.Parameter]]]:
        """Returns the groups of the student and, as one of its own, the critic."""
        groups = super().parameter_groups()
        if self.critic is not None:
            groups.append((self.critic_learning_rate, list(self.critic_lora.parameters())))
        return groups

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clips the gradients of student and critic apart, so that one's do not shorten the other's."""
        if not gradient_clip_val:
            return
        clip = clip_grad_value_ if gradient_clip_algorithm == "value" else clip_grad_norm_
        for trained in (self.net.trained, *([] if self.critic is None else [self.critic_lora])):
            clip(trained.parameters(), gradient_clip_val)
