import csv
import importlib.metadata
import math
from dataclasses import replace

import pytest
import torch

from dit4sr_pl.common.hashing import values_hash, weights_hash
from dit4sr_pl.scores.results import Result, read_result, read_scores, run_name, versions, write_result, write_scores

RESULT = Result(
    run="demo/no_lr_residual/seed1",
    method="DiT4SR",
    variant="no_lr_residual",
    dataset="realsr",
    seed=1,
    pictures="images",
    identity_hash="c0ffee",
    weights_hash="",
    versions={"torch": "2.14.1"},
    scores={
        "a": {"psnr": 0.1, "lpips": math.nan},
        "sub/b, c": {"psnr": 1 / 3, "lpips": math.nan},
    },
)


def test_what_is_written_is_read_to_the_last_bit(tmp_path):
    write_result(RESULT, tmp_path)
    read = read_result(tmp_path)
    assert str(read) == str(RESULT)  # equal but for nan, which equals nothing
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.csv", "results.parquet", "scores.csv"]


def test_csv_row_has_the_means_and_an_empty_cell_for_what_was_not_measured(tmp_path):
    write_result(RESULT, tmp_path)
    with (tmp_path / "results.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["psnr"]) == (0.1 + 1 / 3) / 2 and row["lpips"] == "" and row["images"] == "2"


def test_a_mean_over_part_of_the_images_is_no_mean():
    half = {"a": {"psnr": 1.0}, "b": {"psnr": math.nan}}
    assert math.isnan(replace(RESULT, scores=half).means["psnr"])


def test_versions_leave_out_a_package_that_is_not_installed(monkeypatch):
    def version(package: str) -> str:
        if package == "spandrel":
            raise importlib.metadata.PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert "torch" in versions() and "spandrel" not in versions()


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "not a table of scores"),
        ("photo,psnr\na,1\n", "not a table of scores"),
        ("image,psnr\n", "no scores"),
        ("image,psnr\na,1\na,2\n", "a appears twice"),
        ("image,psnr\na,high\n", "a: not a number"),
        ("image,psnr\na\n", "a: not a number"),
        ("image,psnr\na,1,2\n", "a: not a number"),
    ],
)
def test_a_file_that_is_no_table_of_scores_is_named(tmp_path, text, message):
    path = tmp_path / "scores.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_scores(path)
    assert str(path) in str(error.value)


def test_a_folder_without_or_with_half_a_result_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no results.parquet"):
        read_result(tmp_path)
    write_result(RESULT, tmp_path)
    whole = (tmp_path / "results.parquet").read_bytes()
    (tmp_path / "results.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a result"):
        read_result(tmp_path)


@pytest.mark.parametrize("cut", [-12, -6, -3])
def test_scores_that_were_cut_off_after_the_result_was_written_are_refused(tmp_path, cut):
    scores = {"a": {"psnr": 20.5}, "b": {"psnr": 21.25}, "c": {"psnr": 30.125}}
    write_result(replace(RESULT, scores=scores), tmp_path)
    assert read_result(tmp_path).scores == scores
    whole = (tmp_path / "scores.csv").read_text()
    (tmp_path / "scores.csv").write_text(whole.replace("\r", "")[:cut])
    with pytest.raises(ValueError, match="scores.csv: not .* cut off or changed|scores.csv: c: not a number"):
        read_result(tmp_path)


def test_a_digit_of_a_score_that_changes_is_noticed(tmp_path):
    write_result(RESULT, tmp_path)
    path = tmp_path / "scores.csv"
    path.write_text(path.read_text().replace("0.3333333333333333", "0.3333333333333332"))
    with pytest.raises(ValueError, match="scores.csv: not the scores of results.parquet"):
        read_result(tmp_path)


def test_scores_in_another_encoding_are_named(tmp_path):
    (tmp_path / "scores.csv").write_bytes("image,psnr\né,1\n".encode("latin-1"))
    with pytest.raises(ValueError, match="scores.csv: not UTF-8 text"):
        read_scores(tmp_path / "scores.csv")


def test_order_of_images_and_metrics_is_kept(tmp_path):
    scores = {"b": {"ssim": 1.0, "psnr": 2.0}, "a": {"ssim": 3.0, "psnr": 4.0}}
    write_scores(scores, tmp_path / "scores.csv")
    assert str(read_scores(tmp_path / "scores.csv")) == str(scores)


@pytest.mark.parametrize(
    "output, name",
    [
        ("outputs/default/full/seed0", "default/full/seed0"),
        ("/outputs/old/outputs/demo/full/seed1", "demo/full/seed1"),
        ("/scratch/run7", "run7"),
        ("/scratch/outputs", "outputs"),
    ],
)
def test_a_run_is_named_by_its_path_below_outputs(output, name):
    assert run_name(output) == name


def test_hashes_tell_settings_and_weights_apart_and_nothing_else():
    assert values_hash({"a": 1, "b": [2.0]}) == values_hash({"b": [2.0], "a": 1}) != values_hash({"a": 1})
    state = {"a": torch.arange(6.0), "b": torch.ones(2)}
    same = {"b": torch.ones(2, dtype=torch.bfloat16), "a": torch.arange(12.0)[::2] / 2}
    assert weights_hash(state) == weights_hash(same)
    for other in ({"a": torch.arange(6.0)}, state | {"a": torch.arange(6.0).view(2, 3)}, state | {"b": torch.zeros(2)}):
        assert weights_hash(other) != weights_hash(state)
