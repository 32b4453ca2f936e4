"""This project's own networks: DiT4SR, its variants, and the SD3-ControlNet baseline."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from functools import cached_property

import torch
from omegaconf import OmegaConf
from torch import Tensor

from dit4sr_pl.backbone import Backbone
from dit4sr_pl.benchmark_sets import SCALE
from dit4sr_pl.config import conf_folder
from dit4sr_pl.latents import enlarge
from dit4sr_pl.methods import Photo
from dit4sr_pl.model import Variant, load_part
from dit4sr_pl.restorer import Restorer, checkpoint_file
from dit4sr_pl.results import file_hash
from dit4sr_pl.sampling import Sampler


class DiT4SR:
    """A trained part over its frozen backbone, read when the first image comes.

    Args:
        label: by the network that the checkpoint holds. checkpoint: as of `Restorer.load`.
        backbone, sampler, seed, device: as for `restore`.
    """

    def __init__(
        self, label: dict[str, str], checkpoint: str, backbone: Backbone, sampler: Sampler, seed: int, device: str
    ):
        self.given, self.backbone, self.sampler, self.seed, self.device = checkpoint, backbone, sampler, seed, device
        path = checkpoint_file(checkpoint)
        settings = load_part(path).settings
        self.label = label[settings["network"]]
        self.variant = ablation(Variant(**settings["variant"])) if "variant" in settings else ""
        self.checkpoint = file_hash(path)
        base = {"name": backbone.name, "dtype": str(backbone.dtype), "t5_tokens": backbone.t5_tokens}
        self.settings = {"checkpoint": self.checkpoint, "base": base, "sampler": asdict(sampler), "seed": seed}

    @cached_property
    def restorer(self) -> Restorer:
        return Restorer.load(self.backbone, self.sampler, self.given, torch.device(self.device))

    def __call__(self, photos: Iterable[Photo]) -> Iterator[tuple[str, Tensor]]:
        for photo in photos:
            exact = tuple(SCALE * length for length in photo.lr.shape[-2:])
            floored = tuple(length // 8 * 8 for length in exact)
            enlarged = enlarge(photo.lr.to(self.device), exact)
            sr = self.restorer(enlarged, floored, [photo.caption], [photo.name], self.seed)
            yield photo.name, enlarge(sr, exact)[0]


def ablation(variant: Variant) -> str:
    """A variant's name in `conf/ablation/`, by its three switches; empty if none has these."""

    def switches(variant: Variant) -> dict:
        same = replace(variant, injection_scale=1.0, legacy_lr_keys=False)
        return same.as_dict()

    for path in sorted((conf_folder() / "ablation").glob("*.yaml")):
        options = OmegaConf.select(OmegaConf.load(path), "model.network.variant") or {}
        if switches(Variant(**options)) == switches(variant):
            return path.stem
    return ""
