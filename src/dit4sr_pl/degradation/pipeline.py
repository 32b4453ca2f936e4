"""Real-ESRGAN's second-order degradation (Wang et al. 2021, Figure 2), drawn per image.

hr = sharpen(image)
first    blur -> resize -> noise -> JPEG
second   blur -> resize -> noise
final    resize to the LR size -> sinc -> JPEG,  or  JPEG -> resize to the LR size -> sinc
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dit4sr_pl.degradation import ops
from dit4sr_pl.degradation.draws import Dice, DrawnDegradation, DrawnNoise, DrawnStage
from dit4sr_pl.degradation.jpeg import jpeg
from dit4sr_pl.degradation.settings import Final, Sharpen, Stage, read_settings

Step = tuple[str, Callable[[Tensor], Tensor]]  # with its name


class Degradation:
    """Makes low-resolution images of photos. Random values are drawn first, apart from the images.

    Args:
        scale: how many times smaller the LR image is.
        sharpen: settings of the unsharp masking of the target (`Sharpen`); None: no masking.
        first: settings of the first pass (`Stage`); its resize factor is relative to the HR size.
        second: settings of the second pass (`Stage`); its resize factor is relative to the LR size.
        final: settings of the last resize, sinc filter and JPEG (`Final`).

    Raises:
        ValueError: a setting is missing, unknown or out of its range.
    """

    def __init__(
        self,
        scale: int,
        sharpen: Mapping[str, Any] | None,
        first: Mapping[str, Any],
        second: Mapping[str, Any],
        final: Mapping[str, Any],
    ):
        self.scale = scale
        self.sharpen = read_settings(Sharpen, sharpen, "degradation.sharpen") if sharpen is not None else None
        self.first = read_settings(Stage, first, "degradation.first")
        self.second = read_settings(Stage, second, "degradation.second")
        self.final = read_settings(Final, final, "degradation.final")

    def draw(self, seeds: Sequence[int], size: tuple[int, int]) -> DrawnDegradation:
        """Draws the values of one image per seed; an image's values depend on its own seed alone.

        Args:
            seeds: one per image.
            size: height and width of the HR images, pixels.

        Raises:
            ValueError: there are no seeds, or images of this size cannot be degraded.
        """
        if not seeds:
            raise ValueError("degradation: no seeds to draw with; give one per image")
        self._check_size(size)
        dice = Dice(seeds)
        return DrawnDegradation(self.first.draw(dice), self.second.draw(dice), self.final.draw(dice))

    @torch.no_grad()
    def __call__(self, images: Tensor, params: DrawnDegradation) -> tuple[Tensor, Tensor]:
        """Degrades images on their own device; the same arguments give the same result.

        Args:
            images: `(B, 3, H, W)` in 0..1.
            params: what `draw` returned for them.

        Returns:
            LR images `(B, 3, H/scale, W/scale)`, multiples of 1/255 in 0..1, and their targets `(B, 3, H, W)` in 0..1;
            both are float32.

        Raises:
            ValueError: `params` were drawn for another number of images, or the size cannot be degraded.
        """
        if len(params) != len(images):
            raise ValueError(f"degradation: {len(images)} images, but parameters of {len(params)}; draw one per image")
        self._check_size(tuple(images.shape[-2:]))
        kernels = self._kernels(params, images.device)
        # Training runs in bfloat16, whose steps near 1 are coarser than those of an 8-bit image.
        with torch.autocast(images.device.type, enabled=False):
            pairs = [
                self._degrade(image, *kernels_of_image, params[i])
                for i, (image, *kernels_of_image) in enumerate(zip(images.float().split(1), *kernels, strict=True))
            ]
        lr, hr = zip(*pairs, strict=True)
        return torch.cat(lr), torch.cat(hr)

    @torch.no_grad()
    def stages(self, image: Tensor, params: DrawnDegradation) -> Iterator[tuple[str, Tensor]]:
        """Yields name and image after every step that was drawn for one image, from its target `hr` to `lr`.

        Sizes and ranges are those between the steps.

        Args:
            image: `(1, 3, H, W)` in 0..1.
            params: what `draw` returned for it.

        Raises:
            ValueError: `params` were drawn for several images, or the size cannot be degraded.
        """
        if len(params) != len(image) or len(image) != 1:
            raise ValueError(f"degradation: stages are of one image, not of {len(image)} with {len(params)} draws")
        self._check_size(tuple(image.shape[-2:]))
        image = self._target(image.float())
        yield "hr", image
        for name, step in self._steps(*self._kernels(params, image.device), params[0], tuple(image.shape[-2:])):
            image = step(image)
            yield name, image

    def _kernels(self, params: DrawnDegradation, device: torch.device) -> list[Tensor]:
        """Returns the kernels of the first blur, the second blur and the sinc filter, each `(B, K, K)`."""
        filters = (
            (params.first.blur, self.first.blur.size),
            (params.second.blur, self.second.blur.size),
            (params.final.sinc, self.final.sinc.size),
        )
        return [drawn.kernels(size.high).to(device, torch.float32) for drawn, size in filters]

    def _degrade(
        self, image: Tensor, first_kernel: Tensor, second_kernel: Tensor, sinc_kernel: Tensor, drawn: DrawnDegradation
    ) -> tuple[Tensor, Tensor]:
        """Returns the LR image and the target of one image `(1, 3, H, W)`."""
        lr = hr = self._target(image)
        for _, step in self._steps(first_kernel, second_kernel, sinc_kernel, drawn, tuple(image.shape[-2:])):
            lr = step(lr)
        return lr, hr

    def _target(self, image: Tensor) -> Tensor:
        return image if self.sharpen is None else self.sharpen.apply(image)

    def _steps(
        self,
        first_kernel: Tensor,
        second_kernel: Tensor,
        sinc_kernel: Tensor,
        drawn: DrawnDegradation,
        size: tuple[int, int],
    ) -> Iterator[Step]:
        """Yields the steps from the target of this size to its LR image."""
        lr_size = (size[0] // self.scale, size[1] // self.scale)
        yield from _blur_resize_noise("first", first_kernel, drawn.first, size)
        yield "first JPEG", partial(jpeg, quality=float(drawn.first.quality))
        yield from _blur_resize_noise("second", second_kernel, drawn.second, lr_size)

        second_jpeg = ("second JPEG", partial(jpeg, quality=float(drawn.second.quality)))
        if drawn.final.jpeg_first:
            yield second_jpeg
        yield "final resize", partial(ops.resize, size=lr_size, mode=int(drawn.final.mode))
        if drawn.final.sinc.on:
            yield "final sinc", partial(ops.blur, kernel=sinc_kernel)
        if not drawn.final.jpeg_first:
            yield second_jpeg
        yield "lr", ops.to_8_bits

    def _check_size(self, size: tuple[int, int]) -> None:
        """Checks that the kernels' reflected borders fit: reflection needs more pixels than it adds."""
        if any(side % self.scale for side in size):
            raise ValueError(f"degradation: {size[0]}x{size[1]} images are not multiples of the scale {self.scale}")
        second_pass = (self.second.blur.size.high // 2 + 1) / self.first.resize.factor.low
        sinc = (self.final.sinc.size.high // 2 + 1) * self.scale
        sharpen = self.sharpen.kernel_size // 2 + 1 if self.sharpen else 1
        smallest = max(second_pass, sinc, sharpen, self.first.blur.size.high // 2 + 1)
        if min(size) < smallest:
            raise ValueError(
                f"degradation: {size[0]}x{size[1]} images are too small for its kernels and resizes; "
                f"give at least {math.ceil(smallest)} pixels a side"
            )


def _blur_resize_noise(stage: str, kernel: Tensor, drawn: DrawnStage, base: tuple[int, int]) -> Iterator[Step]:
    """Yields the steps that both passes share; the drawn factor is relative to the size `base`."""
    if drawn.blur.on:
        yield f"{stage} blur", partial(ops.blur, kernel=kernel)
    factor = float(drawn.resize.factor)
    size = (max(1, int(base[0] * factor)), max(1, int(base[1] * factor)))
    yield f"{stage} resize", partial(ops.resize, size=size, mode=int(drawn.resize.mode))
    yield f"{stage} noise", partial(_add_noise, drawn=drawn.noise)


def _add_noise(image: Tensor, drawn: DrawnNoise) -> Tensor:
    if drawn.poisson:
        return ops.add_poisson_noise(image, float(drawn.poisson_scale), bool(drawn.grey), int(drawn.seed))
    return ops.add_gaussian_noise(image, float(drawn.sigma), bool(drawn.grey), int(drawn.seed))
