"""The network: `variant` says what is in it, `lr_stream` is trained, `block` and `transformer` run it over SD3.

`controlnet` is the paper's baseline. Words that the whole project uses:

    base            SD3's transformer, frozen
    backbone        the whole frozen pipeline: base, autoencoder, text encoders, scheduler
    frozen          a block's frozen half, a diffusers module
    trained part    the module that is trained and saved, `net.trained`: an LR stream or a ControlNet
    network_config  how a network was made: its kind, its variant and, of a student, how it restores
    student         another LR stream over its teacher's base, trained to do the same with fewer evaluations
    identity        the settings that a run or an evaluation depends on
    checkpoint      a training state (.ckpt), which resumes a run
    LR-stream file  lr_stream.safetensors, the trained weights alone
    noise, lr, text the three streams of tokens: noisy latent (X in the paper), LR latent (L), prompt
    image           pixels; a picture is a file with its metadata, a photo is an HR training image
"""

from dit4sr_pl.model.controlnet import SD3ControlNet
from dit4sr_pl.model.lr_cache import LRCache
from dit4sr_pl.model.lr_stream import LRStream
from dit4sr_pl.model.student import Student
from dit4sr_pl.model.trained_part import TrainedPart, load_part, save_part
from dit4sr_pl.model.transformer import DiT4SRTransformer
from dit4sr_pl.model.variant import Variant

__all__ = [
    "DiT4SRTransformer",
    "LRCache",
    "LRStream",
    "SD3ControlNet",
    "Student",
    "TrainedPart",
    "Variant",
    "load_part",
    "save_part",
]
