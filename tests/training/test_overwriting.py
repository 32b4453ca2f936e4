"""Nothing of a run is replaced before its successor has loaded everything and trained a step, and then only what is
its own.
"""

import hashlib
import shutil
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from dit4sr_pl.cli.command import conf_folder
from dit4sr_pl.train import train
from dit4sr_pl.training import provenance
from dit4sr_pl.training.former_run import FORMER, files_of_run
from dit4sr_pl.training.run_folder import Start, check_same_run, checkpoints_in, finished_steps, settle
from testing.events import event
from testing.toy_runs import toy

SMALL = ["metrics=[psnr]", "trainer.max_steps=3", "trainer.val_check_interval=3", "callbacks=default"]
SMALL += ["callbacks.checkpoint.every_n_train_steps=1", "trainer.limit_val_batches=1"]


def start(photos: Path, folder: Path, *overrides: str) -> dict[str, float]:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return train(compose("train", [*toy(photos, folder), *SMALL, *overrides]))


def contents(folder: Path) -> dict[str, str]:
    """Returns the hashes of a folder's files except its log, which every start continues."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "train.log"]
    return {path.relative_to(folder).as_posix(): hashlib.md5(path.read_bytes()).hexdigest() for path in files}


def steps(folder: Path) -> list[int]:
    return [int(path.stem) for path in checkpoints_in(folder)]


@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    start(photos, folder)
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run", symlinks=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, message",
    [
        (
            ["model.checkpoint={run}/lr_stream.safetensors", "overwrite=true"],
            "would replace .*, which model.checkpoint",
        ),
        (["ckpt_path={run}/checkpoints/0000002.ckpt", "overwrite=true"], "would replace .*, which ckpt_path"),
        (["data.validation_folders=[{run}/images]", "overwrite=true"], "would replace .*, which data"),
        (["data.crop_size=65", "overwrite=true"], "crop_size=65"),
        (["data.folders=[{run}/nowhere]", "overwrite=true"], "no such file or folder"),
        (["ckpt_path={run}/lr_stream.safetensors"], "truncated or not a checkpoint"),
        (["+ablation=no_lr_residual", "ckpt_path={run}/checkpoints/0000001.ckpt", "overwrite=true"], "would replace"),
    ],
)
def test_a_mistake_costs_the_run_in_the_folder_nothing(photos, run, options, message):
    before = contents(run)
    with pytest.raises(Exception, match=message):
        start(photos, run, *(option.format(run=run) for option in options))
    assert contents(run) == before and steps(run) == [3, 2, 1] and finished_steps(run, 1) == 3


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_leaves_the_run_that_it_was_given_to(photos, finished, run, tmp_path):
    start(photos, tmp_path / "other", "+ablation=no_lr_residual", "trainer.max_steps=1")
    before = contents(run)
    with pytest.raises(ValueError, match="trained as .*lr_residual"):
        start(photos, run, f"ckpt_path={tmp_path / 'other/checkpoints/0000001.ckpt'}", "trainer.max_steps=4")
    assert contents(run) == before


@pytest.mark.slow
def test_an_error_before_the_first_step_ends_leaves_the_former_run(photos, run):
    before = contents(run)
    with pytest.raises(SystemExit):
        event_ = ["+callbacks.monitor={_target_: testing.events.Exit, hook: on_train_batch_start, steps: 0}"]
        start(photos, run, "overwrite=true", "seed=5", *event_)
    assert contents(run) == before


@pytest.mark.slow
def test_an_error_before_the_first_checkpoint_brings_the_former_run_back(photos, run):
    before = contents(run)
    stop = ["+callbacks.monitor={_target_: testing.events.Exit, hook: on_train_batch_start, steps: 1}"]
    never = ["callbacks.checkpoint.every_n_train_steps=null", "trainer.limit_val_batches=0", "trainer.max_steps=9"]
    with pytest.raises(SystemExit):
        start(photos, run, "overwrite=true", "seed=5", *stop, *never)
    assert contents(run) == before


@pytest.mark.slow
def test_overwrite_replaces_the_run_and_leaves_what_is_somebody_elses(photos, run):
    kept = [
        "code.py",
        "results.xlsx",
        "images/holiday.jpg",
        "my_model.safetensors",
        "checkpoints/notes.txt",
        "notes.txt",
    ]
    for name in kept:
        (run / name).write_text(name)
    start(photos, run, "overwrite=true", "seed=5", "trainer.max_steps=2", "trainer.val_check_interval=2")
    assert OmegaConf.load(run / "config.yaml").seed == 5 and finished_steps(run, 1) == 2 and steps(run) == [2, 1]
    assert all((run / name).read_text() == name for name in kept)
    assert len(list(run.glob("events*"))) == 1 and not list(run.rglob(FORMER))


@pytest.mark.slow
def test_a_linked_folder_of_checkpoints_can_be_overwritten(photos, run, tmp_path):
    (run / "checkpoints").rename(tmp_path / "scratch")
    (run / "checkpoints").symlink_to("../scratch")
    start(photos, run, "overwrite=true", "trainer.max_steps=1", "trainer.limit_val_batches=0")
    assert steps(run) == [1] and (run / "checkpoints").is_symlink()


def test_a_folder_without_a_run_has_nothing_to_overwrite(tmp_path):
    for name in ("code.py", "results.xlsx", "images/holiday.jpg", "my_model.safetensors", "checkpoints/0000001.ckpt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert files_of_run(tmp_path) == []
    (tmp_path / "config.yaml").write_text("model: resnet\ndata: cifar\n")
    assert files_of_run(tmp_path) == []
    with pytest.raises(ValueError, match="config.yaml: not a run's; give another folder"):
        check_same_run(None, tmp_path)


@pytest.mark.parametrize("damage", [b"", b"a: [", b"\xff"])
def test_a_run_whose_config_is_damaged_says_so_and_can_be_overwritten(run, damage):
    (run / "config.yaml").write_bytes(damage)
    with pytest.raises(ValueError, match="config.yaml: empty or damaged.* or overwrite=true to replace that run"):
        check_same_run(OmegaConf.load(run / "code.yaml"), run)
    assert run / "lr_stream.safetensors" in files_of_run(run)
    (run / "finished.yaml").write_bytes(damage)
    assert finished_steps(run, 1) == 0


def test_copies_of_checkpoints_are_no_checkpoints(run):
    shutil.copy(run / "checkpoints/0000003.ckpt", run / "checkpoints/0000003 (copy).ckpt")
    assert steps(run) == [3, 2, 1]


@pytest.mark.slow
def test_a_job_that_its_scheduler_restarts_resumes_although_its_command_overwrites(photos, run, monkeypatch, caplog):
    options = ["overwrite=true", "seed=5", "trainer.max_steps=4", "trainer.limit_val_batches=0"]
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    with pytest.raises(SystemExit):
        start(photos, run, *options, *event("SIGTERM", "on_train_batch_start", 1))
    assert steps(run) == [2, 1]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    start(photos, run, *options)
    assert "restarted by the scheduler; it resumes, without overwrite=True" in caplog.text
    assert "resuming from step 2" in caplog.text and finished_steps(run, 1) == 4
    monkeypatch.setenv("SLURM_JOB_ID", "18")  # another job that was restarted before it could train
    start(photos, run, *options, "trainer.max_steps=1")
    assert finished_steps(run, 1) == 1


@pytest.mark.slow
def test_a_run_that_a_callback_ends_early_is_finished_with_a_checkpoint_of_its_last_step(photos, tmp_path, caplog):
    """Lightning checks its limit of time after each batch. Another limit, or a given checkpoint, trains on."""
    options = [
        "+trainer.max_time=00:00:00:01",
        "trainer.max_steps=999",
        "callbacks.checkpoint.every_n_train_steps=null",
    ]
    start(photos, tmp_path, *options)
    done = steps(tmp_path)[0]
    assert (
        0 < done < 999 and finished_steps(tmp_path, 999, "00:00:00:01") == done and (tmp_path / "scores.csv").exists()
    )
    start(photos, tmp_path, *options)
    assert f"finished at step {done}; give another trainer.max_time" in caplog.text and steps(tmp_path)[0] == done
    start(photos, tmp_path, f"trainer.max_steps={done + 1}")
    assert finished_steps(tmp_path, done + 1) == done + 1
    newest = f"ckpt_path={tmp_path / 'checkpoints' / f'{done + 1:07d}.ckpt'}"
    start(photos, tmp_path, f"trainer.max_steps={done + 2}", newest)
    assert finished_steps(tmp_path, done + 2) == done + 2


@pytest.mark.parametrize("steps", [-1, 0, 0.5, None])
def test_a_run_without_a_number_of_steps_is_refused(tmp_path, steps):
    with pytest.raises(ValueError, match=f"trainer.max_steps={steps}: give the number of steps"):
        start(tmp_path, tmp_path, f"trainer.max_steps={'null' if steps is None else steps}")


@pytest.mark.parametrize("moved", [0, 1, 3, 99])
@pytest.mark.parametrize("new_checkpoint", [True, False])
def test_a_kill_at_any_moment_of_setting_aside_keeps_one_whole_run(finished, tmp_path, moved, new_checkpoint):
    from dit4sr_pl.training import former_run

    run = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    before, files = contents(run), files_of_run(run)
    in_order = sorted(files, key=lambda file: file.name == "config.yaml")
    former_run.set_aside(in_order[:moved])
    whole = len(in_order) <= moved
    if whole:
        (run / "events.out.tfevents.new").touch()
        (run / "config.yaml").write_text("new")
        if new_checkpoint:
            (run / "checkpoints" / "0000001.ckpt").write_text("new")
    settle(run)
    if whole and new_checkpoint:
        assert (run / "config.yaml").read_text() == "new" and steps(run) == [1] and not list(run.rglob(FORMER))
    else:
        assert contents(run) == before and steps(run) == [3, 2, 1]


def test_broken_packages_and_odd_files_of_a_checkout_do_not_stop_a_run(tmp_path, monkeypatch, caplog):
    """A killed pip leaves packages without a name, and `${` in a file's name is no interpolation."""
    nameless = [type("Package", (), {"metadata": {"Name": None, "Version": None}})() for _ in range(2)]
    monkeypatch.setattr(provenance.importlib.metadata, "distributions", lambda: nameless)
    monkeypatch.setattr(provenance, "git", lambda *arguments: "a${b\n" if "--others" in arguments else "c\n")
    monkeypatch.setattr(provenance, "package_versions", provenance.package_versions.__wrapped__)  # not its cache
    provenance.record_code(tmp_path)
    code = yaml.safe_load((tmp_path / "code.yaml").read_text())
    assert code["packages"] == {} and code["untracked"] == ["a${b"]
    monkeypatch.setattr(provenance, "package_versions", lambda: 1 / 0)
    provenance.record_code(tmp_path, 7)
    assert "the code of this run is not recorded (ZeroDivisionError" in caplog.text


def test_every_start_keeps_its_record_of_the_code_and_none_is_of_steps_that_are_trained_again(tmp_path):
    for step in (0, 40, 80):
        provenance.record_code(tmp_path, step)
    assert {"code.yaml", "code-0000040.yaml", "code-0000080.yaml"} <= {path.name for path in tmp_path.iterdir()}
    Start(OmegaConf.create({"overwrite": False, "output": str(tmp_path)}), tmp_path, 60).begin()
    names = {path.name for path in tmp_path.iterdir()}
    assert {"code.yaml", "code-0000040.yaml", "code-0000060.yaml", "code-0000080.yaml.aside"} <= names
    assert "code-0000080.yaml" not in names
