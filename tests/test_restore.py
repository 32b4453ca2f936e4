"""The command, with the network of the package or, where the result must be known, with bicubic in its place."""

import dataclasses
import errno
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from dit4sr_pl.backbone.sd3 import Backbone
from dit4sr_pl.common.randomness import generator
from dit4sr_pl.images.files import find_images, read_image
from dit4sr_pl.images.picture_files import write_picture
from dit4sr_pl.images.resize import enlarge
from dit4sr_pl.restoration.restorer import Restorer
from testing.stand_ins import Bicubic, command, run_restore
from testing.toy_runs import SAMPLER


def images(folder) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in find_images(folder)}


def test_a_file_and_its_folder_give_the_same_picture_four_times_as_large(photo, tmp_path, monkeypatch):
    for source, output in ((photo, "one"), (photo.parent, "many")):
        arguments = [f"input={source}", f"output={tmp_path / output}", "sampler.steps=2"]
        assert run_restore(monkeypatch, *arguments) is None
    assert read_image(tmp_path / "one" / "photo.png").shape == (3, 72, 52)
    assert torch.equal(read_image(tmp_path / "one" / "photo.png"), read_image(tmp_path / "many" / "photo.png"))


@pytest.mark.slow
def test_a_bad_file_does_not_stop_the_folder_and_is_named_at_the_end(photo, tmp_path):
    (tmp_path / "in" / "broken.png").write_bytes(photo.read_bytes()[:60])
    command = [sys.executable, "-m", "dit4sr_pl.restore", "input=in", "output=out", "scale=1.5", "sampler.steps=2"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert result.returncode == 1 and "1 of 2 images restored" in result.stdout
    # A slow machine shows signs of life first.
    *others, last = result.stderr.splitlines()
    assert last.startswith("error: ") and "broken.png" in last and all(line.endswith(" so far") for line in others)
    with Image.open(tmp_path / "out" / "deep" / "photo.png") as image:
        assert image.size == (20, 27)


def test_a_checkpoint_that_is_no_lr_stream_is_named(photo, tmp_path, monkeypatch):
    message = run_restore(monkeypatch, f"input={photo}", f"output={tmp_path / 'out'}", f"checkpoint={photo}")
    assert "photo.png: truncated or not safetensors" in message and "\n" not in message


@pytest.mark.slow
def test_the_networks_results_do_not_depend_on_the_batch(folder, tmp_path, monkeypatch):
    for size in (1, 3):
        arguments = [f"input={folder}", f"output={tmp_path / f'out{size}'}", f"batch_size={size}", "sampler.steps=2"]
        assert run_restore(monkeypatch, *arguments) is None
    alone, together = images(tmp_path / "out1"), images(tmp_path / "out3")
    assert alone.keys() == together.keys() == {f"{i}.png" for i in range(5)}
    assert all(np.abs(alone[name] - together[name]).max() <= 1 for name in alone)  # the last digit of a sum


def test_a_folder_is_one_call_per_batch_and_one_model(folder, tmp_path, monkeypatch, capsys):
    restorer = Bicubic()
    assert command(monkeypatch, restorer, f"input={folder}", f"output={tmp_path / 'out'}", "batch_size=2") is None
    assert restorer.loads == 1
    assert [call.names for call in restorer.calls] == [["0", "2"], ["4"], ["1", "3"]]
    assert {call.size for call in restorer.calls} == {(64, 64), (72, 52)}
    assert "5 of 5 images restored" in capsys.readouterr().out
    for name, result in images(tmp_path / "out").items():
        lr = read_image(folder / name)[None] / 255
        expected = enlarge(lr, tuple(4 * length for length in lr.shape[-2:]))[0].permute(1, 2, 0).numpy() * 255
        assert np.abs(result - expected).max() <= 0.51


EXTRAS = ["gradio", "skimage", "sklearn", "spandrel"]
EXTRAS += ["hydra_plugins.hydra_joblib_launcher", "hydra_plugins.hydra_submitit_launcher", "joblib", "submitit"]
NOT_NEEDED = [*EXTRAS, "pyiqa", "stlpips_pytorch", "matplotlib", "tensorboard", "pyarrow", "lightning"]
WITHOUT = """
import pkgutil, runpy, sys
from importlib.machinery import PathFinder

missing, find_spec, walk_packages = set({names}), PathFinder.find_spec, pkgutil.walk_packages
PathFinder.find_spec = lambda name, *where: None if name in missing else find_spec(name, *where)
pkgutil.walk_packages = lambda **where: (  # Hydra looks for its plug-ins on the disk
    module for module in walk_packages(**where) if ".".join(module.name.split(".")[:2]) not in missing
)
sys.argv = ["restore", "input={photo}", "output=out", "sampler.steps=1", "device=cpu"]
runpy.run_module("dit4sr_pl.restore", run_name="__main__")

from PIL import Image
from dit4sr_pl.pipeline import DiT4SRPipeline

images = DiT4SRPipeline.from_pretrained("tiny-dit4sr")(Image.open("{photo}"), num_inference_steps=1).images
assert images[0].size == (52, 72) and not missing & sys.modules.keys()
"""


@pytest.mark.slow
def test_restoring_and_the_pipeline_need_none_of_the_extras_and_of_the_packages_for_training(photo, tmp_path):
    code = WITHOUT.format(names=NOT_NEEDED, photo=photo)
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    assert read_image(tmp_path / "out" / "photo.png").shape == (3, 72, 52)


def test_every_bad_file_has_its_line_and_needs_no_model_if_there_is_no_other(tmp_path, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b\n.jpg"):
        (tmp_path / "in" / name).write_text("text")
    restorer = Bicubic()
    message = command(monkeypatch, restorer, f"input={tmp_path / 'in'}", f"output={tmp_path / 'out'}")
    assert message == "error: 2 of 2 images not restored, for the reasons above" and restorer.loads == 0
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"not restored: {tmp_path / 'in/a.png'}: not a readable image (unknown format)"
    assert second == f"not restored: {tmp_path / 'in/b'} .jpg: not a readable image (unknown format)"


def test_a_network_that_fails_on_one_image_goes_on_and_a_full_disk_does_not(folder, tmp_path, monkeypatch, capsys):
    class Picky(Bicubic):
        def __call__(self, lr, size, captions, names, seed, on_step):
            if names == ["1"]:
                raise ValueError("no such prompt")
            return super().__call__(lr, size, captions, names, seed, on_step) * (torch.nan if names == ["2"] else 1)

    message = command(monkeypatch, Picky(), f"input={folder}", f"output={tmp_path / 'out'}")
    assert message == "error: 2 of 5 images not restored, for the reasons above"
    lines = capsys.readouterr().err.splitlines()
    assert "1.png: no such prompt" in lines[0] and "2.png: " in lines[1] and "not finite" in lines[1]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.png", "3.png", "4.png"]

    def disk_full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dit4sr_pl.restoration.pictures.write_picture", disk_full)
    message = command(monkeypatch, Bicubic(), f"input={folder}", f"output={tmp_path / 'new'}")
    assert "No space left on device" in message and "0 of 5 images restored" in message and "\n" not in message


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["read_picture", "network", "write_picture"])
@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")])
def test_an_image_without_enough_memory_is_named_and_the_others_go_on(
    stage, error, folder, tmp_path, monkeypatch, capsys
):
    count, restorer = iter(range(9)), Bicubic()
    room = "dit4sr_pl.restoration." + ("reading" if stage == "read_picture" else "pictures")
    owner, name = (Bicubic, "__call__") if stage == "network" else (importlib.import_module(room), stage)
    whole = getattr(owner, name)

    def third(*arguments, **options):
        if next(count) == 2:
            raise error
        return whole(*arguments, **options)

    monkeypatch.setattr(owner, name, third)
    message = command(monkeypatch, restorer, f"input={folder}", f"output={tmp_path / 'out'}")
    assert message.lower() == f"error: not restored: {folder / '4.png'}: ".lower() + (
        "out of memory" if isinstance(error, MemoryError) else "cuda out of memory."
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.png", "1.png", "2.png", "3.png"]


def test_a_result_is_written_while_the_next_is_restored_and_no_more_than_two_batches_are_held(
    folder, tmp_path, monkeypatch
):
    begun, held, most = threading.Event(), [], []

    class Watched(Bicubic):
        def __call__(self, *arguments, **options):
            if self.calls:
                begun.set()  # the second batch, while the first waits for it
            most.append(len(held))
            return super().__call__(*arguments, **options)

    def write(path, picture, level):
        held.append(path)
        assert begun.wait(20)
        write_picture(path, picture, level)
        held.remove(path)

    monkeypatch.setattr("dit4sr_pl.restoration.pictures.write_picture", write)
    assert command(monkeypatch, Watched(), f"input={folder}", f"output={tmp_path / 'out'}") is None
    assert len(images(tmp_path / "out")) == 5 and max(most) <= 1 and not held


def test_the_level_of_compression_changes_the_size_alone(folder, tmp_path, monkeypatch):
    for level in (0, 9):
        arguments = f"input={folder}", f"output={tmp_path / str(level)}", f"png_level={level}"
        assert command(monkeypatch, Bicubic(), *arguments) is None
    plain, small = (images(tmp_path / level) for level in ("0", "9"))
    assert plain.keys() == small.keys() and all(np.array_equal(plain[name], small[name]) for name in plain)
    size = lambda level: sum(path.stat().st_size for path in (tmp_path / level).iterdir())  # noqa: E731
    assert size("9") < size("0")
    message = command(monkeypatch, Bicubic(), f"input={folder}", f"output={tmp_path / 'no'}", "png_level=10")
    assert message == "error: png_level=10: must be a whole number from 0 to 9, or null"


def test_ctrl_c_leaves_whole_images_and_says_how_many(folder, tmp_path, monkeypatch, capsys):
    class Interrupted(Bicubic):
        def __call__(self, *arguments, **options):
            if len(self.calls) == 2:  # a terminal sends it to all processes
                for process in (*multiprocessing.active_children(), multiprocessing.current_process()):
                    os.kill(process.pid, signal.SIGINT)
            return super().__call__(*arguments, **options)

    restorer, arguments = Interrupted(), [f"input={folder}", f"output={tmp_path / 'out'}"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background processes ignore SIGINT otherwise
    code = command(monkeypatch, restorer, *arguments)
    signal.signal(signal.SIGINT, before)
    message = capsys.readouterr().err
    assert code == 130 and message.startswith("interrupted: 2 of 5 images restored into") and message.count("\n") == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.png", "2.png"]
    whole = Bicubic()
    assert command(monkeypatch, whole, *arguments) is None and len(whole.calls) == 3


def test_an_interrupted_write_leaves_nothing(folder, tmp_path, monkeypatch, capsys):
    def interrupt(file, *_):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("dit4sr_pl.images.picture_files.putchunk", interrupt)
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "maker"
    Image.new("RGB", (4, 4)).save(folder / "0.png", exif=exif)
    assert command(monkeypatch, Bicubic(), f"input={folder}", f"output={tmp_path / 'out'}") == 130
    assert capsys.readouterr().err.startswith("interrupted: 1 of 5")  # the next one had been restored meanwhile
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["1.png"]


@pytest.mark.parametrize("alpha", ["bicubic", "network"])
def test_the_bar_counts_every_pass_through_the_network(tmp_path, monkeypatch, alpha):
    moves = []

    @contextmanager
    def work(description, total, count):
        yield lambda done, items: moves.append((done, items))
        moves.append((total, count))

    (tmp_path / "in").mkdir()
    for name, mode in (("a", "RGBA"), ("b", "RGB"), ("c", "LA")):
        Image.new(mode, (4, 3)).save(tmp_path / f"in/{name}.png")
    monkeypatch.setattr("dit4sr_pl.restore.work", work)
    arguments = [f"input={tmp_path / 'in'}", f"output={tmp_path / 'o'}", "batch_size=2", f"alpha={alpha}"]
    assert command(monkeypatch, Bicubic(), *arguments) is None
    expected = {
        "bicubic": [(24, 0), (36, 0), (36, 1), (36, 2), (36, 3), (36, 3)],
        "network": [(24, 0), (36, 0), (48, 0), (60, 0), (60, 1), (60, 2), (60, 3), (60, 3)],
    }
    assert moves == expected[alpha]


def test_pictures_that_differ_only_in_how_they_lie_share_a_batch_of_files(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for name, orientation in (("a", 1), ("b", 6), ("c", 1)):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        Image.new("RGB", (8, 5)).save(tmp_path / f"in/{name}.png", exif=exif)
    restorer = Bicubic()
    assert (
        command(monkeypatch, restorer, f"input={tmp_path / 'in'}", f"output={tmp_path / 'o'}", "batch_size=3") is None
    )
    assert sorted((call.names, call.size) for call in restorer.calls) == [(["a", "c"], (20, 32)), (["b"], (32, 20))]


def test_sample_k_is_the_result_of_the_seed_plus_k(photo, tmp_path, monkeypatch, capsys):
    restorer = Bicubic()
    arguments = [f"input={photo}", f"output={tmp_path / 'out'}", "seed=5"]
    assert command(monkeypatch, restorer, *arguments, "samples=3") is None
    assert "3 of 3 images restored" in capsys.readouterr().out
    assert [(call.seed, call.names) for call in restorer.calls] == [(5, ["photo"]), (6, ["photo"]), (7, ["photo"])]
    assert sorted(path.parent.name for path in (tmp_path / "out").rglob("*.png")) == [
        "sample00",
        "sample01",
        "sample02",
    ]
    for wrong in ("0", "1.5", "101"):
        assert "samples=" in command(monkeypatch, restorer, *arguments, f"samples={wrong}")


def test_a_note_says_what_of_a_file_is_left_out(tmp_path, monkeypatch, capsys):
    Image.new("RGB", (4, 4)).save(tmp_path / "[a].png", icc_profile=b"none")
    assert command(monkeypatch, Bicubic(), f"input='{tmp_path / '[a].png'}'", f"output={tmp_path / 'out'}") is None
    assert "[a].png: its colour profile cannot be read and is left out" in capsys.readouterr().out


def test_half_precision_restores_nearly_the_same_picture():
    lr = enlarge(torch.rand(1, 3, 3, 3, generator=generator("cpu", 0)), (16, 16))
    sampler = dataclasses.replace(SAMPLER, steps=2, guidance_scale=1.5, negative_prompt="a dog")
    restored = []
    for dtype in ("float32", "bfloat16"):
        restorer = Restorer.load(Backbone("tiny-sd3", dtype, 8), sampler, "tiny-dit4sr", torch.device("cpu"))
        restored.append(restorer(lr, (64, 64), ["a cat"], ["photo"], 0))
    assert 0 < (restored[1] - restored[0]).abs().mean() < 0.02
