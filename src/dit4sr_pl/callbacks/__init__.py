"""What a run shows beside its loss."""

from dit4sr_pl.callbacks.degradation_log import DegradationLog
from dit4sr_pl.callbacks.hyper_parameters import HyperParameters
from dit4sr_pl.callbacks.validation_scores import ValidationScores

__all__ = ["DegradationLog", "HyperParameters", "ValidationScores"]
