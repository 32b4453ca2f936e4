"""A run, an evaluation and a pipeline folder that commit 6d90829 wrote are still resumed, scored, compared and loaded.

`tests/made_at_6d90829/` holds them with their backbone (`toy-sd3`), photos and pairs; their paths are relative to it.
They must not be made anew. If a test here fails after a change of modules, class names or config keys, then users
cannot continue the runs that they have: mend the code (`common/run_identity.py`, `evaluation/scoring.py`), or let
CHANGELOG.md say what users have to do.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from dit4sr_pl import compare, evaluate
from dit4sr_pl.cli.command import conf_folder
from dit4sr_pl.images.files import read_image
from dit4sr_pl.model import load_part
from dit4sr_pl.pipeline import DiT4SRPipeline
from dit4sr_pl.scores.results import read_result, read_scores, versions
from dit4sr_pl.train import train

MADE = Path(__file__).parent / "made_at_6d90829"
BEGUN_WITH = [
    "data=folder",
    "data.folders=[photos]",
    "data.validation_folders=[photos]",
    "data.validation_limit=2",
    "data.crop_size=64",
    "data.validation_crop=64",
    "data.batch_size=2",
    "data.num_workers=0",
    "data.min_gradient=0",
    "model.compile=false",
    "model.backbone.name=./toy-sd3",
    "sampler.steps=1",
    "sampler.smallest=1",
    "trainer.precision=32-true",
    "trainer.val_check_interval=2",
    "trainer.log_every_n_steps=1",
    "callbacks.checkpoint.every_n_train_steps=2",
    "~callbacks.progress",
    "+trainer.enable_progress_bar=false",
    "metrics=[psnr]",
    "trainer.max_steps=4",
    "experiment=resume_check",
    "output=run",
]
EVALUATED_WITH = [
    "dataset=folder",
    "dataset.name=toy",
    "dataset.lr=pairs/lr",
    "dataset.hr=pairs/hr",
    "method=dit4sr",
    "checkpoint=run/lr_stream.safetensors",
    "metrics=[psnr]",
    "output=evaluation",
    "model.backbone.name=./toy-sd3",
    "sampler=tiny",  # was the default then
    "sampler.steps=2",
    "sampler.smallest=1",
]


@pytest.fixture
def made(tmp_path, monkeypatch) -> Path:
    """A copy of the folder, which is also the working folder."""
    copy = tmp_path / "made"
    shutil.copytree(MADE, copy)
    monkeypatch.chdir(copy)
    return copy


def losses(folder: Path) -> dict[str, float]:
    rows = (line.split(",") for line in (folder / "losses.csv").read_text().splitlines()[1:])
    return {batch: float(loss) for batch, loss in rows}


def test_a_run_begun_before_is_resumed_by_todays_command_with_the_losses_of_then(made):
    """The overrides are those of then, except where a config key was renamed since.

    The run is not refused as one with other settings: the resume check sees no difference between the config.yaml of
    then, with its module paths, and today's. The checkpoint of then fits: its keys, the optimizer's states and its
    position. The draws of steps 3 and 4 (crops, degradation, timesteps, noise) are still those of then.
    """
    before = losses(made / "run")
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        scores = train(compose("train", BEGUN_WITH))
    assert "step 2: " in (made / "run" / "train.log").read_text()
    assert losses(made / "run") == pytest.approx(before, rel=1e-5)
    assert scores["train/loss"] == pytest.approx(before["4"], rel=1e-5)
    ours, theirs = (load_part(folder / "run" / "lr_stream.safetensors").state for folder in (made, MADE))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)


def test_an_evaluation_made_before_is_read_and_compared(made, monkeypatch, capsys):
    result = read_result(made / "evaluation")
    assert (result.method, result.variant, result.dataset, result.seed) == ("DiT4SR", "full", "toy", 0)
    assert result.scores == read_scores(MADE / "evaluation" / "scores.csv")
    assert result.weights_hash == "1738615e4a582ee91f96b3d06f9e0452"
    monkeypatch.setattr(sys, "argv", ["compare", "evaluation"])
    compare.main()
    assert "15.126" in capsys.readouterr().out


def test_an_evaluation_begun_before_is_completed_with_the_scores_of_then(made, monkeypatch):
    folder = made / "evaluation"
    for path in [*folder.glob("results.*"), folder / "scores.csv", folder / "images" / "1.png"]:
        path.unlink()
    identity = json.loads((folder / "settings.json").read_text())
    (folder / "settings.json").write_text(json.dumps(identity | {"versions": versions()}))  # which must match
    monkeypatch.setattr(sys, "argv", ["evaluate", *EVALUATED_WITH])
    evaluate.main()
    ours, theirs = (read_scores(path / "evaluation" / "scores.csv") for path in (made, MADE))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name] == pytest.approx(theirs[name], abs=1e-3)


def test_a_pipeline_saved_before_restores_what_it_restored_then(made):
    for component in (made / "toy-sd3").iterdir():
        if component.is_dir():
            shutil.copytree(component, made / "pipeline" / component.name)
    pipeline = DiT4SRPipeline.from_pretrained(made / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    picture = Image.open(made / "pairs" / "lr" / "0.png")
    sizes = {"smallest": 1, "t5_tokens": 8, "tile": 32, "overlap": 12}
    pipeline(picture, num_inference_steps=2, **sizes).images[0].save(made / "ours.png")
    ours, theirs = (read_image(made / name) for name in ("ours.png", "pipeline_result.png"))
    assert (ours - theirs).abs().max() * 255 <= 2
