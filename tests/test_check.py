"""`check` finds a changed byte in every kind of folder, and changes nothing."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

from dit4sr_pl.check import main
from dit4sr_pl.images.files import write_image
from dit4sr_pl.preparation.build_manifest import build_manifest
from dit4sr_pl.preparation.embeddings import write_embeddings
from testing import ROOT
from testing.releases import write_toy_prompts
from testing.sigkill import contents

MADE_BEFORE = ROOT / "tests" / "made_at_6d90829"


@pytest.fixture
def check(monkeypatch, capsys):
    """A function that runs the command and returns its exit code and its lines."""

    def check(*folders: Path) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["check", *map(str, folders)])
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return end.value.code, captured.out + captured.err

    return check


def damage(path: Path) -> None:
    """Changes one bit in the middle of a file; a table made before its hash was kept is cut off."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data[:-9] if path.suffix == ".csv" else data)


def embeddings(folder: Path) -> Path:
    encode = lambda prompt: (torch.rand(1, 4, 600), torch.rand(1, 300))  # noqa: E731
    write_embeddings(["a cat", "a dog"], encode, folder, "toy", 2, 10**6)
    return folder


def photos(folder: Path) -> Path:
    for name in ("a", "b"):
        write_image(folder / f"{name}.png", torch.rand(3, 32, 32))
    build_manifest(folder)
    return folder


def copied(name: str):
    return lambda folder: shutil.copytree(MADE_BEFORE / name, folder, symlinks=True)


@pytest.mark.parametrize(
    "make, kind, damaged",
    [
        (copied("run"), "a run", "checkpoints/*.ckpt"),
        (copied("run"), "a run", "lr_stream.safetensors"),
        (copied("run"), "a run", "scores.csv"),
        (copied("run"), "a run", "results.parquet"),
        (copied("evaluation"), "an evaluation", "scores.csv"),
        (copied("evaluation"), "an evaluation", "settings.json"),
        (embeddings, "embeddings", "*.safetensors"),
        (embeddings, "embeddings", "index.json"),
        (lambda folder: write_toy_prompts(folder).parent, "prompt embeddings", "*.safetensors"),
        (photos, "a manifest", "b.png"),
    ],
)
def test_a_whole_folder_is_whole_and_a_changed_bit_is_found(check, tmp_path, make, kind, damaged):
    folder = make(tmp_path / "folder")
    code, lines = check(folder)
    if not code:
        assert f"{folder}: {kind}, whole" in lines
    before = lines
    path = next(path for path in sorted(folder.glob(damaged)) if not path.is_symlink())
    damage(path)
    files = contents(folder)
    code, lines = check(folder)
    assert code == 1 and lines != before and " problems" in lines
    assert contents(folder) == files


def test_missing_and_new_photos_are_named(check, tmp_path):
    folder = photos(tmp_path / "folder")
    (folder / "a.png").rename(folder / "c.png")
    code, lines = check(folder / "manifest.parquet")
    assert (
        code == 1
        and "a.png: cannot be read (No such file" in lines
        and "1 photos are not in it, such as c.png" in lines
    )


def test_what_is_nothing_of_ours_is_one_line(check, tmp_path):
    code, lines = check(tmp_path)
    assert "neither a run nor an evaluation" in code and lines == ""
    assert "no such file or folder" in check(tmp_path / "nowhere")[0]
