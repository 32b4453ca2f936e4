"""Files that are never half-written, whoever else writes there, and locks that nothing but their end releases."""

import os
import stat
import threading
import time

import pytest
import torch
from safetensors.torch import save_file

from dit4sr_pl.cli.checks import check_writable
from dit4sr_pl.common.files import atomic_write, exclusive_lock, folder_lock, is_held, remove_leftovers


def test_two_writers_of_one_file_never_meet_and_the_last_one_wins(tmp_path):
    path = tmp_path / "a.png"
    with atomic_write(path) as first, atomic_write(path) as second:
        first.write_bytes(b"first")
        second.write_bytes(b"second")
        assert first != second and not path.exists()
    assert path.read_bytes() == b"first" and os.listdir(tmp_path) == ["a.png"]


def test_an_error_leaves_the_former_file_and_nothing_else(tmp_path):
    (tmp_path / "a").write_text("former")
    with pytest.raises(KeyError), atomic_write(tmp_path / "a") as partial:
        partial.write_text("half")
        raise KeyError
    assert (tmp_path / "a").read_text() == "former" and os.listdir(tmp_path) == ["a"]


def test_links_that_somebody_placed_are_not_written_through(tmp_path):
    (tmp_path / "victim").write_text("precious")
    for name in (".a.png.partial", "a.png"):
        (tmp_path / name).symlink_to("victim")
    with atomic_write(tmp_path / "a.png") as partial:
        partial.write_text("picture")
    assert (tmp_path / "victim").read_text() == "precious"
    assert not (tmp_path / "a.png").is_symlink() and (tmp_path / "a.png").read_text() == "picture"


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_files_have_the_access_rights_that_the_umask_gives_also_those_of_safetensors(tmp_path, umask):
    former = os.umask(umask)
    try:
        with atomic_write(tmp_path / "weights.safetensors") as partial:
            save_file({"a": torch.zeros(1)}, partial)
    finally:
        os.umask(former)
    assert stat.S_IMODE((tmp_path / "weights.safetensors").stat().st_mode) == 0o666 & ~umask


def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path):
    path = tmp_path / ("é" * 125 + ".png")  # 254 of 255 bytes
    with atomic_write(path) as partial:
        partial.touch()
    assert path.exists()


def test_file_and_folder_are_on_the_disk_in_this_order_around_the_rename(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append(stat.S_ISDIR(os.fstat(file).st_mode)), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("renamed"), replace(*paths)))
    with atomic_write(tmp_path / "a") as partial:
        partial.write_text("a")
    assert done == [False, "renamed", True]


def killed_while_writing(folder) -> None:
    if (child := os.fork()) == 0:
        with atomic_write(folder / "deep" / "a") as partial:
            partial.write_text("half")
            os._exit(0)  # as SIGKILL, no `finally` runs
    os.waitpid(child, 0)


def test_what_a_killed_process_was_writing_goes_and_what_a_living_one_writes_stays(tmp_path):
    killed_while_writing(tmp_path)
    assert len(os.listdir(tmp_path / "deep")) == 1
    with atomic_write(tmp_path / "deep" / "b") as partial:
        partial.write_text("whole")
        remove_leftovers(tmp_path)
        assert os.listdir(tmp_path / "deep") == [partial.parent.name]
    assert os.listdir(tmp_path / "deep") == ["b"]


def holds(folder, shard=(1, 1)) -> bool:
    try:
        with folder_lock(folder, shard):
            return False
    except ValueError as error:
        assert f"{folder}: " in str(error) and "writes here; wait for it or give another output" in str(error)
        return True


def test_a_lock_outlasts_readers_and_removers_of_its_file_and_holds_within_the_process(tmp_path):
    with folder_lock(tmp_path):
        (tmp_path / ".lock").read_text()  # closing a file ends a POSIX lock on it
        assert holds(tmp_path)
        (tmp_path / ".lock").unlink()
        assert holds(tmp_path)
        results = []
        other = threading.Thread(target=lambda: results.append(holds(tmp_path)))
        other.start()
        other.join()
        assert results == [True]
    assert not holds(tmp_path) and os.listdir(tmp_path) == []


def test_shards_of_one_number_share_a_folder_and_each_is_there_once(tmp_path):
    with folder_lock(tmp_path, (1, 2)), folder_lock(tmp_path, (2, 2)):
        assert holds(tmp_path) and holds(tmp_path, (1, 2)) and is_held(tmp_path / ".lock-2-of-2")
    with folder_lock(tmp_path):
        assert holds(tmp_path, (1, 2))
    assert os.listdir(tmp_path) == []


def test_forked_processes_do_not_keep_a_lock(tmp_path):
    with folder_lock(tmp_path):
        if (child := os.fork()) == 0:
            time.sleep(60)
            os._exit(0)
    try:
        assert not holds(tmp_path)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_a_lock_can_be_waited_for(tmp_path):
    order = []

    def second() -> None:
        with exclusive_lock(tmp_path / "lock", wait=True):
            order.append("second")

    with exclusive_lock(tmp_path / "lock"):
        other = threading.Thread(target=second)
        other.start()
        time.sleep(0.2)
        order.append("first")
    other.join()
    assert order == ["first", "second"] and os.listdir(tmp_path) == []


def test_asking_whether_a_folder_can_be_written_removes_nothing(tmp_path):
    (tmp_path / ".writable").write_text("a user's own")
    check_writable(tmp_path, "output")
    assert (tmp_path / ".writable").read_text() == "a user's own" and os.listdir(tmp_path) == [".writable"]
