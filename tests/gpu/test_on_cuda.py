"""A CUDA device computes what the CPU computes.

    python -m pytest tests/gpu --confcutdir=tests/gpu -W default

runs these tests also where only PyTorch, lightning, transformers, accelerate, diffusers, kornia and tensorboard are.
"""

from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import FlowMatchEulerDiscreteScheduler
from lightning import Trainer

from dit4sr_pl.backbone.flow import TimestepDensity
from dit4sr_pl.backbone.sd3 import Backbone
from dit4sr_pl.backbone.shipped_prompts import HeldPrompts
from dit4sr_pl.common.randomness import generator
from dit4sr_pl.data.module import SuperResolutionData
from dit4sr_pl.degradation import Degradation
from dit4sr_pl.images.files import write_image
from dit4sr_pl.images.resize import enlarge
from dit4sr_pl.model import DiT4SRTransformer, load_part
from dit4sr_pl.model.compilation import CUDAGraphs, capture_graphs, compile_blocks
from dit4sr_pl.model.trained_part import fit_part
from dit4sr_pl.restoration.restorer import Restorer
from dit4sr_pl.restoration.sampler import Sampler
from dit4sr_pl.training.learning_rate import LearningRateSchedule
from dit4sr_pl.training.module import SuperResolutionModule
from testing import ROOT
from testing.networks import randomise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
LR_STREAM = ROOT / "src/dit4sr_pl/assets/tiny-dit4sr/lr_stream.safetensors"


def settings(path: str) -> dict:
    keys = yaml.safe_load((ROOT / "conf" / path).read_text())
    return {key: value for key, value in keys.items() if key not in ("defaults", "_target_")}


def sampler(**options) -> Sampler:
    fields = settings("sampler/paper.yaml") | settings("sampler/tiny.yaml") | options
    return Sampler(solver=FlowMatchEulerDiscreteScheduler.from_config, **fields)


def tiny(dtype: str = "float32") -> Backbone:
    return Backbone("tiny-sd3", dtype=dtype, t5_tokens=8)


def pictures(count: int, side: int) -> torch.Tensor:
    small = torch.rand(count, 3, side // 4, side // 4, generator=generator("cpu", "pictures"))
    return enlarge(small, (side, side))


def network(device: torch.device) -> DiT4SRTransformer:
    net = DiT4SRTransformer(tiny().transformer)
    fit_part(net, load_part(LR_STREAM), LR_STREAM)
    randomise(net.lr_stream)
    return net.to(device)


@pytest.fixture
def inputs() -> list[torch.Tensor]:
    draw = generator("cpu", "inputs")
    config = tiny().transformer.config
    latent, embeds = (2, config.in_channels, 16, 24), (2, 16, config.joint_attention_dim)
    shapes = latent, latent, (2,), embeds, (2, config.pooled_projection_dim)
    return [torch.randn(shape, generator=draw) for shape in shapes]


def test_the_velocity_is_the_cpus(inputs):
    with torch.no_grad():
        expected = network(CPU)(*inputs)
        velocity = network(CUDA)(*(each.to(CUDA) for each in inputs)).cpu()
    torch.testing.assert_close(velocity, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_captured_graph_gives_what_the_network_gives(inputs, compiled):
    """Two shapes in turn, with new values in every call: all graphs share one pool of memory."""
    plain, net = network(CUDA), network(CUDA)
    if compiled:
        compile_blocks(net)
    capture_graphs(net)
    results = []
    with torch.no_grad():
        for factor in (1.0, 0.5, 0.25):
            for rows in (2, 1):
                given = [factor * each[:rows].to(CUDA) for each in inputs]
                results.append((net(*given), plain(*given)))
    assert isinstance(net.forward, CUDAGraphs) and len(net.forward.graphs) == 2
    for ours, expected in results:  # at the end: no later replay may have overwritten them
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-3)


def test_restoring_with_captured_graphs_equals_restoring_without():
    lr, results = pictures(2, 32), []
    for options in ({}, {"cuda_graph": True}, {"cuda_graph": True, "compile": True}):
        restorer = Restorer.load(tiny(), sampler(steps=4), "tiny-dit4sr", CUDA, **options)
        # The first image is one tile, the second one has several: two shapes.
        results.append([restorer(lr[:1], size, [""], ["a"], seed=0) for size in ((128, 128), (384, 320), (128, 128))])
    for ours in results[1:]:
        for each, expected in zip(ours, results[0], strict=True):
            assert (each - expected).abs().max() <= 1.01 / 255


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_the_cpus(inputs, checkpointing):
    gradients = []
    for device in (CPU, CUDA):
        net = network(device)
        net.gradient_checkpointing = checkpointing
        net(*(each.to(device) for each in inputs)).square().mean().backward()
        gradients.append({name: weight.grad.cpu() for name, weight in net.lr_stream.named_parameters()})
    for name, expected in gradients[0].items():
        error = (gradients[1][name] - expected).norm() / expected.norm().clamp(min=1e-12)
        assert error < 1e-3, name


def test_a_training_has_the_cpus_losses(tmp_path):
    for index, image in enumerate(pictures(4, 96)):
        write_image(tmp_path / f"{index}.png", image)
    losses = {device: train(tmp_path, device, "32-true") for device in (CPU, CUDA)}
    assert losses[CUDA] == pytest.approx(losses[CPU], rel=1e-3)
    assert train(tmp_path, CUDA, "bf16-mixed") == pytest.approx(losses[CPU], rel=0.05)


def train(folder: Path, device: torch.device, precision: str) -> list[float]:
    losses = []

    class Module(SuperResolutionModule):
        def on_train_batch_end(self, outputs, *_):
            losses.append(outputs["loss"].item())

    data = SuperResolutionData(
        *(str(folder), [], Degradation(**settings("degradation/light.yaml"))),
        **{"crop_size": 64, "batch_size": 2, "num_workers": 0, "min_gradient": 0.0},
    )
    optimizer = partial(torch.optim.AdamW, lr=1e-3, fused=True)
    parts = {"timesteps": TimestepDensity(), "schedule": LearningRateSchedule("constant", 0, 1, 1.0, None, 0.0)}
    parts |= {"backbone": tiny(), "network": DiT4SRTransformer, "sampler": sampler(), "optimizer": optimizer}
    module = Module(checkpoint=str(LR_STREAM), weighting="released", compile=False, seed=0, **parts)
    trainer = Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        precision=precision,
        max_steps=3,
        max_epochs=-1,
        limit_val_batches=0,
        use_distributed_sampler=False,
        **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    )
    trainer.fit(module, data)
    return losses


