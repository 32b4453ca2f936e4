import pyiqa
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from dit4sr_pl.config import conf_folder
from dit4sr_pl.metrics import SHIPPED_WEIGHTS, ImageScore, create


@pytest.fixture(scope="module")
def pairs():
    torch.manual_seed(0)
    hr = torch.rand(5, 3, 64, 64)
    return (hr + 0.1 * torch.randn_like(hr)).clamp(0, 1), hr


def metric(name: str) -> ImageScore:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return instantiate(compose("train", [f"metrics=[{name}]"]).metrics)[name]


@pytest.mark.parametrize("name", ["psnr", "ssim", "stlpips"])
def test_equals_pyiqa_image_by_image_in_uneven_batches(name, pairs):
    score, sr, hr = metric(name), *pairs
    for part in (slice(0, 3), slice(3, 5)):
        score.update(sr[part], hr[part])
    luma = {"test_y_channel": True, "color_space": "ycbcr"}
    weights = {"pretrained_model_path": SHIPPED_WEIGHTS.get(name)}
    oracle = pyiqa.create_metric(name, device="cpu", **(weights if name == "stlpips" else luma))
    expected = torch.stack([oracle(sr[i : i + 1], hr[i : i + 1]).squeeze() for i in range(5)]).mean()
    torch.testing.assert_close(score.compute(), expected.float(), atol=1e-6, rtol=1e-6)


def test_psnr_is_of_luma(pairs):
    """Written out: Y of ITU-R BT.601 in 16..235, as StableSR and SeeSR score."""
    sr, hr = ((images * torch.tensor([65.481, 128.553, 24.966]).view(1, 3, 1, 1)).sum(1) / 255 for images in pairs)
    expected = (-10 * (sr - hr).square().mean(dim=(1, 2)).log10()).mean()
    score = metric("psnr")
    score.update(*pairs)
    torch.testing.assert_close(score.compute(), expected, atol=0.05, rtol=0)


def test_stlpips_has_the_trained_weights():
    trained = torch.load(SHIPPED_WEIGHTS["stlpips"], weights_only=True, map_location="cpu")
    loaded = create("stlpips").net.state_dict()
    assert trained and all(torch.equal(loaded[name], weight) for name, weight in trained.items())
