import hashlib
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
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
    """Names of the files that are decoded, as they are."""
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
    assert built == (folder / "manifest.parquet", 12, [], [])
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


def test_progress_counts_the_files_that_were_there_before(folder, monkeypatch):
    monkeypatch.setattr(building, "FILES_PER_PART", 4)

    def stop(done, total):
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_manifest(folder, on_file=stop)
    calls = []
    build_manifest(folder, on_file=lambda *call: calls.append(call))
    assert calls == [(done, 12) for done in range(8, 13)]


def test_shards_are_joined_by_the_last(folder, tmp_path):
    output = tmp_path / "elsewhere/list.parquet"
    first, second = (build_manifest(folder, output, shard=(i, 3)) for i in (3, 1))
    assert first[0] is second[0] is None and not output.exists()
    assert (first.waiting_for, second.waiting_for) == ([1, 2], [2])
    last = build_manifest(folder, output, shard=(2, 3))
    assert (last.manifest, last.files, last.waiting_for) == (output, 12, [])
    assert rows(output) == expected(folder)
    assert [path.name for path in output.parent.iterdir()] == ["list.parquet"]
    for wrong in ((0, 3), (4, 3)):
        with pytest.raises(ValueError, match=f"shard={wrong[0]}/3"):
            build_manifest(folder, output, shard=wrong)


def test_shards_that_end_together_join_once(folder, tmp_path):
    for attempt in range(10):
        output = tmp_path / f"{attempt}.parquet"
        with ThreadPoolExecutor(4) as pool:
            built = list(pool.map(lambda i, output=output: build_manifest(folder, output, (i, 4)), range(1, 5)))
        assert any(one.manifest for one in built)
        assert rows(output) == expected(folder)
        assert not list(tmp_path.glob("*.parts"))


CHILD = """
import multiprocessing, os, sys
from dit4sr_pl.preparation import build_manifest as building

def on_file(done, total):
    os.write(log, f"{done}\\n".encode())

if __name__ == "__main__":
    building.FILES_PER_PART = 3
    folder, processes = sys.argv[1], int(sys.argv[3])
    log = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    building.pa.table({"a": [1]})  # the first table imports pandas: a long moment in which a kill tests nothing
    print("ready", flush=True)
    if processes > 1:
        calls = iter(range(10**6))
        def on_file(done, total):
            if next(calls) == 1:
                print(*(child.pid for child in multiprocessing.active_children()), flush=True)
                signal = sys.stdin.read()  # until killed
    building.build_manifest(folder, processes=processes, on_file=on_file)
"""


def start(tmp_path: Path, folder: Path, processes: int = 1) -> subprocess.Popen:
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    command = [sys.executable, script, folder, tmp_path / "log", str(processes)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    return child


def kill(child: subprocess.Popen) -> None:
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdin.close()
    child.stdout.close()


def test_killed_at_random_moments_it_loses_and_doubles_nothing(tmp_path):
    folder, moments, kills = write_photos(tmp_path / "photos", 400), random.Random(0), 0
    (folder / "a/000.png").write_bytes(b"rubbish")
    while not (folder / "manifest.parquet").exists() and kills < 6:
        child = start(tmp_path, folder)
        time.sleep(moments.uniform(0, 0.15))
        kill(child)
        kills += 1
    built = build_manifest(folder)
    assert [path for path, _ in built.damaged] == ["a/000.png"]
    assert [row for row in rows(built.manifest) if row["error"] is None] == expected(folder)[1:]
    assert len(rows(built.manifest)) == 400 and not list(folder.glob("*.parts"))
    # Where a run begins below the end of the one before, files are done again: at most a part, and the damaged one.
    done = [int(line) for line in (tmp_path / "log").read_text().split()]
    assert max(before - after for before, after in itertools.pairwise([*done, done[-1]])) <= 3 + 1


def test_worker_processes_give_the_same_and_end_with_a_killed_parent(folder, tmp_path):
    child = start(tmp_path, folder, processes=2)
    workers = [int(pid) for pid in child.stdout.readline().split()]
    kill(child)
    assert len(workers) == 2
    deadline = time.monotonic() + 20
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
