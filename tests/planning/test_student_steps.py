"""Planned steps of students against steps that ran: the module's own loss, counted on real tensors."""

from functools import partial

import pytest
from hydra import compose, initialize_config_dir

from dit4sr_pl.cli.command import conf_folder
from dit4sr_pl.plan import make_budget
from dit4sr_pl.planning.budget import Budget, Spread
from dit4sr_pl.planning.step_cost import CostCounter, fused_norms
from testing.students import GUIDED, make_student, toy_batch, write_teacher
from testing.toy_runs import TOY_SD3

pytestmark = pytest.mark.slow

EXPERIMENTS = {
    "tiny_guided_student": [],
    "tiny_student_4": [*GUIDED, "student.teaching.steps=4", "student.loss.perceptual=1", "student.crop=32"],
    "tiny_student_1": [
        *(*GUIDED, "student.teaching.steps=4", "student.crop=32"),
        *("student.loss.score=1", "student.loss.target_score=1", "student.loss.teacher=1", "student.loss.perceptual=1"),
    ],
}


def budget(experiment: str, *overrides: str) -> Budget:
    toy = [f"model.backbone.name={TOY_SD3}", "model.backbone.t5_tokens=8", "data.crop_size=64", "data.batch_size=2"]
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        precision = ["trainer.precision=32-true", "model.backbone.dtype=float32"]
        cfg = compose("plan", [f"experiment={experiment}", *toy, *precision, *overrides])
    return make_budget(cfg, TOY_SD3)


@pytest.fixture(scope="module")
def teacher(toy_backbone, tmp_path_factory):
    return write_teacher(toy_backbone, tmp_path_factory.mktemp("teacher") / "lr_stream.safetensors")


@pytest.fixture(scope="module", params=EXPERIMENTS)
def planned_and_counted(request, teacher):
    """The planned cost of a student's step, and the counter of a step that ran."""
    overrides = EXPERIMENTS[request.param]
    module = make_student(teacher, f"experiment={request.param}", "model.backbone.t5_tokens=8", *overrides)
    module.log = lambda *_: None
    batch = toy_batch(module)
    batch |= dict(zip(("embeds", "pooled"), module.embeddings(batch), strict=True))
    module.teacher.conditions(module.embeddings(batch), "blurry")  # encoded once a run
    module.loss(batch).backward()  # gradients are there
    with CostCounter() as counter, fused_norms():
        module.loss(batch).backward()
    return budget(request.param, *overrides).cost(False, 2), counter


def test_flops_are_those_of_the_modules_own_loss(planned_and_counted):
    cost, counter = planned_and_counted
    planned = cost.teacher + cost.forward + cost.backward
    assert planned.flops == pytest.approx(counter.work.flops, rel=0.05)


def test_memory_is_that_of_the_modules_own_loss(planned_and_counted):
    cost, counter = planned_and_counted
    assert cost.activations == pytest.approx(counter.peak, rel=0.25)


@pytest.fixture(scope="module")
def one_step() -> Budget:
    return budget("tiny_student_1", *EXPERIMENTS["tiny_student_1"])


def test_all_networks_share_one_base(one_step):
    teacher = budget("tiny_dit4sr")
    ours, theirs = (each.per_gpu(Spread(1, False, 2)) for each in (one_step, teacher))
    assert ours["frozen transformer"] == theirs["frozen transformer"]
    assert ours["table of positions"] == theirs["table of positions"]
    assert ours["teacher's LR stream"] == theirs["trained weights"]  # both in float32 here
    lora, critic = one_step.parameters()["saved (lr_stream)"], one_step.parameters()["critic (LoRA)"]
    assert ours["trained weights"] == 4 * (lora + critic) and critic > 0
    assert ours["gradients"] == ours["trained weights"]
    assert ours["optimizer's moments"] == pytest.approx(2 * ours["gradients"], rel=0.01)


def test_what_has_weight_zero_takes_nothing(one_step):
    off = budget("tiny_student_1", "student.loss.score=0", "student.loss.perceptual=0", "student.lora_rank=0")
    parameters = off.parameters()
    assert parameters["critic (LoRA)"] == parameters["perceptual network"] == 0
    assert parameters["saved (lr_stream)"] == parameters["teacher's LR stream"]
    assert off.cost(False, 2).teacher.flops == 0 < one_step.cost(False, 2).teacher.flops
    assert off.cost(False, 2).activations < one_step.cost(False, 2).activations


def test_windows_of_a_trajectory_are_one_batch_of_the_student():
    of = partial(budget, "tiny_student_4", "student.teaching.steps=4", "student.loss.perceptual=0")
    one, two = (of(f"student.sigmas={sigmas}").cost(False, 2) for sigmas in ("[1]", "[1,0.5]"))
    assert two.teacher.flops == one.teacher.flops
    assert two.forward.flops == pytest.approx(2 * one.forward.flops, rel=0.1)
    assert two.backward.flops == pytest.approx(2 * one.backward.flops, rel=0.1)
