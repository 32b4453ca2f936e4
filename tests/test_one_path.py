"""The commands and the pipeline give the same pixels for the same LR image, seed and settings."""

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from dit4sr_pl.cli.command import conf_folder
from dit4sr_pl.common.randomness import generator
from dit4sr_pl.evaluate import evaluate
from dit4sr_pl.images.files import write_image
from dit4sr_pl.images.resize import LazyEnlargement, enlarge
from dit4sr_pl.pipeline import DiT4SRPipeline
from dit4sr_pl.restoration.fitting import enlarge_through, resize, working_sizes
from testing.stand_ins import run_restore

OPTIONS = {"steps": 1, "smallest": 2, "guidance_scale": 1.5, "negative_prompt": "dark"}


@pytest.fixture(scope="module")
def pipe() -> DiT4SRPipeline:
    pipe = DiT4SRPipeline.from_pretrained("tiny-dit4sr", injection_scale=1.1)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def lr(tmp_path):
    """An LR image whose enlarged sides, 36 and 44 pixels, are no multiples of 8, with a caption."""
    write_image(tmp_path / "lr" / "a.png", enlarge(torch.rand(1, 3, 4, 4, generator=generator("cpu", 0)), (9, 11))[0])
    (tmp_path / "lr" / "a.txt").write_text("A cat. It is out of focus.")
    return tmp_path / "lr"


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"fit": "extend"}, {"process_size": 48, "color": "wavelet"}])
def test_restore_evaluate_and_the_pipeline_give_the_same_pixels(pipe, lr, tmp_path, monkeypatch, options):
    overrides = [f"sampler.{key}={value}" for key, value in (OPTIONS | options).items()]
    overrides += ["seed=3", "injection_scale=1.1", "device=cpu"]
    assert run_restore(monkeypatch, f"input={lr}", f"output={tmp_path / 'restored'}", *overrides) is None
    dataset = ["dataset=folder", f"dataset.lr={lr}", f"dataset.captions={lr}", "metrics=[musiq]"]
    overrides += [f"metric_weights.folder={tmp_path}", "metric_weights.on_missing=skip"]
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        evaluate(compose("evaluate", [*dataset, f"output={tmp_path / 'evaluated'}", *overrides]))
    image = Image.open(lr / "a.png")
    ours = pipe(image, "A cat.", seed=3, names=["a"], num_inference_steps=1, **OPTIONS | options | {"steps": None})
    restored = pixels(tmp_path / "restored" / "a.png")
    assert restored.shape == (36, 44, 3) and restored.std() > 1
    assert np.array_equal(restored, pixels(tmp_path / "evaluated" / "images" / "a.png"))
    assert np.abs(restored - np.asarray(ours.images[0]).astype(int)).max() <= 1  # the last digit of a sum


def test_an_image_takes_the_releases_sizes():
    """The release's arithmetic: enlarge until the shorter side has 128 pixels, x4, down to multiples of 8."""
    for width, height in [(1, 1), (3, 2), (49, 60), (103, 200), (127, 128), (128, 128), (130, 333)]:
        grown = (width, height)
        if min(width, height) < 128:
            grown = tuple(int(128 / min(width, height) * side) for side in grown)
        exact = tuple(4 * side for side in grown)
        floored = tuple(side // 8 * 8 for side in exact)
        sizes = working_sizes((height, width), (4 * height, 4 * width), 8, "floor", 512)
        expected = [size for size in (grown, exact, floored) if size != (width, height)]
        assert sizes == list(dict.fromkeys((high, wide) for wide, high in expected))
    assert working_sizes((1, 1), (4, 4), 8, "floor", None) == [(4, 4), (8, 8)]  # the smallest grid
    assert working_sizes((5, 9), (20, 36), 8, "extend", None) == [(20, 36)]
    assert working_sizes((64, 48), (173, 130), 8, "extend", 260) == [(128, 96), (346, 260)]  # x2.7


def test_sizes_are_passed_one_after_another_without_holding_an_image():
    lr = torch.rand(2, 3, 9, 11, generator=generator("cpu", 1))
    expected = enlarge(enlarge(lr, (36, 44)), (32, 40))
    lazy = enlarge_through(lr, [(36, 44), (32, 40)], extent=(48, 48))
    torch.testing.assert_close(lazy[..., :32, :40], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(lazy[..., 5:9, 30:40], expected[..., 5:9, 30:40], atol=1e-6, rtol=0)
    assert isinstance(lazy.lr, LazyEnlargement)
    tall = torch.rand(1, 3, 600, 4, generator=generator("cpu", 2))  # several bands
    torch.testing.assert_close(resize(tall, (607, 5)), enlarge(tall, (607, 5)), atol=1e-4, rtol=0)
    assert resize(tall, (600, 4)) is tall
