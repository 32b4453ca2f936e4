"""FID and KID: scores of a whole set, against pyiqa's own on two folders. The weights are random."""

import csv

import numpy as np
import pytest
import torch
from pyiqa.archs import fid_arch

from dit4sr_pl.common.randomness import generator
from dit4sr_pl.images.files import write_image
from dit4sr_pl.images.resize import enlarge
from dit4sr_pl.scores.results import read_result
from testing.commands import call
from testing.metric_weights import MetricWeights

NAMES = [f"{i:02}" for i in range(6)]


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        weights = MetricWeights(tmp_path_factory.mktemp("weights"), patch)
        return weights.folder, weights.fid()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Six small pairs with ground truth, and a folder of other photos."""
    root = tmp_path_factory.mktemp("pairs")
    for i, name in enumerate(NAMES):
        hr = enlarge(torch.rand(1, 3, 6, 7, generator=generator("cpu", i)), (64, 72))
        write_image(root / "HR" / f"{name}.png", hr[0])
        write_image(root / "LR" / f"{name}.png", enlarge(hr, (16, 18))[0])
        write_image(root / "other" / "deep" / f"{name}.png", hr[0].flip(0))
    return root


def options(net, *names: str) -> list[str]:
    """Returns the overrides that choose metrics, whose weight file has another hash than the published one."""
    files = "[{url: 'https://example.org/pt_inception-2015-12-05-6726825d.pth', sha256: null}]"
    folder = f"metric_weights.folder={net[0]}"
    sets = [f"metrics.{name}.weights.files={files}" for name in names if name in ("fid", "kid")]
    return [f"metrics=[{','.join(names)}]", folder, *sets]


def oracle(net, restored, reference, **call) -> float:
    np.random.seed(0)
    cpu = {"device": torch.device("cpu"), "num_workers": 0, "verbose": False}
    return float(net[1](str(restored), str(reference), **cpu, **call))


@pytest.fixture
def few_features(monkeypatch):
    """Of 2048 features 4 are left, of which six images have a covariance; its square root is what takes long."""
    whole = fid_arch.get_folder_features
    monkeypatch.setattr(fid_arch, "get_folder_features", lambda *given, **named: whole(*given, **named)[:, :4])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The `disp` argument:DeprecationWarning")
def test_shards_join_to_the_distances_that_pyiqa_measures_of_the_folders(net, root, tmp_path, capsys, few_features):
    dataset = ["dataset=folder", f"dataset.folder={root}", "dataset.lr=LR", "dataset.hr=HR", "method=bicubic"]
    both = [*dataset, *options(net, "psnr", "fid", "kid"), "output=out"]
    assert call("dit4sr_pl.evaluate", *both, "shard=2/2", cwd=tmp_path) is None
    assert "3 of 6 images scored" in capsys.readouterr().out and not (tmp_path / "out/results.parquet").exists()
    assert call("dit4sr_pl.evaluate", *both, "shard=1/2", cwd=tmp_path) is None
    result = read_result(tmp_path / "out")
    assert result.set_scores["fid"] > 1e-6
    images = tmp_path / "out" / "images"
    assert result.set_scores["fid"] == pytest.approx(oracle(net, images, root / "HR"), rel=1e-4)
    assert result.set_scores["kid"] == pytest.approx(oracle(net, images, root / "HR", distance_type="mmd"), rel=1e-4)
    assert result.metrics == ["psnr", "fid", "kid"] and all(list(row) == ["psnr"] for row in result.scores.values())
    with (tmp_path / "out/results.csv").open() as file:
        assert float(next(csv.DictReader(file))["fid"]) == result.set_scores["fid"]

    again = [*dataset, *options(net, "psnr"), "output=out"]
    assert call("dit4sr_pl.evaluate", *again, cwd=tmp_path) is None  # what was measured stays
    assert read_result(tmp_path / "out").set_scores == result.set_scores

    other = [f"images={root / 'LR'}", f"metrics.fid.folder={root / 'other'}", *options(net, "fid"), "output=alone"]
    assert call("dit4sr_pl.evaluate", *other, cwd=tmp_path) is None  # a set without ground truth
    alone = read_result(tmp_path / "alone")
    assert alone.set_scores["fid"] == pytest.approx(oracle(net, root / "LR", root / "other"), rel=1e-4)
    assert alone.metrics == ["fid"]

    assert call("dit4sr_pl.evaluate", *both, "output=again", "name=again", cwd=tmp_path) is None
    capsys.readouterr()
    assert call("dit4sr_pl.compare", "out", "again", "against=again", "resampling.resamples=9", cwd=tmp_path) is None
    table = capsys.readouterr().out
    score = f"{result.set_scores['fid']:.3f}"
    row = next(line for line in table.splitlines() if line.startswith("| Bicubic"))
    assert f"**{score}** |" in row and "- fid: a score of the whole set, without interval and test." in table
    with (tmp_path / "outputs/compare/table1.csv").open() as file:
        cells = {(line["method"], line["metric"]): line for line in csv.DictReader(file)}
    assert cells["Bicubic", "fid"]["difference"] == "0.0"
    assert cells["Bicubic", "fid"]["low"] == cells["Bicubic", "fid"]["p"] == "" != cells["Bicubic", "psnr"]["low"]


@pytest.mark.parametrize(
    "command, arguments, message",
    [
        ("train", ["metrics=[psnr,fid]"], "metrics=fid: a score of a whole set, which evaluate measures"),
        ("evaluate", ["images=LR", "metrics=[fid]"], "no ground truth, needed for fid"),
        (
            "evaluate",
            ["images=LR", "metrics=[fid]", "metrics.fid.folder=none"],
            "metrics.fid.folder=none: no such",
        ),
        ("evaluate", ["images=one", "reference=one", "metrics=[kid]"], "a score of a set, and there is one image"),
    ],
)
def test_what_has_no_distance_is_one_line(command, arguments, message, root, tmp_path):
    for name in ("LR", "one"):
        (tmp_path / name).symlink_to(root / "LR") if name == "LR" else write_image(
            tmp_path / "one" / "a.png", torch.rand(3, 32, 32)
        )
    error = call(f"dit4sr_pl.{command}", *arguments, "output=out", cwd=tmp_path)
    assert message in error and "\n" not in error
