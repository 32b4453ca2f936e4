"""Frozen linear layers whose weights are stored in 8 or 4 bits and multiplied in their original dtype."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

KINDS = ("int8", "fp8", "nf4")
BLOCK = 64  # weights that share a scale in NF4, bitsandbytes' default


class QuantizedLinear(nn.Module):
    """A frozen linear layer that stores its weight in fewer bits; it rounds nothing but the weight.

    Args:
        linear: the layer to store; its weight's number of elements is a multiple of 64 for `nf4`.
        kind: `int8` or `fp8` (E4M3) with a float32 scale per row, or `nf4` (QLoRA) with one per 64 weights.
    """

    def __init__(self, linear: nn.Linear, kind: str):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.kind, self.dtype, self.bias = kind, linear.weight.dtype, linear.bias
        # Both are kept as whole numbers: `module.to(dtype)` would round others.
        stored, scales = store(linear.weight.detach(), kind)
        self.register_buffer("stored", stored if kind == "int8" else stored.view(torch.uint8))
        self.register_buffer("scales", scales.view(torch.int32))

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns `weight @ tokens + bias`."""
        return FrozenProduct.apply(tokens, self)

    def full_weight(self) -> Tensor:
        """Returns the weight `(out, in)` in its original dtype."""
        scales = self.scales.view(torch.float32)
        if self.kind == "nf4":
            from bitsandbytes.functional import QuantState, dequantize_4bit

            shape = torch.Size([self.out_features, self.in_features])
            state = QuantState(scales, shape, blocksize=BLOCK, quant_type="nf4", dtype=self.dtype)
            return dequantize_4bit(self.stored, state)
        stored = self.stored.view(torch.float8_e4m3fn) if self.kind == "fp8" else self.stored
        return (stored.float() * scales).to(self.dtype)


class FrozenProduct(torch.autograd.Function):
    """A product that keeps the stored weight for the backward pass instead of the full one."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, linear: QuantizedLinear) -> Tensor:
        """Returns the layer's output."""
        ctx.linear, ctx.dtype = linear, tokens.dtype
        return F.linear(tokens, linear.full_weight(), linear.bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Returns the gradient of the tokens."""
        return (gradient @ ctx.linear.full_weight().to(gradient.dtype)).to(ctx.dtype), None


def full_weight(linear: nn.Module) -> Tensor:
    """Returns the weight `(out, in)` of a layer that may be quantized, or have LoRA."""
    if hasattr(linear, "base_layer"):
        weight, (adapter,) = full_weight(linear.base_layer), linear.active_adapters
        return (weight + linear.get_delta_weight(adapter)).to(weight.dtype)
    return linear.full_weight() if isinstance(linear, QuantizedLinear) else linear.weight


def store(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Returns a weight in fewer bits and its scales."""
    if kind == "nf4":
        from bitsandbytes.functional import quantize_4bit

        packed, state = quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
        return packed, state.absmax
    largest = 127 if kind == "int8" else torch.finfo(torch.float8_e4m3fn).max
    scales = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / largest
    scaled = weight.float() / scales
    return scaled.round().to(torch.int8) if kind == "int8" else scaled.to(torch.float8_e4m3fn), scales


def stored_bytes(base: SD3Transformer2DModel, kind: str | None) -> int:
    """Returns the bytes of a base's parameters after `quantize`, from their shapes, without LoRA; None: as they are."""
    frozen = (weight for name, weight in base.named_parameters() if ".lora_" not in name)
    parameters = sum(weight.nbytes for weight in frozen)
    if kind is None:
        return parameters
    for _, _, linear in linears_of(base):
        rows, count = linear.out_features, linear.weight.numel()
        parameters -= linear.weight.nbytes
        parameters += count // 2 + 4 * (count // BLOCK) if kind == "nf4" else count + 4 * rows
    return parameters


def quantize(bases: list[SD3Transformer2DModel], kind: str) -> None:
    """Stores the weights of all linear layers in the blocks of bases in fewer bits, where they are, one after another;
    a layer that several bases share is stored once."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for base in bases:
        for parent, name, linear in linears_of(base):
            places.setdefault(id(linear), []).append((parent, name))
    for (parent, name), *others in list(places.values()):
        stored = QuantizedLinear(getattr(parent, name), kind)
        for place, child in [(parent, name), *others]:
            setattr(place, child, stored)


def linears_of(base: SD3Transformer2DModel) -> list[tuple[nn.Module, str, nn.Linear]]:
    """Returns all linear layers in the blocks of a base, but LoRA's, with the module that each is a child of, and its
    name."""
    named = [each for block in base.transformer_blocks for each in block.named_modules()]
    children = [(module, *child) for name, module in named if ".lora_" not in name for child in module.named_children()]
    return [(parent, name, child) for parent, name, child in children if isinstance(child, nn.Linear)]
