"""Commands as a user starts them: help, mistakes, the folder of a run, and every config composed."""

import functools
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from dit4sr_pl import train
from dit4sr_pl.cli.command import command, conf_folder
from testing.commands import run

GROUPS = {
    folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
    for folder in conf_folder().iterdir()
    if folder.is_dir()
}
COMMANDS = ["train", "restore", "evaluate", "demo", "convert", "plan", "prepare", "compare", "app"]
TAKES_BACKBONE = ["restore", "evaluate", "demo", "convert", "prepare", "app"]

# groups that train does not know
OTHER_COMMANDS = {"captioner": "prepare", "release": "convert", "dataset": "evaluate", "method": "evaluate"}
OTHER_COMMANDS |= {"backbone": "restore"}
APPENDED = {"ablation", "debug", "student"}  # groups without a default
USERS_OWN = {"folder", "lr", "checkout", "python", "label", "arguments"}  # paths, and what makes `method=command`
PARTS = ("sampler", "callbacks", "logger", "trainer", "degradation", "optimizer")


def composed(config_name: str, *overrides: str, **options: bool) -> DictConfig:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return compose(config_name, list(overrides), **options)


@functools.cache
def full() -> object:
    return instantiate(composed("train").model.network).keywords["variant"]


def start(monkeypatch, module, *arguments: str) -> None:
    """Runs a command in this process."""
    monkeypatch.setattr(sys, "argv", ["dit4sr_pl", *arguments])
    module()


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_help_needs_no_pytorch(command, tmp_path):
    code = "import sys, runpy; sys.argv = ['x', '--help']\n" + (
        f"try: runpy.run_module('dit4sr_pl.{command}', run_name='__main__')\n"
        "finally: assert not {'torch', 'gradio'} & sys.modules.keys(), 'imported for --help'"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "== Config ==" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "+ablation=typo"], "Could not find 'ablation/typo'"),
        (["train", "trainer.max_stps=3"], "max_stps"),
        (["train", "data=folder"], "no value for data.folders"),
        (["train", "data=folder", "data.folders=[nowhere]"], "data.folders=nowhere: no such file or folder"),
        (["train", "data=paper"], "no photos; give data.folders=[PATH] or data.sets.NAME.folder=PATH"),
        (["train", "data=paper", "data.sets.ffhq.folder=nowhere"], "data.sets.ffhq.folder=nowhere: no such file"),
        (
            ["train", "data=paper", "data.sets.div2k.folder=.", "data.sets.div2k.captions=nowhere.parquet"],
            "data.sets.div2k.captions=nowhere.parquet: no such file",
        ),
        (["train", "data=paper", "data.sets.div3k.folder=."], "div3k"),
        (["train", "ckpt_path=nowhere.ckpt"], "ckpt_path=nowhere.ckpt: no such file"),
        (["train", "ckpt_path=half.ckpt"], "truncated or not a checkpoint"),
        (["train", "model.backbone.name=./sd3"], "model.backbone.name=sd3/model_index.json: no such file"),
        (["train", "output=/proc/nowhere"], "cannot be written"),
        (["train", "trainer=fsdp", "experiment=demo"], "trainer=fsdp cannot average weights; add ~callbacks.ema"),
        (["train", "-m", "trainer=ddp", "seed=0"], "every process would start the whole sweep"),
        (["train", "-m", "trainer=ddp", "hydra/launcher=slurm", "hydra.launcher.nodes=2"], "nodes=2 for a run with 1"),
        (["train", "metrics=paper", "metric_weights.folder=."], "alexnet-owt-7be5be79.pth: no such file"),
        (["train", "metrics=[musiq]", "metric_weights.on_missing=never"], "choose one of stop, skip"),
        (
            ["train", "metrics=[liqe]", "data.validation_crop=128"],
            "metrics=liqe needs images of 224 pixels a side, not 128",
        ),
        (["prepare", "data.folders=[.]"], "no value for stage; choose one of captions, embeddings, manifest, metrics"),
        (["prepare", "stage=metrics", "metric_weights.folder=/proc/nowhere"], "cannot be written"),
        (["plan", "trainer.devices=auto"], "trainer.devices=auto: give the number of GPUs"),
        (["plan", "trainer.precision=8"], "trainer.precision=8; choose one of"),
        (["plan", "model.backbone.name=nobody/nothing"], "its config is not in this package"),
        (["compare"], "no runs; give folders with results"),
        (["compare", "nowhere"], "nowhere: no such file or folder"),
        (["compare", "."], "no results.parquet in it or below"),
        (["compare", ".", "table=2"], "table=2; choose one of auto, 1, 3"),
        (["compare", ".", "resampling.level=95"], "resampling.level=95: must be between 0 and 1"),
        (["compare", ".", "strip.crop=0"], "strip.crop=0"),
        (["compare", ".", "output=/proc/nowhere"], "cannot be written"),
        (["evaluate"], "nothing to score; give images=FOLDER, or dataset=NAME"),
        (["evaluate", "images=nowhere"], "images=nowhere: no such file or folder"),
        (["evaluate", "images=.", "reference=nowhere"], "reference=nowhere: no such file or folder"),
        (["evaluate", "images=.", "dataset=realsr", "reference=."], "reference is for images=FOLDER without a dataset"),
        (["evaluate", "dataset=realsr"], "where is realsr? give dataset.folder=PATH, or root=PATH"),
        (["evaluate", "dataset=realsr", "root=."], "dataset.folder=./RealSRVal_crop128: no such file or folder"),
        (["evaluate", "dataset=folder"], "no value for dataset.lr"),
        (
            ["evaluate", "dataset=folder", "dataset.lr=.", "output=../out", "method=swinir"],
            "no value for weights; give a published",
        ),
        (
            ["evaluate", "dataset=folder", "dataset.lr=.", "output=../out", "method=seesr"],
            "no value for method.checkout, method.python",
        ),
        (["evaluate", "images=.", "shard=3/2"], "shard=3/2: must be i/n"),
        (["evaluate", "images=."], "no images in this folder"),
        (["restore"], "no value for input"),
        (["restore", "input=nowhere.png"], "input=nowhere.png: no such file"),
        (["restore", "input=half.ckpt", "scale=0.5"], "scale=0.5"),
        (["restore", "input=half.ckpt", "scale=9"], "scale=9: must be a number from 1 to 8"),
        (["restore", "input=half.ckpt", "scale=four"], "scale=four: must be a number from 1 to 8"),
        (["restore", "input=half.ckpt", "batch_size=0"], "batch_size=0: must be 1 or more"),
        (["restore", "input=half.ckpt", "alpha=wavelet"], "alpha=wavelet: choose one of bicubic, network"),
        (
            ["restore", "input=half.ckpt", "model.backbone.dtype=int8"],
            "dtype=int8: choose one of float32, bfloat16, float16",
        ),
        (["restore", "input=.", "output=in/.."], "is the input folder; choose another"),
        (["restore", "input=."], ".: no images in this folder or below it"),
        (["restore", "input=half.ckpt"], "not restored: half.ckpt: not a readable image (unknown format)"),
        (["restore", "input=half.ckpt", "output=/proc/nowhere"], "cannot be written"),
        (["restore", "model=dit4sr"], "give backbone=sd35_medium or backbone=tiny_sd3"),
        (["app", "scale=0.5"], "scale=0.5"),
        (["app", "host=256.0.0.1"], "host=256.0.0.1 port=7860"),
    ],
)
def test_a_mistake_gets_one_line_and_no_traceback(arguments, message, tmp_path, monkeypatch):
    (tmp_path / "half.ckpt").write_bytes(b"PK\x03\x04 cut off")
    monkeypatch.chdir(tmp_path)
    main = importlib.import_module(f"dit4sr_pl.{arguments[0]}").main
    with pytest.raises(SystemExit) as stopped:
        start(monkeypatch, main, *arguments[1:])
    assert message in stopped.value.code and "\n" not in stopped.value.code


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["data=folder"], "error: no value for data.folders; give it as key=value"),
        pytest.param(
            ["-m", "trainer=ddp", "hydra/launcher=local"],
            "start the runs one by one, or with hydra/launcher=slurm",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_mistake_in_a_process_of_its_own_gets_one_line_on_stderr(arguments, message, tmp_path):
    result = run("dit4sr_pl.train", *arguments, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1 and message in result.stderr, result.stderr


@pytest.mark.parametrize("before", [None, "0", "1"])
def test_a_command_leaves_the_environment_as_it_was(before, tmp_path, monkeypatch):
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    if before is not None:
        monkeypatch.setenv("HYDRA_FULL_ERROR", before)
    environment = dict(os.environ)
    with pytest.raises(FileNotFoundError if before == "1" else SystemExit):
        start(monkeypatch, train.main, f"output={tmp_path}", "ckpt_path=nowhere.ckpt")
    assert dict(os.environ) == environment


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, folders",
    [
        ([], ["outputs/default/full/seed0"]),
        (["+ablation=no_lr_residual", "seed=3"], ["outputs/default/no_lr_residual/seed3"]),
        (["output=here"], ["here"]),
        (["hydra.run.dir=here"], ["here"]),
        (["hydra.run.dir=here/${ablation_name}"], ["here/full"]),
        (["output=here", "hydra.run.dir=here"], ["here"]),
        (["-m", "seed=0,1"], ["outputs/default/full/seed0", "outputs/default/full/seed1"]),
        (["-m", "seed=0,1", "hydra.sweep.dir=swept"], ["swept/default/full/seed0", "swept/default/full/seed1"]),
        (["-m", "seed=0,1", "hydra.sweep.subdir=s${seed}"], ["outputs/s0", "outputs/s1"]),
        (["-m", "seed=0,1", "output=here/${seed}"], ["here/0", "here/1"]),
    ],
)
def test_a_run_and_hydra_write_into_one_folder_however_it_was_given(arguments, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = []
    start(monkeypatch, command("train")(lambda cfg: given.append(cfg.output)), *arguments)
    assert given == [str(tmp_path / folder) for folder in folders] or given == folders
    assert sorted(str(path.relative_to(tmp_path).parent) for path in tmp_path.rglob("hydra")) == folders


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "train"])
def test_other_commands_leave_no_folder_of_hydra(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start(monkeypatch, command(name)(lambda cfg: None))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, folder",
    [
        (["model=tiny_sd3_controlnet", "+ablation=full"], "default/sd3_controlnet/seed0"),
        (["experiment=sd3_controlnet"], "sd3_controlnet/sd3_controlnet/seed0"),
    ],
)
def test_a_baseline_has_its_own_folder_and_row(arguments, folder, monkeypatch):
    cfg = composed("train", *arguments, return_hydra_config=True)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", cfg)  # as in a command
    assert cfg.hydra.run.dir == str(Path("outputs", folder).absolute())
    assert cfg.callbacks.hyper_parameters.columns.ablation == folder.split("/")[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, choice",
    [*((name, "backbone=sd35_medium") for name in TAKES_BACKBONE), ("train", "model=dit4sr"), ("plan", "model=dit4sr")],
)
def test_a_backbones_keys_are_the_same_in_every_command(name, choice):
    overrides = [choice, "model.backbone.name=./sd3", "model.backbone.embeddings=folder"]
    backbone = composed(name, *overrides).model.backbone
    assert (backbone.name, backbone.dtype, backbone.embeddings) == ("./sd3", "bfloat16", "folder")


