"""JPEG (ITU-T T.81, baseline, 4:2:0) without its file: colour transform, DCT, quantisation and back.

Kornia's codec is made to be differentiated: it rounds softly and filters the chroma. With it the LR images move away
from the reference degradation's (the median spread of the chroma by half an interquartile range).
"""

import math

import torch
import torch.nn.functional as F
from kornia.color import rgb_to_ycbcr, ycbcr_to_rgb
from torch import Tensor

# T.81, tables K.1 and K.2, rows from low to high vertical frequencies.
LUMA = torch.tensor(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ]
)
CHROMA = torch.full((8, 8), 99)
CHROMA[:4, :4] = torch.tensor([[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]])


def jpeg(image: Tensor, quality: float) -> Tensor:
    """Compresses images.

    Args:
        image: `(B, 3, H, W)`, clamped to 0..1.
        quality: JPEG's quality, 1..100; fractions are allowed.

    Returns:
        The decompressed images, `(B, 3, H, W)` in 0..1.
    """
    height, width = image.shape[-2:]
    # The padding is black, as in the reference, whose edges lose colour by it; its statistics show that.
    padded = F.pad(image.clamp(0, 1), (0, -width % 16, 0, -height % 16))
    ycbcr = rgb_to_ycbcr(padded) * 255
    luma = _code(ycbcr[:, :1], quantisation_table(LUMA, quality), centre=128)
    # Kornia's neutral chroma is 0.5, not JPEG's 128/255; coded around 128, grey would come back tinted.
    chroma = _code(F.avg_pool2d(ycbcr[:, 1:], 2), quantisation_table(CHROMA, quality), centre=127.5)
    coded = torch.cat([luma, F.interpolate(chroma, scale_factor=2, mode="nearest")], dim=1)
    return ycbcr_to_rgb(coded / 255).clamp(0, 1)[..., :height, :width]


def quantisation_table(table: Tensor, quality: float) -> Tensor:
    """Returns the steps `(8, 8)` at `quality`, integers of 1..255, by libjpeg's scaling of T.81's tables."""
    percent = 5000 / quality if quality < 50 else 200 - 2 * quality
    return ((table * percent + 50) / 100).floor().clamp(1, 255)


def _code(planes: Tensor, steps: Tensor, centre: float) -> Tensor:
    """Quantises the DCT of the 8x8 blocks of planes `(B, C, H, W)` about `centre`; H and W are multiples of 8."""
    dct, steps = _dct_matrix().to(planes), steps.to(planes)
    batch, channels, height, width = planes.shape
    blocks = planes.view(batch, channels, height // 8, 8, width // 8, 8).transpose(3, 4) - centre
    coefficients = torch.round(dct @ blocks @ dct.T / steps) * steps
    return (dct.T @ coefficients @ dct + centre).transpose(3, 4).reshape(planes.shape)


def _dct_matrix() -> Tensor:
    """Returns the orthonormal DCT-II of 8 values."""
    frequency, position = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    matrix = torch.cos((2 * position + 1) * frequency * math.pi / 16) / 2
    matrix[0] /= math.sqrt(2)
    return matrix
