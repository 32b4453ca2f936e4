"""The schedule of the learning rate, over a stand-in for Lightning's trainer."""

from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import Timer

from dit4sr_pl.callbacks import LearningRate


def rates(schedule: LearningRate, steps: int, max_steps: int, callbacks: list) -> list[float]:
    group = {"lr": 7.0}
    trainer = SimpleNamespace(
        global_step=0, max_steps=max_steps, callbacks=callbacks, optimizers=[SimpleNamespace(param_groups=[group])]
    )
    seen = []
    for step in range(steps):
        trainer.global_step = step
        schedule.on_train_batch_start(trainer, None, None, step)
        seen.append(group["lr"])
    return seen


def test_it_rises_stays_and_falls_to_zero_with_the_steps():
    seen = rates(LearningRate(peak=1.0, warm_up=4, decay=0.5), 20, 20, [])
    assert seen[:4] == [0.25, 0.5, 0.75, 1.0] and set(seen[4:11]) == {1.0}
    assert seen[11:] == pytest.approx([(20 - step) / 10 for step in range(11, 20)])


def test_it_falls_with_the_time_where_that_ends_first(monkeypatch):
    timer = Timer(duration="00:00:01:40")
    elapsed = iter(range(0, 200, 10))
    now = {}
    monkeypatch.setattr(timer, "time_elapsed", lambda *_: now["elapsed"])
    monkeypatch.setattr(timer, "time_remaining", lambda *_: now.update(elapsed=next(elapsed)) or 100 - now["elapsed"])
    seen = rates(LearningRate(peak=1.0, warm_up=0, decay=1.0), 11, 10**6, [timer])
    assert seen == pytest.approx([1 - step / 10 for step in range(11)], abs=1e-4)


def test_without_a_decay_it_stays():
    assert set(rates(LearningRate(peak=2.0, warm_up=1, decay=0), 10, 10, [])) == {2.0}


def test_a_share_over_one_is_refused():
    with pytest.raises(ValueError, match="from 0 to 1"):
        LearningRate(peak=1.0, warm_up=0, decay=1.5)
