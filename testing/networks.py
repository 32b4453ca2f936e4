"""The five variants of the ablation, and random weights for small networks that tests compare."""

import torch

from dit4sr_pl.model import Variant

VARIANTS = {
    "full": Variant(),
    "no_lr_integration": Variant(lr_integration="none"),
    "no_lr_residual": Variant(lr_residual=False),
    "no_lr_injection": Variant(lr_injection="none"),
    "linear_lr_injection": Variant(lr_injection="linear"),
}


def randomise(module: torch.nn.Module) -> None:
    """Adds noise to all parameters: at its zero start, half of the LR stream has no effect."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
