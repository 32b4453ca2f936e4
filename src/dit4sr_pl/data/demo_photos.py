"""Photos for the demo and the miniature ablation, from the wheels of scikit-image and scikit-learn: no download."""

from pathlib import Path

import numpy as np
import torch
from skimage import data
from sklearn.datasets import load_sample_image

from dit4sr_pl.data.module import SuperResolutionData
from dit4sr_pl.images.files import write_image

TRAIN = ("coffee", "coins", "flower", "grass", "gravel", "hubble_deep_field", "motorcycle", "retina")
TEST = ("astronaut", "brick", "camera", "chelsea", "china", "rocket")
WRITING = ("page", "text")  # print and handwriting
CROP, CROPS = 128, 6


def write_demo_photos(folder: Path | str) -> None:
    """Writes the demo's 8 photos to `folder/train` and 6 held-out ones to `folder/test`, as RGB PNG; existing files
    stay.
    """
    for part, names in (("train", TRAIN), ("test", TEST)):
        for name in names:
            path = Path(folder, part, f"{name}.png")
            if not path.exists():
                write_image(path, _load(name))


def write_crops(folder: Path | str) -> None:
    """Writes the images that the miniature ablation is scored on.

    They are crops of 128x128 from the six held-out photos and from two scanned pages of text: up to 6 per source,
    spread
    evenly over it, named `NAME_K.png`. A source whose first crop exists is skipped.
    """
    for name in (*TEST, *WRITING):
        if not Path(folder, f"{name}_0.png").exists():
            crops = _load(name).unfold(1, CROP, CROP).unfold(2, CROP, CROP).flatten(1, 2).transpose(0, 1)
            chosen = torch.linspace(0, len(crops) - 1, min(CROPS, len(crops))).round().int()
            for place, crop in reversed(list(enumerate(crops[chosen]))):  # 0 last: then all are there
                write_image(Path(folder, f"{name}_{place}.png"), crop)


def _load(name: str) -> torch.Tensor:
    """Returns RGB `(3, H, W)` in 0..1; grey photos are repeated over the channels."""
    if name in ("china", "flower"):
        pixels = load_sample_image(f"{name}.jpg")
    elif name == "motorcycle":
        pixels = data.stereo_motorcycle()[0]  # the left picture of the stereo pair
    else:
        pixels = getattr(data, name)()
    pixels = np.broadcast_to(pixels[..., None], (*pixels.shape, 3)) if pixels.ndim == 2 else pixels
    return torch.tensor(pixels).permute(2, 0, 1) / 255


def demo_data(photos: str, **arguments) -> SuperResolutionData:
    """Writes the demo's photos into the folder `photos` and returns `SuperResolutionData` over them."""
    write_demo_photos(photos)
    write_crops(Path(photos, "crops"))
    return SuperResolutionData(**arguments)
