"""Schedules of the learning rate against diffusers' own, and the options of an optimizer in a resumed run."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers.optimization import get_scheduler
from lightning.pytorch.callbacks import Timer

from dit4sr_pl.model import load_part
from dit4sr_pl.training.learning_rate import NAMES, LearningRateSchedule, share_done
from testing.toy_runs import events, losses

OPTIONS = {
    "constant": {},
    "piecewise_constant": {"step_rules": "1:3,0.1:6,0.01"},
    "polynomial": {"num_warmup_steps": 2, "power": 2.0},
    "cosine_with_restarts": {"num_warmup_steps": 2, "num_cycles": 3},
}


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")
@pytest.mark.parametrize("name", NAMES)
def test_every_schedule_is_diffusers(name):
    options = OPTIONS.get(name, {"num_warmup_steps": 3})
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2e-3)
    theirs = get_scheduler(name, optimizer, **{"num_warmup_steps": 0, "num_training_steps": 12} | options)
    ours = LearningRateSchedule(name, **options).over(12, 2e-3)
    for step in range(12):
        assert 2e-3 * ours(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        theirs.step()


def trainer(step: int, steps: int, *callbacks: Timer) -> SimpleNamespace:
    strategy = SimpleNamespace(broadcast=lambda value: value)
    return SimpleNamespace(global_step=step, max_steps=steps, callbacks=callbacks, strategy=strategy)


def test_a_decay_ends_with_the_run():
    falling = LearningRateSchedule("constant", decay=0.5)
    factors = [falling.decayed(share_done(trainer(step, 20))) for step in range(21)]
    assert factors[:11] == [1.0] * 11 and factors[11:] == pytest.approx([(20 - step) / 10 for step in range(11, 21)])
    assert LearningRateSchedule("constant").decayed(0.99) == 1.0


def test_the_time_counts_where_it_ends_the_run(monkeypatch):
    timer = Timer(duration="00:00:01:40")
    monkeypatch.setattr(timer, "time_elapsed", lambda *_: 75.0)
    monkeypatch.setattr(timer, "time_remaining", lambda *_: 25.0)
    assert share_done(trainer(1, 1000, timer)) == pytest.approx(0.75)
    assert share_done(trainer(900, 1000, timer)) == pytest.approx(0.9)
    assert share_done(trainer(9, -1)) == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"name": "cosin"}, "schedule.name=cosin: choose one of linear, cosine"),
        ({"name": "constant", "num_warmup_steps": 5}, "has no warm-up; take constant_with_warmup"),
        ({"name": "linear", "num_warmup_steps": -1}, "must be 0 or more"),
        ({"name": "linear", "decay": 1.5}, "from 0 to 1"),
    ],
)
def test_what_a_schedule_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LearningRateSchedule(**options)


def test_a_schedule_without_its_end_or_its_rules_is_refused():
    with pytest.raises(ValueError, match="give trainer.max_steps"):
        LearningRateSchedule("cosine").over(-1, 1.0)
    with pytest.raises(ValueError, match="give schedule.step_rules"):
        LearningRateSchedule("piecewise_constant").over(9, 1.0)
    assert LearningRateSchedule("constant_with_warmup", num_warmup_steps=4).over(-1, 1.0)(2) == 0.5


QUICK = ["trainer.limit_val_batches=0", "callbacks=default", "callbacks.checkpoint.every_n_train_steps=1"]


def rates(folder: Path) -> list[float]:
    return [event.value for event in events(folder).Scalars("train/learning_rate")]


@pytest.mark.slow
def test_a_run_takes_the_rate_of_its_step_also_when_it_resumes_with_accumulation(run, tmp_path):
    linear = ["schedule.name=linear", "schedule.num_warmup_steps=1", "optimizer.lr=1.0e-3", *QUICK]
    run("run", *linear, "trainer.max_steps=5")
    assert rates(tmp_path / "run") == pytest.approx([0, 1e-3, 0.75e-3, 0.5e-3, 0.25e-3])
    checkpoint = tmp_path / "run" / "checkpoints" / "0000003.ckpt"
    halves = ["data.batch_size=1", "trainer.accumulate_grad_batches=2"]
    each = ["+callbacks.losses._target_=dit4sr_pl.training.callbacks.Losses", "+callbacks.losses.folder=${output}"]
    run("other", *linear, *halves, *each, "trainer.max_steps=5", f"ckpt_path={checkpoint}")
    assert rates(tmp_path / "other") == pytest.approx([0.5e-3, 0.25e-3])
    rows = (tmp_path / "other" / "losses.csv").read_text().splitlines()[1:]
    first, second, third, fourth = (float(row.split(",")[1]) for row in rows)
    assert losses(tmp_path / "other") == pytest.approx([(first + second) / 2, (third + fourth) / 2])


@pytest.mark.slow
def test_a_checkpoint_of_another_rate_is_continued_with_what_the_config_says(run, tmp_path):
    run("first", *QUICK, "trainer.max_steps=2", "optimizer.lr=1.0e-3")
    options = ["optimizer.lr=1.0e-6", "optimizer.weight_decay=0.5", "optimizer.betas=[0.5,0.9]"]
    checkpoint = f"ckpt_path={tmp_path}/first/checkpoints/0000002.ckpt"
    run("second", *QUICK, "trainer.max_steps=3", *options, checkpoint)
    (group,) = torch.load(tmp_path / "second/checkpoints/0000003.ckpt", weights_only=True)["optimizer_states"][0][
        "param_groups"
    ]
    assert (group["lr"], group["weight_decay"], tuple(group["betas"])) == (1e-6, 0.5, (0.5, 0.9))
    with pytest.raises(ValueError, match="has the state of AdamW, and this run has the optimizer SGD; take the same"):
        sgd = ["optimizer._target_=torch.optim.SGD", "~optimizer.betas", "~optimizer.eps", "optimizer.fused=false"]
        run("third", *QUICK, "trainer.max_steps=3", *sgd, checkpoint)


@pytest.mark.slow
def test_the_convolutions_of_the_injection_have_their_own_rate(run, tmp_path):
    ten = [
        *QUICK,
        "optimizer.lr=1.0e-3",
        "optimizer.weight_decay=0",
        "model.conv_learning_rate=10",
    ]
    run("first", *ten, "trainer.max_steps=1")
    weights = load_part(tmp_path / "first" / "lr_stream.safetensors").state
    moved = {name: weight.abs().max().item() for name, weight in weights.items() if weight.count_nonzero()}
    # Adam's first step moves a weight by its learning rate, and these start at zero.
    assert moved["blocks.0.injection.conv.weight"] == pytest.approx(1e-2, rel=1e-3)
    assert moved["blocks.0.injection.conv.bias"] == pytest.approx(1e-2, rel=1e-3)
    assert moved["blocks.0.attn.v.weight"] == pytest.approx(1e-3, rel=1e-3)

    checkpoint = f"ckpt_path={tmp_path}/first/checkpoints/0000001.ckpt"
    run("second", *ten, "model.conv_learning_rate=4", "schedule.decay=1.0", "trainer.max_steps=4", checkpoint)
    state = torch.load(tmp_path / "second/checkpoints/0000004.ckpt", weights_only=True)["optimizer_states"][0]
    assert [group["lr"] for group in state["param_groups"]] == pytest.approx([0.25e-3, 1e-3])
    with pytest.raises(
        ValueError, match=r"of \[\d+, \d+\] weights, and this run's of \[\d+\]; set model.conv_learning"
    ):
        run("third", *QUICK, "trainer.max_steps=2", checkpoint)


@pytest.mark.slow
def test_average_patience_and_time_are_those_of_the_config_and_not_of_the_checkpoint(run, tmp_path):
    stop = "+callbacks.stop={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/psnr, patience: %d}"
    options = ["trainer.limit_val_batches=0", "callbacks.checkpoint.every_n_train_steps=1", "optimizer.lr=1.0e-2"]
    run("first", *options, stop % 3, "trainer.max_steps=2", "+trainer.max_time=00:01:00:00")
    paths = [tmp_path / name for name in ("first/checkpoints/0000002.ckpt", "second/checkpoints/0000003.ckpt")]
    clock = {"time_elapsed": {"train": 3600.0}}
    checkpoint = torch.load(paths[0], weights_only=True)
    assert "Timer" in checkpoint["callbacks"]
    torch.save(checkpoint | {"callbacks": checkpoint["callbacks"] | {"Timer": clock}}, paths[0])
    changed = [stop % 7, "callbacks.ema.decay=0.5", "seed=3", "+trainer.max_time=00:01:00:00"]
    run("second", *options, *changed, "trainer.max_steps=3", f"ckpt_path={paths[0]}")
    before, after = (torch.load(path, weights_only=True) for path in paths)
    (patience,) = [state["patience"] for key, state in after["callbacks"].items() if key.startswith("EarlyStopping")]
    assert patience == 7
    assert after["callbacks"]["Timer"]["time_elapsed"]["train"] < 3600
    for name, average in after["state_dict"].items():
        torch.testing.assert_close(average, (before["state_dict"][name] + after["current_model_state"][name]) / 2)
