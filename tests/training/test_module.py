"""The LightningModule: what it trains, what a copy of it shares, and how its gradients are clipped."""

import copy

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from dit4sr_pl.cli.command import conf_folder
from dit4sr_pl.model import load_part
from dit4sr_pl.training.module import SuperResolutionModule
from testing.toy_runs import TOY_SD3


def make_module(*overrides: str) -> SuperResolutionModule:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        cfg = compose("train", ["output=x", f"model.backbone.name={TOY_SD3}", *overrides])
    return instantiate(cfg.model)


def test_trainable_weights_are_float32_and_the_base_is_no_part_of_the_module():
    module = make_module("model.backbone.dtype=bfloat16")
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert all(name.startswith("lr_stream.") for name in module.state_dict())
    assert module.net.base.proj_out.weight.dtype == torch.bfloat16


def test_averaging_copies_what_is_trained_and_nothing_frozen():
    module = make_module()
    copied = copy.deepcopy(module)
    assert copied.net.base is module.net.base and copied.backbone is module.backbone
    assert copied.net.lr_stream is copied.lr_stream is not module.lr_stream
    assert copied.velocity.__self__ is copied.net
    for ours, theirs in zip(copied.net.blocks, module.net.blocks, strict=True):
        assert ours.frozen is theirs.frozen and ours.lr is not theirs.lr


@pytest.mark.slow
def test_gradients_are_clipped_in_half_precision_with_a_fused_optimizer(run, tmp_path):
    """One step of gradient descent with learning rate 1 is as long as the clipped gradient."""
    descent = ["optimizer._target_=torch.optim.SGD", "~optimizer.betas", "~optimizer.eps", "optimizer.weight_decay=0"]
    descent += [
        "trainer.precision=bf16-mixed",
        "optimizer.lr=1.0",
        "callbacks=default",
        "trainer.max_steps=1",
        "trainer.limit_val_batches=0",
    ]
    run("still", *descent, "optimizer.lr=0.0", "callbacks.checkpoint.every_n_train_steps=1")
    run("step", *descent, "trainer.gradient_clip_val=1e-3", "callbacks.checkpoint.every_n_train_steps=1")
    still, step = (load_part(tmp_path / name / "lr_stream.safetensors").state for name in ("still", "step"))
    length = sum((still[name] - step[name]).square().sum() for name in still).sqrt()
    assert length.item() == pytest.approx(1e-3, rel=1e-2)
