"""LoRA on the frozen base (arXiv 2106.09685): trained updates of low rank, `W + alpha / rank * B A`; PEFT adds them.

    LoRA          rank, scale and targets, as a network config keeps them
    LoRALayers    the trained weights, a part of the LR stream: `lora.*` in its file
    adapted       a base with these layers, which shares every frozen weight with the base that it is made from

The base itself stays as it was. So a teacher, a student and a critic can run over one base, which is in memory once.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
ADAPTER = "lora"  # the adapter's name in PEFT; a base has one at most


@dataclass(frozen=True)
class LoRA:
    """The layers that LoRA adapts, and how.

    Args:
        rank: rank of the updates; 0: there are none.
        alpha: updates are multiplied by `alpha / rank`.
        targets: ends of the names of linear layers in the base's blocks, such as `attn.to_q` or `ff.net.2`.

    Raises:
        ValueError: a number is out of range, or there are no targets.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = ATTENTION

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 0:
            raise ValueError(f"lora: rank={self.rank}; give a whole number, or 0 for a base without LoRA")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"lora: alpha={self.alpha}; give a number above 0")
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.rank and not self.targets:
            raise ValueError("lora: no targets; name linear layers of the base's blocks, or give rank 0")

    @classmethod
    def of(cls, network_config: Mapping[str, Any]) -> "LoRA | None":
        """Returns the LoRA of a network config; None: its network has none."""
        return cls(**network_config["lora"]) if "lora" in network_config else None

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields as a network config keeps them."""
        return asdict(self) | {"targets": list(self.targets)}


class LoRALayers(nn.Module):
    """The trained weights of LoRA: a pair `A` `(rank, in)`, random, and `B` `(out, rank)`, zero, per adapted layer.

    Args:
        lora: rank and scale.
        shapes: inputs and outputs of every adapted layer, by its name in the base.
    """

    def __init__(self, lora: LoRA, shapes: Mapping[str, tuple[int, int]]):
        super().__init__()
        self.lora, self.shapes = lora, {name: tuple(shape) for name, shape in shapes.items()}
        for name, (inputs, outputs) in self.shapes.items():
            place = self
            for part in name.split("."):
                if part not in place._modules:
                    place.add_module(part, nn.Module())
                place = place._modules[part]
            place.A, place.B = (
                nn.Parameter(torch.empty(lora.rank, inputs)),
                nn.Parameter(torch.zeros(outputs, lora.rank)),
            )
            nn.init.kaiming_uniform_(place.A, a=math.sqrt(5))

    @classmethod
    def with_shapes(cls, shapes: Mapping[str, tuple[int, int]], **fields: Any) -> "LoRALayers":
        """Returns new layers from the fields of `LoRA` and the shapes."""
        return cls(LoRA(**fields), shapes)

    @classmethod
    def over(cls, base: SD3Transformer2DModel, lora: LoRA | None) -> "LoRALayers | None":
        """Returns new layers that fit an SD3 transformer, of which only the shape is read; None: without LoRA.

        Raises:
            ValueError: a target is the end of no name.
        """
        if lora is None or not lora.rank:
            return None
        linears = {f"transformer_blocks.{name}": linear for name, linear in linears_of(base.transformer_blocks)}
        last = base.transformer_blocks[-1].attn
        for name, linear in list(linears.items()):
            # Nothing reads the last block's text queries; a weight without a gradient would stop DDP.
            if linear is getattr(last, "add_q_proj", None):
                del linears[name]
        for target in lora.targets:
            if not any(name.endswith(f".{target}") for name in linears):
                raise ValueError(f"lora: no linear layer in the base's blocks has a name that ends in {target!r}")
        ends = tuple(f".{target}" for target in lora.targets)
        chosen = {name: linear for name, linear in linears.items() if name.endswith(ends)}
        return cls(lora, {name: (linear.in_features, linear.out_features) for name, linear in chosen.items()})


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Returns inputs and outputs of every adapted layer by name, from the weights of an LR stream."""
    sides = {name: weight.shape for name, weight in state.items() if name.startswith("lora.")}
    names = [name.removesuffix(".A") for name in sides if name.endswith(".A")]
    return {name.removeprefix("lora."): (sides[f"{name}.A"][1], sides[f"{name}.B"][0]) for name in names}


def adapted(base: SD3Transformer2DModel, layers: LoRALayers | None) -> SD3Transformer2DModel:
    """Returns a base with LoRA layers, which reads the weights of `layers`; `base` stays as it is.

    The two share all modules with weights. Only the modules that contain adapted layers exist twice. None: `base`.
    """
    if layers is None:
        return base
    from peft import LoraConfig  # takes a second

    result = copied_along(base, list(layers.shapes))
    config = LoraConfig(r=layers.lora.rank, lora_alpha=layers.lora.alpha, target_modules=list(layers.shapes))
    result.add_adapter(config, ADAPTER)
    for name, layer in adapted_layers(result):
        ours = layers.get_submodule(name)
        layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight = ours.A, ours.B
    return result


def copied_along(module: nn.Module, names: Iterable[str]) -> nn.Module:
    """Returns a module in which the children named by dotted `names` can be replaced without changing the original."""
    result = copy.copy(module)
    result._modules = dict(module._modules)
    below: dict[str, list[str]] = {}
    for name in names:
        child, _, rest = name.partition(".")
        below.setdefault(child, []).extend([rest] if rest else [])
    for child, rest in below.items():
        if rest:
            result._modules[child] = copied_along(module._modules[child], rest)
    return result


@torch.no_grad()
def merge_lora(base: SD3Transformer2DModel) -> None:
    """Replaces the LoRA layers of an adapted base by linear layers with the sum of both weights, added in float32."""
    for name, layer in list(adapted_layers(base)):
        frozen = layer.base_layer
        merged = nn.Linear(frozen.in_features, frozen.out_features, bias=frozen.bias is not None, device="meta")
        total = frozen.weight.float() + layer.get_delta_weight(ADAPTER).float()
        merged.weight, merged.bias = nn.Parameter(total.to(frozen.weight.dtype), requires_grad=False), frozen.bias
        base.set_submodule(name, merged)


def adapted_layers(base: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields PEFT's layers of a base by name."""
    yield from ((name, module) for name, module in base.named_modules() if hasattr(module, "base_layer"))


def plain_weights(base: nn.Module) -> dict[str, Tensor]:
    """Returns the weights of a base without LoRA by the names that they have without it."""
    state = base.state_dict()
    return {name.replace(".base_layer.", "."): weight for name, weight in state.items() if ".lora_" not in name}


def linears_of(module: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Returns all linear layers in a module by name."""
    return [(name, each) for name, each in module.named_modules() if isinstance(each, nn.Linear)]
