import shutil
from pathlib import Path

import numpy as np
import pytest

from dit4sr_pl.comparison.rows import Run, find_runs, make_rows
from testing.made_up_scores import draw_scores, made_up, write_run


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        write_run(Path(f"outputs/x, y=1/full/seed{seed}"), made_up(draw_scores(seed), variant="full", seed=seed))
    return tmp_path


def found(*paths: str) -> list[str]:
    return [str(run.folder) for run in find_runs(paths)]


FIRST, SECOND = "outputs/x, y=1/full/seed0", "outputs/x, y=1/full/seed1"


def test_runs_are_found_by_folder_file_parent_and_glob(folder):
    assert found(FIRST) == found(f"{FIRST}/results.parquet") == found(f"{FIRST}/scores.csv") == [FIRST]
    assert found("outputs") == found("outputs/*/full/*") == found("outputs/**/*.parquet") == [FIRST, SECOND]
    assert found(str(folder / SECOND), FIRST) == [SECOND, FIRST]
    assert found("outputs/**") == found(f"{FIRST}/results.*") + found(SECOND)


@pytest.mark.parametrize("paths", [["outputs", FIRST], [FIRST, f"./{FIRST}/scores.csv"]])
def test_one_run_twice_is_a_mistake(folder, paths):
    with pytest.raises(ValueError, match=f"{FIRST}: named twice, by {paths[0]} and by {paths[1]}"):
        find_runs(paths)


def test_one_run_in_two_folders_is_a_mistake_that_names_both(folder):
    write_run(folder / "other", made_up(draw_scores(5), variant="full", dataset="RealSR", seed=1))
    with pytest.raises(ValueError, match=f"{SECOND} and other: both are DiT4SR FULL on RealSR with seed 1"):
        find_runs(["outputs", "other"])


def test_two_sets_under_one_name_are_a_mistake(folder):
    scores = {f"other {name}": row for name, row in draw_scores(5).items()}
    write_run(folder / "other", made_up(scores, variant="no_lr_residual"))
    with pytest.raises(ValueError, match=f"{FIRST} and other: both of RealSR, without a common image"):
        make_rows(find_runs([FIRST, "other"]), ["psnr"])


def test_half_a_file_and_no_file_are_named(folder):
    shutil.copytree(FIRST, "half")
    whole = Path(FIRST, "results.parquet").read_bytes()
    Path("half/results.parquet").write_bytes(whole[:100])
    with pytest.raises(ValueError, match="half/results.parquet: not a result"):
        find_runs(["half"])
    Path("half/results.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="half: no results.parquet in it or below"):
        find_runs(["half"])


def rows(*results):
    return make_rows([Run(Path(str(number)), result) for number, result in enumerate(results)], ["psnr", "ssim"])


def test_seeds_are_averaged_image_by_image_and_images_without_every_seed_named():
    scores = [draw_scores(seed) for seed in range(3)]
    del scores[1]["04"]
    (row,) = rows(*(made_up(scores[seed], seed=seed) for seed in (2, 0, 1)))["RealSR"]
    assert row.images == ["00", "01", "02", "03", "05"] and row.left_out == ["04"]
    assert [run.result.seed for run in row.runs] == [0, 1, 2]
    for image, values in zip(row.images, row.scores, strict=True):
        for metric, value in zip(["psnr", "ssim"], values, strict=True):
            assert value == pytest.approx(sum(of_seed[image][metric] for of_seed in scores) / 3)


def test_datasets_are_never_mixed():
    datasets = rows(
        made_up(draw_scores(0)), made_up(draw_scores(1), dataset="DRealSR"), made_up(draw_scores(2), seed=1)
    )
    assert {name: len(of.runs) for name, (of,) in datasets.items()} == {"RealSR": 2, "DrealSR": 1}


def test_rows_are_sorted_as_in_the_paper_and_unknown_methods_come_first():
    keys = [("DiT4SR", "own"), ("DiT4SR", "linear_lr_injection"), ("DiT4SR", "full"), ("SeeSR", ""), ("SwinIR", "")]
    keys += [("Bicubic", ""), ("DiT4SR", "no_lr_residual"), ("Another", "")]
    table = rows(*(made_up(draw_scores(number), *key) for number, key in enumerate(keys)))["RealSR"]
    assert [row.label for row in table] == [
        *("Another", "Bicubic", "SwinIR", "SeeSR", "DiT4SR FULL"),
        *("DiT4SR B: no_lr_residual", "DiT4SR D: linear_lr_injection", "DiT4SR own"),
    ]


def test_a_metric_that_was_not_measured_is_nan():
    (row,) = rows(made_up(draw_scores(0, metrics=("psnr",))))["RealSR"]
    assert np.isnan(row.scores).all(axis=0).tolist() == [False, True]


def test_seeds_without_a_common_image_are_named():
    scores = {f"other {name}": values for name, values in draw_scores(1).items()}
    with pytest.raises(ValueError, match="0 and 1: seeds of DiT4SR without a common image"):
        rows(made_up(draw_scores(0)), made_up(scores, seed=1))
