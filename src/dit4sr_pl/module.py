"""Training DiT4SR (paper Section 5.1) as a LightningModule."""

from collections.abc import Callable
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from dit4sr_pl.backbone import Backbone
from dit4sr_pl.flow import RectifiedFlow, interpolate
from dit4sr_pl.latents import draw_noise, enlarge
from dit4sr_pl.model import DiT4SRTransformer, Variant
from dit4sr_pl.model.checkpoints import fit_lr_stream
from dit4sr_pl.randomness import generator
from dit4sr_pl.sampling import Sampler, restore


class DiT4SRModule(LightningModule):
    """Trains the LR stream over a frozen SD3 pipeline.

    Only the LR stream is a submodule: what Lightning counts, averages, optimises, saves and sends between devices is
    what is trained. The frozen parts stand beside it in `backbone`.

    Args:
        backbone: the frozen pipeline. variant: which parts of the LR stream are in.
        weighting: of the loss, see `RectifiedFlow`.
        optimizer: from parameters to an optimizer.
        sampler: how validation restores.
        gradient_checkpointing: recompute the blocks in the backward pass.
        seed: with a sample's place in the run it gives timestep and noise.
    """

    def __init__(
        self,
        backbone: Backbone,
        variant: Variant,
        weighting: str,
        optimizer: Callable[[Any], Optimizer],
        sampler: Sampler,
        gradient_checkpointing: bool,
        seed: int,
    ):
        super().__init__()
        self.backbone = backbone
        self.flow = RectifiedFlow(backbone.scheduler, weighting)
        self.optimizer = optimizer
        self.sampler = sampler
        self.seed = seed
        net = DiT4SRTransformer(backbone.transformer, variant, gradient_checkpointing)
        self.lr_stream = net.lr_stream.float()  # trained in float32 under autocast
        object.__setattr__(self, "net", net)  # not a submodule: see above

    def setup(self, stage: str) -> None:
        self.backbone.to(self.device)

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        keys = [(self.seed, position) for position in batch["position"].tolist()]
        generators = [generator("cpu", "flow", *key) for key in keys]
        coder = self.backbone.coder
        clean = coder.encode(batch["hr"], [generator("cpu", "posterior", *key) for key in keys])
        lr_latent = coder.encode(enlarge(batch["lr"], batch["hr"].shape[-2:]))
        embeds, pooled = self.backbone.prompts(batch["prompt"], self.device)

        timestep, sigma = (values.to(self.device) for values in self.flow.draw_timesteps(generators))
        noise = draw_noise(clean, generators)
        velocity = self.net(interpolate(clean, noise, sigma), lr_latent, timestep, embeds, pooled)
        loss = self.flow.loss(velocity, clean, noise, sigma).mean()
        self.stop_unless_finite(loss)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def stop_unless_finite(self, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise ValueError(
                f"loss is {loss.item()} at step {self.global_step}; lower optimizer.lr or resume from an earlier "
                "checkpoint (ckpt_path=...)"
            )

    def validation_step(self, batch: dict, batch_idx: int) -> Tensor:
        """The restored images `(B, 3, H, W)`; scores are the callbacks' business."""
        return self.restore(batch["lr"], batch["hr"].shape[-2:], batch["prompt"], batch["name"])

    def restore(self, lr: Tensor, size: tuple[int, int], captions: list[str], names: list[str]) -> Tensor:
        """`(B, 3, h, w)` to `(B, 3, *size)`, both in 0..1; an image's noise depends on the seed and its name."""
        generators = [generator("cpu", "restore", self.seed, name) for name in names]
        parts = self.backbone.coder, self.backbone.prompts, self.backbone.scheduler
        return restore(self.net, *parts, self.sampler, lr, size, captions, generators)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["variant"] = self.lr_stream.variant.as_dict()

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Variants B and FULL have the same weights by name: the checkpoint says which it is."""
        theirs, ours = checkpoint["variant"], self.lr_stream.variant.as_dict()
        if theirs != ours:
            raise ValueError(f"{self.trainer.ckpt_path}: trained as variant {theirs}; this run is {ours}")
        prefix = "lr_stream."
        state = {name.removeprefix(prefix): weight for name, weight in checkpoint["state_dict"].items()}
        fit_lr_stream(self.lr_stream, state, self.trainer.ckpt_path)

    def configure_optimizers(self) -> Optimizer:
        return self.optimizer(parameter for parameter in self.lr_stream.parameters() if parameter.requires_grad)
