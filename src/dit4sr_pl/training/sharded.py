"""Training with the network's weights shared out over devices, frozen ones too: FSDP, as PyTorch's `fully_shard`."""

import warnings

from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from dit4sr_pl.training.module import SuperResolutionModule, start_from_checkpoint


class ShardedModule(SuperResolutionModule):
    """For Lightning's `ModelParallelStrategy`; checkpoints and results are those of `SuperResolutionModule`.

    A device holds its share of the weights, gradients and optimizer states, and the whole of one block at a time.
    Autoencoder and text encoders are on every device. Weights are not averaged: Lightning's callback copies the module
    before it is sharded, and cannot average shards into whole weights.
    """

    def configure_model(self) -> None:
        if self.trainer.ckpt_path is not None:
            start_from_checkpoint(
                self.net, self.trainer.ckpt_path
            )  # Lightning loads it again, and cannot say what does not fit
        shard(self.net, self.device_mesh)
        # PyTorch warns of writing into what a sharded module returns; nothing here does.
        warnings.filterwarnings("ignore", ".*returned a view tensor", UserWarning)

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """The strategy has loaded the weights by now: of a run that averaged them, the averaged ones."""
        if (trained := checkpoint.get("current_model_state")) is not None:
            set_model_state_dict(self, trained, options=StateDictOptions(full_state_dict=True))

    def on_validation_start(self) -> None:
        # Images take steps and tiles of their own number: no device may wait for another's to gather a block.
        self.net.set_reshard_after_forward(False)
        for unit in (self.net, *self.net.units):
            unit.unshard()

    def on_validation_end(self) -> None:
        for unit in self.net.units:
            unit.set_reshard_after_forward(True)
        for unit in (self.net, *self.net.units):
            unit.reshard()


def shard(net: nn.Module, mesh: DeviceMesh) -> None:
    """Shards a network in place, block by block and the rest as one.

    Args:
        net: DiT4SR or a baseline.
        mesh: two-dimensional: copies over the first dimension (nodes), shards over the second (a node's devices).
    """
    for unit in net.units:
        fully_shard(unit, mesh=mesh)
    fully_shard(net, mesh=mesh, ignored_params={parameter for unit in net.units for parameter in unit.parameters()})