@pytest.mark.parametrize(
    ("size", "options"),
    [((128, 128), {}), ((384, 320), {}), ((128, 128), {"color": "wavelet", "guidance_scale": 2.0})],
    ids=["one tile", "tiles", "guided"],
)
def test_a_restored_pair_is_the_cpus_within_a_level(size, options):
    lr = torch.nn.functional.interpolate(pictures(2, 128), scale_factor=(size[0] / 512, size[1] / 512))
    results = []
    for device in (CPU, CUDA):
        restorer = Restorer.load(tiny(), sampler(steps=4, **options), "tiny-dit4sr", device)
        results.append(restorer(lr, size, ["", ""], ["a", "b"], seed=0))
    assert results[1].device == lr.device
    assert (results[1] - results[0]).abs().max() <= 1.01 / 255


def test_prompts_that_are_encoded_together_and_held_ones_are_the_cpus():
    backbone, prompts = tiny(), ["a cat", "", "a dog", ""]
    backbone.to(CUDA)
    expected = [torch.cat(parts) for parts in zip(*(tiny().encoder.encode(each, CPU) for each in prompts), strict=True)]
    held = HeldPrompts({"": backbone.encoder.encode("", CUDA)}, lambda: backbone.encoder)
    for encode in (backbone.prompts, backbone.prompts.of_step, held):
        for ours, theirs in zip(encode(prompts, CUDA), expected, strict=True):
            assert ours.device.type == "cuda"
            torch.testing.assert_close(ours.cpu(), theirs, atol=1e-4, rtol=1e-3)


def test_a_batch_is_degraded_as_on_the_cpu():
    chain, images = Degradation(**settings("degradation/seesr.yaml")), pictures(6, 256)
    params = chain.draw(range(6), (256, 256))
    torch.set_float32_matmul_precision("high")  # as in training
    try:
        (lr, hr), (expected_lr, expected_hr) = chain(images.to(CUDA), params), chain(images, params)
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(hr.cpu(), expected_hr, atol=1e-4, rtol=0)
    # A rounding error can move a DCT coefficient by one step, which is rare and changes one block.
    assert ((lr.cpu() - expected_lr).abs() < 1e-5).float().mean() > 0.99
