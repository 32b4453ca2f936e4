"""The student of one step: each of its losses by a formula of its own, its critic, and its runs."""

import copy
from dataclasses import replace

import pytest
import torch

from dit4sr_pl.images.resize import enlarge
from dit4sr_pl.model import load_part
from dit4sr_pl.restoration.restorer import Restorer
from dit4sr_pl.scores.pyiqa_loading import create
from dit4sr_pl.training.students.one_step import LossWeights
from dit4sr_pl.training.students.perceptual import crop_window
from dit4sr_pl.training.students.score import loss_with_gradient
from testing.events import event
from testing.networks import randomise
from testing.students import GUIDED, losses_of, make_student, toy_batch
from testing.toy_runs import losses, train_toy

NONE = [f"student.loss.{name}=0" for name in LossWeights.__dataclass_fields__]
ONE = ["model=tiny_student_1", *GUIDED, "student.crop=32", "student.lora_rank=2", "student.critic.rank=2"]
ALL = [f"student.loss.{name}=1" for name in LossWeights.__dataclass_fields__] + ["student.teaching.steps=2"]


def only(file, /, **weights: float):
    """Returns a module with these losses alone, whose student is random."""
    module = make_student(file, *ONE, *NONE, *(f"student.loss.{name}={each}" for name, each in weights.items()))
    randomise(module.lr_stream)
    module.log = lambda *_: None
    return module


@pytest.fixture(scope="module")
def scored(teacher):
    """A module with both losses of scores, whose critic is random."""
    module = only(teacher, score=2.0, target_score=3.0)
    randomise(module.critic.layers)
    return module


@torch.no_grad()
def guided(module, noisy, batch):
    """Returns the teacher's velocity by two passes one after another."""
    conditions = module.teacher.conditions(module.embeddings(batch), "blurry")
    positive, negative = (
        module.teacher.net(noisy, batch["lr_latent"], batch["timestep"], *each) for each in conditions
    )
    return negative + 3.0 * (positive - negative)


@torch.no_grad()
def test_its_result_is_one_evaluation_from_the_lr_latent(scored):
    batch = toy_batch(scored)
    lr, sigma = batch["lr_latent"], scored.sigma
    prompts = scored.embeddings(batch)
    expected = lr - sigma * scored.net(lr, lr, torch.full((2,), 1000 * sigma), *prompts)
    torch.testing.assert_close(scored.restored(lr, prompts), expected)


@torch.no_grad()
def test_a_validation_restores_by_the_same_evaluation(scored):
    image = torch.rand(1, 3, 16, 16)
    restorer: Restorer = scored.restorer
    restorer.sampler = replace(restorer.sampler, color="none")
    restored = restorer(image, (64, 64), [""], ["0"], seed=0)
    coder, prompts = scored.backbone.coder, scored.backbone.prompts([restorer.sampler.prompt("")], torch.device("cpu"))
    expected = coder.decode(scored.restored(coder.encode(enlarge(image, (64, 64))), prompts))
    assert restorer.evaluations == 1
    torch.testing.assert_close(restored, expected, atol=1e-5, rtol=0)


def test_the_gradient_of_a_score_is_the_given_one_by_the_distance():
    torch.manual_seed(0)
    restored, gradient, real = (torch.randn(2, 4, 8, 8) for _ in range(3))
    restored.requires_grad_()
    loss_with_gradient(restored, gradient, real).backward()
    for image in range(2):
        distance = (restored[image] - real[image]).abs().mean()
        torch.testing.assert_close(restored.grad[image], gradient[image] / distance / restored.numel())


def test_scores_follow_their_formulas_and_the_critic_learns_the_students_results(scored):
    batch = toy_batch(scored)
    clean, lr, noise, timestep = (batch[name] for name in ("clean", "lr_latent", "noise", "timestep"))
    sigma, prompts = batch["sigma"].view(-1, 1, 1, 1), scored.embeddings(batch)
    result = torch.randn(2, 4, 8, 8, requires_grad=True)
    parts = scored.of_scores(result, clean, lr, batch, prompts)

    noisy = ((1 - sigma) * result + sigma * noise).detach()
    real = noisy - sigma * guided(scored, noisy, batch)
    critic = scored.critic.net(noisy, lr, timestep, *prompts)
    target = (1 - sigma) * clean + sigma * noise
    torch.testing.assert_close(parts["critic"], (critic - (noise - result)).square().mean())
    distance = (result - real).abs().mean(dim=(1, 2, 3), keepdim=True) * result.numel()
    expected = {
        "score": (noisy - sigma * critic - real) / distance,
        "target_score": (real - (target - sigma * guided(scored, target, batch))) / distance,
    }
    for name, gradient in expected.items():
        (ours,) = torch.autograd.grad(parts[name], result, retain_graph=True)
        torch.testing.assert_close(ours, gradient.detach(), atol=1e-5, rtol=1e-4)
    assert torch.autograd.grad(parts["critic"], result, allow_unused=True) == (None,)


