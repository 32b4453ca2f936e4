"""Signs of life without a terminal; bars in one are rich's own."""

import io
import sys
import threading
import time

import pytest

from dit4sr_pl.common import progress
from dit4sr_pl.common.progress import in_words, sign, signs_of_life, tick, track, work


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def test_work_in_a_file_has_a_first_line_soon_and_then_one_every_half_minute(clock, capsys):
    for _ in track(range(100), "captions"):
        clock[0] += 2
        tick()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "captions: 4 of 100, about 4 min left"
    assert [int(line.split()[1]) for line in lines] == [4, 19, 34, 49, 64, 79, 94]


def test_work_may_be_measured_in_another_unit_than_it_is_counted_in(clock, capsys):
    with work("restoring", 1000, 4) as show:
        clock[0] += 60
        show(500, items=1)
        tick()
    assert capsys.readouterr().err == "restoring: 1 of 4, about 60 s left\n"


def test_the_innermost_work_speaks_and_after_it_the_outer_one(clock, capsys):
    with sign(lambda: print("command", file=sys.stderr)):
        with work("counting") as show:
            clock[0] += 40
            tick()
            show(3, 9)
        clock[0] += 31
        tick()
        tick()
    assert capsys.readouterr().err == "counting: 40 s\ncommand\n"


def test_a_command_that_says_nothing_tells_how_long_it_has_been_running(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 0)
    with signs_of_life("plan"), signs_of_life("nested"):
        deadline = time.monotonic() + 20
        while "so far" not in (text := capsys.readouterr().err):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert text.startswith("plan: ") and progress.thread is None


def test_a_run_next_to_others_has_lines_in_a_terminal_too(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    written = threading.Event()
    with signs_of_life("train"), sign(written.set, seconds=0):
        assert written.wait(20)
    assert not capsys.readouterr().err


def test_lines_have_no_carriage_returns_and_a_closed_pipe_does_not_stop_the_work(clock, monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr("sys.stderr", file)
    for number in track([1, 2], "crops"):
        clock[0] += 31
        tick()
        if number == 1:
            file.write = lambda text: (_ for _ in ()).throw(BrokenPipeError)
    assert file.getvalue() == "crops: 0 of 2, 31 s\n"


@pytest.mark.parametrize("seconds, words", [(40, "40 s"), (95, "2 min"), (3599, "1 h 00 min"), (11100, "3 h 05 min")])
def test_times_are_in_words(seconds, words):
    assert in_words(seconds) == words
