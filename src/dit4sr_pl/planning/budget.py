"""The needs of a whole training: parameters, FLOPs, and the memory of each GPU by part."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from dit4sr_pl.model.quantized import stored_bytes
from dit4sr_pl.planning.meta_backbone import MetaBackbone
from dit4sr_pl.planning.step_cost import StepCost, StudentStep, step_cost

PREFETCHED = 2  # blocks: FSDP gathers the next one while one runs


@dataclass(frozen=True)
class Spread:
    """A way to distribute a step over GPUs.

    Args:
        gpus: number of GPUs.
        sharded: True for FSDP, False for DDP.
        images: images per GPU.
    """

    gpus: int
    sharded: bool
    images: int

    def __str__(self) -> str:
        return "1 GPU" if self.gpus == 1 else f"{self.gpus} GPUs, {'fsdp' if self.sharded else 'ddp'}"


class Budget:
    """The needs of one training, counted on the network itself at its real size.

    Args:
        backbone: the frozen pipeline on the meta device.
        make_network: makes the network over the frozen transformer, by its argument `gradient_checkpointing`.
        make_optimizer: makes an optimizer of parameters.
        batch: images that a GPU processes at a time.
        image: side of an image in pixels.
        text_tokens: length of the text stream.
        precision: precision of Lightning's Trainer, see `step_cost`.
        reads_text_encoders: False if prompt embeddings are cached.
        averages: True if an average of the weights is kept during training.
        quantization: how the base's weights are stored, see `quantize`; None: as they are.
        make_student_step: returns what a student's step runs besides, over the base and by its argument
            `gradient_checkpointing`; None: no student is trained.
    """

    def __init__(
        self,
        backbone: MetaBackbone,
        make_network: Callable[..., nn.Module],
        make_optimizer: Callable[[Any], Optimizer],
        *,
        batch: int,
        image: int,
        text_tokens: int,
        precision: str,
        reads_text_encoders: bool,
        averages: bool,
        quantization: str | None = None,
        make_student_step: Callable[..., StudentStep] | None = None,
    ):
        def build(checkpointing: bool) -> tuple[nn.Module, StudentStep | None]:
            options, base = {"gradient_checkpointing": checkpointing}, backbone.base()
            student_step = None if make_student_step is None else make_student_step(base, **options)
            return backbone.network(partial(make_network, **options), base), student_step

        self.network, self.student_step = build(False)
        self.vae = backbone.coder().vae
        self.text_encoders = backbone.text_encoders() if reads_text_encoders else []
        self.averages = averages
        self.batch = batch
        self.base_bytes = stored_bytes(self.network.base, quantization)
        sizes = {"image": image, "text_tokens": text_tokens, "precision": precision}

        def cost(checkpointing: bool, images: int) -> StepCost:
            network, student_step = build(checkpointing)
            return step_cost(
                network, backbone.coder(), make_optimizer, batch=images, student_step=student_step, **sizes
            )

        self.cost = cache(cost)

    @property
    def trained_part(self) -> nn.Module:
        """The module that is trained and saved."""
        return self.network.trained

    @property
    def critic(self) -> list[Tensor]:
        """The trained parameters of a critic; []: there is none."""
        return trainable(self.student_step.critic) if self.student_step and self.student_step.critic else []

    def parameters(self) -> dict[str, int]:
        """Returns numbers of parameters by what they are."""
        trained = count(trainable(self.network))
        everything = count(self.network.parameters())
        counts = {
            f"saved ({self.network.trained_name})": count(self.trained_part.parameters()),
            "trained": trained,
            "frozen": everything - trained,
            "network": everything,
            "autoencoder": count(self.vae.parameters()),
        }
        if self.student_step:
            counts["teacher's LR stream"] = count(self.student_step.teacher.trained.parameters())
            counts["critic (LoRA)"] = count(self.critic)
            counts["perceptual network"] = count(parameters_of(self.student_step.perceptual))
        if self.text_encoders:
            counts["text encoders"] = sum(count(encoder.parameters()) for encoder in self.text_encoders)
        return counts

    def flops_per_image(self) -> dict[str, float]:
        """Returns FLOPs per image by what they are spent on, at `batch` images at a time."""
        images = max(2, self.batch)
        plain, checkpointed = self.cost(False, images), self.cost(True, images)
        return {
            "encode HR and LR": plain.encode.flops / images,
            **({"teacher": plain.teacher.flops / images} if self.student_step else {}),
            "forward": plain.forward.flops / images,
            "backward": plain.backward.flops / images,
            "computed again, if checkpointed": (checkpointed.backward.flops - plain.backward.flops) / images,
            "in all, not checkpointed": plain.work.flops / images,
            "in all, checkpointed": checkpointed.work.flops / images,
        }

    def per_gpu(self, spread: Spread) -> dict[str, int]:
        """Returns the bytes on each GPU by part, without activations.

        FSDP divides the network's parameters. Its buffers (SD3's table of positions: 226M numbers in SD3.5-medium),
        autoencoder, text encoders and the running average are complete on every GPU.
        """
        share = spread.gpus if spread.sharded else 1
        trained = weight_bytes(self.trained_part) + bytes_of(self.critic)
        gradients = bytes_of([*trainable(self.network), *self.critic])
        return {
            "frozen transformer": self.base_bytes // share,
            "table of positions": weight_bytes(self.network.base) - parameter_bytes(self.network.base),
            "autoencoder": weight_bytes(self.vae),
            "text encoders": sum(map(weight_bytes, self.text_encoders)),
            "trained weights": trained // share,
            "gradients": gradients // share,
            "optimizer's moments": self.cost(False, self.batch).moments // share,
            "running average": trained if self.averages else 0,
            **self.of_student_step(),
            "gathered blocks": PREFETCHED * gathered_bytes(self.network) if spread.sharded else 0,
        }

    def of_student_step(self) -> dict[str, int]:
        """Returns the bytes of what a student's step runs besides, but the critic, which is trained; {}: no student."""
        if self.student_step is None:
            return {}
        perceptual = bytes_of(parameters_of(self.student_step.perceptual))
        return {
            "teacher's LR stream": weight_bytes(self.student_step.teacher.trained),
            "perceptual network": perceptual,
        }

    def activations(self, images: int, checkpointing: bool) -> int:
        """Returns the bytes of activations: counted, or by the line through one image and `batch` images."""
        if images == self.batch:
            return self.cost(checkpointing, images).activations
        high = max(2, self.batch)
        at_low, at_high = self.cost(checkpointing, 1).activations, self.cost(checkpointing, high).activations
        return round(at_low + (at_high - at_low) / (high - 1) * (images - 1))

    def peak(self, spread: Spread, images: int, checkpointing: bool) -> int:
        """Returns the bytes that a GPU needs at `images` images at a time."""
        return sum(self.per_gpu(spread).values()) + self.activations(images, checkpointing)

    def fitting(self, spread: Spread, free: float) -> tuple[int, bool] | None:
        """Returns how many images at a time fit into `free` bytes, and whether they need gradient checkpointing.

        The number divides the GPU's share and is at most `batch`. None: not even one image fits.
        """
        for images in range(min(self.batch, spread.images), 0, -1):
            for checkpointing in (False, True):
                if spread.images % images == 0 and self.peak(spread, images, checkpointing) <= free:
                    return images, checkpointing
        return None


def trainable(module: nn.Module) -> list[Tensor]:
    """Returns the parameters with a gradient."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def count(tensors: Iterable[Tensor]) -> int:
    """Returns how many numbers the tensors have together."""
    return sum(tensor.numel() for tensor in tensors)


def parameters_of(module: nn.Module | None) -> list[Tensor]:
    """Returns the parameters of a module; []: there is none."""
    return [] if module is None else list(module.parameters())


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Returns the bytes of tensors."""
    return sum(tensor.nbytes for tensor in tensors)


def parameter_bytes(module: nn.Module) -> int:
    """Returns the bytes of parameters."""
    return bytes_of(module.parameters())


def weight_bytes(module: nn.Module) -> int:
    """Returns the bytes of parameters and buffers."""
    return parameter_bytes(module) + bytes_of(module.buffers())


def gathered_bytes(network: nn.Module) -> int:
    """Returns the bytes that FSDP gathers to run a block: the largest of each stack (`base.transformer_blocks` ...)."""
    parts = (module for part in network.children() for module in part.children())
    return sum(max(map(weight_bytes, stack)) for stack in parts if isinstance(stack, nn.ModuleList))
