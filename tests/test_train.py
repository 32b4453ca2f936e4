import copy
import io
import logging
import re
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from dit4sr_pl import prepare
from dit4sr_pl import train as train_module
from dit4sr_pl.backbone.flow import RectifiedFlow
from dit4sr_pl.backbone.sd3 import Backbone
from dit4sr_pl.cli.command import conf_folder
from dit4sr_pl.common.files import ASSETS
from dit4sr_pl.common.hashing import values_hash, weights_hash
from dit4sr_pl.common.randomness import generator
from dit4sr_pl.common.run_identity import result_identity
from dit4sr_pl.images.files import read_image
from dit4sr_pl.model import DiT4SRTransformer, LRStream, Variant, block, load_part
from dit4sr_pl.preparation.embeddings import write_embeddings
from dit4sr_pl.restoration.restorer import Restorer
from dit4sr_pl.scores.results import read_result
from dit4sr_pl.train import check, gradient_checkpointing, train
from dit4sr_pl.training.module import start_from_checkpoint
from testing.students import write_teacher
from testing.toy_runs import CONTROLNET, SAMPLER, TOY_SD3, events, losses, toy

ABLATION = "no_lr_residual"  # of the run that several tests share
ABLATIONS = sorted(path.stem for path in (conf_folder() / "ablation").glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("ablation", ABLATIONS)
def test_every_ablation_takes_a_step_and_leaves_its_lr_stream(run, tmp_path, ablation, toy_backbone):
    scores = run("run", f"+ablation={ablation}", "metrics=[psnr]")
    assert {"train/loss", "val/psnr", "val/psnr_bicubic"} <= scores.keys()
    part = load_part(tmp_path / "run" / "lr_stream.safetensors")
    start = LRStream.over(toy_backbone.transformer, Variant(**part.network_config["variant"]))
    start.copy_output_projections_from(toy_backbone.transformer)
    assert any(not torch.equal(part.state[name], tensor) for name, tensor in start.state_dict().items())
    assert read_result(tmp_path / "run").variant == ablation


ON_TOY_SD3 = [f"model.backbone.name={TOY_SD3}", "model.backbone.dtype=float32", "model.backbone.t5_tokens=8"]
ON_A_CPU = ["trainer.accelerator=cpu", "trainer.devices=1", "++trainer.strategy=auto", "degradation=light"]
OF_ITS_OWN = {"sd3_controlnet": ["model.network.num_layers=1"]}


@pytest.mark.slow
@pytest.mark.parametrize("experiment", sorted(path.stem for path in (conf_folder() / "experiment").glob("*.yaml")))
def test_every_experiment_takes_a_step(run, experiment, tmp_path, toy_backbone):
    small = [*ON_TOY_SD3, *ON_A_CPU, *OF_ITS_OWN.get(experiment, [])]
    if "student" in experiment:
        small += [f"student.teacher={write_teacher(toy_backbone, tmp_path / 'teacher.safetensors')}"]
    if experiment.startswith("tiny_") or experiment == "ablation":  # on latents
        for kind in ("latent_hr", "latent_lr"):
            (tmp_path / kind).mkdir()
            torch.save(torch.rand(3, 4, 8, 8), tmp_path / kind / "0.pt")
        small += [
            "data=latents",
            f"data.latents=[{tmp_path}]",
            "data.crop_size=32",
            "data.latent_crops=[[32,0.5],[64,0.5]]",
        ]
    run("run", f"experiment={experiment}", *small, "metrics=[psnr]")


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return compose("train", list(overrides))


@pytest.fixture(scope="module")
def whole_config(photos, tmp_path_factory) -> DictConfig:
    """The config of one run of four steps with two validations, by all default metrics."""
    output = tmp_path_factory.mktemp("whole") / "outputs" / "default" / "some" / "seed0"
    steps = ["trainer.max_steps=4", "callbacks.checkpoint.keep_last=9", "callbacks.ema.decay=0.5"]
    return composed(*toy(photos, output), f"+ablation={ABLATION}", *steps)


@pytest.fixture(scope="module")
def logged(whole_config) -> dict[str, float]:
    """The scores that this run returns."""
    return train(copy.deepcopy(whole_config))  # which resolves its config in place


@pytest.fixture(scope="module")
def whole(whole_config, logged) -> Path:
    """The folder of this run."""
    return Path(whole_config.output)


def test_log_holds_losses_scores_pictures_and_degradation(whole, logged):
    log = events(whole)
    assert len(log.Scalars("train/loss")) == 4
    assert {f"val/{m}{b}" for m in ("psnr", "ssim", "stlpips") for b in ("", "_bicubic")} <= logged.keys()
    assert set(log.Tags()["images"]) == {"val/0", "val/1"}
    assert any(tag.startswith("degradation/") for tag in log.Tags()["histograms"])


def test_a_run_leaves_the_scores_and_images_of_its_last_validation(whole, logged):
    result = read_result(whole)
    assert (result.run, result.method, result.variant) == ("default/some/seed0", "DiT4SR", ABLATION)
    assert (result.dataset, result.seed, list(result.scores)) == ("validation", 0, ["0", "1"])
    assert result.metrics == ["psnr", "ssim", "stlpips"]
    for metric, mean in result.means.items():
        assert events(whole).Scalars(f"val/{metric}")[-1].value == pytest.approx(mean, rel=1e-6)
        assert logged[f"val/{metric}"] == pytest.approx(mean, rel=1e-6)
    assert result.weights_hash == weights_hash(load_part(whole / "lr_stream.safetensors").state)
    assert {"torch", "lightning", "diffusers", "pyiqa", "dit4sr_pl"} < result.versions.keys()
    images = [read_image(whole / result.pictures / f"{name}.png") for name in result.scores]
    strips = events(whole).Images("val/0")
    assert len(strips) == 2  # one tag, two validations
    last = torch.from_numpy(np.array(Image.open(io.BytesIO(strips[-1].encoded_image_string)))).permute(2, 0, 1)
    assert torch.equal(last[:, :, 128:192], images[0])


def test_hash_of_the_settings_is_of_all_that_counts_but_not_of_the_seed(whole, whole_config):
    hashes = []
    for key, value in (("output", "elsewhere"), ("seed", 1), ("optimizer.lr", 1e-4)):
        changed = copy.deepcopy(whole_config)
        OmegaConf.update(changed, key, value)
        hashes.append(values_hash(result_identity(changed)))
    assert hashes[0] == hashes[1] == read_result(whole).identity_hash != hashes[2]


@pytest.mark.slow
def test_a_run_of_another_seed_has_other_weights(run, tmp_path):
    quick = ["~callbacks.scores", "trainer.limit_val_batches=0", "trainer.max_steps=1"]
    quick += ["callbacks.checkpoint.every_n_train_steps=1"]
    for seed in range(2):
        run(str(seed), *quick, f"seed={seed}")
    first, second = (weights_hash(load_part(tmp_path / name / "lr_stream.safetensors").state) for name in "01")
    assert first != second


def test_checkpoint_holds_the_lr_stream_and_its_average_never_the_base(whole, toy_backbone):
    checkpoint = torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)
    lr_stream = LRStream.over(toy_backbone.transformer, Variant(lr_residual=False))
    names = {f"lr_stream.{name}" for name in lr_stream.state_dict()}
    assert set(checkpoint["state_dict"]) == set(checkpoint["current_model_state"]) == names
    averaged, current = checkpoint["state_dict"], checkpoint["current_model_state"]
    assert any(not torch.equal(averaged[name], current[name]) for name in names)
    assert len(checkpoint["optimizer_states"][0]["state"]) == len(names)
    saved = load_part(whole / "lr_stream.safetensors").state
    assert all(torch.equal(saved[name.removeprefix("lr_stream.")], averaged[name]) for name in names)


