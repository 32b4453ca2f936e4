"""Runs on two devices equal runs on one. The devices are processes on the CPU over gloo instead of GPUs over NCCL."""

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir

from dit4sr_pl.cli.command import conf_folder
from dit4sr_pl.model import load_part
from dit4sr_pl.scores.results import read_result
from dit4sr_pl.train import train
from testing.toy_runs import CONTROLNET, events, losses, toy

pytestmark = pytest.mark.slow

STRATEGIES = ("ddp", "fsdp")
NETWORKS = {path.stem: [f"+ablation={path.stem}"] for path in (conf_folder() / "ablation").glob("*.yaml")}
NETWORKS |= {
    "legacy": ["model.network.variant.legacy_lr_keys=true"],
    "controlnet": CONTROLNET,
}
CPU = ["trainer.accelerator=cpu", "trainer.devices=2"]
QUICK = ["~callbacks.scores", "trainer.limit_val_batches=0"]
FOUR_STEPS = ["trainer.max_steps=4", "trainer.precision=32-true", *QUICK]
BFLOAT16 = ["trainer.precision=bf16-mixed", "model.backbone.dtype=bfloat16", "data.crop_size=32"]  # slow on some CPUs
SCORED = ["callbacks=default", "trainer.precision=32-true", "data.validation_limit=3", "metrics=[psnr]"]
# One step of gradient descent with learning rate 1: weights before minus weights after are the gradients.
DESCENT = [*QUICK, "callbacks=default", "callbacks.checkpoint.every_n_train_steps=1"]
DESCENT += ["trainer.max_steps=1", "trainer.precision=32-true", "trainer.gradient_clip_val=0"]
DESCENT += ["optimizer._target_=torch.optim.SGD", "optimizer.lr=1.0", "optimizer.weight_decay=0"]
DESCENT += ["optimizer.fused=false", "~optimizer.betas", "~optimizer.eps"]


