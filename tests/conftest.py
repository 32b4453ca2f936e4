from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from selenium.webdriver import Chrome

from dit4sr_pl.backbone.sd3 import Backbone
from dit4sr_pl.cli.command import conf_folder
from dit4sr_pl.common.randomness import generator
from dit4sr_pl.images.files import write_image
from dit4sr_pl.images.resize import enlarge
from dit4sr_pl.train import train
from testing.browser import chromium
from testing.toy_runs import TOY_SD3, toy


@pytest.fixture(scope="session")
def tiny_backbone() -> Backbone:
    return Backbone("tiny-sd3", dtype="float32", t5_tokens=8)


@pytest.fixture(scope="session")
def toy_backbone() -> Backbone:
    return Backbone(str(TOY_SD3), dtype="float32", t5_tokens=8)


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(5):
        picture = enlarge(torch.rand(1, 3, 20, 20, generator=generator("cpu", i)), (80, 80))
        write_image(folder / f"{i}.png", picture[0])
    return folder


@pytest.fixture
def run(photos, tmp_path):
    def run(name: str, *overrides: str) -> dict[str, float]:
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            return train(compose("train", [*toy(photos, tmp_path / name), *overrides]))

    return run


@pytest.fixture
def browser(tmp_path, request) -> Iterator[Chrome]:
    """A window of Chromium; what it shows when a test fails is kept as `page.png` in the test's `tmp_path`."""
    with chromium(tmp_path / "profile") as window:
        request.node.stash[PAGE] = lambda: window.save_screenshot(str(tmp_path / "page.png"))
        yield window


PAGE = pytest.StashKey()
WEIGHTS = {"slow": 1, "browser": 2, "slurm": 20}  # about how long a test with this marker takes next to the others


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts files by the weights of their tests' markers, longest first: no process is left alone with a long file."""
    weight = Counter()
    for item in items:
        weight[item.path] += sum(WEIGHTS.get(marker.name, 0) for marker in item.iter_markers())
    items.sort(key=lambda item: -weight[item.path])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.when == "call" and report.failed and PAGE in item.stash:
        item.stash[PAGE]()
    return report
