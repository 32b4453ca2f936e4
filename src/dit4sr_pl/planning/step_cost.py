"""FLOPs, launches and bytes of a training step, counted while it runs on tensors that have shapes and no memory."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import conv_flop_count, flop_registry, shape_wrapper
from torch.utils.weak import WeakIdKeyDictionary

from dit4sr_pl.backbone.autoencoder import LatentCoder

# The step runs on fake CPU tensors, and on a CPU the network treats bfloat16 specially. float16 takes the same bytes.
AUTOCAST = {"bf16-mixed": torch.float16, "16-mixed": torch.float16, "32-true": None}
STAND_IN = {torch.bfloat16: torch.float16}


def conv_backward_flop(grad_shape, x_shape, weight_shape, *_, out_shape=None, **__) -> int:
    """Returns the FLOPs of a convolution's backward: each requested gradient costs as much as the forward.

    PyTorch's own formula counts a depth-wise convolution as a dense one.
    """
    return sum(shape is not None for shape in out_shape[:2]) * conv_flop_count(x_shape, weight_shape, grad_shape)


aten = torch.ops.aten
FORMULAS = flop_registry | {  # where PyTorch has no formula or a wrong one
    aten.convolution_backward: shape_wrapper(conv_backward_flop),
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}


# Operations that allocate or rename memory; together with views they start no kernel.
WITHOUT_KERNEL = {
    *(aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten._unsafe_view),
    *(aten.detach, aten.lift_fresh, torch.ops.prim.device),
}


@dataclass(frozen=True)
class Work:
    """The work that a part of a step gives to a GPU.

    Args:
        flops: FLOPs of products, convolutions and attention.
        launches: number of operations that start a kernel. One that starts several, such as a fused optimizer over
            many weights, counts once.
        moved: bytes that all other operations read and write.
    """

    flops: int = 0
    launches: int = 0
    moved: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.launches + other.launches, self.moved + other.moved)

    def __mul__(self, count: int) -> "Work":
        return Work(self.flops * count, self.launches * count, self.moved * count)

    def __sub__(self, other: "Work") -> "Work":
        return Work(self.flops - other.flops, self.launches - other.launches, self.moved - other.moved)


class CostCounter(TorchDispatchMode):
    """Counter of the work of all operations within it and of the bytes of all live tensors that they have made.

    PyTorch's `FlopCounterMode` uses the same formulas, but keeps the tensors of recomputed blocks alive.
    """

    def __init__(self):
        super().__init__()
        self.known = WeakIdKeyDictionary()  # storages, so that views count once
        self.work = Work()
        self.now = self.peak = 0

    @property
    def flops(self) -> int:
        """FLOPs so far."""
        return self.work.flops

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if formula := FORMULAS.get(func._overloadpacket):
            self.work += Work(flops=formula(*args, **kwargs, out_val=result), launches=1)
        elif starts_kernel(func):
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            self.work += Work(launches=1, moved=sum(tensor.nbytes for tensor in tensors))
        tree_map_only(Tensor, self.see, result)
        return result

    def see(self, tensor: Tensor) -> None:
        """Adds the bytes of a new tensor until its storage is freed."""
        storage = tensor.untyped_storage()
        if storage not in self.known:
            self.known[storage] = True
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, storage.nbytes())

    def forget(self, count: int) -> None:
        """Subtracts the bytes of a freed storage."""
        self.now -= count


class FusedNorm(torch.autograd.Function):
    """The RMS norm as CUDA computes it, in one kernel forward and one backward; a CPU has no such kernel.

    Only shapes, types and what is kept for the backward are right.
    """

    @staticmethod
    def forward(ctx, tokens: Tensor, weight: Tensor) -> Tensor:
        """Returns tokens of the right shape, and keeps what the kernel keeps for the backward pass."""
        ctx.save_for_backward(tokens, weight, torch.empty(*tokens.shape[:-1], 1))
        return tokens * weight

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        """Returns a gradient of the tokens' shape."""
        tokens, _, _ = ctx.saved_tensors
        return torch.addcmul(grad, grad, tokens), None


