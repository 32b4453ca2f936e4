"""TensorBoard in a browser shows a sweep and the other runs in `outputs/`."""

import io
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
from hydra import compose, initialize_config_dir
from PIL import Image
from selenium.webdriver import Chrome

from dit4sr_pl.cli.command import conf_folder
from dit4sr_pl.train import main, train
from testing.browser import everywhere
from testing.toy_runs import CONTROLNET, events, small, toy

pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty"),  # the resumed run's
]

SWITCHES = {
    "full": {"lr_integration": "joint", "lr_residual": "true", "lr_injection": "conv"},
    "no_lr_residual": {"lr_integration": "joint", "lr_residual": "false", "lr_injection": "conv"},
    "linear_lr_injection": {"lr_integration": "joint", "lr_residual": "true", "lr_injection": "linear"},
}
SWEPT = {f"default/{ablation}/seed0" for ablation in SWITCHES}
BASELINE, UNVALIDATED = "default/sd3_controlnet/seed1", "default/unvalidated/seed0"
VALIDATED = SWEPT | {BASELINE}
RUNS = VALIDATED | {UNVALIDATED}


@pytest.fixture(scope="module")
def outputs(photos, tmp_path_factory) -> Path:
    """Returns the folder of a sweep whose FULL was resumed, of a run of the baseline, and of one without validation."""
    folder = tmp_path_factory.mktemp("board")
    arguments = ["-m", f"+ablation={','.join(SWITCHES)}", *small(photos), "metrics=[psnr]"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["train", *arguments])
        patch.setenv("HYDRA_FULL_ERROR", "1")  # main() would set it and leave it so
        main()
    outputs = folder / "outputs"
    resumed = f"ckpt_path={outputs}/default/full/seed0/checkpoints/last.ckpt"
    for name, *overrides in [
        ("default/full/seed0", resumed, "trainer.max_steps=4"),
        (BASELINE, *CONTROLNET, "seed=1"),
        (UNVALIDATED, "trainer.limit_val_batches=0"),
    ]:
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            train(compose("train", [*toy(photos, outputs / name), "metrics=[psnr]", *overrides]))
    return outputs


@pytest.fixture(scope="module")
def board(outputs, tmp_path_factory) -> Iterator[str]:
    """Returns the address of a TensorBoard that has read all of `outputs`."""
    log = tmp_path_factory.mktemp("tensorboard") / "log.txt"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", outputs, "--host", "127.0.0.1", "--port", "0"]
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file) as server:
        try:
            address = until(lambda: re.search(r"http://127\S+", log.read_text())).group()
            until(lambda: tags(address, "scalars").keys() >= RUNS and tags(address, "images").keys() >= VALIDATED)
            yield address
        finally:
            server.terminate()


def tags(address: str, plugin: str) -> dict:
    with urlopen(f"{address}data/plugin/{plugin}/tags") as answer:
        return json.load(answer)


def until(read: Callable, seconds: float = 60):
    """Returns what `read` returns, as soon as that is true."""
    end = time.monotonic() + seconds
    while not (value := read()):
        assert time.monotonic() < end, f"nothing after {seconds} s"
        time.sleep(0.1)
    return value


def last(outputs: Path, run: str, tag: str) -> float:
    return events(outputs / run).Scalars(tag)[-1].value


CHARTS = """
    const text = node => node.textContent.trim();
    const rows = card => [...card.querySelectorAll("tb-data-table-content-row")];
    const charts = [...document.querySelectorAll("tb-truncated-path")].map(tag => [tag, tag.closest("scalar-card")]);
    return charts.filter(([_, card]) => card)
        .map(([tag, card]) => [text(tag), rows(card).map(row => [...row.children].map(text))]);
"""


def charts(browser: Chrome) -> dict[str, dict[str, str]]:
    """Returns the last values that Time Series shows beneath each chart, by tag and run."""
    return {tag: {row[1]: row[3] for row in rows} for tag, rows in browser.execute_script(CHARTS)}


