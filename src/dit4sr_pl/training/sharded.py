"""Training with all of the network's weights, also the frozen ones, sharded over the devices (FSDP)."""

import warnings

from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from dit4sr_pl.training.lightning_state import weights_before_averaging
from dit4sr_pl.training.module import SuperResolutionModule, start_from_checkpoint


class ShardedModule(SuperResolutionModule):
    """The module for Lightning's `ModelParallelStrategy`, by PyTorch's `fully_shard`.

    Checkpoints and results are those of `SuperResolutionModule`. Each device holds its share of the weights, gradients
    and optimizer states, and one whole block at a time. The autoencoder and the text encoders are whole on every
    device. Weights are not averaged: Lightning's callback copies the module before it is sharded, and cannot average
    shards into whole weights.
    """

    def configure_model(self) -> None:
        """Shards the network, after a check that the checkpoint to resume from fits it."""
        if self.trainer.ckpt_path is not None:
            # Lightning loads it again later, but its errors do not name what does not fit.
            start_from_checkpoint(self.net, self.trainer.ckpt_path)
        shard(self.net, self.device_mesh)
        # PyTorch warns against writing into what a sharded module returns; nothing here does that.
        warnings.filterwarnings("ignore", ".*returned a view tensor", UserWarning)

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Replaces averaged weights, which the strategy has loaded by now, with the trained ones."""
        self.adapt(checkpoint)
        if (trained := weights_before_averaging(checkpoint)) is not None:
            set_model_state_dict(self, trained, options=StateDictOptions(full_state_dict=True))

    def on_validation_start(self) -> None:
        """Gathers the whole network: images take different numbers of steps and tiles, so no device may wait for
        another one to gather a block."""
        super().on_validation_start()
        self.net.set_reshard_after_forward(False)
        for unit in (self.net, *self.net.units):
            unit.unshard()

    def on_validation_end(self) -> None:
        """Shards the network again."""
        for unit in self.net.units:
            unit.set_reshard_after_forward(True)
        for unit in (self.net, *self.net.units):
            unit.reshard()


def shard(net: nn.Module, mesh: DeviceMesh) -> None:
    """Shards a network in place: each block by itself, and all other weights together.

    Args:
        net: DiT4SR or a baseline.
        mesh: two dimensions. Weights are copied over the first (nodes) and sharded over the second (a node's devices).
    """
    for unit in net.units:
        fully_shard(unit, mesh=mesh)
    fully_shard(net, mesh=mesh, ignored_params={parameter for unit in net.units for parameter in unit.parameters()})
