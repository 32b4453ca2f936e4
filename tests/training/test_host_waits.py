"""How often the host waits for a GPU, counted on a CUDA device without memory."""

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from dit4sr_pl.cli.command import conf_folder
from dit4sr_pl.data.module import SuperResolutionData
from testing.host_waits import waits_of_sampling, waits_of_training

SOLVERS = sorted(path.stem for path in (conf_folder() / "sampler/solver").glob("*.yaml"))


@pytest.fixture(scope="module")
def waits(photos):
    degradation = instantiate(OmegaConf.load(conf_folder() / "degradation" / "light.yaml"))
    sizes = {"crop_size": 64, "batch_size": 2, "num_workers": 0, "min_gradient": 0.0}
    return waits_of_training(SuperResolutionData(photos, [], degradation, **sizes), steps=3)


def test_a_training_step_waits_once_for_the_loss_of_the_step_before(waits):
    assert [sum(step.values()) for step in waits] == [0, 1, 1]
    assert [line.split(":")[0] for step in waits for line in step] == ["finite_loss.py"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", SOLVERS)
def test_steps_of_sampling_wait_for_nothing_but_what_the_solver_copies(name):
    waits = waits_of_sampling(instantiate(OmegaConf.load(conf_folder() / f"sampler/solver/{name}.yaml")))
    if name == "unipc":  # it makes tensors of two or three numbers at every step
        assert {line.split(":")[0] for line in waits} == {"sampling.py"}
        assert sum(waits.values()) <= 4 * 6
    else:
        assert not waits
