"""`+debug=...`: what each of the three does, over the toy backbone."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from dit4sr_pl.cli.command import conf_folder
from dit4sr_pl.training.run_folder import finished_steps
from testing.toy_runs import losses, small

DECIDED = ("trainer.max_steps", "trainer.val_check_interval", "callbacks.checkpoint", "data.validation_limit")


@pytest.fixture
def debug(photos, tmp_path):
    """Trains with a debug config, which decides on its own what `small` would decide."""

    def debug(option: str, *overrides: str) -> Path:
        from dit4sr_pl.train import train

        given = [override for override in small(photos) if not override.startswith(DECIDED)]
        arguments = [f"+debug={option}", *given, f"output={tmp_path}", "metrics=[psnr]", *overrides]
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            train(compose("train", arguments))
        return tmp_path

    return debug


def test_one_batch_is_one_training_and_one_validation_batch_with_all_files_of_a_run(debug):
    folder = debug("one_batch")
    assert finished_steps(folder, 1) == 1 and len(losses(folder)) == 1
    assert len(list((folder / "images").iterdir())) == 2  # a batch, of five photos
    assert {"lr_stream.safetensors", "results.parquet"} <= {path.name for path in folder.iterdir()}
    assert (folder / "checkpoints" / "0000001.ckpt").exists()


@pytest.mark.slow
def test_overfit_sees_one_batch_again_and_again(debug):
    folder = debug(
        "overfit", "trainer.max_steps=8", "trainer.limit_val_batches=0", "optimizer.lr=0", "model.compile=false"
    )
    assert len(losses(folder)) == 8 and len(set(losses(folder))) == 1  # without learning the loss of one batch is one


def test_profiler_leaves_a_table_in_the_runs_folder(debug):
    folder = debug("profiler", "trainer.max_steps=2")
    assert "run_training_batch" in (folder / "fit-profile.txt").read_text()


def test_every_start_has_a_folder_of_its_own_apart_from_the_runs():
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        sweep = compose("train", ["+debug=one_batch"], return_hydra_config=True).hydra.sweep
    assert Path(sweep.dir).parent == Path("outputs/debug")
