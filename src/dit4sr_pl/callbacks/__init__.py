"""What a run shows beside its loss, and what it saves."""

from dit4sr_pl.callbacks.checkpoints import Checkpoints, WholeFiles
from dit4sr_pl.callbacks.degradation_log import DegradationLog
from dit4sr_pl.callbacks.hyper_parameters import HyperParameters
from dit4sr_pl.callbacks.learning_rate import LearningRate
from dit4sr_pl.callbacks.losses import Losses
from dit4sr_pl.callbacks.validation_scores import ValidationScores

__all__ = [
    "Checkpoints",
    "DegradationLog",
    "HyperParameters",
    "LearningRate",
    "Losses",
    "ValidationScores",
    "WholeFiles",
]
