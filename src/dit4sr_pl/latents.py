"""Images to latents and back: SD3's `AutoencoderKL`, and tiny-sd3's `AutoencoderDC`, which has no posterior."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, AutoencoderKL
from torch import Tensor


class LatentCoder:
    """Frozen autoencoder with SD3's scaling `(z - shift) * scale`.

    Args:
        vae: diffusers' autoencoder, 8x down.
    """

    def __init__(self, vae: AutoencoderKL | AutoencoderDC):
        self.vae = vae.requires_grad_(False).eval()
        self.scale = vae.config.scaling_factor
        self.shift = vae.config.get("shift_factor") or 0.0

    @property
    def factor(self) -> int:
        """Pixels per latent along one side."""
        if isinstance(self.vae, AutoencoderDC):
            return self.vae.spatial_compression_ratio
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @contextmanager
    def tiles(self, side: int) -> Iterator[None]:
        """Inside, images go through one by one, and in overlapping tiles where they are larger than `side` latents.

        The tiles and their blending are diffusers' own; they overlap by a quarter. `side` is a multiple of 4.
        """
        tile, stride = side * self.factor, side * self.factor * 3 // 4
        if isinstance(self.vae, AutoencoderDC):
            self.vae.enable_tiling(tile, tile, stride, stride)
        else:
            self.vae.tile_sample_min_size, self.vae.tile_latent_min_size = tile, side
            self.vae.enable_tiling()
        self.vae.enable_slicing()
        try:
            yield
        finally:
            self.vae.disable_tiling()
            self.vae.disable_slicing()

    @torch.no_grad()
    def encode(self, images: Tensor, generators: list[torch.Generator] | None = None) -> Tensor:
        """`(B, 3, H, W)` in 0..1 to scaled latents `(B, C, H/8, W/8)`, float32.

        With one CPU generator per image a sample of the posterior (HR), without the posterior's mode (LR).
        """
        encoded = self.vae.encode(images.mul(2).sub_(1).to(self.vae.dtype))
        if isinstance(self.vae, AutoencoderDC):
            latents = encoded.latent.float()
        else:
            posterior = encoded.latent_dist
            latents = posterior.mode().float()
            if generators is not None:
                latents = latents + posterior.std.float() * draw_noise(latents, generators)
        return (latents - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents to images `(B, 3, H, W)` in 0..1, float32, clamped."""
        images = self.vae.decode((latents / self.scale + self.shift).to(self.vae.dtype)).sample.float()
        return images.div_(2).add_(0.5).clamp_(0, 1)


def draw_noise(like: Tensor, generators: list[torch.Generator]) -> Tensor:
    """Standard normal noise, one CPU generator per image: the same on every device and in every batch."""
    noise = [torch.randn(like.shape[1:], generator=generator) for generator in generators]
    return torch.stack(noise).to(like.device)


def enlarge(lr: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic enlargement `(B, 3, h, w)` to `(B, 3, *size)`, as Pillow's (a = -0.5), clamped to 0..1."""
    return F.interpolate(lr, size=size, mode="bicubic", antialias=True).clamp_(0, 1)
