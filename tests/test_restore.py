import subprocess
import sys

import pytest
import torch
from PIL import Image

from dit4sr_pl.images import read_image, write_image
from dit4sr_pl.latents import enlarge
from dit4sr_pl.randomness import generator


@pytest.fixture
def photo(tmp_path):
    picture = enlarge(torch.rand(1, 3, 3, 3, generator=generator("cpu", 0)), (18, 13))
    write_image(tmp_path / "in" / "deep" / "photo.png", picture[0])
    return tmp_path / "in" / "deep" / "photo.png"


def restore(tmp_path, *arguments):
    command = [sys.executable, "-m", "dit4sr_pl.restore", *map(str, arguments), "sampler.steps=2"]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)


def test_a_file_and_its_folder_give_the_same_picture_four_times_as_large(photo, tmp_path):
    one = restore(tmp_path, f"input={photo}", "output=one")
    many = restore(tmp_path, f"input={photo.parent}", "output=many")
    assert one.returncode == many.returncode == 0, one.stderr + many.stderr
    assert read_image(tmp_path / "one" / "photo.png").shape == (3, 72, 52)
    assert torch.equal(read_image(tmp_path / "one" / "photo.png"), read_image(tmp_path / "many" / "photo.png"))


def test_a_bad_file_does_not_stop_the_folder_and_is_named_at_the_end(photo, tmp_path):
    (tmp_path / "in" / "broken.png").write_bytes(photo.read_bytes()[:60])
    result = restore(tmp_path, "input=in", "output=out", "scale=1.5")
    assert result.returncode == 1 and "1 of 2 images restored" in result.stdout
    assert "broken.png" in result.stderr and result.stderr.count("\n") == 1
    with Image.open(tmp_path / "out" / "deep" / "photo.png") as image:
        assert image.size == (20, 27)


def test_a_checkpoint_that_is_no_lr_stream_is_named(photo, tmp_path):
    result = restore(tmp_path, f"input={photo}", "output=out", f"checkpoint={photo}")
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "photo.png: truncated or not safetensors" in result.stderr
