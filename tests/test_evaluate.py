"""The command: its contract, and what it does when it is killed, shared out, or given something that does not fit."""

import csv
import math
import os
import subprocess
import sys

import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from dit4sr_pl.cli.command import conf_folder, mistakes_in_one_line
from dit4sr_pl.common.randomness import generator
from dit4sr_pl.evaluate import evaluate
from dit4sr_pl.evaluation.benchmark_sets import read
from dit4sr_pl.evaluation.methods.bicubic import Bicubic
from dit4sr_pl.images.files import write_image
from dit4sr_pl.images.resize import enlarge
from dit4sr_pl.scores.results import read_result, read_scores
from testing.commands import call
from testing.sigkill import assert_kills_change_nothing

NAMES = [f"Canon_{i}_LR4" for i in range(5)]


def run(*overrides) -> str | None:
    """Returns the command's message if it fails, and None if it works."""
    if not any(str(override).startswith("metrics=") for override in overrides):
        overrides += ("metrics=[psnr,ssim]",)
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        cfg = compose("evaluate", [str(override) for override in overrides])
    try:
        with mistakes_in_one_line():
            evaluate(cfg)
    except SystemExit as exit:
        return exit.code
    return None


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """RealSR's layout with five small pairs."""
    root = tmp_path_factory.mktemp("benchmarks")
    for i, name in enumerate(NAMES):
        hr = enlarge(torch.rand(1, 3, 6, 7, generator=generator("cpu", i)), (60, 68))
        write_image(root / "RealSRVal_crop128" / "test_HR" / f"{name}.png", hr[0])
        write_image(root / "RealSRVal_crop128" / "test_LR" / f"{name}.png", enlarge(hr, (15, 17))[0])
    return root


@pytest.fixture
def pairs(root):
    return root / "RealSRVal_crop128"


