"""Waits of the host for the device in a training step and in steps of sampling, counted on a fake CUDA device."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from dit4sr_pl.backbone.sd3 import Backbone
from dit4sr_pl.data.module import SuperResolutionData
from dit4sr_pl.model import DiT4SRTransformer
from dit4sr_pl.restoration.restorer import Restorer
from dit4sr_pl.training.callbacks import EMAWeightAveraging
from dit4sr_pl.training.lightning_state import averaged_model
from dit4sr_pl.training.module import SuperResolutionModule
from testing.fake_cuda import CUDA, cuda_autocast, fake_cuda, onto_fake_cuda
from testing.toy_runs import SAMPLER, TOY_SD3


class FakePrompts:
    """Prompt embeddings that lie on the fake device."""

    def __init__(self, backbone: Backbone):
        config = backbone.transformer.config
        self.widths = (config.joint_attention_dim, config.pooled_projection_dim)

    def __call__(self, prompts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        embeds, pooled = (torch.empty(len(prompts), 16, width, device=device) for width in self.widths)
        return embeds, pooled[:, 0]

    of_step = __call__


def toy_backbone() -> Backbone:
    """Returns the toy backbone with prompts for the fake device."""
    backbone = Backbone(str(TOY_SD3), "bfloat16", 8)
    backbone.prompts = FakePrompts(backbone)
    return backbone


def move(backbone: Backbone, net: DiT4SRTransformer) -> None:
    """Replaces all weights by fake ones on the fake device; call it within `fake_cuda`."""
    for module in (net, backbone.vae):
        onto_fake_cuda(module)
    backbone.device = CUDA


def waits_of_training(data: SuperResolutionData, steps: int) -> list[Counter[str]]:
    """Returns the waits of each of a few training steps, from a worker's batch to the averaged weights, by line.

    The backward pass and the optimizer's step read nothing; PyTorch cannot run them on a fake device.
    """
    waits, backbone, optimizer = [], toy_backbone(), partial(torch.optim.AdamW, lr=1e-4)
    parts = backbone, DiT4SRTransformer, None, "released", optimizer, SAMPLER
    module = SuperResolutionModule(*parts, compile=False, seed=0)
    reduce = lambda value, reduce_op: value  # noqa: E731
    module._trainer = SimpleNamespace(strategy=SimpleNamespace(reduce=reduce), global_step=0, datamodule=data)
    average = EMAWeightAveraging()
    average.setup(module._trainer, module, "fit")
    with fake_cuda() as device:
        move(backbone, module.net)
        onto_fake_cuda(averaged_model(average).module)
        module._device, module.log = CUDA, lambda *_, **__: None
        module.setup("fit")
        for step, batch in zip(range(steps), data.train_dataloader(), strict=False):
            device.waits.clear()
            batch = data.transfer_batch_to_device(batch, CUDA, 0)
            batch = data.on_after_batch_transfer(batch, 0)
            with cuda_autocast(torch.bfloat16):
                module.training_step(batch, step)
            module._trainer.global_step = step + 1
            average.on_train_batch_end(module._trainer, module, None, batch, step)
            waits.append(device.waits.copy())
    return waits


def waits_of_sampling(solver: Callable[..., SchedulerMixin], batch: int = 2) -> Counter[str]:
    """Returns the waits of four further steps of a solver, by line: those of eight steps without those of four."""
    counted, backbone = [], toy_backbone()
    net = DiT4SRTransformer(backbone.transformer).to(backbone.dtype).eval()
    with fake_cuda() as device, torch.no_grad():
        move(backbone, net)
        for steps in (4, 8):
            restorer = Restorer(net, backbone, replace(SAMPLER, solver=solver, steps=steps, guidance_scale=2.0))
            device.waits.clear()
            names = [str(number) for number in range(batch)]
            restorer(torch.rand(batch, 3, 16, 16), (64, 64), [""] * batch, names, seed=0)
            counted.append(device.waits.copy())
    return counted[1] - counted[0]
