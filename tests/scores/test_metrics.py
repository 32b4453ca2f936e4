"""Scores against pyiqa's own networks called by hand. Nothing may be downloaded: weights are made here, at random."""

import copy
import functools
import os
import re
import shutil
import socket
import sys
from importlib.resources import files
from pathlib import Path
from urllib.parse import unquote

import pyiqa
import pytest
import scipy.io
import timm
import torch
import torchvision
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from pyiqa.archs import clip_model, clipiqa_arch, dists_arch, liqe_arch, lpips_arch, maniqa_arch, musiq_arch, niqe_arch
from pyiqa.archs.dists_arch import DISTS
from pyiqa.archs.niqe_arch import NIQE
from pyiqa.utils.registry import ARCH_REGISTRY

from dit4sr_pl.cli.command import conf_folder
from dit4sr_pl.common.precision import exact_float32
from dit4sr_pl.common.randomness import generator
from dit4sr_pl.data.datasets import pad_to
from dit4sr_pl.data.demo_photos import TEST, TRAIN, write_demo_photos
from dit4sr_pl.images.files import read_image
from dit4sr_pl.images.resize import enlarge
from dit4sr_pl.scores.metrics import ImageScore
from dit4sr_pl.scores.pyiqa_loading import SHIPPED_WEIGHTS, create
from dit4sr_pl.scores.weight_files import check_digest, check_metrics
from testing import two_scores
from testing.metric_weights import MetricWeights

OURS = ("psnr", "ssim", "stlpips")
PAPER = ["psnr", "ssim", "lpips", "musiq", "maniqa", "clipiqa", "liqe"]
MORE = ["stlpips", "dists", "niqe"]
TRAINED_LPIPS = str(files("torchmetrics") / "functional" / "image" / "lpips_models" / "alex.pth")
complete = pytest.mark.skipif("COMPLETE" not in os.environ, reason="minutes and gigabytes; COMPLETE=1 runs it")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(self, address):
        raise AssertionError(f"a connection to {address} was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """20 crops `(20, 3, 96, 96)` of the demo's photos: enlarged from a quarter of their size, and as they are."""
    folder = tmp_path_factory.mktemp("demo")
    write_demo_photos(folder)
    photos = [folder / part / f"{name}.png" for part, names in (("train", TRAIN), ("test", TEST)) for name in names]
    crops = [pad_to(read_image(photo), 200, 200)[:, :200, :200] for photo in photos]
    hr = torch.stack([crop[:, y : y + 96, y : y + 96] for y in (0, 100) for crop in crops])[:20] / 255
    lr = torch.nn.functional.interpolate(hr, scale_factor=0.25, mode="bicubic", antialias=True).clamp(0, 1)
    return enlarge(lr, (96, 96)).clamp(0, 1), hr


@functools.cache
def configs(*overrides: str):
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return compose("train", [f"metrics=[{','.join([*PAPER, *MORE])}]", *overrides]).metrics


def config(name: str, *overrides: str):
    return copy.deepcopy(configs(*overrides)[name])


def metric(name: str, *overrides: str) -> ImageScore:
    return instantiate(config(name, *overrides))


def oracle(name: str, pairs) -> torch.Tensor:
    """pyiqa, image by image."""
    weights, luma = {"pretrained_model_path": SHIPPED_WEIGHTS.get(name)}, {"test_y_channel": True}
    arguments = weights if name == "stlpips" else luma | {"color_space": "ycbcr"}
    score = pyiqa.create_metric(name, device="cpu", **arguments)
    return torch.stack([score(sr[None], hr[None]).squeeze() for sr, hr in zip(*pairs, strict=True)])


@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("batch", [1, 8])
def test_equals_pyiqa_image_by_image(name, batch, pairs):
    score, expected = metric(name), oracle(name, pairs).float()
    parts = list(zip(*(images.split(batch) for images in pairs), strict=True))
    torch.testing.assert_close(torch.cat([score.each(*part) for part in parts]), expected, atol=1e-6, rtol=1e-6)
    for part in parts:
        score.update(*part)
    torch.testing.assert_close(score.compute(), expected.double().mean().float(), atol=1e-6, rtol=1e-6)


@pytest.mark.slow
def test_two_processes_give_the_mean_of_one(pairs, monkeypatch):
    """12 images in batches of 8 in the one, 8 in batches of 3 in the other."""
    monkeypatch.undo()  # they talk to each other
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = torch.zeros(2).share_memory_()
    torch.multiprocessing.spawn(two_scores.mean_of_two, (port, pairs, results), nprocs=2)
    expected = oracle("psnr", pairs).double().mean().float()
    torch.testing.assert_close(results, expected.repeat(2), atol=1e-6, rtol=1e-6)


def test_psnr_is_of_luma(pairs):
    """Written out: Y of ITU-R BT.601 in 16..235, as StableSR and SeeSR score."""
    sr, hr = ((images * torch.tensor([65.481, 128.553, 24.966]).view(1, 3, 1, 1)).sum(1) / 255 for images in pairs)
    expected = (-10 * ((sr - hr).square().mean(dim=(1, 2)) + 1e-8).log10()).mean()  # 1e-8 is pyiqa's
    score = metric("psnr")
    score.update(*pairs)
    torch.testing.assert_close(score.compute(), expected, atol=1e-3, rtol=0)


def test_stlpips_has_the_trained_weights():
    trained = torch.load(SHIPPED_WEIGHTS["stlpips"], weights_only=True, map_location="cpu")
    loaded = create("stlpips").net.state_dict()
    assert trained and all(torch.equal(loaded[name], weight) for name, weight in trained.items())


class Making(MetricWeights):
    """Random weights, and scores from them."""

    def score(self, name: str, **arguments) -> ImageScore:
        """Ours, from these files, whose hashes are not the ones known."""
        cfg = config(name, f"metric_weights.folder={self.folder}")
        for file in cfg.weights.files:
            file.sha256 = None
        return instantiate(cfg, **arguments)


@pytest.fixture
def making(tmp_path, monkeypatch) -> Making:
    return Making(tmp_path, monkeypatch)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 240, 256, generator=generator("cpu", 0))


