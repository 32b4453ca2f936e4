"""Training (paper Section 5.1) as a LightningModule: DiT4SR, or a baseline over the same frozen SD3 pipeline."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from dit4sr_pl.backbone import Backbone
from dit4sr_pl.flow import RectifiedFlow, interpolate
from dit4sr_pl.latents import draw_noise, enlarge
from dit4sr_pl.model import TrainedPart, load_part
from dit4sr_pl.model.checkpoints import base_of, check_settings, fit_part
from dit4sr_pl.randomness import generator
from dit4sr_pl.restorer import Restorer
from dit4sr_pl.sampling import Sampler


class SuperResolutionModule(LightningModule):
    """Trains one part of a network over a frozen SD3 pipeline.

    Only that part (`lr_stream` or `controlnet`) is a submodule: what Lightning counts, averages, optimises, saves and
    sends between devices is what is trained. The frozen parts stand beside it in `net` and `backbone`.

    Args:
        backbone: the frozen pipeline.
        network: makes the network over the backbone's transformer.
        checkpoint: trained part to start from, for fine-tuning; its settings must be the network's.
        weighting: of the loss, see `RectifiedFlow`.
        optimizer: from parameters to an optimizer.
        sampler: how validation restores.
        compile: run training steps through `torch.compile`.
        seed: with a sample's place in the run it gives timestep and noise.
    """

    def __init__(
        self,
        backbone: Backbone,
        network: Callable[[SD3Transformer2DModel], nn.Module],
        checkpoint: str | None,
        weighting: str,
        optimizer: Callable[[Any], Optimizer],
        sampler: Sampler,
        compile: bool,
        seed: int,
    ):
        super().__init__()
        self.backbone = backbone
        self.flow = RectifiedFlow(backbone.scheduler, weighting)
        self.optimizer = optimizer
        self.seed = seed
        net = network(backbone.transformer)
        if checkpoint is not None:
            start_from(net, checkpoint)
        self.base = base_of(net, backbone.name)  # read before weights are sharded
        self.add_module(net.part, getattr(net, net.part).float())  # trained in float32 under autocast
        object.__setattr__(self, "net", net)  # not a submodule: see above
        self.velocity = torch.compile(net.__call__) if compile else net.__call__  # with FSDP's hooks, unlike forward
        self.restorer = Restorer(net, backbone, sampler)

    def __deepcopy__(self, memo: dict) -> "SuperResolutionModule":
        """Lightning's weight averaging copies the module: its trained part, while frozen weights exist once."""
        memo |= {id(module): module for module in self.net.base.modules()}
        memo[id(self)] = copied = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__getstate__(), memo))  # without the trainer
        return copied

    def setup(self, stage: str) -> None:
        self.backbone.to(self.device)

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        keys = [(self.seed, position) for position in batch["position"].tolist()]
        generators = [generator("cpu", "flow", *key) for key in keys]
        clean, lr_latent = self.latents(batch, keys)
        embeds, pooled = self.backbone.prompts(batch["prompt"], self.device)

        timestep, sigma = (values.to(self.device) for values in self.flow.draw_timesteps(generators))
        noise = draw_noise(clean, generators)
        velocity = self.velocity(interpolate(clean, noise, sigma), lr_latent, timestep, embeds, pooled)
        loss = self.flow.loss(velocity, clean, noise, sigma).mean()
        # Over the global batch: all devices stop together, and logs do not depend on their number.
        mean = self.trainer.strategy.reduce(loss.detach().clone(), reduce_op="mean")
        self.stop_unless_finite(mean)
        self.log("train/loss", mean, prog_bar=True)
        return loss

    def latents(self, batch: dict, keys: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Returns the latents of the HR images and of the enlarged LR images, encoded now or before the run."""
        if "clean" in batch:
            return batch["clean"].float(), batch["lr_latent"].float()
        coder = self.backbone.coder
        clean = coder.encode(batch["hr"], [generator("cpu", "posterior", *key) for key in keys])
        return clean, coder.encode(enlarge(batch["lr"], batch["hr"].shape[-2:]))

    def stop_unless_finite(self, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise ValueError(
                f"loss is {loss.item()} at step {self.global_step}; lower optimizer.lr or resume from an earlier "
                "checkpoint (ckpt_path=...)"
            )

    def validation_step(self, batch: dict, batch_idx: int) -> Tensor:
        """The restored images `(B, 3, H, W)`; scores are the callbacks' business."""
        return self.restorer(batch["lr"], batch["hr"].shape[-2:], batch["prompt"], batch["name"], self.seed)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["settings"] = self.net.settings()
        checkpoint["base"] = self.base

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        check_settings(self.net, checkpoint["settings"], self.trainer.ckpt_path)
        prefix = f"{self.net.part}."
        state = {name.removeprefix(prefix): weight for name, weight in checkpoint["state_dict"].items()}
        fit_part(self.net, TrainedPart(checkpoint["settings"], checkpoint["base"], state), self.trainer.ckpt_path)

    def configure_optimizers(self) -> Optimizer:
        # All parameters: optimizer states count them, and FSDP's counts those without gradients too.
        optimizer = self.optimizer(self.parameters())
        # A fused optimizer would unscale float16's gradients by itself, and Lightning then refuses to clip them.
        optimizer._step_supports_amp_scaling = False
        return optimizer


def start_from(net: nn.Module, checkpoint: str) -> None:
    """Gives a network the weights of a trained part of the same settings over the same base; errors name the file."""
    part = load_part(checkpoint)
    check_settings(net, part.settings, checkpoint)
    fit_part(net, part, checkpoint)
