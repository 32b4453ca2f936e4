"""The network, from the outside in: transformer <- block <- lr_stream <- variant; the controlnet baseline beside it.

Both networks have `base`, which is frozen, and under the name `part` the module that is trained and saved.
"""

from dit4sr_pl.model.controlnet import SD3ControlNet
from dit4sr_pl.model.lr_stream import LRStream
from dit4sr_pl.model.trained_part import TrainedPart, load_part, save_part
from dit4sr_pl.model.transformer import DiT4SRTransformer
from dit4sr_pl.model.variant import Variant

__all__ = ["DiT4SRTransformer", "LRStream", "SD3ControlNet", "TrainedPart", "Variant", "load_part", "save_part"]
