import sys

import pytest
from omegaconf import OmegaConf

from dit4sr_pl.cli.checks import check_data, check_extra
from dit4sr_pl.evaluate import check_method


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
