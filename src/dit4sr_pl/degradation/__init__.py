"""Real-ESRGAN's degradation on the batch's own device; every random choice is drawn per image and can be replayed."""

from dit4sr_pl.degradation.draws import DrawnDegradation
from dit4sr_pl.degradation.pipeline import Degradation

__all__ = ["Degradation", "DrawnDegradation"]
