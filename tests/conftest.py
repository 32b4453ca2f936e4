"""Fixtures of all tests. They import what they need when they are asked for: with several processes, the one that
hands out the tests reads this file, too, and the others wait for it."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

    from dit4sr_pl.backbone.sd3 import Backbone
    from testing.other_user import SomebodyElse


@pytest.fixture(scope="session")
def tiny_backbone() -> "Backbone":
    from dit4sr_pl.backbone.sd3 import Backbone

    return Backbone("tiny-sd3", dtype="float32", t5_tokens=8)


@pytest.fixture(scope="session")
def toy_backbone() -> "Backbone":
    from dit4sr_pl.backbone.sd3 import Backbone
    from testing.toy_runs import TOY_SD3

    return Backbone(str(TOY_SD3), dtype="float32", t5_tokens=8)


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    from testing.toy_runs import write_toy_photos

    return write_toy_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture
def photo(tmp_path) -> Path:
    """A photo in a folder below `in/`."""
    from testing.small_photos import write_photo

    write_photo(tmp_path / "in" / "deep" / "photo.png")
    return tmp_path / "in" / "deep" / "photo.png"


@pytest.fixture
def folder(tmp_path) -> Path:
    """The folder `in/` of five photos."""
    from testing.small_photos import write_photos

    return write_photos(tmp_path / "in")


@pytest.fixture
def run(photos, tmp_path) -> Callable[..., dict[str, float]]:
    from testing.toy_runs import train_toy

    return lambda name, *overrides: train_toy(photos, tmp_path / name, *overrides)


@pytest.fixture
def somebody_else() -> Iterator["SomebodyElse"]:
    """A folder, and a block in which this process is another user; it takes root."""
    from testing.other_user import another_user

    if os.geteuid():
        pytest.skip("becoming another user takes root")
    with another_user() as somebody:
        yield somebody


@pytest.fixture
def browser(tmp_path, request) -> Iterator["Chrome"]:
    """A window of Chromium; what it shows when a test fails is kept as `page.png` in the test's `tmp_path`."""
    from testing.browser import chromium

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