@contextmanager
def fused_norms() -> Iterator[None]:
    """Replaces `F.rms_norm` by `FusedNorm`, also where checkpointing computes blocks again."""
    before = F.rms_norm
    F.rms_norm = lambda tokens, _, weight, eps: FusedNorm.apply(tokens, weight)
    try:
        yield
    finally:
        F.rms_norm = before


def starts_kernel(func: OpOverload) -> bool:
    """Returns whether an operation starts a kernel: it is no view and no allocation."""
    returned = [value.alias_info for value in func._schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in returned)
    return not is_view and func._overloadpacket not in WITHOUT_KERNEL


@dataclass
class StudentStep:
    """The networks and passes of a student's step besides the student, on the meta device, over one base.

    Args:
        teacher: the teacher, with its LR stream merged and in the base's dtype.
        conditions: sequences of each of the teacher's passes, per image: 2 with guidance.
        passes: number of the teacher's passes in a step.
        teacher_first: whether they are done before the student's pass, when its activations are not in memory.
        windows: number of the student's sequences per image.
        critic: the critic; None: there is none.
        crop: side of decoded crops in latents; 0: nothing is decoded.
        perceptual: the perceptual network; None: there is none.
    """

    teacher: nn.Module
    conditions: int
    passes: int
    teacher_first: bool
    windows: int = 1
    critic: nn.Module | None = None
    crop: int = 0
    perceptual: nn.Module | None = None

    @property
    def networks(self) -> list[nn.Module]:
        """All networks."""
        return [each for each in (self.teacher, self.critic, self.perceptual) if each is not None]

    @torch.no_grad()
    def teach(self, latent: Tensor, *inputs: Tensor) -> None:
        """Runs one pass of the teacher."""
        if self.passes:
            self.teacher(*(repeated(each, self.conditions) for each in (latent, latent, *inputs)))

    def losses(self, coder: LatentCoder, restored: Tensor, clean: Tensor, *inputs: Tensor) -> list[Tensor]:
        """Returns the losses besides the distance of latents, and the critic's."""
        parts = []
        if self.crop:
            window = slice(None), slice(None), slice(self.crop), slice(self.crop)  # of the last of a student's windows
            images = coder.decoder_output(restored[-len(clean) :][window]).float().div(2).add(0.5).clamp(0, 1)
            reference = coder.decode(clean[window])
            parts.append((images - reference).abs().mean())
            if self.perceptual is not None:
                parts.append(self.perceptual(images, reference))
        if self.critic is not None:
            velocity = self.critic(restored.detach(), clean, *inputs).float()
            parts.append((velocity - clean).square().mean())
        return parts


def repeated(batch: Tensor, count: int) -> Tensor:
    """Returns a batch `count` times in a row, without a copy for one."""
    return batch if count == 1 else batch.repeat(count, *[1] * (batch.ndim - 1))


@dataclass(frozen=True)
class StepCost:
    """The cost of one step.

    Args:
        encode: encoding the HR and the LR images.
        teacher: all passes of a student's teacher.
        forward: the network's forward, and that of a student's other losses and its critic.
        backward: its backward, including what checkpointing computes again.
        update: the optimizer's step.
        moments: bytes of the optimizer's moments.
        activations: bytes of the step's peak above weights, gradients and moments.
    """

    encode: Work
    teacher: Work
    forward: Work
    backward: Work
    update: Work
    moments: int
    activations: int

    @property
    def work(self) -> Work:
        """The whole step."""
        return self.encode + self.teacher + self.forward + self.backward + self.update


