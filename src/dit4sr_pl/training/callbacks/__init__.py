"""Callbacks that log, validate and save a training run."""

from dit4sr_pl.training.callbacks.averaging import EMAWeightAveraging
from dit4sr_pl.training.callbacks.checkpoints import AtomicCheckpointIO, Checkpoints
from dit4sr_pl.training.callbacks.degradation_log import DegradationLog
from dit4sr_pl.training.callbacks.first_step import FirstStep
from dit4sr_pl.training.callbacks.hyper_parameters import HyperParameters
from dit4sr_pl.training.callbacks.losses import Losses
from dit4sr_pl.training.callbacks.progress import Progress
from dit4sr_pl.training.callbacks.sources import Sources
from dit4sr_pl.training.callbacks.validation_scores import ValidationScores

__all__ = [
    "Checkpoints",
    "DegradationLog",
    "EMAWeightAveraging",
    "FirstStep",
    "HyperParameters",
    "Losses",
    "Progress",
    "Sources",
    "ValidationScores",
    "AtomicCheckpointIO",
]
