"""A student in relation to its teacher: the few evaluations that it was trained for, and how it has guidance."""

from dataclasses import asdict, dataclass

STARTS = ("noise", "lr_latent")
GUIDANCES = ("built_in", "input")


@dataclass(frozen=True)
class Student:
    """How a student restores; a network without one is a teacher.

    Args:
        sigmas: decreasing sigmas in (0, 1], of one evaluation of the network each; the last one goes to 0. None: any
            number of steps.
        start: the noisy latent of the first evaluation: `noise`, or `lr_latent`, the LR latent without noise.
        guidance: `built_in`: the student predicts the guided velocity for the scale that it was trained with; `input`:
            the scale is an input of the network. Neither runs a negative prompt.

    Raises:
        ValueError: a field is unknown, or fields contradict each other.
    """

    sigmas: tuple[float, ...] | None = None
    start: str = "noise"
    guidance: str = "built_in"

    def __post_init__(self) -> None:
        for name, choices in (("start", STARTS), ("guidance", GUIDANCES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"student: {name}={getattr(self, name)!r}; choose one of {', '.join(choices)}")
        if self.sigmas is None:
            if self.start == "lr_latent":
                raise ValueError("student: start=lr_latent needs sigmas, such as sigmas=[0.5]")
            return
        try:
            sigmas = tuple(float(sigma) for sigma in self.sigmas)
        except (TypeError, ValueError):
            sigmas = ()
        below_one = zip((1.0, *sigmas), sigmas, strict=False)
        if not sigmas or not all(0 < sigma <= before for before, sigma in below_one) or len({*sigmas}) < len(sigmas):
            raise ValueError(f"student: sigmas={self.sigmas}; give decreasing numbers, above 0 and at most 1, or null")
        if self.start == "noise" and sigmas[0] != 1:
            raise ValueError(
                f"student: sigmas={list(sigmas)}; with start=noise the first one is 1, which is pure noise"
            )
        object.__setattr__(self, "sigmas", sigmas)  # of lists, as files and configs have them

    @classmethod
    def of(cls, network_config: dict) -> "Student | None":
        """Returns the student of a network config; None: the network is a teacher."""
        return cls(**network_config["student"]) if "student" in network_config else None

    def as_dict(self) -> dict:
        """Returns the fields as plain values of JSON."""
        fields = asdict(self)
        return fields | {"sigmas": None if self.sigmas is None else list(self.sigmas)}
