"""The paper's ablation as data (Section 5 and supplement Figure 3): which units of the LR stream a network has."""

from dataclasses import asdict, dataclass

INTEGRATIONS = ("joint", "none")
INJECTIONS = ("conv", "linear", "none")


@dataclass(frozen=True)
class Variant:
    """Three switches and a scale. The paper's FULL is all defaults; A to D change one switch each.

    Args:
        lr_integration: `"joint"`: one attention over noise, LR and text tokens; `"none"` (A): the LR stream attends to
            itself only.
        lr_residual: whether the LR attention's input is added to its output; False is B.
        lr_injection: `"conv"`: a depth-wise 3x3 convolution between the MLPs; `"linear"` (D): a linear layer per token;
            `"none"` (C).
        injection_scale: factor of the injection; 1.0 to train, 1.2 in all of the paper's releases.
        legacy_lr_keys: whether LR keys are the twice normalised noise keys, a bug with which `dit4sr_q` and `dit4sr_f`
            were trained.

    Raises:
        ValueError: a switch is unknown, or nothing leads from the LR stream to the noise stream.
    """

    lr_integration: str = "joint"
    lr_residual: bool = True
    lr_injection: str = "conv"
    injection_scale: float = 1.0
    legacy_lr_keys: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("lr_integration", INTEGRATIONS), ("lr_injection", INJECTIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"variant: {name}={getattr(self, name)!r}; choose one of {', '.join(choices)}")
        if self.lr_integration == "none" and self.lr_injection == "none":
            raise ValueError(
                "variant: without LR Integration and LR Injection the LR image reaches nothing; give one of them"
            )
        if self.legacy_lr_keys and self.lr_integration == "none":
            raise ValueError("variant: legacy_lr_keys needs lr_integration=joint (it takes its keys from the noise)")

    @property
    def name(self) -> str:
        """The variant's name in `conf/ablation/`, of its switches alone; several changes are joined by `+`."""
        changes = {
            "no_lr_integration": self.lr_integration == "none",
            "no_lr_residual": not self.lr_residual,
            "no_lr_injection": self.lr_injection == "none",
            "linear_lr_injection": self.lr_injection == "linear",
        }
        return "+".join(name for name, changed in changes.items() if changed) or "full"

    def as_dict(self) -> dict:
        """Returns the fields as plain values."""
        return asdict(self)
