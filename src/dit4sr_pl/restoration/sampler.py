"""How to restore: steps, guidance, tiles, colours, and what of it a network can have."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin
from torch import nn

from dit4sr_pl.common.students import fixed_settings, refusal
from dit4sr_pl.model import DiT4SRTransformer, Student
from dit4sr_pl.model.compilation import CUDAGraphs, is_compiled
from dit4sr_pl.restoration.color import COLORS
from dit4sr_pl.restoration.evaluations import Evaluation, planned
from dit4sr_pl.restoration.fitting import FITS, Size, working_sizes
from dit4sr_pl.restoration.tiling import TILINGS, TileBatcher

STARTS = ("noise", "lr", "lr_latent")
GUIDANCES = ("classifier_free", "input")
EULER = FlowMatchEulerDiscreteScheduler
CLIP_TOKENS = 77
CLOSEST_TO_NOISE = 1 - 1e-6  # the largest sigma whose distance to 1 has a logarithm; UniPC's own first sigma
ACTIVATIONS = 18  # values in memory at a forward pass's peak, per token and unit of width; docs/verification.md


@dataclass(frozen=True)
class Sampler:
    """How to restore; the paper's numbers are in `conf/sampler/paper.yaml`.

    Args:
        solver: function from the base's scheduler config to a diffusers scheduler.
        steps: number of the solver's steps; a network evaluation each, two with Heun.
        start: `noise`; `lr`: the LR latent with the noise that remains after the first steps, which are skipped; or
            `lr_latent`: the LR latent without noise, from which all steps are run.
        strength: share of the steps that is run with `start=lr`, in 0..1.
        guidance_scale: scale of guidance.
        added_prompt: text that is appended to every caption.
        negative_prompt: prompt that guidance leads away from.
        t5_tokens: number of T5's tokens in commands that restore; training's validation takes the training's number.
        tile: side of a tile in latents, for larger images.
        overlap: overlap of neighbouring tiles in latents.
        tile_memory: GiB that one forward pass may take next to the weights; as many tiles, of one image or several, go
            through at once, and at least one.
        smallest: smallest side in latents; smaller images are extended by reflection, and their results cut.
        vae_tile: side of the autoencoder's tiles in latents, for larger images; they overlap by a quarter.
        color: alignment to the enlarged LR image: `adain`, `wavelet`, `wavelet_adain` or `none`.
        wavelet_levels: levels of the wavelet, 1 to 8: the result takes what is coarser than `2**wavelet_levels` pixels
            from the enlarged LR image.
        fit: how sides that are no multiples of the grid fit it, see `working_sizes`.
        process_size: size at which smaller results are restored, see `working_sizes`.
        guidance_sigma_min: smallest sigma, in 0..1, at which guidance is applied; below it the negative prompt is not
            run.
        guidance_sigma_max: largest one.
        lr_refresh: number of evaluations from one run of the LR stream to the next; those in between read what is kept.
        lr_shared: whether the negative prompt's pass reads the LR stream of the prompt's.
        tiling: `overlapping`, or `shifted`: tiles do not overlap, and their places change from step to step.
        sigmas: sigmas of the steps in the place of the solver's own, decreasing, in 0..1 without 0; the last step goes
            to 0. They decide the number of steps. None: the solver's own for `steps`.
        guidance: `classifier_free`: the negative prompt is run, too, unless the scale is 1; `input`: the scale is an
            input of the network, a student.

    Raises:
        ValueError: a number is out of range.
    """

    solver: Callable[..., SchedulerMixin]
    steps: int
    start: str
    strength: float
    guidance_scale: float
    added_prompt: str
    negative_prompt: str
    t5_tokens: int
    tile: int
    overlap: int
    tile_memory: float
    smallest: int
    vae_tile: int
    color: str
    wavelet_levels: int = 5
    fit: str = "floor"
    process_size: int | None = None
    guidance_sigma_min: float = 0.0
    guidance_sigma_max: float = 1.0
    lr_refresh: int = 1
    lr_shared: bool = False
    tiling: str = "overlapping"
    sigmas: Sequence[float] | None = None
    guidance: str = "classifier_free"

    def __post_init__(self) -> None:
        if self.sigmas is not None:
            object.__setattr__(self, "sigmas", checked_sigmas(self.sigmas))
            object.__setattr__(self, "steps", len(self.sigmas))
        for name in ("steps", "smallest", "lr_refresh"):
            if getattr(self, name) < 1:
                raise ValueError(f"sampler: {name}={getattr(self, name)}; at least 1 is needed")
        if not isinstance(self.wavelet_levels, int) or not 1 <= self.wavelet_levels <= 8:
            raise ValueError(f"sampler: wavelet_levels={self.wavelet_levels}; give a whole number in 1..8")
        if not 0 < self.tile_memory < math.inf:
            raise ValueError(f"sampler: tile_memory={self.tile_memory}; give GiB, above 0")
        if self.process_size is not None and (not isinstance(self.process_size, int) or self.process_size < 1):
            raise ValueError(f"sampler: process_size={self.process_size}; give pixels, or null for every size as it is")
        named = {"start": STARTS, "color": COLORS, "fit": FITS, "tiling": TILINGS, "guidance": GUIDANCES}
        for name, choices in named.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"sampler: {name}={getattr(self, name)!r}; choose one of {', '.join(choices)}")
        low, high = self.guidance_sigma_min, self.guidance_sigma_max
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"sampler: guidance_sigma_min={low}, guidance_sigma_max={high}; give two numbers in 0..1, in this order"
            )
        if not 0 < self.strength <= 1:
            raise ValueError(f"sampler: strength={self.strength} must be above 0, and at most 1")
        if not 0 <= self.overlap < self.tile or self.tile % 2 or self.overlap % 2:
            raise ValueError(f"sampler: overlap={self.overlap} must be under tile={self.tile}, and both even")
        if self.vae_tile < 4 or self.vae_tile % 4:
            raise ValueError(f"sampler: vae_tile={self.vae_tile}; give a multiple of 4")

    def changed(self, **options: Any) -> "Sampler":
        """Returns the sampler with other options; another number of steps takes the place of `sigmas`, too."""
        if options.get("steps", self.steps) != self.steps:
            options = {"sigmas": None} | options
        return replace(self, **options)

    def prompt(self, caption: str) -> str:
        """Returns the prompt of a caption."""
        return f"{caption} {self.added_prompt}".strip()

    def prompts(self, captions: Iterable[str]) -> set[str]:
        """Returns all prompts that restoring images with these captions needs."""
        return {self.negative_prompt, *map(self.prompt, captions)}

    @property
    def runs_negative_prompt(self) -> bool:
        """Whether the negative prompt is run at any sigma."""
        return self.guidance == "classifier_free" and self.guidance_scale != 1

    def guides_at(self, sigma: float) -> bool:
        """Returns whether the negative prompt is run at a sigma."""
        rounded = round(sigma, 5)  # solvers' sigmas have float32's rounding errors
        return self.runs_negative_prompt and self.guidance_sigma_min <= rounded <= self.guidance_sigma_max

    def for_student(self, student: Student | None) -> "Sampler":
        """Returns the sampler with the settings that a student fixes; None: a teacher, which fixes none."""
        if student is None:
            return self
        fixed = fixed_settings(student.as_dict())
        if "solver" in fixed:
            fixed["solver"] = EULER.from_config
        return replace(self, **fixed)

    def check_network(self, net: nn.Module) -> None:
        """Raises ValueError if a network cannot be sampled so: it is a student, or cannot keep its LR stream."""
        student = getattr(net, "student", None)  # a ControlNet has none
        student = student and student.as_dict()
        for name, fixed in fixed_settings(student).items():
            value = name_of(self.solver) if name == "solver" else getattr(self, name)
            if (list(value) if isinstance(value, tuple) else value) != fixed:
                raise ValueError(refusal(f"sampler: {name}={value}", name, "the network", student))
        if self.lr_refresh == 1 and not self.lr_shared:
            return
        given = f"sampler: lr_refresh={self.lr_refresh}, lr_shared={self.lr_shared}"
        if not isinstance(net, DiT4SRTransformer):
            raise ValueError(f"{given}: the checkpoint's network has no LR stream; leave both out")
        if isinstance(net.forward, CUDAGraphs):
            raise ValueError(f"{given}: CUDA graphs keep no LR stream; give cuda_graph=false")

    def schedule(self, base: FlowMatchEulerDiscreteScheduler) -> tuple[SchedulerMixin, range]:
        """Returns a solver with its timesteps, and the network evaluations to run, numbered as its `sigmas`."""
        solver = self.solver(base.config)
        given = {**base.config, **getattr(self.solver, "keywords", {})}
        if "flow_shift" in solver.config and "flow_shift" not in given:  # some solvers' name of the base's `shift`
            solver.register_to_config(flow_shift=base.config.shift)
        solver.set_timesteps(self.steps)
        if self.sigmas is not None:
            set_sigmas(solver, self.sigmas)
        run = max(1, round(self.strength * self.steps)) if self.start == "lr" else self.steps
        first = (self.steps - run) * solver.order
        solver.set_begin_index(first)
        return solver, range(first, len(solver.timesteps))

    def evaluations(self, solver: SchedulerMixin, run: range, device: torch.device) -> list[Evaluation]:
        """Returns what each evaluation of a `schedule` does, with its timestep on a device."""
        # Timesteps come from the sigmas, since some of diffusers' solvers round theirs.
        timesteps = solver.sigmas.to(device) * solver.config.num_train_timesteps
        guided = [self.guides_at(sigma) for sigma in solver.sigmas[run.start : run.stop].tolist()]
        return planned([timesteps[number] for number in run], guided, self.lr_refresh, self.tiling == "shifted")

    def fitted(self, lr: Size, size: Size, factor: int, patch: int) -> tuple[list[Size], Size]:
        """Returns the sizes that an LR image passes through (`working_sizes`), and the size that the network gets: the
        last one of them, extended to its grid.

        Args:
            lr: height and width of the LR image.
            size: height and width of the result.
            factor: pixels per latent.
            patch: latents per token along one side.
        """
        sizes = working_sizes(lr, size, factor, self.fit, self.process_size)
        height, width = (extended(side, self.smallest * factor, patch * factor) for side in sizes[-1])
        return sizes, (height, width)

    def coded_at_once(self, size: Size, factor: int) -> int:
        """Returns how many images of a size, with `factor` pixels per latent, the autoencoder takes at once: as many as
        fit into one of its tiles, and at least one.
        """
        return max(1, self.vae_tile**2 * factor**2 // math.prod(size))

    def tile_batcher(self, net: DiT4SRTransformer) -> TileBatcher:
        """Returns a batcher for the number of tiles that fit into `tile_memory`.

        A tile takes memory for its tokens in the noise, LR and text stream, twice with guidance in one pass.
        """
        config, dtype = net.base.config, net.base.dtype
        tokens = 2 * (self.tile // net.patch_size) ** 2 + CLIP_TOKENS + self.t5_tokens
        width = config.num_attention_heads * config.attention_head_dim
        passes = 2 if self.runs_negative_prompt and not self.lr_shared else 1
        tile = ACTIVATIONS * passes * tokens * width * dtype.itemsize
        return TileBatcher(max(1, int(self.tile_memory * 2**30 / tile)), padded=is_compiled(net))


def name_of(solver: Callable[..., SchedulerMixin]) -> str:
    """Returns the name of a solver's class, `euler` for the one that students need."""
    made = getattr(getattr(solver, "func", solver), "__self__", solver)  # of a `from_config`, or a partial one
    return "euler" if made is EULER else getattr(made, "__name__", str(made))


