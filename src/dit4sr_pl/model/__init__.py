"""The network, from the outside in: transformer <- block <- lr_stream <- variant; checkpoints beside them."""

from dit4sr_pl.model.checkpoints import load_lr_stream, save_lr_stream
from dit4sr_pl.model.lr_stream import LRStream
from dit4sr_pl.model.transformer import DiT4SRTransformer
from dit4sr_pl.model.variant import Variant

__all__ = ["DiT4SRTransformer", "LRStream", "Variant", "load_lr_stream", "save_lr_stream"]