def test_neither_of_student_and_critic_gets_a_gradient_from_the_others_loss(scored):
    batch = toy_batch(scored)
    prompts = scored.embeddings(batch)
    result = scored.restored(batch["lr_latent"], prompts)
    parts = scored.of_scores(result, batch["clean"], batch["lr_latent"], batch, prompts)
    student, critic = (list(each.parameters()) for each in (scored.lr_stream, scored.critic_lora))
    for own, other, loss in (
        (student, critic, parts["score"] + parts["target_score"]),
        (critic, student, parts["critic"]),
    ):
        assert all(each is not None for each in torch.autograd.grad(loss, own, retain_graph=True, allow_unused=True))
        assert not any(
            each is not None for each in torch.autograd.grad(loss, other, retain_graph=True, allow_unused=True)
        )


def test_a_new_critic_is_the_teacher_so_its_score_is_zero(teacher):
    module = make_student(teacher, *ONE, *NONE, "student.loss.score=1", "student.teaching.guidance_scale=1")
    batch = toy_batch(module)
    result = torch.randn(2, 4, 8, 8)
    parts = module.of_scores(result, batch["clean"], batch["lr_latent"], batch, module.embeddings(batch))
    assert parts["score"].item() == pytest.approx(0, abs=1e-9)


def test_distances_of_latents_and_decoded_crops(teacher, monkeypatch):
    module = only(teacher, latent=1.0, teacher=2.0, pixel=3.0, perceptual=4.0)
    batch = toy_batch(module)
    prompts = module.embeddings(batch)
    result = module.restored(batch["lr_latent"], prompts)
    conditions = module.teacher.conditions(prompts, "blurry")
    taught = module.teacher.states(module.teaching, batch["lr_latent"], batch["noise"], conditions)[-1]
    rows, columns = crop_window((8, 8), 4, module.seed, 0)
    images = [module.backbone.coder.decode(each[..., rows, columns]) for each in (result, batch["clean"])]
    expected = (
        (result - batch["clean"]).square().mean()
        + 2 * (result - taught).square().mean()
        + 3 * (images[0] - images[1]).abs().mean()
        + 4 * create("stlpips-vgg")(*images).mean()
    )
    torch.testing.assert_close(module.loss(batch), expected.detach(), atol=1e-4, rtol=1e-4)


def test_hr_images_of_a_batch_are_the_reference_where_the_crop_lies(teacher):
    module = only(teacher, pixel=1.0)
    latents = torch.randn(2, 4, 8, 8)
    hr = torch.rand(2, 3, 64, 64)
    rows, columns = crop_window((8, 8), 4, module.seed, 0)
    hr[..., 8 * rows.start : 8 * rows.stop, 8 * columns.start : 8 * columns.stop] = module.backbone.coder.decode(
        latents[..., rows, columns]
    )
    assert module.of_decoded(latents, latents, hr)["pixel"].item() == pytest.approx(0, abs=1e-6)


def test_a_crop_is_a_function_of_its_key_and_lies_within():
    windows = [crop_window((8, 12), 4, 0, step) for step in range(200)]
    assert windows == [crop_window((8, 12), 4, 0, step) for step in range(200)]
    assert {rows.start for rows, _ in windows} == set(range(5)) and {cols.start for _, cols in windows} == set(range(9))
    assert crop_window((8, 12), 64, 0) == (slice(0, 8), slice(0, 12))


def test_without_a_weight_nothing_is_made_or_computed(teacher, monkeypatch):
    monkeypatch.setattr("dit4sr_pl.scores.pyiqa_loading.create", lambda **_: pytest.fail("a network is read"))
    module = only(teacher, latent=1.0)
    assert module.critic is None and module.perceptual is None
    assert all(name.startswith("lr_stream.") for name in module.state_dict())
    module.teacher.net.forward = module.backbone.coder.vae.decode = None
    batch = toy_batch(module)
    batch |= dict(zip(("embeds", "pooled"), module.embeddings(batch), strict=True))
    module.loss(batch).backward()
    del module.backbone.coder.vae.decode


