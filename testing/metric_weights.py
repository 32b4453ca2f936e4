"""Weight files of metrics, made at random and named as the metrics' own, and the networks that they come from."""

import warnings
from pathlib import Path

import pytest
import timm
import torch
from pyiqa.archs import inception, liqe_arch
from pyiqa.archs.clip_model import CLIP, load
from pyiqa.archs.clipiqa_arch import CLIPIQA
from pyiqa.archs.fid_arch import FID
from pyiqa.archs.liqe_arch import LIQE
from pyiqa.archs.maniqa_arch import MANIQA
from pyiqa.archs.musiq_arch import MUSIQ

CLIPS = {  # arguments of CLIP, in their order
    "small": (64, 64, 2, 64, 32, 77, 49408, 64, 1, 2),
    "ViT-B-32.pt": (512, 224, 12, 768, 32, 77, 49408, 512, 8, 12),
    "ViT-L-14.pt": (768, 224, 24, 1024, 14, 77, 49408, 768, 12, 12),
}


class Holder(torch.nn.Module):
    """Weights by dotted names, for TorchScript, in which CLIP's files are."""

    def __init__(self, state: dict[str, torch.Tensor]):
        super().__init__()
        for name in {name.split(".")[0] for name in state}:
            below = {
                key.removeprefix(f"{name}."): weight for key, weight in state.items() if key.startswith(f"{name}.")
            }
            self.add_module(name, Holder(below)) if below else self.register_buffer(name, state[name])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class MetricWeights:
    """Random weights in files named as the metrics' own, and the networks that they come from."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.monkeypatch = folder, monkeypatch
        torch.manual_seed(0)

    def clip(self, size: str, name: str) -> str:
        net = CLIP(*CLIPS[size])
        net.initialize_parameters()
        path = str(self.folder / name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            torch.jit.script(Holder(net.state_dict())).save(path)
        return path

    def musiq(self) -> torch.nn.Module:
        net = MUSIQ(pretrained=False).eval()
        torch.save(net.state_dict(), self.folder / "musiq_koniq_ckpt-e95806b9.pth")
        return net

    def maniqa(self, **arguments) -> torch.nn.Module:
        with self.monkeypatch.context() as without_hub:
            create_model = timm.create_model
            without_hub.setattr(timm, "create_model", lambda name, pretrained: create_model(name, pretrained=False))
            net = MANIQA(pretrained=False, **arguments).eval()
        torch.save(net.state_dict(), self.folder / "MANIQA_PIPAL-ae6d356b.pth")
        return net

    def clipiqa(self, size: str) -> torch.nn.Module:
        path = self.clip(size, "ViT-L-14.pt")
        net = CLIPIQA("clipiqa+_vitL14_512", path, pretrained=False, pos_embedding=True).eval()
        torch.nn.init.normal_(net.prompt_learner.ctx, std=0.1)
        torch.save({"params": net.state_dict()}, self.folder / "CLIPIQA+_ViTL14_512-e66488f2.pth")
        return net

    def fid(self) -> torch.nn.Module:
        """Returns pyiqa's FID; its file holds Inception's own layers, in front of which pyiqa puts its blocks."""
        path = self.folder / "pt_inception-2015-12-05-6726825d.pth"
        with self.monkeypatch.context() as without_hub, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            without_hub.setattr(inception, "load_pretrained_network", lambda net, url: keep_scale(net, path))
            return FID().eval()

    def liqe(self, size: str) -> torch.nn.Module:
        path = self.clip(size, "ViT-B-32.pt")
        with self.monkeypatch.context() as small:
            small.setattr(liqe_arch, "load", lambda name, device: load(path, device))
            small.setattr(liqe_arch, "DEFAULT_CACHE_DIR", str(self.folder))
            net = LIQE(pretrained=False).eval()
        for weight in (net.clip_model.visual.proj, net.clip_model.text_projection):  # trained: CLIP's no more
            torch.nn.init.normal_(weight, std=0.1)
        torch.save({"params": net.state_dict()}, self.folder / "liqe_koniq.pt")
        net.text_features = net.get_text_features(net.joint_texts)
        return net


def keep_scale(net: torch.nn.Module, path: Path) -> None:
    """Makes weights with which features stay as large as the images, and saves them."""
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.save(net.state_dict(), path)
