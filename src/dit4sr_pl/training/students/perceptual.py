"""Losses of decoded crops: an autoencoder's decoder and a perceptual network, both frozen."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dit4sr_pl.backbone.autoencoder import LatentCoder
from dit4sr_pl.common.precision import without_autocast
from dit4sr_pl.common.randomness import generator


class PerceptualLoss:
    """The distance between decoded crops, through which gradients pass; it is no submodule of a training module.

    Args:
        make: makes the perceptual network, a module from two batches of images in 0..1 to a scalar.
    """

    def __init__(self, make: Callable[[], nn.Module]):
        self.network = make().requires_grad_(False).eval()

    def to(self, device: torch.device) -> None:
        """Moves the network to a device."""
        self.network.to(device)

    def __call__(self, images: Tensor, reference: Tensor) -> Tensor:
        """Returns the mean distance of images `(B, 3, h, w)` in 0..1 from those of reference, in float32."""
        with without_autocast(images.device):
            return self.network(images, reference)

    def __deepcopy__(self, memo: dict) -> "PerceptualLoss":
        return self  # Lightning's weight averaging copies the module around it; frozen weights exist once


def crop_window(latent: tuple[int, int], side: int, *key: object) -> tuple[slice, slice]:
    """Returns rows and columns of a random square in latents, or of all of them if they are smaller.

    Args:
        latent: height and width of the latents.
        side: side of the square in latents.
        key: what the place depends on.
    """
    draws, window = generator("cpu", "crop", *key), []
    for length in latent:
        size = min(side, length)
        start = int(torch.randint(length - size + 1, (), generator=draws))
        window.append(slice(start, start + size))
    return window[0], window[1]


def decoded(coder: LatentCoder, latents: Tensor) -> Tensor:
    """Returns images `(B, 3, H, W)` in 0..1, float32, through which gradients pass."""
    return coder.decoder_output(latents).float().div(2).add(0.5).clamp(0, 1)
