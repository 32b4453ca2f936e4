"""One of two processes that score images together, started by `test_metrics.py`; imports no more than that takes."""

import torch

from dit4sr_pl.scores.metrics import ImageScore

LUMA = {"test_y_channel": True, "color_space": "ycbcr"}
SHARES = [(8, slice(0, 12)), (3, slice(12, 20))]  # batch size and images of each


def mean_of_two(rank: int, port: int, pairs: tuple[torch.Tensor, torch.Tensor], results: torch.Tensor) -> None:
    """Puts the mean score of this process's share of the images, reduced over both processes, into a queue."""
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    score = ImageScore("psnr", reference=True, lower_is_better=False, **LUMA)
    size, share = SHARES[rank]
    for part in zip(*(images[share].split(size) for images in pairs), strict=True):
        score.update(*part)
    results[rank] = score.compute()
    torch.distributed.destroy_process_group()