def test_contracts_spelling_of_an_ablation():
    assert composed("train", "+ablation=no_lr_residual").model.network.variant.lr_residual is False


@pytest.mark.slow
@pytest.mark.parametrize(
    "group, option",
    [(group, option) for group in sorted(GROUPS.keys() - OTHER_COMMANDS.keys()) for option in GROUPS[group]],
)
def test_every_config_composes_and_its_objects_can_be_made(group, option, tmp_path):
    """Models and data are made where their inputs ship with the package; the rest by their targets' signatures."""
    plus = "+" if group in APPENDED else ""
    overrides = [f"{plus}{group}={option}", f"output={tmp_path}"]
    if group == "perceptual":
        overrides[0] = f"{group}@student.{group}={option}"
        overrides.insert(0, "model=tiny_student_1")
    overrides += [f"metric_weights.folder={tmp_path}", "metric_weights.on_missing=skip"]  # where none were downloaded
    if (group, option) == ("data", "folder"):
        overrides += [f"data.folders=[{tmp_path}]"]
    if group in ("trainer", "experiment"):
        overrides += ["trainer.accelerator=cpu"]  # where there may be no GPU
    cfg = composed("train", *overrides)
    OmegaConf.resolve(cfg)
    assert not OmegaConf.missing_keys(cfg)
    for part in PARTS if group in ("experiment", "debug", "trainer") else {group} & set(PARTS):
        instantiate(cfg[part])
    if group in ("model", "ablation", "experiment"):
        network = instantiate(cfg.model.network).keywords
        if group == "ablation":
            assert (network["variant"] == full()) == (option == "full")


@pytest.mark.slow
@pytest.mark.parametrize("group, option", [(group, option) for group in OTHER_COMMANDS for option in GROUPS[group]])
def test_every_config_of_other_commands_composes(group, option):
    overrides = [f"{group}={option}", *(["root=x"] if group == "dataset" else [])]
    cfg = composed(OTHER_COMMANDS[group], *overrides)
    chosen = cfg.model.backbone if group == "backbone" else cfg[group]
    assert chosen and {key.split(".")[-1] for key in OmegaConf.missing_keys(chosen)} <= USERS_OWN


def test_paper_data_has_the_papers_sets_and_no_validation_set():
    data = composed("train", "data=paper").data
    assert {name: options.limit for name, options in data.sets.items()} == {
        "div2k": None,
        "div8k": None,
        "flickr2k": None,
        "ffhq": 10000,
        "nkusr8k": None,
    }
    assert all(options.folder is None and options.weight == 1 for options in data.sets.values())
    assert data.folders == data.validation_folders == []
