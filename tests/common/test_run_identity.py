"""Identities of runs and evaluations, on the composed configs of `train`."""

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from dit4sr_pl.cli.command import conf_folder
from dit4sr_pl.common.run_identity import (
    MAY_CHANGE,
    MUST_MATCH,
    NO_EFFECT,
    differences,
    evaluation_identity,
    flat_settings,
    hashed_part,
    result_identity,
    resume_identity,
)

ADDED_BY_USERS = ["+trainer.enable_progress_bar=false", "+callbacks.monitor={_target_: my.Watcher}"]
IDENTITIES = {"resume": resume_identity, "result": result_identity}


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return compose("train", ["output=run", *overrides])


@pytest.fixture(scope="module")
def default() -> DictConfig:
    return composed()


@pytest.fixture
def cfg(default) -> DictConfig:
    return default.copy()


@pytest.fixture(scope="module")
def keys(default) -> set[str]:
    """The settings of all trainers, with some that users add with `+`."""
    others = [composed(f"trainer={trainer}", *ADDED_BY_USERS) for trainer in ("gpu", "ddp", "fsdp")]
    others.append(composed("experiment=resume_check", "+debug=profiler"))
    others.append(composed("experiment=tiny_student_1", "perceptual@student.perceptual=lpips_vgg"))
    return {key for config in (default, *others) for key in flat_settings(config)}


def changed(cfg: DictConfig, **values: object) -> DictConfig:
    """A copy of the config with other values; `__` in a name stands for a dot."""
    other = cfg.copy()
    for name, value in values.items():
        OmegaConf.update(other, name.replace("__", "."), value)
    return other


@pytest.mark.slow
@pytest.mark.parametrize("section", sorted({*NO_EFFECT, *MAY_CHANGE, *MUST_MATCH}))
def test_no_list_names_a_setting_that_does_not_exist(keys, section):
    assert any(key == section or key.startswith(f"{section}.") for key in keys)


@pytest.mark.parametrize("identity", IDENTITIES.values(), ids=IDENTITIES)
def test_a_class_that_moved_to_another_module_is_the_same_run(cfg, identity):
    before = identity(cfg)
    for node in (cfg.data, cfg.model, cfg.model.network, cfg.model.backbone, cfg.degradation, cfg.optimizer):
        node["_target_"] = "somewhere.else." + node["_target_"].rpartition(".")[2]
    assert identity(cfg) == before
    cfg.degradation["_target_"] = "dit4sr_pl.degradation.Other"
    assert differences(identity(cfg), before) == ["degradation._target_"]


def test_runs_with_other_seeds_have_one_result_identity_and_cannot_resume_one_another(cfg):
    other = changed(cfg, seed=1)
    assert result_identity(other) == result_identity(cfg)
    assert differences(resume_identity(other), resume_identity(cfg)) == ["seed"]


def test_paths_and_speed_belong_to_no_identity(cfg):
    other = changed(cfg, output="elsewhere", overwrite=True, data__num_workers=9, model__compile=not cfg.model.compile)
    for identity in IDENTITIES.values():
        assert identity(other) == identity(cfg)


def test_a_longer_or_differently_validated_run_resumes_and_has_another_result(cfg):
    other = changed(cfg, trainer__max_steps=7, data__validation_limit=1)
    assert resume_identity(other) == resume_identity(cfg)
    assert differences(result_identity(other), result_identity(cfg)) == ["data.validation_limit", "trainer.max_steps"]


@pytest.mark.parametrize("key", ["gradient_clip_algorithm", "limit_train_batches", "overfit_batches", "sync_batchnorm"])
def test_a_setting_of_the_trainer_that_is_on_no_list_makes_another_run(cfg, key):
    other = cfg.copy()
    OmegaConf.update(other, f"trainer.{key}", 3, force_add=True)
    assert differences(resume_identity(other), resume_identity(cfg)) == [f"trainer.{key}"]


@pytest.mark.parametrize(
    "name, target, same",
    [
        ("swa", "lightning.pytorch.callbacks.StochasticWeightAveraging", False),
        ("mine", "my.FreezesLayers", False),
        ("monitor", "my.Watcher", True),
        ("stop", "lightning.pytorch.callbacks.EarlyStopping", True),
        ("rate", "lightning.pytorch.callbacks.LearningRateMonitor", True),
    ],
)
def test_a_callback_makes_another_run_unless_it_only_watches(cfg, name, target, same):
    other = cfg.copy()
    OmegaConf.update(other, f"callbacks.{name}", {"_target_": target, "option": 1}, force_add=True)
    assert (resume_identity(other) == resume_identity(cfg)) is same


@pytest.mark.parametrize("identity", IDENTITIES.values(), ids=IDENTITIES)
def test_precision_and_averaging_belong_to_both_identities(cfg, identity):
    other = changed(cfg, trainer__precision="64-true")
    assert differences(identity(other), identity(cfg)) == ["trainer.precision"]
    without = differences(identity(composed("callbacks=default")), identity(cfg))
    assert without and all(name.startswith("callbacks.ema") for name in without)


def test_the_batch_may_be_divided_in_other_ways_but_not_change(cfg):
    smaller = changed(cfg, data__batch_size=cfg.data.batch_size // 2)
    divided = changed(smaller, trainer__accumulate_grad_batches=2)
    for identity in IDENTITIES.values():
        assert identity(divided) == identity(cfg)
        assert differences(identity(smaller), identity(cfg)) == ["images per step"]


def test_versions_and_names_of_rows_do_not_change_the_hash_of_an_evaluation():
    given = {"dataset": "toy", "files": "f", "method": {"label": "bicubic"}}
    metrics = {"psnr": {"_target_": "old.place.Psnr", "measured": True}}
    first = evaluation_identity(**given, metrics=metrics, name=None, versions={"torch": "1"})
    moved = {"psnr": metrics["psnr"] | {"_target_": "new.Psnr"}}
    second = evaluation_identity(**given, metrics=moved, name="row", versions={"torch": "2"})
    assert differences(first, second) == ["name", "versions"] and hashed_part(first) == hashed_part(second)
    other = evaluation_identity(**given | {"files": "g"}, metrics=metrics, name=None, versions={"torch": "1"})
    assert hashed_part(other) != hashed_part(first)
