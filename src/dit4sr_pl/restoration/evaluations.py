"""The plan of a restoration: guidance, LR stream and tiles of each evaluation of the network."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

# Multiples of these two numbers, modulo 1, fill a square evenly (the R2 sequence, a golden ratio for two dimensions).
PLASTIC = 1.324717957244746
STEPS = (1 / PLASTIC, 1 / PLASTIC**2)


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the network.

    Args:
        timestep: in [0, 1000], a scalar on the network's device.
        guided: whether the negative prompt is run, too.
        fresh: whether the LR stream runs; otherwise what is kept of it is read.
        shift: rows and columns by which tiles without overlap are shifted, as shares of a tile; None: tiles overlap.
    """

    timestep: Tensor
    guided: bool = False
    fresh: bool = True
    shift: tuple[float, float] | None = None


def planned(
    timesteps: Sequence[Tensor], guided: Sequence[bool], lr_refresh: int = 1, shifted: bool = False
) -> list[Evaluation]:
    """Returns the evaluations of a restoration, in their order.

    The LR stream runs every `lr_refresh` evaluations and where guidance begins or ends, since it depends on the prompt.
    The shift of tiles changes whenever it runs: what is kept of it belongs to a tile.

    Args:
        timesteps: one per evaluation, see `Evaluation`.
        guided: likewise.
        lr_refresh: number of evaluations from one run of the LR stream to the next.
        shifted: whether tiles lie side by side, and their places change.
    """
    evaluations, runs, since = [], 0, 0
    for timestep, guides in zip(timesteps, guided, strict=True):
        fresh = since % lr_refresh == 0 or guides != evaluations[-1].guided
        runs, since = runs + fresh, 1 if fresh else since + 1
        shift = tuple((runs - 1) * step % 1 for step in STEPS) if shifted else None
        evaluations.append(Evaluation(timestep, guides, fresh, shift))
    return evaluations
