import sys

import pytest
import torch
from omegaconf import OmegaConf

from dit4sr_pl.cli.checks import check_data, check_extra
from dit4sr_pl.evaluate import check_method
from dit4sr_pl.images.files import write_image
from testing.commands import call


def test_a_missing_extra_is_named(monkeypatch):
    check_extra("the page", "app", "gradio")
    for package in ("skimage", "sklearn", "spandrel"):
        monkeypatch.setitem(sys.modules, package, None)
    data = {"photos": "x", "folders": ["x/train"], "validation_folders": [], "sets": {}}
    with pytest.raises(ValueError, match=r"^data=demo needs skimage and sklearn; pip install 'dit4sr_pl\[demo\]'$"):
        check_data(OmegaConf.create(data))
    method = {"_target_": "dit4sr_pl.evaluation.methods.spandrel.SpandrelNet", "weights": "x.pth"}
    with pytest.raises(ValueError, match=r"^this method needs spandrel; pip install 'dit4sr_pl\[spandrel\]'$"):
        check_method(OmegaConf.create({"method": method}))


def test_options_of_latents_without_latents_are_named():
    data = {"folders": ["."], "validation_folders": [], "sets": {}, "latents": None, "latent_crops": [[128, 1.0]]}
    with pytest.raises(
        ValueError, match=r"^data.latent_crops belongs to data.latents; give data.latents=\[FOLDER\], too$"
    ):
        check_data(OmegaConf.create(data))


@pytest.mark.parametrize(
    "command, arguments",
    [
        ("restore", ["input=lr"]),
        ("evaluate", ["dataset=folder", "dataset.folder=.", "dataset.lr=lr", "dataset.hr=hr", "metrics=[psnr]"]),
        pytest.param("app", ["port=0"], marks=pytest.mark.slow),  # Gradio is imported first
    ],
)
def test_a_cuda_graph_on_a_cpu_is_refused_in_one_line_before_a_network_is_read(tmp_path, command, arguments):
    write_image(tmp_path / "lr" / "photo.png", torch.zeros(3, 8, 8))
    write_image(tmp_path / "hr" / "photo.png", torch.zeros(3, 32, 32))
    output = [] if command == "app" else ["output=out"]
    line = call(f"dit4sr_pl.{command}", *arguments, *output, "device=cpu", "cuda_graph=true", cwd=tmp_path)
    assert line == "error: cuda_graph=true needs a CUDA device, and not cpu; give cuda_graph=false"