def checked_sigmas(sigmas: Sequence[float]) -> tuple[float, ...]:
    """Returns sigmas as numbers; raises ValueError unless they decrease from 1 at most and end above 0."""
    numbers = all(isinstance(sigma, int | float) and not isinstance(sigma, bool) for sigma in sigmas)
    steps = pairwise([*sigmas, 0]) if numbers else ()
    if not numbers or not len(sigmas) or sigmas[0] > 1 or not all(sigma > following for sigma, following in steps):
        raise ValueError(
            f"sampler: sigmas={list(sigmas)}; give a list of decreasing numbers, at most 1 and above 0, such as "
            "[1,0.75,0.5,0.25], or null for the solver's own"
        )
    return tuple(map(float, sigmas))


def set_sigmas(solver: SchedulerMixin, sigmas: Sequence[float]) -> None:
    """Gives a solver other sigmas than its own, which are as many. The base's shift does not change them."""
    if "use_flow_sigmas" in solver.config:  # these solvers take the logarithm of 1 - sigma
        sigmas = [min(sigmas[0], CLOSEST_TO_NOISE), *sigmas[1:]]
    # Every step but the first has as many sigmas as it has evaluations.
    each = torch.tensor(sigmas).repeat_interleave(solver.order)[solver.order - 1 :]
    solver.sigmas = torch.cat([each, torch.zeros(1)])
    solver.timesteps = (each * solver.config.num_train_timesteps).to(solver.timesteps.dtype)


def extended(length: int, least: int, multiple: int) -> int:
    """Returns the smallest multiple that is at least `length` and `least`."""
    return -(-max(length, least) // multiple) * multiple
