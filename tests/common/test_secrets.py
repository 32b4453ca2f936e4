"""What comes from the environment, tokens and passwords: in no file of a run, and in no message."""

import logging
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from dit4sr_pl.cli.command import conf_folder, one_line
from dit4sr_pl.common import secrets
from dit4sr_pl.common.run_identity import evaluation_identity, resume_identity
from dit4sr_pl.common.secrets import hidden, without_secrets
from dit4sr_pl.training.run_folder import Formatter, read_config
from testing.toy_runs import small

TOKEN, WORD = "hf_" + "x7" * 17, "correct-horse"


@pytest.fixture
def environment(monkeypatch, tmp_path):
    monkeypatch.setattr(secrets, "used", {})
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("MY_WORD", WORD)
    monkeypatch.setenv("MY_DATA", str(tmp_path))


def test_values_are_replaced_by_the_names_of_their_variables(environment, monkeypatch, tmp_path):
    texts = OmegaConf.create(
        {"a": "${oc.env:MY_WORD}", "b": "${oc.env:MY_DATA}", "c": "${oc.env:NONE,x}", "d": "${a}/b"}
    )
    assert OmegaConf.to_container(texts, resolve=True) == {"a": WORD, "b": str(tmp_path), "c": "x", "d": f"{WORD}/b"}
    assert without_secrets(OmegaConf.to_container(texts, resolve=True)) == {
        **{"a": "<MY_WORD>", "b": str(tmp_path), "c": "x", "d": "<MY_WORD>/b"}
    }
    assert hidden(f"--token={TOKEN}") == "--token=<HF_TOKEN>" and hidden("hf_" + "q" * 34) == "hf_***"
    assert hidden("https://me:pass@host/x@y and ftp://:p@h") == "https://me:***@host/x@y and ftp://:***@h"
    assert hidden("http://127.0.0.1:7860/a@b: 12:30") == "http://127.0.0.1:7860/a@b: 12:30"
    monkeypatch.setenv("SHORT_TOKEN", "1")
    assert without_secrets({"lr": "1e-4", "steps": 11, "list": ["1"]}) == {"lr": "1e-4", "steps": 11, "list": ["1"]}


def test_a_variable_that_is_missing_is_one_line_and_a_default_is_taken(environment):
    with pytest.raises(Exception, match="Environment variable 'NONE' not found") as missing:
        OmegaConf.to_container(OmegaConf.create({"a": "${oc.env:NONE}"}), resolve=True)
    assert "\n" not in one_line(missing.value)


def test_messages_and_an_evaluations_settings_have_none(environment):
    assert one_line(ValueError(f"https://a:b@c: {TOKEN}")) == "https://a:***@c: <HF_TOKEN>"
    identity = evaluation_identity("set", "hash", {}, {"arguments": ["run.py", "--token", TOKEN]}, None, {})
    assert identity["method"]["arguments"] == ["run.py", "--token", "<HF_TOKEN>"]


@pytest.mark.slow
def test_no_file_of_a_run_has_them_and_it_resumes_with_another_token(environment, photos, run, tmp_path, monkeypatch):
    given = ["+logger.comment=${oc.env:MY_WORD}", "+callbacks.hyper_parameters.columns.by=${oc.env:HF_TOKEN}"]
    given += ["~callbacks.scores", "callbacks.checkpoint.every_n_train_steps=1"]
    run("run", *given, "trainer.max_steps=1")
    assert Formatter().format(logging.makeLogRecord({"msg": "%s", "args": (TOKEN,)})) == "<HF_TOKEN>"
    files = [
        path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.name != "code.diff"
    ]  # of this file
    assert len(files) > 5
    for path in files:
        assert not any(value.encode() in path.read_bytes() for value in (TOKEN, WORD)), path
    config = read_config(tmp_path / "run" / "config.yaml")
    assert config.logger.comment == "<MY_WORD>" and config.data.folders == [str(photos)]
    monkeypatch.setenv("HF_TOKEN", TOKEN.replace("x", "y"))
    assert run("run", *given, "trainer.max_steps=2")


def test_a_setting_from_the_environment_is_the_same_run(environment):
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        cfg = compose("train", [*small(Path("photos")), "output=x", "model.weighting=${oc.env:MY_WORD}"])
    OmegaConf.resolve(cfg)
    written = OmegaConf.create(without_secrets(OmegaConf.to_container(cfg)))
    assert written.model.weighting == "<MY_WORD>" and resume_identity(cfg) == resume_identity(written)