@pytest.mark.slow
def test_contracts_spelling_scores_finished_images_by_stem(pairs, tmp_path):
    """The expected score is the PSNR of Y, written out on the 8-bit values."""
    for path in (pairs / "test_HR").iterdir():
        Image.open(path).convert("L").convert("RGB").save(tmp_path / f"{path.stem}.png")
    arguments = [f"images={tmp_path}", f"reference={pairs / 'test_HR'}", "metrics=[psnr,ssim]", "output=out"]
    command = [sys.executable, "-m", "dit4sr_pl.evaluate", *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    with (tmp_path / "out" / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["image", "psnr", "ssim"] and [row["image"] for row in rows] == NAMES
    luma = torch.tensor([65.481, 128.553, 24.966]).view(1, 3, 1, 1)
    for row in rows:
        sr, hr = read(tmp_path / f"{row['image']}.png"), read(pairs / "test_HR" / f"{row['image']}.png")
        expected = -10 * (((sr - hr) * luma).sum(1) / 255).square().mean().log10()
        assert abs(float(row["psnr"]) - expected) < 0.05 and 0 < float(row["ssim"]) < 1
    assert read_result(tmp_path / "out").method == tmp_path.name


def test_a_result_says_what_was_scored(root, tmp_path):
    assert run("dataset=realsr", f"root={root}", "method=bicubic", f"output={tmp_path / 'out'}", "seed=3") is None
    result = read_result(tmp_path / "out")
    described = result.run, result.method, result.variant, result.dataset, result.seed, result.pictures
    assert described == ("out", "Bicubic", "", "realsr", 3, "images")
    assert result.versions["torch"] == torch.__version__.split("+")[0] and len(result.identity_hash) == 32
    assert sorted(result.scores) == NAMES and not (tmp_path / "out" / "parts").exists()


def test_what_is_on_disk_is_what_is_scored(root, tmp_path):
    out = tmp_path / "out"
    assert run("dataset=realsr", f"root={root}", "method=bicubic", f"output={out}") is None
    images = [f"images={out / 'images'}", f"output={tmp_path / 'again'}"]
    assert run("dataset=realsr", f"root={root}", *images, "name=Bicubic") is None
    assert (out / "scores.csv").read_bytes() == (tmp_path / "again" / "scores.csv").read_bytes()
    again = read_result(tmp_path / "again")
    assert (again.method, again.dataset, again.pictures) == ("Bicubic", "realsr", "../out/images")


@pytest.mark.slow
@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_shards_in_any_order_give_what_one_task_gives(root, tmp_path, order, capsys):
    arguments = ["dataset=realsr", f"root={root}", "method=bicubic"]
    assert run(*arguments, f"output={tmp_path / 'one' / 'out'}") is None
    for shard in order:
        assert not (tmp_path / "many" / "out" / "scores.csv").exists()
        assert run(*arguments, f"output={tmp_path / 'many' / 'out'}", f"shard={shard}/3") is None
    for name in ("scores.csv", "results.csv", "results.parquet", "settings.json", f"images/{NAMES[0]}.png"):
        assert (tmp_path / "one" / "out" / name).read_bytes() == (tmp_path / "many" / "out" / name).read_bytes()
    assert f"of {len(NAMES)} images scored; the last shard to end writes" in capsys.readouterr().out


@pytest.mark.slow
def test_a_batch_size_changes_neither_the_evaluation_nor_more_than_the_last_digits(root, tmp_path, monkeypatch):
    """With batches, images of one size follow one another; scoring them together is asked for as a GPU would be."""
    from dit4sr_pl.evaluation import scoring

    score = scoring.score
    arguments = [f"root={root}", "dataset=realsr", "sampler.steps=1", "sampler.smallest=2"]
    assert run(*arguments, f"output={tmp_path / '1' / 'out'}") is None
    monkeypatch.setattr(scoring, "score", lambda *arguments: score(*arguments[:-1], 3))
    assert run(*arguments, f"output={tmp_path / '3' / 'out'}", "batch_size=3", "png_level=1") is None
    one, three = (read_result(tmp_path / size / "out") for size in "13")
    assert one.identity_hash == three.identity_hash and list(one.scores) == list(three.scores) == NAMES
    for name in NAMES:
        assert one.scores[name] == pytest.approx(three.scores[name], abs=0.02)
        images = [read(tmp_path / size / "out" / "images" / f"{name}.png") for size in "13"]
        assert (images[0] - images[1]).abs().max() < 1.01 / 255
    (tmp_path / "1" / "out" / "images" / f"{NAMES[0]}.png").unlink()
    assert run(*arguments, f"output={tmp_path / '1' / 'out'}", "batch_size=2") is None
    assert "batch_size=0: must be 1 or more" in run(*arguments, "batch_size=0")
    assert "png_level=10: must be" in run(*arguments, "png_level=10")


def test_nothing_is_scored_twice(root, tmp_path, monkeypatch):
    from dit4sr_pl.evaluation import scoring

    scored, scores_of = [], scoring.scores_of
    monkeypatch.setattr(scoring, "scores_of", lambda *arguments: scored.append(1) or scores_of(*arguments))
    arguments = ["dataset=realsr", f"root={root}", "method=bicubic", "metrics=[psnr]", f"output={tmp_path}"]
    assert run(*arguments, "shard=1/2") is None and len(scored) == 3
    half = (tmp_path / "parts" / "1-of-2.jsonl").read_text()
    (tmp_path / "parts" / "1-of-2.jsonl").write_text(half[: half.rindex("psnr")])  # the last row cut off
    assert run(*arguments, "shard=1/2") is None and len(scored) == 4
    assert (tmp_path / "parts" / "1-of-2.jsonl").read_text() == half
    assert run(*arguments) is None and len(scored) == 4 + 2
    assert run(*arguments) is None and len(scored) == 4 + 2 and sorted(read_scores(tmp_path / "scores.csv")) == NAMES


def killed(arguments, folder):
    """The command as typed in `folder`."""
    from dit4sr_pl.evaluate import main as command

    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    sys.argv = ["evaluate", *arguments]
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    torch.set_num_threads(1)
    command()


@pytest.mark.slow
def test_kills_change_nothing(root, tmp_path):
    import functools

    arguments = ["dataset=realsr", f"root={root}", "method=bicubic", "metrics=[psnr]", "output=out"]
    whole = assert_kills_change_nothing(functools.partial(killed, arguments), tmp_path, kills=2)
    assert len(whole) == len(NAMES) + 4


def test_a_folder_of_other_scores_is_refused(root, pairs, tmp_path):
    arguments = ["dataset=realsr", f"root={root}", "metrics=[psnr]", f"output={tmp_path / 'out'}"]
    assert run(*arguments, "method=bicubic") is None
    before = (tmp_path / "out" / "scores.csv").read_bytes()
    assert run(*arguments, "method=bicubic", "dataset.crop=40").endswith("other scores (files); choose another folder")
    assert "(metrics)" in run(*arguments, "method=bicubic", "metrics.psnr.test_y_channel=false")
    assert "holds other scores (method)" in run(*arguments, "sampler.steps=1")
    assert (tmp_path / "out" / "scores.csv").read_bytes() == before
    (tmp_path / "out" / "settings.json").unlink()
    assert "holds other scores (settings unknown)" in run(*arguments, "method=bicubic")


def test_further_metrics_come_beside_those_that_are_there(root, tmp_path, monkeypatch):
    arguments = ["dataset=realsr", f"root={root}", "method=bicubic", f"output={tmp_path / 'out'}"]
    assert run(*arguments, "metrics=[psnr]") is None
    before = read_scores(tmp_path / "out" / "scores.csv")
    monkeypatch.setattr(Bicubic, "__call__", None)  # nothing is restored again
    missing = [f"metric_weights.folder={tmp_path}", "metric_weights.on_missing=skip"]
    assert run(*arguments, "metrics=[ssim,lpips]", *missing) is None
    after = read_scores(tmp_path / "out" / "scores.csv")
    assert [list(row) for row in after.values()] == [["psnr", "ssim", "lpips"]] * len(NAMES)
    assert all(row["psnr"] == before[name]["psnr"] and row["ssim"] > 0 for name, row in after.items())
    assert all(math.isnan(row["lpips"]) for row in after.values())
    assert read_result(tmp_path / "out").metrics == ["psnr", "ssim", "lpips"]


def test_pictures_of_unknown_origin_are_not_scored_as_this_methods(root, tmp_path):
    write_image(tmp_path / "out" / "images" / f"{NAMES[0]}.png", torch.zeros(3, 60, 68))
    message = run("dataset=realsr", f"root={root}", "method=bicubic", f"output={tmp_path / 'out'}")
    assert "holds other scores (settings unknown)" in message


def test_an_output_among_the_lr_images_is_refused(root, pairs):
    message = run("dataset=realsr", f"root={root}", "method=bicubic", f"output={pairs / 'test_LR' / 'out'}")
    assert "lies in dataset.lr, among its images" in message


def test_two_tasks_of_one_shard_do_not_work_at_once(root, tmp_path):
    arguments = ["dataset=realsr", f"root={root}", "method=bicubic", f"output={tmp_path / 'out'}"]
    code = "import pathlib, time\nfrom dit4sr_pl.common.files import folder_lock\n"
    code += f"with folder_lock(pathlib.Path({str(tmp_path / 'out')!r})):\n"
    code += "    print('held', flush=True)\n    time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        assert f"process {other.pid} on " in run(*arguments)
        other.kill()
    assert run(*arguments) is None


def test_a_path_with_metrics_in_it_names_no_metrics(pairs, tmp_path, capsys):
    arguments = [f"images={pairs / 'test_HR'}", f"metric_weights.folder={tmp_path / 'metrics'}", f"output={tmp_path}"]
    assert "metrics=musiq needs it" in call("dit4sr_pl.evaluate", *arguments, cwd=tmp_path)
    assert "no ground truth: without psnr, ssim, lpips" in capsys.readouterr().out


def test_changed_pixels_are_not_taken_for_the_scored_ones(pairs, tmp_path):
    arguments = [f"images={tmp_path / 'sr'}", f"reference={pairs / 'test_HR'}", f"output={tmp_path / 'out'}"]
    for path in (pairs / "test_HR").iterdir():
        write_image(tmp_path / "sr" / path.name, torch.zeros(3, 60, 68))
    assert run(*arguments) is None
    write_image(tmp_path / "sr" / f"{NAMES[0]}.png", torch.ones(3, 60, 68))
    assert "holds other scores (files)" in run(*arguments)


def test_without_ground_truth_the_default_goes_without_what_needs_it(root, pairs, tmp_path, capsys):
    """Weights of what is left out are not missed; those of the rest are, before anything is restored."""
    arguments = ["dataset=folder", f"dataset.lr={pairs / 'test_LR'}", "method=bicubic", "metrics=paper"]
    arguments += [f"output={tmp_path / 'out'}", f"metric_weights.folder={tmp_path}"]
    assert "musiq_koniq_ckpt-e95806b9.pth: no such file" in run(*arguments)
    assert not (tmp_path / "out" / "images").exists()
    assert run(*arguments, "metric_weights.on_missing=skip", "dataset.count=6") is None
    told = capsys.readouterr().out
    assert "no ground truth: without psnr, ssim, lpips" in told and "5 of folder's 6 images are there" in told
    scores = read_scores(tmp_path / "out" / "scores.csv")
    assert sorted(scores) == NAMES and list(scores[NAMES[0]]) == ["musiq", "maniqa", "clipiqa", "liqe"]
    assert len(list((tmp_path / "out" / "images").iterdir())) == len(NAMES)


def test_without_ground_truth_what_the_user_named_is_an_error(pairs, tmp_path):
    arguments = ["dataset=folder", f"dataset.lr={pairs / 'test_LR'}", "metrics=[psnr,musiq]", "output=out"]
    message = call("dit4sr_pl.evaluate", *arguments, cwd=tmp_path)
    assert "no ground truth, needed for psnr; give reference=FOLDER or metrics=no_reference" in message
    assert "\n" not in message


def test_a_damaged_image_is_named_and_the_rest_kept(pairs, tmp_path):
    for path in (pairs / "test_HR").iterdir():
        write_image(tmp_path / "sr" / path.name, torch.zeros(3, 60, 68))
    last = tmp_path / "sr" / f"{NAMES[-1]}.png"
    last.write_bytes(last.read_bytes()[:70])
    arguments = [f"images={tmp_path / 'sr'}", f"reference={pairs / 'test_HR'}", f"output={tmp_path / 'out'}"]
    message = run(*arguments)
    assert message.startswith(f"error: {last}: not a readable image") and "\n" not in message