@torch.no_grad()
def assert_equals(score: ImageScore, net: torch.nn.Module, images: torch.Tensor) -> None:
    scores = score.each(images, None)
    assert scores.shape == (len(images),) and scores.dtype == torch.float32
    assert len(scores.unique()) == len(images)  # random weights, but no constant
    torch.testing.assert_close(scores, net(images).flatten().float(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(scores[1:2], score.each(images[1:2], None), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_lpips_is_the_weighted_distance_of_normalised_features(making, pairs):
    """Written out over torchvision's AlexNet; the weights of the distances are the trained ones."""
    trunk = torchvision.models.alexnet(weights=None)
    torch.save(trunk.state_dict(), making.folder / "alexnet-owt-7be5be79.pth")
    shutil.copy(TRAINED_LPIPS, making.folder / "LPIPS_v0.1_alex-df73285e.pth")
    weights = list(torch.load(TRAINED_LPIPS, "cpu", weights_only=True).values())
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x, y = ((2 * images - 1 - shift.view(3, 1, 1)) / scale.view(3, 1, 1) for images in pairs)
    expected = torch.zeros(len(x))
    for i, layer in enumerate(trunk.features[:12]):
        x, y = layer(x), layer(y)
        if i in (1, 4, 7, 9, 11):
            difference = torch.nn.functional.normalize(x) - torch.nn.functional.normalize(y)
            expected += (difference.square() * weights.pop(0)).sum(1).mean((1, 2))
    torch.testing.assert_close(making.score("lpips").each(*pairs), expected, atol=1e-6, rtol=1e-5)


def test_hashes_in_the_file_names_are_their_sha256():
    """Shown for the one file of pyiqa's that another package ships too."""
    _, lpips = config("lpips").weights.files
    check_digest(Path(TRAINED_LPIPS), lpips.sha256)
    for name in PAPER:
        for file in config(name).get("weights", {}).get("files", []):
            digits = re.search(r"-([0-9a-f]{8})[.]pth$|/([0-9a-f]{64})/", file.url)
            assert file.sha256 == (digits and (digits[1] or digits[2]))


@pytest.mark.slow
def test_musiq_equals_pyiqa(making, images):
    net = making.musiq()
    assert_equals(making.score("musiq"), net, images)


SMALL_VIT = {"embed_dim": 48, "num_heads": 3, "depth": 10}
SMALL_MANIQA = {"embed_dim": 48, "dim_mlp": 48, "test_sample": 2}


@pytest.mark.slow
def test_maniqa_equals_pyiqa(making, images, monkeypatch):
    create_model = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: create_model(*args, **kwargs | SMALL_VIT))
    net = making.maniqa(**SMALL_MANIQA)
    assert_equals(making.score("maniqa", **SMALL_MANIQA), net, images)


@pytest.mark.filterwarnings("ignore:.*jit:FutureWarning")  # of the network called by hand
def test_clipiqa_equals_pyiqa(making, images):
    net = making.clipiqa("small")
    assert_equals(making.score("clipiqa"), net, images)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*jit:FutureWarning")
def test_liqe_equals_pyiqa(making, images):
    """pyiqa's cache of text features, which other weights may have left, is not read."""
    net = making.liqe("small")
    (making.folder / "liqe_text_feat.pt").write_bytes(b"another's")
    assert_equals(making.score("liqe"), net, images)


class SmallLinear(torch.nn.Linear):
    """A layer that stands for one of any size."""

    def __init__(self, *_):
        super().__init__(1, 1)


@pytest.mark.slow
def test_dists_equals_pyiqa(making, pairs, monkeypatch):
    """VGG-16's classifier, nine tenths of its weights, is left out."""
    make, images = torchvision.models.vgg16, tuple(part[:4] for part in pairs)
    monkeypatch.setattr(torchvision.models.vgg.nn, "Linear", SmallLinear)
    torch.save(make(weights=None).state_dict(), making.folder / "vgg16-397923af.pth")
    with monkeypatch.context() as without_hub:
        without_hub.setattr(torchvision.models, "vgg16", lambda weights: make(weights=None))
        net = DISTS(pretrained=False).eval()
    torch.nn.init.uniform_(net.alpha), torch.nn.init.uniform_(net.beta)
    torch.save(net.state_dict(), making.folder / "DISTS_weights-f5e65c96.pth")
    scores = making.score("dists").each(*images)
    torch.testing.assert_close(scores, net(*images).flatten().detach(), atol=1e-6, rtol=1e-6)
    assert scores.max() > 0.1 and len(scores.unique()) == len(scores)


@pytest.mark.slow
def test_niqe_equals_pyiqa(making, images):
    path, draws = making.folder / "niqe_modelparameters.mat", torch.rand(36, 36, generator=generator("cpu", 1)).double()
    scipy.io.savemat(path, {"mu_prisparam": draws[:1].numpy(), "cov_prisparam": (draws @ draws.T).numpy()})
    assert_equals(making.score("niqe"), NIQE(color_space="yiq", pretrained_model_path=str(path)), images)


@complete
@pytest.mark.filterwarnings("ignore:.*jit:FutureWarning")
@pytest.mark.parametrize("name, size", [("maniqa", None), ("clipiqa", "ViT-L-14.pt"), ("liqe", "ViT-B-32.pt")])
def test_networks_in_their_own_sizes_equal_pyiqa(name, size, making, images):
    net = getattr(making, name)(*[size] if size else [])
    assert_equals(making.score(name), net, images[:2])


@pytest.mark.filterwarnings("ignore:.*jit:FutureWarning")
def test_scores_are_float32_whatever_training_is_set_to(making, images):
    making.clipiqa("small")
    score = making.score("clipiqa")
    alone = score.each(images, None)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            assert torch.equal(score.each(images, None), alone)
        assert torch.get_float32_matmul_precision() == "medium"
        with exact_float32(torch.device("cpu")):
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cudnn.allow_tf32 and torch.backends.cudnn.enabled
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*jit:FutureWarning")
@pytest.mark.parametrize("name", ["clipiqa", "liqe"])
def test_all_weights_follow_to_another_device(name, making):
    """The device without memory stands for a GPU: pyiqa's input goes where its weights say, CLIP must be there too."""
    getattr(making, name)("small")
    score = making.score(name).to("meta")
    assert score.score.dummy_param.device.type == "meta"
    clip = score.score.net.clip_model
    parts = [score, clip[0] if isinstance(clip, list) else clip]
    assert all(weight.device.type == "meta" for part in parts for weight in part.parameters())


def test_metrics_know_what_they_need(images):
    with pytest.raises(ValueError, match="psnr needs ground truth; give reference=FOLDER or metrics=no_reference"):
        metric("psnr").each(images, None)
    theirs = {name: pyiqa.default_model_configs.DEFAULT_CONFIGS[config(name).name] for name in [*PAPER, *MORE]}
    for name, entry in theirs.items():
        assert config(name).reference == (entry["metric_mode"] == "FR")
        assert config(name).lower_is_better == entry.get("lower_better", False)


@pytest.mark.filterwarnings("ignore:.*jit:FutureWarning")
def test_liqe_refuses_images_smaller_than_its_crops(making, images):
    making.liqe("small")
    with pytest.raises(ValueError, match="liqe needs images of 224 pixels a side"):
        making.score("liqe").each(images[..., :200], None)
    with pytest.raises(ValueError, match="metrics=liqe needs images of 224 pixels a side, not 128"):
        check_metrics({"liqe": config("liqe")}, 128)


def test_sets_are_the_papers_columns():
    for chosen, names in (("paper", PAPER), ("no_reference", PAPER[3:])):
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            metrics = compose("train", [f"metrics={chosen}"]).metrics
        assert list(metrics) == names
    assert all(not metric.reference for metric in metrics.values())


NEEDED = [(name, file.url) for name in [*PAPER[2:], *MORE[1:]] for file in config(name).weights.files]


@pytest.mark.parametrize("name, url", NEEDED)
def test_every_file_is_one_that_pyiqa_or_torchvision_asks_for(name, url):
    asked = [str(torchvision.models.AlexNet_Weights.IMAGENET1K_V1.url), *clip_model._MODELS.values()]
    asked += [str(torchvision.models.VGG16_Weights.IMAGENET1K_V1.url)]
    asked += [
        url
        for module in (lpips_arch, musiq_arch, maniqa_arch, clipiqa_arch, liqe_arch, dists_arch, niqe_arch)
        for url in module.default_model_urls.values()
    ]
    assert url in asked


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPER[2:])
def test_missing_weights_stop_or_leave_the_scores_empty(name, tmp_path, images, caplog):
    first = tmp_path / unquote(NEEDED[[needed for needed, _ in NEEDED].index(name)][1].rsplit("/", 1)[1])
    cfg = config(name, f"metric_weights.folder={tmp_path}")
    with pytest.raises(FileNotFoundError, match=rf"prepare stage=metrics metrics=\[{name}\]") as error:
        check_metrics({name: cfg})
    assert str(first) in str(error.value)
    score = metric(name, f"metric_weights.folder={tmp_path}", "metric_weights.on_missing=skip")
    assert str(first) in caplog.text
    assert score.each(images, None).isnan().tolist() == [True] * 3
    with pytest.raises(ValueError, match="metric_weights.on_missing=never; choose one of stop, skip"):
        check_metrics({name: config(name, "metric_weights.on_missing=never")})


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "of another metric", "no weights"])
def test_damaged_weights_are_named_in_one_line(damage, making):
    path = making.folder / "musiq_koniq_ckpt-e95806b9.pth"
    if damage == "cut":
        torch.save({"cls": torch.rand(10**6)}, path)
        path.write_bytes(path.read_bytes()[: 10**6])
    else:
        torch.save({"cls": torch.rand(3)} if damage == "of another metric" else 3, path)
    with pytest.raises(InstantiationException) as error:
        making.score("musiq")
    message = str(error.value.__cause__)
    assert str(path) in message and "truncated or not what" in message and "\n" not in message
    with pytest.raises(ValueError, match="truncated or another file"):
        check_metrics({"musiq": config("musiq", f"metric_weights.folder={making.folder}")})


class Attack:
    def __reduce__(self):
        return os.mkdir, ("pickled code ran",)


def test_pickled_code_in_weights_does_not_run(making, monkeypatch):
    monkeypatch.chdir(making.folder)
    torch.save({"params": Attack()}, making.folder / "musiq_koniq_ckpt-e95806b9.pth")
    with pytest.raises(InstantiationException, match="truncated or not what musiq needs"):
        making.score("musiq")
    assert not Path("pickled code ran").exists()


def test_clip_without_pkg_resources_says_what_to_install(making, monkeypatch):
    making.clip("small", "ViT-L-14.pt")
    for module in [name for name in sys.modules if re.match(r"clip([.]|$)|pyiqa[.]archs[.]clip", name)]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "pkg_resources", None)
    monkeypatch.delitem(ARCH_REGISTRY._obj_map, "CLIPIQA")
    (making.folder / "CLIPIQA+_ViTL14_512-e66488f2.pth").touch()
    with pytest.raises(InstantiationException) as error:
        making.score("clipiqa")
    assert str(error.value.__cause__).endswith("CLIP needs pkg_resources; run pip install 'setuptools<81'")
