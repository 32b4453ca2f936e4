"""Images to latents and back: SD3's `AutoencoderKL`, or tiny-sd3's `AutoencoderDC`, which has no posterior."""

from collections.abc import Callable, Iterator, Sequence

import torch
from diffusers import AutoencoderDC, AutoencoderKL
from torch import Tensor

from dit4sr_pl.common.precision import without_autocast
from dit4sr_pl.images.resize import LazyEnlargement


class LatentCoder:
    """Frozen autoencoder with SD3's scaling `(z - shift) * scale`; it computes in its weights' dtype, not autocast's.

    Args:
        vae: diffusers' autoencoder.
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

    @property
    def has_posterior(self) -> bool:
        """Whether latents can be sampled; an `AutoencoderDC` has one latent per image."""
        return not isinstance(self.vae, AutoencoderDC)

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """Returns the shape of one latent, `(C, h, w)`, from height and width of its image."""
        return self.vae.config.latent_channels, size[0] // self.factor, size[1] // self.factor

    def posterior_noise(self, images: Tensor, generators: list[torch.Generator]) -> Tensor | None:
        """Returns what `encode` samples the posterior of images with, one CPU generator per image; None: there is no
        posterior.
        """
        if not self.has_posterior:
            return None
        return draw_noise(self.latent_shape(tuple(images.shape[-2:])), generators).to(images.device)

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Returns scaled latents `(B, C, H/8, W/8)`, float32.

        Args:
            images: `(B, 3, H, W)` in 0..1.
            noise: standard normal, of the latents' shape: a sample of the posterior is taken (HR); None: the
                posterior's mode (LR).
        """
        with without_autocast(images.device):
            encoded = self.vae.encode(images.mul(2).sub_(1).to(self.vae.dtype))
        if not self.has_posterior:
            latents = encoded.latent.float()
        else:
            posterior = encoded.latent_dist
            latents = posterior.mode().float()
            if noise is not None:
                latents = latents + posterior.std.float() * noise
        return (latents - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Returns images `(B, 3, H, W)` in 0..1, float32, clamped, from latents `(B, C, H/8, W/8)` as `encode` scales
        them.
        """
        return to_images(self.decoder_output(latents))

    def encode_tiled(self, images: Tensor | LazyEnlargement, side: int) -> Tensor:
        """Encodes images `(B, 3, H, W)`, in tiles if they are larger than `side` latents, a multiple of 4."""
        encode = lambda *window: self.encode(images[..., *window])  # noqa: E731
        return torch.cat(list(self._bands(encode, images.shape[-2:], side * self.factor, side)), dim=2)

    @torch.no_grad()
    def decode_tiled(self, latents: Tensor, side: int) -> Iterator[Tensor]:
        """Decodes latents `(B, C, h, w)` in tiles; yields the images from top to bottom in bands `(B, 3, n, W)`."""
        decode = lambda *window: self.decoder_output(latents[..., *window])  # noqa: E731
        yield from map(to_images, self._bands(decode, latents.shape[-2:], side, side * self.factor))

    def decoder_output(self, latents: Tensor) -> Tensor:
        """Returns what the autoencoder decodes: images in -1..1, not clamped, through which gradients pass."""
        with without_autocast(latents.device):
            return self.vae.decode((latents / self.scale + self.shift).to(self.vae.dtype)).sample

    def _bands(self, code: Callable[..., Tensor], size: tuple[int, int], side: int, coded: int) -> Iterator[Tensor]:
        """Codes in tiles with the blending of diffusers' `tiled_encode` and `tiled_decode`.

        diffusers keeps all tiles until the end; this keeps two rows of them.

        Args:
            code: function from rows and columns of the input to that tile's result.
            size: height and width of the input.
            side: side of a tile before coding; neighbours overlap by a quarter.
            coded: side of a tile after coding.
        """
        if max(size) <= side:
            yield code(slice(0, size[0]), slice(0, size[1]))
            return
        step, kept, overlap, above = side * 3 // 4, coded * 3 // 4, coded // 4, None
        for top in range(0, size[0], step):
            row = [code(slice(top, top + side), slice(left, left + side)) for left in range(0, size[1], step)]
            for place, tile in enumerate(row):
                if above is not None:
                    blend(above[place], tile, overlap, dim=2)
                if place > 0:
                    blend(row[place - 1], tile, overlap, dim=3)
            yield torch.cat([tile[..., :kept, :kept] for tile in row], dim=3)
            above = row


def blend(before: Tensor, after: Tensor, overlap: int, dim: int) -> None:
    """Fades the end of a tile into the beginning of the next one along a dimension, in place."""
    overlap = min(overlap, before.shape[dim], after.shape[dim])
    end, begin = before.narrow(dim, before.shape[dim] - overlap, overlap), after.narrow(dim, 0, overlap)
    share = torch.arange(overlap, dtype=after.dtype, device=after.device) / overlap
    begin.copy_(torch.lerp(end, begin, share.unsqueeze(1) if dim == 2 else share))


def draw_noise(shape: Sequence[int], generators: list[torch.Generator]) -> Tensor:
    """Returns standard normal noise `(B, *shape)` on the CPU, one CPU generator per image: the same for every device
    and in every batch.
    """
    return torch.stack([torch.randn(*shape, generator=generator) for generator in generators])


def to_images(decoded: Tensor) -> Tensor:
    """Returns images in 0..1, float32, from the autoencoder's -1..1; works in place if it can."""
    return decoded.float().div_(2).add_(0.5).clamp_(0, 1)
