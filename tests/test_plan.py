"""The cost of a training, before it runs: at the paper's size by its parameters, at toy size by everything else."""

import json
import shutil
from functools import partial

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from dit4sr_pl.cli.command import conf_folder
from dit4sr_pl.common.files import ASSETS
from dit4sr_pl.model import DiT4SRTransformer, SD3ControlNet, Variant
from dit4sr_pl.plan import find_configs, images_per_step, main, make_budget
from dit4sr_pl.planning.budget import Spread, count, trainable
from dit4sr_pl.planning.meta_backbone import MetaBackbone

SD35 = "stabilityai/stable-diffusion-3.5-medium"
FULL = 350_877_696


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """tiny-sd3's configs without its weights, and three blocks of it."""
    folder = tmp_path_factory.mktemp("sd3")
    for config in (ASSETS / "tiny-sd3").rglob("*.json"):
        target = folder / config.relative_to(ASSETS / "tiny-sd3")
        target.parent.mkdir(exist_ok=True)
        shutil.copy(config, target)
    transformer = folder / "transformer" / "config.json"
    shorter = json.loads(transformer.read_text()) | {"num_layers": 3, "dual_attention_layers": [0, 1]}
    transformer.write_text(json.dumps(shorter))
    return folder


@pytest.fixture(scope="module")
def cfg(pipeline):
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return compose("plan", [f"model.backbone.name={pipeline}", "data.batch_size=8"])


@pytest.fixture(scope="module")
def budget(cfg, pipeline):
    return make_budget(cfg, pipeline)


@pytest.mark.parametrize(
    "network, trained, everything",
    [
        (DiT4SRTransformer, FULL, 2_594_049_216),
        # Without a gradient: the projection of keys that nothing reads, in 24 + 13 attentions.
        (partial(DiT4SRTransformer, variant=Variant(legacy_lr_keys=True)), FULL - 37 * 1537 * 1536, 2_594_049_216),
        (partial(SD3ControlNet, num_layers=12), None, 3_504_341_184),
    ],
)
def test_parameters_at_the_papers_size(network, trained, everything):
    net = MetaBackbone(ASSETS / "published" / SD35, "bfloat16").network(network)
    assert count(net.parameters()) == everything
    assert trained is None or count(trainable(net)) == trained
    assert all(parameter.is_meta for parameter in net.parameters())


def test_published_parts_have_their_published_sizes():
    backbone = MetaBackbone(ASSETS / "published" / SD35, "bfloat16")
    assert count(backbone.coder().vae.parameters()) == 83_819_683
    sizes = [count(encoder.parameters()) for encoder in backbone.text_encoders()]
    assert sizes == [123_650_304, 694_659_840, 4_762_310_656]
    assert backbone.text_tokens(t5_tokens=77) == 154


@pytest.mark.parametrize("name, source", [("tiny-sd3", "shipped"), (SD35, "published"), (None, "folder")])
def test_configs_are_found_without_a_download(name, source, pipeline, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert source in find_configs(name or str(pipeline))[1]


@pytest.mark.slow
def test_fsdp_shares_out_the_network_and_nothing_else(budget):
    whole, shared = (budget.per_gpu(Spread(4, sharded, images=8)) for sharded in (False, True))
    for part in ("frozen transformer", "trained weights", "gradients", "optimizer's moments"):
        assert shared[part] == whole[part] // 4
    for part in ("table of positions", "autoencoder", "text encoders", "running average"):
        assert shared[part] == whole[part] > 0
    assert whole["gathered blocks"] == 0 < shared["gathered blocks"] < 2 * whole["frozen transformer"]


@pytest.mark.slow
def test_adamw_keeps_two_numbers_for_each_trained_one(budget):
    parts = budget.per_gpu(Spread(1, False, images=8))
    assert parts["optimizer's moments"] == pytest.approx(2 * parts["gradients"], rel=0.001)
    assert parts["gradients"] == parts["trained weights"]


@pytest.mark.slow
def test_what_fits_grows_with_the_memory(budget):
    spread = Spread(1, False, images=8)
    fixed = sum(budget.per_gpu(spread).values())
    assert budget.fitting(spread, fixed) is None
    assert budget.fitting(spread, fixed + budget.activations(1, True)) == (1, True)
    assert budget.fitting(spread, fixed + budget.activations(8, True)) == (8, True)
    assert budget.fitting(spread, fixed + budget.activations(8, False)) == (8, False)
    assert budget.fitting(Spread(1, False, images=3), float("inf")) == (3, False)


def test_activations_lie_on_the_line_through_counted_steps(budget):
    for switch in (False, True):
        assert budget.activations(8, switch) == budget.cost(switch, 8).activations
        assert budget.activations(1, switch) < budget.activations(4, switch) < budget.activations(8, switch)


@pytest.mark.parametrize("experiment", ["paper", "paper_r1", "sd3_controlnet"])
def test_experiments_have_the_papers_global_batch(experiment):
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        cfg = compose("plan", [f"experiment={experiment}"])
    assert images_per_step(cfg) == 64
    assert cfg.optimizer.lr == 5e-5 and cfg.trainer.gradient_clip_val == 1.0
    assert "checkpoint" in cfg.callbacks and "ema" not in cfg.callbacks  # neither paper nor release averages weights
    assert ("variant" in cfg.model.network) == (experiment != "sd3_controlnet")
    if experiment != "sd3_controlnet":
        assert cfg.model.network.variant.legacy_lr_keys == (experiment == "paper")


def test_variant_a_has_keys_of_its_own_in_the_papers_experiment():
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        cfg = compose("plan", ["experiment=paper", "+ablation=no_lr_integration"])
    instantiate(cfg.model.network.variant)  # with legacy_lr_keys it would be refused


def test_the_command_prints_what_fits(pipeline, budget, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dit4sr_pl.plan.make_budget", lambda cfg, folder: budget)
    monkeypatch.setattr(
        "sys.argv", ["plan", f"model.backbone.name={pipeline}", "data.batch_size=8", "plan.restoring=null"]
    )
    main()
    printed = capsys.readouterr().out
    assert "| fits 24 GB" in printed and "yes" in printed
    assert not list(tmp_path.iterdir())
