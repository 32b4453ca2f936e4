"""Trainings with LoRA on the base: they resume exactly, average what is trained, and their files restore."""

import copy

import pytest
import torch

from dit4sr_pl.backbone.sd3 import Backbone
from dit4sr_pl.convert import main as convert
from dit4sr_pl.model import load_part, save_part
from dit4sr_pl.model.lora import ATTENTION
from dit4sr_pl.model.reference_format import Release
from dit4sr_pl.model.trained_part import base_of, fit_part, part_of
from dit4sr_pl.pipeline import DiT4SRPipeline
from dit4sr_pl.restoration.restorer import Restorer, build_network
from testing.networks import randomise
from testing.toy_runs import SAMPLER, TOY_SD3, train_toy
from tests.training.test_module import make_module

LORA = ["+model.network.lora._target_=dit4sr_pl.model.lora.LoRA", "+model.network.lora.rank=2"]
LORA += ["+model.network.lora.alpha=4.0", f"+model.network.lora.targets=[{','.join(ATTENTION)}]"]


@pytest.fixture(scope="module")
def runs(photos, tmp_path_factory):
    """The folders of two runs of four steps, one of which was stopped after two and resumed."""
    folder = tmp_path_factory.mktemp("lora")
    common = [*LORA, "optimizer.lr=1e-2", "callbacks.ema.decay=0.5", "trainer.limit_val_batches=0"]
    train_toy(photos, folder / "whole", *common, "trainer.max_steps=4")
    train_toy(photos, folder / "resumed", *common, "trainer.max_steps=2")
    train_toy(photos, folder / "resumed", *common, "trainer.max_steps=4")
    return folder


def test_a_resumed_training_equals_an_undisturbed_one(runs):
    whole, resumed = (load_part(runs / name / "lr_stream.safetensors") for name in ("whole", "resumed"))
    assert whole.network_config["lora"]["rank"] == 2
    assert all(torch.equal(whole.state[name], resumed.state[name]) for name in whole.state)


def test_the_layers_are_trained_and_averaged(runs):
    averaged = load_part(runs / "whole" / "lr_stream.safetensors").state
    checkpoint = torch.load(runs / "whole" / "checkpoints" / "0000004.ckpt", weights_only=True)
    trained = checkpoint["current_model_state"]
    layers = [name for name in averaged if name.startswith("lora.") and name.endswith(".B")]
    assert layers and all(averaged[name].any() for name in layers)
    assert all(not torch.equal(averaged[name], trained[f"lr_stream.{name}"]) for name in layers)
    assert torch.equal(load_part(runs / "whole" / "checkpoints" / "0000004.ckpt").state[layers[0]], averaged[layers[0]])


def test_a_copy_for_averages_shares_what_is_frozen_and_nothing_that_is_trained():
    module = make_module(*LORA)
    copied = copy.deepcopy(module)
    ours, theirs = ({id(weight): weight for weight in each.net.parameters()} for each in (module, copied))
    assert all(not ours[same].requires_grad for same in ours.keys() & theirs.keys())
    assert all(theirs[own].requires_grad for own in theirs.keys() - ours.keys())
    trained = {id(weight) for weight in copied.parameters()}
    assert {id(weight) for weight in copied.net.base.parameters() if weight.requires_grad} <= trained


@pytest.fixture(scope="module")
def file(toy_backbone, tmp_path_factory):
    """An LR-stream file with random LoRA."""
    module = make_module(*LORA)
    randomise(module.lr_stream)
    path = tmp_path_factory.mktemp("file") / "lr_stream.safetensors"
    save_part(part_of(module.net, base_of(module.net, str(TOY_SD3))), path)
    return path


def restored(file, lr: torch.Tensor, **options) -> torch.Tensor:
    backbone = Backbone(str(TOY_SD3), "float32", 8, **options)
    return Restorer.load(backbone, SAMPLER, file, torch.device("cpu"))(lr, (32, 48), [""], ["0"], seed=0)


def test_restorer_and_pipeline_restore_with_the_layers(file, toy_backbone, tmp_path):
    lr = torch.rand(1, 3, 8, 12)
    part = load_part(file)
    net = build_network(toy_backbone.transformer, part.network_config)
    fit_part(net, part, file)
    expected = Restorer(net.eval(), toy_backbone, SAMPLER)(lr, (32, 48), [""], ["0"], seed=0)
    torch.testing.assert_close(restored(file, lr), expected, atol=1e-5, rtol=0)

    options = {"num_inference_steps": 3, "smallest": 1, "color": "none", "output_type": "pt"}
    pipe = DiT4SRPipeline.from_pretrained(str(TOY_SD3), lr_stream=file, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    options |= {"added_prompt": "", "negative_prompt": "", "t5_tokens": 8, "guidance_scale": 1.0}
    torch.testing.assert_close(pipe(lr, **options).images, expected, atol=1e-5, rtol=0)
    pipe.save_pretrained(tmp_path)
    again = DiT4SRPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    torch.testing.assert_close(again(lr, **options).images, expected, atol=1e-5, rtol=0)


def test_a_quantized_base_is_that_of_the_merged_weights(file):
    lr = torch.rand(1, 3, 8, 12)
    difference = (restored(file, lr, quantization="int8") - restored(file, lr)).abs().mean()
    assert 1e-5 < difference < 0.02


def test_the_released_layout_gets_merged_weights(file, toy_backbone, tmp_path, monkeypatch, capsys):
    arguments = [
        f"input={file}",
        f"output={tmp_path}",
        f"model.backbone.name={TOY_SD3}",
        "model.backbone.dtype=float32",
    ]
    monkeypatch.setattr("sys.argv", ["convert", *arguments])
    convert()
    part = load_part(file)
    net = build_network(toy_backbone.transformer, part.network_config)
    fit_part(net, part, file)
    net.merge_lora()
    theirs, ours = Release(tmp_path).base().state_dict(), net.base.state_dict()
    assert all(torch.equal(theirs[name], weight) for name, weight in ours.items())
    name = "transformer_blocks.0.attn.to_q.weight"
    assert not torch.equal(theirs[name], toy_backbone.transformer.state_dict()[name])