def test_time_series_overlays_every_run_under_its_name(board, outputs, browser):
    browser.get(f"{board}?tagFilter=train%2Floss%7Cval%2Fpsnr%24#timeseries")
    until(lambda: [len(rows) for rows in charts(browser).values()] == [len(RUNS), len(VALIDATED)])
    shown = charts(browser)
    assert {tag: rows.keys() for tag, rows in shown.items()} == {"train/loss": RUNS, "val/psnr": VALIDATED}
    for tag, rows in shown.items():
        for run, value in rows.items():
            assert float(value) == pytest.approx(last(outputs, run, tag), rel=1e-3)
    names = everywhere(browser, "runs-data-table tb-data-table-content-row")
    assert sorted(name.text for name in names) == sorted(RUNS)


GRID = """
    const rows = [...arguments[0].shadowRoot.querySelectorAll("tr")].filter(row => row.offsetParent);
    const text = cell => cell.querySelector("slot").assignedNodes().map(node => node.textContent.trim()).join("");
    return rows.map(row => [...row.children].map(text));
"""


def table(browser: Chrome) -> list[dict[str, str]]:
    """Returns the table of HPARAMS as it is shown, with a row per run."""
    header, *rows = browser.execute_script(GRID, everywhere(browser, "vaadin-grid")[0])
    return [dict(zip(header, row, strict=False)) for row in rows]  # rows end in an empty, hidden cell


def test_hparams_has_one_row_per_run_with_its_switches_and_last_scores(board, outputs, browser):
    browser.get(f"{board}#hparams")
    until(lambda: everywhere(browser, "vaadin-grid") and len(table(browser)) == len(RUNS))
    for box in everywhere(browser, ".hparam-checkbox:not([checked]), .metric-checkbox:not([checked])"):
        browser.execute_script("arguments[0].click()", box)  # TensorBoard shows the first five of each
    columns = {"ablation", "seed", "learning_rate", "max_steps", "val/psnr", "val/psnr_bicubic", "num_layers"}
    until(lambda: columns <= table(browser)[0].keys())
    rows = {row["Trial ID"]: row for row in table(browser)}
    assert rows.keys() == RUNS and len(table(browser)) == len(RUNS)
    assert all("hp_metric" not in row for row in rows.values())
    for ablation, switches in SWITCHES.items():
        row = rows[f"default/{ablation}/seed0"]
        assert row.items() >= {"ablation": ablation, "network": "dit4sr", "degradation": "light", **switches}.items()
        assert float(row["learning_rate"]) == 5e-5 and float(row["batch_size"]) == 2
    assert rows[BASELINE]["network"] == "sd3_controlnet" and float(rows[BASELINE]["seed"]) == 1
    assert all(rows[BASELINE][switch] == "" for switch in SWITCHES["full"])
    for run, tag in [(run, tag) for run in VALIDATED for tag in ("val/psnr", "val/psnr_bicubic")]:
        assert float(rows[run][tag]) == pytest.approx(last(outputs, run, tag), rel=1e-3)
    assert rows[UNVALIDATED]["val/psnr"] == "" and float(rows[UNVALIDATED]["train/loss"]) > 0


def test_images_has_the_same_pictures_of_every_run(board, browser):
    browser.get(f"{board}#images")
    everything = sorted((f"val/{name}", run) for name in range(2) for run in VALIDATED)

    def shown() -> list[tuple[str, str]]:
        return sorted(tuple(picture.text.splitlines()[:2]) for picture in everywhere(browser, "tf-image-loader"))

    until(lambda: len(shown()) == len(everything) and all(map(len, shown())))
    assert shown() == everything


def test_ground_truth_is_that_of_every_run_and_the_lr_image_that_of_every_run_of_a_seed(outputs):
    for tag in ("val/0", "val/1"):
        pictures = {run: images_in(events(outputs / run).Images(tag)[-1].encoded_image_string) for run in VALIDATED}
        first = pictures["default/full/seed0"]
        assert all(picture["hr"] == first["hr"] for picture in pictures.values())
        assert all(pictures[run]["lr"] == first["lr"] for run in SWEPT)
        assert pictures[BASELINE]["lr"] != first["lr"]  # its seed draws other degradations
        assert len({picture["sr"] for picture in pictures.values()}) == len(VALIDATED)


def images_in(png: bytes) -> dict[str, bytes]:
    """Returns the pixels of the images in a strip LR | bicubic | restored | ground truth."""
    strip = Image.open(io.BytesIO(png))
    side = strip.height
    crops = [strip.crop((left, 0, left + side, side)).tobytes() for left in range(0, strip.width, side)]
    return dict(zip(("lr", "bicubic", "sr", "hr"), crops, strict=True))
