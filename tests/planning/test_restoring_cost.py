"""The cost of restoring: FLOPs against PyTorch's counter on a real image, seconds against the paper's."""

from functools import partial

import pytest
import torch
from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dit4sr_pl.backbone.autoencoder import LatentCoder
from dit4sr_pl.cli.command import conf_folder
from dit4sr_pl.common.files import ASSETS
from dit4sr_pl.common.randomness import generator
from dit4sr_pl.model import DiT4SRTransformer, SD3ControlNet
from dit4sr_pl.plan import restoring_row, restoring_table
from dit4sr_pl.planning.meta_backbone import MetaBackbone
from dit4sr_pl.planning.restoring_cost import random_prompts, restoring_cost
from dit4sr_pl.restoration.sampling import restore

SIZE = 256


def composed(name, *overrides):
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return compose(name, list(overrides))


@pytest.mark.slow
@pytest.mark.parametrize("make", [DiT4SRTransformer, partial(SD3ControlNet, num_layers=2)])
def test_flops_are_those_of_pytorchs_counter(make):
    sampler = instantiate(composed("train", "output=x", "sampler.steps=2", "sampler.guidance_scale=2").sampler)
    shapes = MetaBackbone(ASSETS / "tiny-sd3", "float32")
    cost = restoring_cost(shapes, shapes.network(make), sampler, SIZE)
    net = make(SD3Transformer2DModel.from_config(shapes.config("transformer")))
    assert cost.parameters == sum(parameter.numel() for parameter in net.parameters())
    if isinstance(net, DiT4SRTransformer):
        net.lr_stream.merge(net.base)
    coder, prompts = LatentCoder(AutoencoderDC.from_config(shapes.config("vae"))), random_prompts(shapes, net, sampler)
    lr, draws = torch.rand(1, 3, SIZE // 4, SIZE // 4), [generator("cpu", 0)]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # it knows no fused kernel of a CPU
        restore(net, coder, prompts, FlowMatchEulerDiscreteScheduler(), sampler, lr, (SIZE, SIZE), [""], draws)
    assert cost.flops == pytest.approx(counter.get_total_flops(), rel=0.1) and cost.evaluations == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, label, seconds", [("dit4sr", "DiT4SR", 5.61), ("sd3_controlnet", "SD3-ControlNet", 4.35)]
)
def test_predicted_seconds_are_within_three_percent_of_the_papers(model, label, seconds):
    plan = composed("plan").plan
    row = restoring_row(composed("train", "output=x", f"model={model}", "sampler=paper"), plan.size, None, plan.tflops)
    assert float(row[-1]) == pytest.approx(seconds, rel=0.03) and plan.restoring[model] == label


@pytest.mark.slow
def test_the_table_has_a_measured_row_and_the_papers_rows():
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        cfg = compose("plan", ["plan.device=cpu", "plan.size=128"])
        cfg.plan.restoring = {"tiny": "DiT4SR"}
        table = restoring_table(cfg)
    columns = {column.header: list(column.cells) for column in table.columns}
    methods = ["DiT4SR", "ResShift", "StableSR", "SeeSR", "DiffBIR", "SUPIR", "SD3-ControlNet"]
    assert columns["restoring 128x128"] == methods
    measured, *rest = columns["seconds on cpu"]
    assert float(measured) > 0 and set(rest) == {""}
    assert columns["seconds, A100"] == ["5.61", "0.79", "13.18", "5.14", "4.12", "11.85", "4.35"]


@pytest.mark.slow
def test_students_are_planned_with_their_own_evaluations_and_merged_lora():
    models = "tiny", "tiny_student_4", "tiny_student_1 student.lora_rank=0", "tiny_student_1 student.lora_rank=8"
    # At this rate seconds are TFLOPs by a million.
    rows = [
        restoring_row(composed("train", "output=x", *f"model={model}".split()), 128, None, 1e-6) for model in models
    ]
    counted, teacher, four, one, adapted = [row[1] for row in rows], *(float(row[3]) for row in rows)
    assert counted == ["20", "4", "1", "1"] and rows[0][0] == rows[1][0] == rows[2][0] != rows[3][0]
    assert four - one == pytest.approx(3 * (teacher - one) / 19, rel=1e-3) and adapted == pytest.approx(one, rel=1e-3)