def test_teacher_student_and_critic_hold_the_base_once(scored):
    base = {weight.data_ptr() for weight in scored.backbone.transformer.parameters()}
    stream = {weight.data_ptr() for weight in scored.teacher.net.lr_stream.parameters()}
    for net in (scored.net, scored.teacher.net, scored.critic.net):
        frozen = {weight.data_ptr() for weight in net.parameters() if not weight.requires_grad}
        assert frozen <= base | stream
    copied = copy.deepcopy(scored)
    assert copied.critic is scored.critic and copied.teacher is scored.teacher
    assert copied.critic_lora is not scored.critic_lora


def test_gradients_are_clipped_apart_and_the_critic_has_a_learning_rate_of_its_own(teacher):
    module = make_student(teacher, *ONE, *NONE, "student.loss.score=1", "student.critic.learning_rate=0.1")
    optimizer = module.configure_optimizers()
    student, critic = (group["params"] for group in optimizer.param_groups)
    for weight in (*student, *critic):
        weight.grad = torch.ones_like(weight)
    critic[0].grad *= 1000
    module.configure_gradient_clipping(optimizer, 1.0, "norm")
    for group in (student, critic):
        assert sum(weight.grad.square().sum() for weight in group).sqrt().item() == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize(
    "override, message",
    [
        ("student.sigmas=[0.9,0.5]", "a student of one step starts from the LR latent at one sigma"),
        ("student.critic.rank=0", "student.critic.rank=0: a critic needs LoRA"),
        ("student.loss.pixel=-1", "student.loss.pixel=-1"),
    ],
)
def test_what_a_student_of_one_step_cannot_be_is_refused(teacher, override, message):
    with pytest.raises(Exception, match=message):
        make_student(teacher, *ONE, override)


def test_missing_weights_of_the_perceptual_loss_are_told_before_anything_is_read(photos, teacher, tmp_path):
    other = ["perceptual@student.perceptual=lpips_vgg", f"metric_weights.folder={tmp_path}"]
    with pytest.raises(
        FileNotFoundError, match="vgg16-397923af.pth: no such file, and student.perceptual.name=lpips-vgg"
    ):
        train_toy(photos, tmp_path / "run", *ONE, *other, f"student.teacher={teacher}")


def test_all_weights_zero_are_refused():
    with pytest.raises(ValueError, match="all weights are 0"):
        LossWeights()


RUN = [*ONE, *ALL, "optimizer.lr=1e-3", "callbacks.checkpoint.every_n_train_steps=1", "metrics=[psnr]"]
RUN += ["trainer.max_steps=3", "trainer.val_check_interval=3", "schedule.name=constant_with_warmup"]
RUN += ["schedule.num_warmup_steps=2", "student.critic.learning_rate=0.5"]


@pytest.mark.slow
def test_a_run_that_was_stopped_resumes_to_the_last_bit_with_its_critic(photos, teacher, tmp_path):
    arguments = [*RUN, f"student.teacher={teacher}"]
    train_toy(photos, tmp_path / "whole", *arguments)
    with pytest.raises(SystemExit):
        train_toy(photos, tmp_path / "run", *arguments, *event("SIGTERM", "on_train_batch_start", 1))
    train_toy(photos, tmp_path / "run", *arguments)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    ours, theirs = (
        torch.load(tmp_path / name / "checkpoints" / "0000003.ckpt", weights_only=True) for name in ("run", "whole")
    )
    for key in ("state_dict", "current_model_state"):
        assert any(name.startswith("critic_lora.") for name in theirs[key])
        assert all(torch.equal(ours[key][name], weight) for name, weight in theirs[key].items())
    groups = theirs["optimizer_states"][0]["param_groups"]
    assert groups[1]["lr"] == pytest.approx(0.5 * groups[0]["lr"])
    part = load_part(tmp_path / "whole" / "lr_stream.safetensors")
    assert part.network_config["student"] == {"sigmas": [0.5], "start": "lr_latent", "guidance": "built_in"}
    assert {name.split(".")[0] for name in part.state} == {"blocks", "lora"}
    assert load_part(tmp_path / "whole" / "checkpoints" / "0000003.ckpt").state.keys() == part.state.keys()


@pytest.mark.slow
def test_a_few_steps_on_one_batch_lower_the_losses(teacher):
    module = only(teacher, latent=1.0, pixel=1.0)
    batch = toy_batch(module)
    batch["clean"] = -batch["lr_latent"]
    passed = losses_of(module, batch, 25, 1e-2)
    assert passed[-1] < 0.9 * passed[0]
