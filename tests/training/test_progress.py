"""Progress of a training: lines where there is no terminal, a bar where there is one."""

import logging
from types import SimpleNamespace

import pytest
import torch

from dit4sr_pl.training.callbacks import Progress
from dit4sr_pl.training.callbacks.progress import in_words


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def trainer(step: int) -> SimpleNamespace:
    return SimpleNamespace(global_step=step, max_steps=100, callback_metrics={"train/loss": torch.tensor(0.4123)})


def train(progress: Progress, clock: list[float], first: int, seconds: float) -> None:
    """Runs from step `first` to 100 with a validation at step 60, at so many seconds a step."""
    progress.on_train_start(trainer(first), None)
    for step in range(first + 1, 101):
        clock[0] += seconds
        progress.on_train_batch_end(trainer(step), None)
        if step == 60:
            progress.on_validation_start(trainer(step), None)
            clock[0] += 25
            progress.on_validation_end(trainer(step), None)
    progress.teardown(trainer(100), None, "fit")


def test_without_a_terminal_there_is_a_first_line_soon_and_then_one_every_half_minute(clock, caplog):
    caplog.set_level(logging.INFO)
    train(Progress("outputs/demo/full/seed0"), clock, first=0, seconds=2)
    lines = [record.message for record in caplog.records]
    assert lines[0] == "demo/full/seed0: step 5 of 100, loss 0.412, about 3 min left"
    assert "demo/full/seed0: validating at step 60" in lines
    steps = [int(line.split("step ")[1].split()[0]) for line in lines if "left" in line]
    assert steps == [5, 20, 35, 50, 61, 76, 91]


def test_a_resumed_run_reckons_with_the_steps_since_it_was_started(clock, caplog):
    caplog.set_level(logging.INFO)
    train(Progress("outputs/demo/full/seed0"), clock, first=50, seconds=2)
    assert caplog.records[0].message == "demo/full/seed0: step 55 of 100, loss 0.412, about 2 min left"


def test_only_one_process_of_a_run_shows_its_progress(clock, caplog):
    caplog.set_level(logging.INFO)
    progress = Progress("outputs/demo/full/seed0")
    progress.disable()
    train(progress, clock, first=0, seconds=2)
    assert not caplog.records


@pytest.mark.parametrize("bar", [True, False])
def test_in_a_terminal_there_is_a_bar_unless_runs_go_side_by_side(bar, monkeypatch, capsys, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    progress = Progress("run", bar=bar, seconds=0)
    progress.on_train_start(trainer(0), None)
    progress.on_train_batch_end(trainer(40), None)
    progress.on_exception(trainer(40), None, KeyboardInterrupt())
    assert ("40/100" in capsys.readouterr().err) == bar and bool(caplog.records) != bar


@pytest.mark.parametrize("seconds, words", [(40, "40 s"), (95, "2 min"), (3599, "1 h 00 min"), (11100, "3 h 05 min")])
def test_times_are_in_words(seconds, words):
    assert in_words(seconds) == words
