"""One process decides for all, whoever starts the others."""

import json
import os
import socket
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dit4sr_pl.training import leader
from dit4sr_pl.training.leader import DECISION, Decision, agree, exchanged, forget, leads

DECIDED = Decision(checkpoint="a.ckpt", step=7, size=3, gradient_checkpointing=True)


def trainer(**options):
    given = {"_target_": "lightning.Trainer", "accelerator": "cpu", "devices": 2, "num_nodes": 1}
    return OmegaConf.create(given | {"max_steps": 1, "enable_progress_bar": False} | options)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("LOCAL_RANK", "RANK", "NODE_RANK", "SLURM_PROCID", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    yield
    forget()


@pytest.mark.parametrize("rank", ["RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"])
def test_of_a_run_on_several_devices_rank_0_holds_the_folder(monkeypatch, rank):
    two, one = trainer(), trainer(devices=1)
    assert leads(two) and leads(one)
    monkeypatch.setenv(rank, "1")
    assert not leads(two) and leads(one)


def test_a_run_on_one_device_decides_by_itself_and_leaves_nothing_behind():
    assert agree(trainer(devices=1), lambda: DECIDED) == DECIDED and DECISION not in os.environ


def test_processes_that_this_one_starts_get_its_decision():
    assert agree(trainer(), lambda: DECIDED) == DECIDED
    assert agree(trainer(), lambda: pytest.fail("it must not look for itself")) == DECIDED  # now as such a process
    forget()
    with pytest.raises(FileNotFoundError, match="nothing there"):
        agree(trainer(), Path("nothing there").read_text)
    assert DECISION not in os.environ
    os.environ[DECISION] = json.dumps({"error": "out: holds a run"})
    with pytest.raises(ValueError, match="out: holds a run"):
        agree(trainer(), lambda: DECIDED)


def test_machines_whose_processes_are_started_one_by_one_exchange_it(monkeypatch):
    two = trainer(num_nodes=2)
    with pytest.raises(ValueError, match="trainer.num_nodes=2: set MASTER_ADDR, MASTER_PORT, NODE_RANK on every"):
        exchanged(two, lambda: "decided")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port), ("NODE_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert exchanged(two, lambda: "decided") == "decided"
    monkeypatch.setenv("NODE_RANK", "1")
    assert exchanged(two, lambda: pytest.fail("it must not look for itself")) == "decided"


def test_a_machine_waits_until_it_sees_the_checkpoint(tmp_path, monkeypatch):
    decision = Decision(checkpoint=str(tmp_path / "1.ckpt"), step=1, size=3)
    contents = iter([b"a", b"abc"])
    monkeypatch.setattr(leader.time, "sleep", lambda _: (tmp_path / "1.ckpt").write_bytes(next(contents)))
    decision.wait_for_checkpoint()
    assert next(contents, None) is None
    monkeypatch.setattr(leader, "PATIENCE", -1)
    (tmp_path / "1.ckpt").unlink()
    with pytest.raises(FileNotFoundError, match="1.ckpt: not seen by this machine"):
        decision.wait_for_checkpoint()
    Decision().wait_for_checkpoint()
