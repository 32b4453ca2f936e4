"""What a whole training takes: parameters, FLOPs, and every GPU's memory by part."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from torch.optim import Optimizer

from dit4sr_pl.planning.meta_backbone import Skeleton
from dit4sr_pl.planning.step_cost import step_cost

PREFETCHED = 2  # FSDP gathers the next block while one runs


@dataclass(frozen=True)
class Spread:
    """A step over several GPUs: `images` on each of `gpus`; `sharded`: FSDP, else DDP."""

    gpus: int
    sharded: bool
    images: int

    def __str__(self) -> str:
        return "1 GPU" if self.gpus == 1 else f"{self.gpus} GPUs, {'fsdp' if self.sharded else 'ddp'}"


class Budget:
    """One training's needs, each from the network itself at its real size.

    Args:
        skeleton: the frozen pipeline's shapes.
        networks: by whether they checkpoint, what makes the network over the frozen transformer.
        make_optimizer: from parameters to an optimizer.
        batch: images that a GPU holds at a time, of `image` pixels a side. text_tokens: of the text stream.
        precision: see `step_cost`.
        reads_text_encoders: False with cached embeddings. averages: whether weights are averaged as they train.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        networks: dict[bool, Callable[[SD3Transformer2DModel], nn.Module]],
        make_optimizer: Callable[[Any], Optimizer],
        *,
        batch: int,
        image: int,
        text_tokens: int,
        precision: str,
        reads_text_encoders: bool,
        averages: bool,
    ):
        self.network = skeleton.network(networks[True])
        self.vae = skeleton.coder().vae
        self.text_encoders = skeleton.text_encoders() if reads_text_encoders else []
        self.averages = averages
        self.batch = batch
        sizes = {"image": image, "text_tokens": text_tokens, "precision": precision}
        self.costs = {
            checkpointing: {
                count: step_cost(skeleton.network(make), skeleton.coder(), make_optimizer, batch=count, **sizes)
                for count in (1, max(2, batch))
            }
            for checkpointing, make in networks.items()
        }

    @property
    def trained_part(self) -> nn.Module:
        return self.network.trained

    def parameters(self) -> dict[str, int]:
        trained = count(trainable(self.network))
        everything = count(self.network.parameters())
        counts = {
            f"saved ({self.network.trained_name})": count(self.trained_part.parameters()),
            "trained": trained,
            "frozen": everything - trained,
            "network": everything,
            "autoencoder": count(self.vae.parameters()),
        }
        if self.text_encoders:
            counts["text encoders"] = sum(count(encoder.parameters()) for encoder in self.text_encoders)
        return counts

    def flops_per_image(self) -> dict[str, float]:
        """Forward, backward and encoding (HR and LR image) at `batch` images a time."""
        images = max(self.costs[False])
        plain, checkpointed = self.costs[False][images], self.costs[True][images]
        return {
            "encode HR and LR": plain.encode_flops / images,
            "forward": plain.forward_flops / images,
            "backward": plain.backward_flops / images,
            "computed again, if checkpointed": (checkpointed.backward_flops - plain.backward_flops) / images,
            "in all, not checkpointed": plain.flops / images,
            "in all, checkpointed": checkpointed.flops / images,
        }

    def per_gpu(self, spread: Spread) -> dict[str, int]:
        """Bytes on each GPU but for activations. FSDP shares out the network; autoencoder, text encoders and the
        running average, which Lightning keeps whole, are on every GPU."""
        share = spread.gpus if spread.sharded else 1
        trained = weight_bytes(self.trained_part)
        return {
            "frozen transformer": weight_bytes(self.network.base) // share,
            "autoencoder": weight_bytes(self.vae),
            "text encoders": sum(map(weight_bytes, self.text_encoders)),
            "trained weights": trained // share,
            "gradients": sum(parameter.nbytes for parameter in trainable(self.network)) // share,
            "optimizer's moments": self.costs[True][1].moments // share,
            "running average": trained if self.averages else 0,
            "gathered blocks": PREFETCHED * gathered_bytes(self.network) if spread.sharded else 0,
        }

    def activations(self, images: int, checkpointing: bool) -> int:
        """The step's bytes above the parts of `per_gpu`, on the line through the two steps that were counted."""
        (low, at_low), (high, at_high) = sorted(self.costs[checkpointing].items())
        slope = (at_high.activations - at_low.activations) / (high - low)
        return round(at_low.activations + slope * (images - low))

    def fitting(self, spread: Spread, free: float) -> tuple[int, bool] | None:
        """How many images at a time `free` bytes hold (a divisor of the GPU's share, `batch` at most), and whether
        checkpointed; None if not even one."""
        fixed = sum(self.per_gpu(spread).values())
        for images in range(min(self.batch, spread.images), 0, -1):
            for checkpointing in (False, True):
                if spread.images % images == 0 and fixed + self.activations(images, checkpointing) <= free:
                    return images, checkpointing
        return None


def trainable(module: nn.Module) -> list[Tensor]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def weight_bytes(module: nn.Module) -> int:
    """Parameters and buffers: SD3.5's table of positions alone is 226M numbers."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def gathered_bytes(network: nn.Module) -> int:
    """The largest block of every stack of blocks (`base.transformer_blocks`, ...): what FSDP gathers to run one."""
    parts = (module for part in network.children() for module in part.children())
    return sum(max(map(weight_bytes, stack)) for stack in parts if isinstance(stack, nn.ModuleList))
