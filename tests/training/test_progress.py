"""Progress of a training: lines where there is no terminal, a bar where there is one."""

import logging
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Timer

from dit4sr_pl.common.progress import tick
from dit4sr_pl.training.callbacks import Progress

MODULE = SimpleNamespace(step_loss=torch.tensor(0.4123))


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def trainer(step: int, accumulate: int = 1, *callbacks) -> SimpleNamespace:
    named = {"max_steps": 100, "accumulate_grad_batches": accumulate, "num_val_batches": [5]}
    return SimpleNamespace(global_step=step, callbacks=callbacks, **named)


def train(progress: Progress, clock: list[float], first: int, seconds: float) -> None:
    """Runs from step `first` to 100 with a validation of five batches at step 60, at so many seconds a step."""
    progress.on_train_start(trainer(first), None)
    for step in range(first + 1, 101):
        clock[0] += seconds
        progress.on_train_batch_end(trainer(step), MODULE)
        tick()
        if step == 60:
            progress.on_validation_start(trainer(step), None)
            for batch in range(5):
                clock[0] += 10
                progress.on_validation_batch_end(trainer(step), None, None, None, batch)
                tick()
            progress.on_validation_end(trainer(step), None)
    progress.teardown(trainer(100), None, "fit")


def test_without_a_terminal_there_is_a_first_line_soon_and_then_one_every_half_minute(clock, caplog):
    caplog.set_level(logging.INFO)
    train(Progress("outputs/demo/full/seed0"), clock, first=0, seconds=2)
    lines = [record.message for record in caplog.records]
    assert lines[0] == "demo/full/seed0: step 5 of 100, loss 0.412, about 3 min left"
    assert "demo/full/seed0: validating at step 60" in lines
    assert "demo/full/seed0: step 60 of 100, validating, 1 of 5 batches, loss 0.412, about 87 s left" in lines
    steps = [int(line.split("step ")[1].split()[0]) for line in lines if "left" in line]
    assert steps == [5, 20, 35, 50, 60, 60, 70, 85, 100]


def test_a_resumed_run_reckons_with_the_steps_since_it_was_started(clock, caplog):
    caplog.set_level(logging.INFO)
    train(Progress("outputs/demo/full/seed0"), clock, first=50, seconds=2)
    assert caplog.records[0].message == "demo/full/seed0: step 55 of 100, loss 0.412, about 2 min left"


def test_batches_of_a_step_count_before_it_ends(clock):
    progress = Progress("run")
    progress.on_train_start(trainer(0, 32), None)
    clock[0] += 80
    for _ in range(16):
        progress.on_train_batch_end(trainer(0, 32), MODULE)
    assert progress.line() == "run: step 0 of 100, loss 0.412, about 4 h 25 min left"
    progress.teardown(None, None, "fit")


def test_the_time_left_is_that_of_the_time_limit_if_it_ends_the_run_first(clock):
    timer, progress = Timer(duration="00:00:01:00"), Progress("run")
    progress.on_train_start(trainer(0, 1, timer), None)
    timer.on_train_start(SimpleNamespace(), None)
    clock[0] += 20
    progress.on_train_batch_end(trainer(1), MODULE)
    assert progress.line() == "run: step 1 of 100, loss 0.412, about 40 s left (trainer.max_time)"
    for step in range(2, 91):
        progress.on_train_batch_end(trainer(step), MODULE)
    assert progress.line() == "run: step 90 of 100, loss 0.412, about 2 s left"
    progress.teardown(None, None, "fit")


def test_only_one_process_of_a_run_shows_its_progress(clock, caplog):
    caplog.set_level(logging.INFO)
    progress = Progress("outputs/demo/full/seed0")
    progress.disable()
    train(progress, clock, first=0, seconds=2)
    assert not caplog.records


@pytest.mark.parametrize("bar", [True, False])
def test_in_a_terminal_there_is_a_bar_unless_runs_go_side_by_side(bar, clock, monkeypatch, capsys, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    progress = Progress("run", bar=bar, seconds=0)
    progress.on_train_start(trainer(0), None)
    clock[0] += 40
    progress.on_train_batch_end(trainer(40), MODULE)
    tick()
    progress.on_exception(trainer(40), None, KeyboardInterrupt())
    shown = capsys.readouterr().err
    assert ("40/100" in shown and "about 1 h 06 min left" in shown) == bar and bool(caplog.records) != bar