def step_cost(
    network: nn.Module,
    coder: LatentCoder,
    make_optimizer: Callable[[Any], Optimizer],
    batch: int,
    image: int,
    text_tokens: int,
    precision: str,
    student_step: StudentStep | None = None,
) -> StepCost:
    """Returns the cost of one step of `SuperResolutionModule`, or of a student's, as a GPU would run it.

    Gradients exist before the step, as they do with accumulation and in DDP's buckets.

    Args:
        network: the network on the meta device; afterwards its weights are fake tensors.
        coder: the autoencoder on the meta device; afterwards its weights are fake tensors.
        make_optimizer: makes an optimizer of parameters.
        batch: number of images.
        image: side of an image in pixels.
        text_tokens: length of the text stream.
        precision: precision of Lightning's Trainer, a key of `AUTOCAST`.
        student_step: what a student's step runs besides; afterwards its weights are fake tensors. None: no
            student is trained.
    """
    networks = nn.ModuleList([network, *(student_step.networks if student_step else [])])
    if AUTOCAST[precision] is not None:
        normalise_in_float32(networks)
    with FakeTensorMode(), CostCounter() as counter, fused_norms():
        give_storage(networks)
        give_storage(coder.vae)
        parameters = [parameter for parameter in networks.parameters() if parameter.requires_grad]
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        optimizer = make_optimizer(parameters)
        for group in optimizer.param_groups:
            group["foreach"] = not group["fused"]  # as on a GPU
        before = counter.now
        optimizer.step()  # makes the moments
        moments = counter.now - before

        config, dtype = network.base.config, coder.vae.dtype
        images = torch.empty(batch, 3, image, image)
        embeds = torch.empty(batch, text_tokens, config.joint_attention_dim, dtype=dtype)
        pooled = torch.empty(batch, config.pooled_projection_dim, dtype=dtype)
        inputs = torch.empty(batch), embeds, pooled
        start = counter.peak = counter.now
        marks = [counter.work]
        with autocast(precision):
            clean, lr_latent = coder.encode(images), coder.encode(images)
            marks.append(counter.work)
            taught, loss = forward(network, coder, clean, lr_latent, inputs, student_step, counter)
        marks.append(counter.work)
        loss.backward()
        marks.append(counter.work)
        optimizer.step()
        marks.append(counter.work)
    encoded, predicted, derived, updated = (after - before for before, after in pairwise(marks))
    teacher = taught * student_step.passes if student_step else taught
    return StepCost(encoded, teacher, predicted - taught, derived, updated, moments, counter.peak - start)


def forward(
    network: nn.Module,
    coder: LatentCoder,
    clean: Tensor,
    lr_latent: Tensor,
    inputs: tuple[Tensor, ...],
    student_step: StudentStep | None,
    counter: CostCounter,
) -> tuple[Work, Tensor]:
    """Returns the work of one pass of the teacher, and the loss of a step."""
    taught, windows = Work(), student_step.windows if student_step else 1

    def teach() -> Work:
        before = counter.work
        student_step.teach(clean, *inputs)
        return counter.work - before

    if student_step and student_step.teacher_first:
        taught = teach()
    velocity = network(*(repeated(each, windows) for each in (clean, lr_latent, *inputs)), **scale(network, inputs[0]))
    loss = (velocity.float() - repeated(clean, windows)).square().mean()
    if student_step:
        parts = student_step.losses(coder, velocity.float(), clean, *inputs)
        taught = taught if student_step.teacher_first else teach()
        loss = sum(parts, loss)
    return taught, loss


def scale(network: nn.Module, timestep: Tensor) -> dict[str, Tensor]:
    """Returns the scale of guidance, for students that take it as an input."""
    student = getattr(network, "student", None)  # a ControlNet has none
    return {"guidance": timestep} if student is not None and student.guidance == "input" else {}


def autocast(precision: str) -> AbstractContextManager:
    """Returns the autocast context of a precision."""
    dtype = AUTOCAST[precision]
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype)


def give_storage(module: nn.Module, stand_in: dict[torch.dtype, torch.dtype] = STAND_IN) -> None:
    """Replaces meta tensors, which autocast ignores, by fake ones on the CPU, which take no memory either."""
    given = {weight: nn.Parameter(empty(weight, stand_in), weight.requires_grad) for weight in module.parameters()}
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = given[weight]  # LoRA's weights have two names
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = empty(buffer, stand_in)


def normalise_in_float32(module: nn.Module) -> None:
    """Makes normalisations run in float32, as autocast does on a GPU only; the backward then keeps float32 tensors."""
    for part in module.modules():
        if isinstance(part, nn.LayerNorm | nn.GroupNorm):
            part.float().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))


def empty(like: Tensor, stand_in: dict[torch.dtype, torch.dtype]) -> Tensor:
    """Returns a tensor of the same shape and of a type with as many bytes."""
    return torch.empty(like.shape, dtype=stand_in.get(like.dtype, like.dtype))
