import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dit4sr_pl.data.manifest import check_sizes, read_manifest
from dit4sr_pl.images.files import find_images
from dit4sr_pl.preparation import build_manifest as building
from dit4sr_pl.preparation.build_manifest import build_manifest


def write_photos(folder: Path, count: int) -> Path:
    """PNG photos of noise `(8 + i) x 9` in two folders whose paths and names sort differently."""
    for i in range(count):
        path = folder / ("a-b" if i % 2 else "a") / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (9, 8 + i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_photos(tmp_path / "photos", 12)


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """Names of decoded files, added when they are decoded."""
    names, check_image = [], building.check_image
    monkeypatch.setattr(building, "check_image", lambda path: names.append(path.name) or check_image(path))
    return names


def expected(folder: Path) -> list[dict]:
    """Rows for the undamaged photos of `write_photos`, made without the code under test."""
    return [
        {
            "path": path.relative_to(folder).as_posix(),
            "size": len(path.read_bytes()),
            "hash": hashlib.blake2b(path.read_bytes()).hexdigest(),
            "width": 8 + int(path.stem),
            "height": 9,
            "error": None,
        }
        for path in find_images(folder)
    ]


def rows(path: Path) -> list[dict]:
    return pq.read_table(path).to_pylist()


def test_manifest_describes_every_photo_in_the_order_of_the_folder_walk(folder):
    built = build_manifest(folder)
    assert built == (folder / "manifest.parquet", 12, [])
    assert rows(built.manifest) == expected(folder)
    assert [path.name for path in folder.iterdir() if path.is_file()] == ["manifest.parquet"]
    listed = read_manifest(built.manifest)
    assert [folder / file for file in listed.files] == find_images(folder)
    assert read_manifest(built.manifest, limit=5).files == listed.files[:5]


def test_size_is_that_of_the_upright_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    (row,) = rows(build_manifest(tmp_path).manifest)
    assert (row["width"], row["height"]) == (20, 30)


def test_damaged_files_are_named_and_recorded_until_they_are_mended(folder, decoded):
    whole = (folder / "a/004.png").read_bytes()
    (folder / "a/004.png").write_bytes(whole[: len(whole) // 2])
    (folder / "a-b/001.png").write_bytes(b"rubbish")
    for _ in range(2):
        built = build_manifest(folder)
        (rubbish, why), (half, _) = built.damaged
        assert (rubbish, why, half) == ("a-b/001.png", "not a readable image (unknown format)", "a/004.png")
        assert [row["path"] for row in rows(built.manifest) if row["error"]] == [half, rubbish]
    assert len(decoded) == 12 + 2  # the second time only what was damaged
    listed = read_manifest(built.manifest)
    assert len(listed.files) == 10 and listed.damaged == [half, rubbish]
    assert read_manifest(built.manifest, limit=3).files == ["a/000.png", "a/002.png"]
    (folder / "a/004.png").write_bytes(whole)
    (folder / "a-b/001.png").unlink()
    assert build_manifest(folder).damaged == []
    assert rows(built.manifest) == expected(folder)


def test_only_new_and_changed_files_are_decoded_again(folder, decoded):
    build_manifest(folder)
    decoded.clear()
    Image.new("RGB", (8 + 2, 9)).save(folder / "a/002.png")
    Image.new("RGB", (8 + 500, 9)).save(folder / "500.png")
    (folder / "a/000.png").unlink()
    build_manifest(folder)
    assert sorted(decoded) == ["002.png", "500.png"]
    assert rows(folder / "manifest.parquet") == expected(folder)


def test_progress_counts_the_files_that_were_there_before(folder):
    build_manifest(folder)
    Image.new("RGB", (8 + 500, 9)).save(folder / "500.png")
    calls = []
    build_manifest(folder, on_file=lambda *call: calls.append(call))
    assert calls == [(12, 13), (13, 13)]


def test_a_stopped_call_leaves_the_former_manifest(folder):
    build_manifest(folder)
    before = expected(folder)
    Image.new("RGB", (8 + 500, 9)).save(folder / "500.png")

    def stop(done, total):
        if done == 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_manifest(folder, on_file=stop)
    assert rows(folder / "manifest.parquet") == before
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == ["500.png", "manifest.parquet"]
    build_manifest(folder)
    assert rows(folder / "manifest.parquet") == expected(folder)


CHILD = """
import multiprocessing, sys
from dit4sr_pl.preparation.build_manifest import build_manifest

def on_file(done, total):
    if done:
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        sys.stdin.read()  # until killed

if __name__ == "__main__":
    build_manifest(sys.argv[1], processes=2, on_file=on_file)
"""


@pytest.mark.slow
def test_worker_processes_give_the_same_and_end_with_a_killed_parent(folder, tmp_path):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    with subprocess.Popen([sys.executable, script, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        workers = [int(pid) for pid in child.stdout.readline().split()]
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert len(workers) == 2 and not (folder / "manifest.parquet").exists()
        deadline = time.monotonic() + 60
        while any(Path(f"/proc/{pid}").exists() and "Z" not in state(pid) for pid in workers):
            assert time.monotonic() < deadline, "a worker outlives its parent"
            time.sleep(0.05)
    build_manifest(folder, processes=2)
    assert rows(folder / "manifest.parquet") == expected(folder)


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_changed_files_are_named(folder):
    build_manifest(folder)
    listed = read_manifest(folder / "manifest.parquet")
    check_sizes(folder, listed.files, listed.sizes)
    size = os.path.getsize(folder / "a-b/001.png")
    os.truncate(folder / "a-b/001.png", 7)
    (folder / "a/002.png").unlink()
    with pytest.raises(ValueError) as error:
        check_sizes(folder, listed.files, listed.sizes)
    assert "2 of 12 photos differ from its manifest" in str(error.value)
    assert f"a/002.png (missing), a-b/001.png (7 bytes, were {size});" in str(error.value)
    assert "run python -m dit4sr_pl.prepare stage=manifest again" in str(error.value)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent: no such folder"):
        build_manifest(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="absent.parquet: no such manifest"):
        read_manifest(tmp_path / "absent.parquet")
    (tmp_path / "other.parquet").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match="other.parquet: not a manifest"):
        read_manifest(tmp_path / "other.parquet")
    Image.new("RGB", (8, 8)).save(os.fsencode(tmp_path) + b"/\xff.png")
    with pytest.raises(ValueError, match="not UTF-8; rename"):
        build_manifest(tmp_path)


@pytest.mark.parametrize("content", [b"rubbish", "truncated", "other columns"])
def test_a_file_of_another_kind_is_not_overwritten(folder, content):
    path = build_manifest(folder).manifest
    if content == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif content == "other columns":
        pq.write_table(pa.table({"size": [1]}), path)
    else:
        path.write_bytes(content)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="manifest.parquet: not a manifest; move it elsewhere and run python"):
        build_manifest(folder)
    assert path.read_bytes() == before
