"""Toy trainings of students: losses fall, kills change nothing, files say how the student restores."""

import shlex
import shutil
import sys

import pytest
import torch

from dit4sr_pl import prepare, train
from dit4sr_pl.backbone.sd3 import Backbone
from dit4sr_pl.model import Student, load_part, save_part
from dit4sr_pl.preparation.embeddings import write_embeddings
from testing.events import event
from testing.students import GUIDED
from testing.toy_runs import TOY_SD3, losses, toy, train_toy

FOUR = [
    "model=tiny_student_4",
    "student.teaching.steps=4",
    *GUIDED,
    "metrics=[psnr]",
    "callbacks.checkpoint.every_n_train_steps=1",
]
LONG = ["trainer.max_steps=4", "trainer.val_check_interval=4"]


def start(photos, folder, teacher, *overrides: str) -> dict[str, float]:
    return train_toy(photos, folder, *FOUR, *LONG, f"student.teacher={teacher}", *overrides)


@pytest.fixture(scope="module")
def whole(photos, teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    start(photos, folder, teacher)
    return folder


@pytest.mark.slow
def test_a_run_writes_a_student_whose_file_says_how_it_restores(whole):
    part = load_part(whole / "lr_stream.safetensors")
    assert Student.of(part.network_config) == Student(sigmas=(1.0, 0.9, 0.75, 0.5))
    assert all(name.startswith("blocks.") for name in part.state)
    assert part.network_config["variant"]["injection_scale"] == 1.2
    assert load_part(whole / "checkpoints" / "last.ckpt").network_config == part.network_config
    assert len(list((whole / "images").glob("*.png"))) == 2


@pytest.mark.slow
def test_a_run_that_was_stopped_resumes_to_the_last_bit(photos, teacher, whole, tmp_path):
    with pytest.raises(SystemExit):
        start(photos, tmp_path, teacher, *event("SIGTERM", "on_train_batch_start", 1))
    assert not (tmp_path / "finished.yaml").exists()
    start(photos, tmp_path, teacher)
    ours, theirs = (load_part(folder / "lr_stream.safetensors").state for folder in (tmp_path, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert losses(tmp_path) == losses(whole)


@pytest.mark.slow
def test_another_teacher_of_the_same_name_ends_a_start(photos, teacher, whole, tmp_path):
    folder, file = tmp_path / "run", tmp_path / "teacher.safetensors"
    shutil.copyfile(teacher, file)
    start(photos, folder, file, "trainer.max_steps=1", "trainer.limit_val_batches=0")
    shutil.copyfile(whole / "lr_stream.safetensors", file)
    part = load_part(file)
    del part.network_config["student"]
    save_part(part, file)
    with pytest.raises(ValueError, match="the run began with other data: .*model.teacher: "):
        start(photos, folder, file)


def test_sharded_training_of_a_student_is_refused(photos, teacher, tmp_path):
    with pytest.raises(ValueError, match="trainer=fsdp trains no students"):
        start(photos, tmp_path, teacher, "sharded=true", "~callbacks.ema")


def test_a_teacher_that_is_not_there_is_told_before_anything_is_read(photos, tmp_path):
    with pytest.raises(FileNotFoundError, match="model.teacher=.*nowhere"):
        start(photos, tmp_path, tmp_path / "nowhere.safetensors")


@pytest.mark.slow
def test_embeddings_that_a_student_lacks_are_told_with_the_command_that_adds_them(
    photos, teacher, tmp_path, monkeypatch
):
    """The negative prompt and the captions in the sampler's wording; with them the losses are those of the encoders."""
    captioned, cache = tmp_path / "captioned", tmp_path / "cache"
    shutil.copytree(photos, captioned)
    (captioned / "1.txt").write_text("a cat's tail")
    encoder = Backbone(str(TOY_SD3), "float32", 8).encoder
    write_embeddings([""], lambda text: encoder.encode(text, torch.device("cpu")), cache, str(TOY_SD3), 8, 1)
    wording = ["sampler.added_prompt='sharp, clear'", "sampler.negative_prompt=blurry", f"data.folders=[{captioned}]"]
    words = [*toy(photos, tmp_path / "run"), *FOUR, "trainer.max_steps=1", *wording, "trainer.limit_val_batches=0"]
    words += [f"student.teacher={teacher}"]

    def start(*more: str) -> str | None:
        monkeypatch.setattr(sys, "argv", ["train", *words, *more])
        try:
            train.main()
        except SystemExit as end:
            return end.code

    cached = f"model.backbone.embeddings={cache}"
    message = start(cached)
    assert 'no embeddings of the prompt "a cat\'s tail sharp, clear"' in message
    command = shlex.split(message.partition("stage=embeddings: ")[2])
    assert command[-1] == "for_students=true"
    monkeypatch.setattr(sys, "argv", command[2:])
    prepare.main()
    assert start(cached) is None
    assert start(f"output={tmp_path / 'encoded'}") is None
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "encoded"), rel=1e-2)