class Runs:
    """Runs by name below one folder, on one device in this process or on two in processes of their own."""

    def __init__(self, photos: Path, folder: Path):
        self.photos, self.folder = photos, folder

    def on_one(self, name: str, *overrides: str) -> None:
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            train(compose("train", [*toy(self.photos, self.folder / name), *overrides]))

    def on_two(self, runs: dict[str, list[str]], **environment: str) -> list[str]:
        """Runs all of them, one after another, in one pair of processes, and returns what each of these prints."""
        arguments = json.dumps([[*toy(self.photos, self.folder / name), *runs[name], *CPU] for name in runs])
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        group = environment | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "NODE_RANK": "0"}
        logs = [self.folder / f"device{rank}.log" for rank in range(2)]
        command = [sys.executable, "-m", "testing.two_devices", arguments]
        with ExitStack() as stack:
            processes = []
            for rank, log in enumerate(logs):
                place = (
                    os.environ
                    | group
                    | {"LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
                )
                output = {"stdout": stack.enter_context(log.open("w")), "stderr": subprocess.STDOUT}
                processes.append(stack.enter_context(subprocess.Popen(command, env=place, **output)))
                stack.callback(processes[-1].kill)  # on the way out this comes before the wait for its end
            codes = [process.wait(timeout=600) for process in processes]
        printed = [log.read_text() for log in logs]
        assert codes == [0, 0], "\n".join(text[-4000:] for text in printed)
        return printed

    def losses(self, name: str) -> list[float]:
        return losses(self.folder / name)

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        (path,) = (self.folder / name).glob("*.safetensors")
        return load_part(path).state

    def gradients(self, name: str) -> dict[str, torch.Tensor]:
        after = self.weights(name)
        return {key: before - after[key] for key, before in self.weights("start").items()}


@pytest.fixture(scope="module")
def runs(photos, tmp_path_factory) -> Runs:
    """Returns all runs on two devices and the ones that they start from."""
    runs = Runs(photos, tmp_path_factory.mktemp("devices"))
    runs.on_one("start", *DESCENT)  # at zero weights most gradients are zero
    runs.on_one("half", *FOUR_STEPS, "data.batch_size=4", "trainer.max_steps=2")
    runs.on_one("whole", *FOUR_STEPS, "data.batch_size=4")
    runs.on_one("scored", *SCORED, "data.batch_size=4")
    descent = [*DESCENT, *from_start(runs), "data.batch_size=4"]
    resume = [*FOUR_STEPS, f"ckpt_path={runs.folder}/half/checkpoints/last.ckpt"]
    on_two = {name: ["trainer=ddp", *QUICK, *network] for name, network in NETWORKS.items()}
    on_two |= {f"{name}_fsdp": ["trainer=fsdp", *QUICK, *NETWORKS[name]] for name in ("legacy", "controlnet")}
    on_two["full_bf16"] = ["trainer=fsdp", *QUICK, *BFLOAT16]
    for strategy in STRATEGIES:
        share = [
            "+callbacks.monitor._target_=testing.two_devices.WeightShare",
            f"+callbacks.monitor.output={runs.folder}/2x4_{strategy}",
        ]
        on_two[f"2x4_{strategy}"] = [f"trainer={strategy}", *descent, *share]
        on_two[f"half_{strategy}"] = [f"trainer={strategy}", *FOUR_STEPS, "trainer.max_steps=2"]
        on_two[f"resumed_{strategy}"] = [f"trainer={strategy}", *resume]
        on_two[f"scored_{strategy}"] = [f"trainer={strategy}", *SCORED]
    runs.on_two(on_two)
    return runs


def from_start(runs: Runs) -> list[str]:
    return [f"model.checkpoint={runs.folder}/start/lr_stream.safetensors"]


def distances(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> list[float]:
    """Returns the relative distance of each weight's gradients. A gradient shorter than 1e-4 of the whole gradient
    counts as that long."""
    shortest = 1e-4 * torch.stack([gradient.norm() for gradient in theirs.values()]).norm()
    return [float((ours[key] - gradient).norm() / max(gradient.norm(), shortest)) for key, gradient in theirs.items()]


def test_gradients_of_two_times_four_images_are_those_of_eight(runs):
    for size in (4, 8):
        runs.on_one(f"1x{size}", *DESCENT, *from_start(runs), f"data.batch_size={size}")
    eight = runs.gradients("1x8")
    # The tolerance covers another order of float32 sums, and rounding of weights far larger than their gradients.
    assert all(max(distances(runs.gradients(f"2x4_{strategy}"), eight)) < 1e-2 for strategy in STRATEGIES)
    # The gradients that one device has without the other are far away.
    assert torch.tensor(distances(runs.gradients("1x4"), eight)).median() > 0.1
    assert runs.losses("2x4_ddp") == pytest.approx(runs.losses("1x8"), rel=1e-5)


def test_fsdp_shares_out_frozen_and_trained_weights_and_ddp_does_not(runs):
    for strategy, share in (("ddp", 1), ("fsdp", 0.5)):
        for device in range(2):
            shares = json.loads((runs.folder / f"2x4_{strategy}" / f"share{device}.json").read_text())
            assert shares == pytest.approx([share, share], rel=0.01)


@pytest.mark.parametrize("name", [*NETWORKS, "legacy_fsdp", "controlnet_fsdp", "full_bf16"])
def test_every_network_trains_on_two_devices_without_unused_parameters(runs, name):
    """DDP stops at the second step if a weight had no gradient in the first."""
    assert len(runs.losses(name)) == 2
    part = runs.weights(name)
    checkpoint = torch.load(runs.folder / name / "checkpoints" / "last.ckpt", weights_only=True)
    state = {key.split(".", 1)[1]: weight for key, weight in checkpoint["state_dict"].items()}
    torch.testing.assert_close(part, state, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:The checkpoint was not created with WeightAveraging")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_goes_on_from_two_devices_to_one_and_back(runs, strategy):
    whole = runs.losses("whole")
    assert runs.losses(f"resumed_{strategy}") == pytest.approx(whole[2:], rel=1e-5)
    assert runs.losses(f"half_{strategy}") == pytest.approx(whole[:2], rel=1e-5)
    ckpt = f"ckpt_path={runs.folder}/half_{strategy}/checkpoints/last.ckpt"
    runs.on_one(f"one_{strategy}", *FOUR_STEPS, "data.batch_size=4", ckpt)
    assert runs.losses(f"one_{strategy}") == pytest.approx(whole[2:], rel=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_scores_are_means_over_the_images_of_both_devices(runs, strategy):
    """There are three images, two on one device and one on the other."""
    for score in ("val/psnr", "val/psnr_bicubic"):
        one, two = (events(runs.folder / run).Scalars(score) for run in ("scored", f"scored_{strategy}"))
        assert [event.value for event in two] == pytest.approx([event.value for event in one], rel=1e-4)
    one, two = (read_result(runs.folder / run) for run in ("scored", f"scored_{strategy}"))
    assert list(one.scores) == list(two.scores) == ["0", "1", "2"]
    for name in one.scores:
        assert two.scores[name] == pytest.approx(one.scores[name], rel=1e-4)
        assert (runs.folder / f"scored_{strategy}" / two.pictures / f"{name}.png").is_file()
    assert set(events(runs.folder / f"scored_{strategy}").Tags()["images"]) == {"val/0", "val/1", "val/2"}


def test_the_command_starts_the_second_process_and_writes_once(photos, tmp_path):
    command = [sys.executable, "-m", "dit4sr_pl.train", *toy(photos, tmp_path / "run"), "trainer=ddp", *CPU, *QUICK]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr
    assert len(losses(tmp_path / "run")) == 2 and len(list((tmp_path / "run").glob("events*"))) == 1
    load_part(tmp_path / "run" / "lr_stream.safetensors")


def test_the_first_device_decides_where_all_start_also_for_one_that_sees_the_files_later(photos, tmp_path):
    runs = Runs(photos, tmp_path)
    runs.on_one("run", *FOUR_STEPS, "data.batch_size=4", "trainer.max_steps=2")
    (tmp_path / "again").symlink_to("run")
    (tmp_path / "other").symlink_to("run")
    arguments = ["trainer=ddp", *FOUR_STEPS]
    both = runs.on_two({"run": arguments, "again": arguments, "other": [*arguments, "seed=5"]}, LATE_DEVICE="1")
    assert "resuming from step 2" in (tmp_path / "run" / "train.log").read_text()
    assert len(runs.losses("run")) == 4
    for printed in both:
        resumed, finished, refused = [line for line in printed.splitlines() if line.startswith(("scores", "refused"))]
        assert "train/loss" in resumed and finished == "scores {}"
        assert "holds a run with other settings: seed=5 (the run has 0)" in refused


def test_devices_that_see_other_photos_stop_before_the_first_step(monkeypatch):
    from dit4sr_pl.training.callbacks import sources

    trainer = SimpleNamespace(world_size=2, global_step=3, datamodule=None)
    for others, agree in (((3, ""), True), ((3, "5 (ab)"), False), ((0, ""), False)):
        monkeypatch.setattr(sources, "from_all_devices", lambda trainer, own, others=others: [own, others])
        with nullcontext() if agree else pytest.raises(ValueError, match=r"do not agree \(device 0: step 3"):
            sources.Sources(Path(), None).on_train_start(trainer, None)