def test_a_run_resumed_from_a_given_checkpoint_equals_one_that_was_not_stopped(whole, whole_config, tmp_path):
    parts = copy.deepcopy(whole_config)
    parts.output, parts.ckpt_path = str(tmp_path), str(whole / "checkpoints" / "0000002.ckpt")
    train(parts)
    assert losses(tmp_path) == losses(whole)[2:]
    ours, theirs = (load_part(folder / "lr_stream.safetensors").state for folder in (tmp_path, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("ablation", ["linear_lr_injection", "full"])
def test_a_checkpoint_of_another_variant_is_refused_in_one_line(run, whole, ablation):
    checkpoint = whole / "checkpoints" / "last.ckpt"
    with pytest.raises(ValueError, match=r"last\.ckpt: trained as .*; this network is"):
        run("second", f"ckpt_path={checkpoint}", "trainer.max_steps=5", f"+ablation={ablation}")


def test_a_checkpoint_of_the_last_step_is_refused_in_one_line(run, whole):
    with pytest.raises(ValueError, match=r"last\.ckpt: is of step 4; give a larger trainer.max_steps than 2"):
        run("run", f"ckpt_path={whole / 'checkpoints' / 'last.ckpt'}")


def test_fine_tuning_starts_from_a_trained_part(run, whole, tmp_path):
    trained = whole / "lr_stream.safetensors"
    still = ["optimizer.lr=0.0", "callbacks.ema.decay=0", "metrics=[psnr]"]
    run("second", f"model.checkpoint={trained}", f"+ablation={ABLATION}", *still)
    first, second = (load_part(folder / "lr_stream.safetensors").state for folder in (whole, tmp_path / "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(InstantiationException, match=r"lr_stream\.safetensors: trained as .*; this network is"):
        run("third", f"model.checkpoint={trained}")


def test_fine_tuning_takes_a_shipped_stream_by_name_and_keeps_the_networks_own_factor(tiny_backbone, whole_config):
    net, trained = DiT4SRTransformer(tiny_backbone.transformer), load_part(ASSETS / "tiny-dit4sr/lr_stream.safetensors")
    with pytest.raises(ValueError, match="trained as {'injection_scale': 1.5}"):
        start_from_checkpoint(net, "tiny-dit4sr")
    start_from_checkpoint(net, "tiny-dit4sr", may_differ=("injection_scale",))
    weights = net.lr_stream.state_dict()
    assert all(torch.equal(weights[name], trained.state[name].float()) for name in trained.state)
    assert net.variant.injection_scale == 1.0 and trained.network_config["variant"]["injection_scale"] == 1.5
    cfg = copy.deepcopy(whole_config)
    cfg.model.checkpoint = "tiny-dit4sr"
    check(cfg)
    cfg.model.checkpoint = "tiny"
    with pytest.raises(FileNotFoundError, match="model.checkpoint=tiny: no such file"):
        check(cfg)


@pytest.mark.slow
def test_metrics_without_weights_are_empty_columns_and_not_logged(run, tmp_path):
    lacking = ["metrics=[psnr,musiq]", f"metric_weights.folder={tmp_path}"]
    with pytest.raises(FileNotFoundError, match=r"musiq_koniq_ckpt-e95806b9[.]pth: no such file"):
        run("stopped", *lacking)
    logged = run("run", *lacking, "metric_weights.on_missing=skip")
    assert "val/psnr" in logged and not any("musiq" in name for name in logged)
    assert not any("musiq" in tag for tag in events(tmp_path / "run").Tags()["scalars"])
    assert (tmp_path / "run" / "scores.csv").read_text().splitlines()[1].endswith(",")


@pytest.mark.slow
@pytest.mark.parametrize("share, steps", [("0.01", [1, 4]), ("0.99", [1, 2, 3, 4]), ("null", [1, 2, 3, 4])])
def test_validations_that_take_too_much_of_the_time_are_left_out_but_for_the_last(run, tmp_path, caplog, share, steps):
    every = ["trainer.max_steps=4", "trainer.val_check_interval=1", "metrics=[psnr]"]
    run("run", *every, f"callbacks.scores.max_share={share}")
    log = events(tmp_path / "run")
    assert [event.step + 1 for event in log.Scalars("val/psnr")] == steps
    assert all(event.value > 0 for event in log.Scalars("val/seconds"))
    assert caplog.text.count("validation skipped") == 4 - len(steps)
    assert len({event.value for event in log.Scalars("val/psnr_bicubic")}) == 1  # the same images every time


def test_float32_training_over_half_precision_weights_is_refused(photos, tmp_path):
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        cfg = compose("train", [*toy(photos, tmp_path / "run"), "model.backbone.dtype=bfloat16"])
    with pytest.raises(ValueError, match="trainer.precision=bf16-mixed"):
        check(cfg)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(run, monkeypatch):
    loss = RectifiedFlow.loss
    calls = []

    def poisoned(self, *args):
        calls.append(1)
        return loss(self, *args) * (float("nan") if len(calls) == 2 else 1)

    monkeypatch.setattr(RectifiedFlow, "loss", poisoned)
    with pytest.raises(ValueError, match="loss is nan at step 1"):
        run("run")


@pytest.mark.slow
def test_gradient_checkpointing_switch_reaches_the_blocks(run, monkeypatch):
    calls = []
    forward = block.MMDiTControlBlock.forward
    monkeypatch.setattr(block.MMDiTControlBlock, "forward", lambda *args: calls.append(1) or forward(*args))
    counts = []
    for switch in ("false", "true"):
        calls.clear()
        arguments = [
            f"model.network.gradient_checkpointing={switch}",
            "trainer.max_steps=1",
            "trainer.limit_val_batches=0",
        ]
        run(switch, *arguments, "callbacks.checkpoint.every_n_train_steps=1")
        counts.append(len(calls))
    assert counts[1] == 2 * counts[0]


@pytest.mark.slow
@pytest.mark.parametrize(("memory", "switch"), [(80, False), (1, True)])
def test_auto_checkpoints_where_a_step_exceeds_the_gpus_memory(whole_config, monkeypatch, caplog, memory, switch):
    cfg = copy.deepcopy(whole_config)
    cfg.model.network.gradient_checkpointing = "auto"
    assert gradient_checkpointing(cfg) is False  # on a CPU
    monkeypatch.setattr(train_module, "gpu_memory", lambda accelerator: memory * 2**30)
    with caplog.at_level(logging.INFO, "dit4sr_pl.train"):
        assert gradient_checkpointing(cfg) is switch
    assert f"gradient checkpointing is {'on' if switch else 'off'}: a step without it takes" in caplog.text
    cfg.model.network.gradient_checkpointing = not switch
    assert gradient_checkpointing(cfg) is not switch


@pytest.mark.slow
def test_a_run_over_a_quantized_base_resumes_exactly_and_is_another_run_without(run, tmp_path):
    arguments = ["model.backbone.quantization=int8", "trainer.limit_val_batches=0", "~callbacks.scores"]
    arguments += ["callbacks.checkpoint.every_n_train_steps=1"]
    run("whole", *arguments)
    run("resumed", *arguments, "trainer.max_steps=1")
    run("resumed", *arguments)
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")
    with pytest.raises(ValueError, match="model.backbone.quantization"):
        run("resumed", "trainer.max_steps=3")


@pytest.mark.slow
def test_with_cached_embeddings_only_transformer_vae_and_scheduler_are_read(run, photos, tmp_path, monkeypatch):
    """Training and validation without the text encoders' and tokenizers' folders give what they give with them."""
    model, cache, captioned = tmp_path / "model", tmp_path / "cache", tmp_path / "captioned"
    shutil.copytree(TOY_SD3, model)
    encoder = Backbone(str(model), "float32", 8).prompts
    write_embeddings(["a cat"], lambda text: encoder.encode(text, torch.device("cpu")), cache, str(model), 8, 10**6)
    for folder in [*model.glob("text_encoder*"), *model.glob("tokenizer*")]:
        shutil.rmtree(folder)
    shutil.copytree(photos, captioned)
    for photo in photos.iterdir():
        (captioned / f"{photo.stem}.txt").write_text("a cat")

    read = []
    part = Backbone.read
    monkeypatch.setattr(Backbone, "read", lambda *args, **kw: read.append(kw.get("subfolder")) or part(*args, **kw))
    arguments = [f"data.folders=[{captioned}]", f"data.validation_folders=[{captioned}]"]
    arguments += ["data.empty_prompt_probability=0.5", "metrics=[psnr]"]
    cached = run("cached", *arguments, f"model.backbone.name={model}", f"model.backbone.embeddings={cache}")
    assert sorted(read) == ["scheduler", "transformer", "vae"]
    encoded = run("encoded", *arguments)
    del cached["val/seconds"], encoded["val/seconds"]
    assert cached == pytest.approx(encoded, rel=1e-2)

    (captioned / "0.txt").write_text("a cow")
    with pytest.raises(ValueError, match="no embeddings of the prompt 'a cow'; run prepare stage=embeddings"):
        run("other", *arguments, f"model.backbone.name={model}", f"model.backbone.embeddings={cache}")


@pytest.mark.slow
def test_prompts_without_embeddings_end_a_run_before_it_begins_with_the_command_that_adds_them(
    photos, tmp_path, monkeypatch
):
    """Validation's prompts and those of a resumed run are looked up, too; the command of the message is run."""
    captioned, cache = tmp_path / "captioned", tmp_path / "cache"
    shutil.copytree(photos, captioned)
    (captioned / "1.txt").write_text("a cat's tail")
    write_embeddings(
        ["a cat's tail"], lambda _: (torch.zeros(1, 85, 16), torch.zeros(1, 16)), cache, str(TOY_SD3), 8, 1
    )
    folders = [f"data.folders=[{captioned}]", f"data.validation_folders=[{captioned}]"]
    words = [*toy(photos, tmp_path / "run"), *folders, f"model.backbone.embeddings={cache}", "metrics=[psnr]"]

    def start(*more: str) -> str | None:
        monkeypatch.setattr(sys, "argv", ["train", *words, *more])
        try:
            train_module.main()
        except SystemExit as end:
            return end.code

    assert start() is None
    longer = ["trainer.max_steps=3", "sampler.added_prompt='sharp, clear'"]
    message = start(*longer)
    assert "no embeddings of the prompt \"a cat's tail sharp, clear\" and 1 more of this run's 4" in message
    assert not (tmp_path / "run" / "checkpoints" / "0000003.ckpt").exists()
    command = shlex.split(message.partition("stage=embeddings: ")[2])
    assert command[:4] == ["python", "-m", "dit4sr_pl.prepare", "stage=embeddings"]
    monkeypatch.setattr(sys, "argv", command[2:])
    prepare.main()
    assert start(*longer) is None


@pytest.mark.slow
def test_sd3_controlnet_trains_validates_and_restores_by_the_same_commands(run, tmp_path, toy_backbone):
    scores = run("run", *CONTROLNET, "metrics=[psnr]")
    assert {"train/loss", "val/psnr"} <= scores.keys()
    part = load_part(tmp_path / "run" / "controlnet.safetensors")
    assert (read_result(tmp_path / "run").method, read_result(tmp_path / "run").variant) == ("SD3-ControlNet", "")
    assert part.network_config == {"network": "sd3_controlnet", "num_layers": 1} and part.base["name"] == str(TOY_SD3)
    sampler = replace(SAMPLER, steps=1)
    lr = torch.rand(1, 3, 16, 16, generator=generator("cpu", 0))
    for file in ("controlnet.safetensors", "checkpoints/last.ckpt"):
        restorer = Restorer.load(toy_backbone, sampler, tmp_path / "run" / file, torch.device("cpu"))
        assert restorer(lr, (64, 64), [""], ["lr"], 0).shape == (1, 3, 64, 64)


def test_another_global_batch_than_the_papers_is_told_with_the_way_back(caplog):
    cfg = composed("experiment=paper", "data.folders=[x]")
    for devices, accumulated, told in (
        (8, 1, None),
        (4, 1, "a step has 32 images, not .* 64; trainer.accumulate_grad_batches=2 makes it 64"),
        (4, 2, None),
        (1, 2, "a step has 16 images, .* trainer.accumulate_grad_batches=8 makes it 64"),
        (3, 1, "a step has 24 images, .* change data.batch_size"),
    ):
        caplog.clear()
        cfg.trainer.devices, cfg.trainer.accumulate_grad_batches = devices, accumulated
        train_module.tell_global_batch(cfg)
        assert re.search(told, caplog.text) if told else not caplog.text
    cfg.global_batch = None
    train_module.tell_global_batch(cfg)
