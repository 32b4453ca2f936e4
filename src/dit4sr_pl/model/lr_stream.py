"""The trainable half of DiT4SR: every weight that the paper adds to Stable Diffusion 3.5 (Section 4, Figure 3).

    LRStream
      blocks.N.attn       LRAttention   W_q^L, W_k^L, W_v^L, W_out^L   (LR Integration, LR Residual)
      blocks.N.attn2      LRAttention   the same, in blocks with SD3.5's second attention
      blocks.N.injection  LRInjection   between the MLPs               (LR Injection)
      guidance            GuidanceEmbedding                            (students that take the scale as an input)
      lora                LoRALayers, updates of the base                  (students that have them)

The frozen half stays a diffusers model; `block.py` runs the two together.
"""

import copy

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from dit4sr_pl.common.precision import without_autocast
from dit4sr_pl.model.lora import LoRA, LoRALayers
from dit4sr_pl.model.quantized import full_weight
from dit4sr_pl.model.student import Student
from dit4sr_pl.model.variant import Variant

SINUSOIDS = 256  # of the scale of guidance; as many as SD3 has of a timestep


class LRAttention(nn.Module):
    """LR Integration's projections, each on top of its frozen one: `Q_L = W_q^L (W_q L)`, likewise K and V.

    Args:
        dim: width D of a token.
        variant: which units of the LR stream the network has.
        needs_output: False where only keys and values matter. In the last block of a variant without LR Injection the
            LR stream's own output goes nowhere, and a weight without a gradient would stop DDP.
    """

    def __init__(self, dim: int, variant: Variant, needs_output: bool):
        super().__init__()
        self.legacy_keys = variant.legacy_lr_keys
        self.residual = variant.lr_residual
        self.needs_output = needs_output
        self.merged = False
        self.k = zero_linear(dim)
        self.v = zero_linear(dim)
        if needs_output:
            self.q = zero_linear(dim)
            self.out = nn.Linear(dim, dim)
        if self.legacy_keys:
            self.k.requires_grad_(False)  # kept for the released layout; nothing reads it

    def queries(self, frozen: Attention, lr: Tensor) -> Tensor | None:
        """Returns LR queries from LR tokens, `(B, K, D) -> (B, heads, K, D/heads)`; None where no output is needed."""
        return self.project("q", frozen, lr, frozen.norm_q) if self.needs_output else None

    def keys(self, frozen: Attention, lr: Tensor, noise_keys: Tensor) -> Tensor:
        """Returns LR keys from LR tokens or, with legacy keys, from the noise keys, which are normalised already."""
        if self.legacy_keys:
            # normalised a second time, as in those releases
            return normed(frozen.norm_k, noise_keys.transpose(1, 2)).transpose(1, 2)
        return self.project("k", frozen, lr, frozen.norm_k)

    def values(self, frozen: Attention, lr: Tensor) -> Tensor:
        """Returns LR values."""
        return self.project("v", frozen, lr)

    def output(self, attended: Tensor, lr: Tensor) -> Tensor:
        """Returns LR Residual, `L_out = W_out^L (Attention_L + L_in)`, with `L_in` normed and modulated."""
        return self.out(attended + lr if self.residual else attended)

    def project(self, name: str, frozen: Attention, lr: Tensor, norm: nn.Module | None = None) -> Tensor:
        """Returns `W^L (W L)` of the projection `name`, cut into heads and normalised."""
        ours = getattr(self, name)
        projected = ours(lr) if self.merged else F.linear(lr, *product(ours, getattr(frozen, f"to_{name}")))
        return heads(frozen, projected, norm)

    @torch.no_grad()
    def merge(self, frozen: Attention) -> None:
        """Replaces each weight by its float32 product with the frozen one, stored in the frozen weight's dtype."""
        for name in ("q", "k", "v") if self.needs_output else ("k", "v"):
            ours, theirs = getattr(self, name).float(), getattr(frozen, f"to_{name}")
            for kind, value in zip(("weight", "bias"), product(ours, copy.deepcopy(theirs).float()), strict=True):
                setattr(ours, kind, nn.Parameter(value.to(theirs.weight.dtype), requires_grad=False))
        self.merged = True


def product(ours: nn.Linear, frozen: nn.Linear) -> tuple[Tensor, Tensor]:
    """Returns weight and bias of `W^L (W x) = (W^L W) x`.

    The product of the two matrices costs as much as D tokens, forward and backward; every token then passes one matrix
    instead of two.
    """
    full = full_weight(frozen)
    weight = ours.weight.to(full.dtype)  # cast once, since both products under autocast would cast it
    return weight @ full, F.linear(frozen.bias, weight, ours.bias.to(weight.dtype))


class ConvInjection(nn.Module):
    """LR Injection, `phi(X) += s * DWConv3x3(eta(L))`: a depth-wise convolution of the LR stream's MLP activations."""

    def __init__(self, dim: int):
        super().__init__()
        # Tokens are channels last, hence the weight's gradient too; DDP warns if the weight itself is not.
        conv = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)
        self.conv = zeroed(conv).to(memory_format=torch.channels_last)

    def forward(self, eta: Tensor, grid: tuple[int, int]) -> Tensor:
        """Returns `(B, h*w, 4D)` from `(B, h*w, 4D)`, tokens in rows of the grid `(h, w)`."""
        image = eta.transpose(1, 2).unflatten(2, grid)
        return self.conv(image).flatten(2).transpose(1, 2)


class LinearInjection(nn.Module):
    """Variant D's LR Injection, `phi(X) += s * Linear(eta(L))`: no token sees its neighbours."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear = zero_linear(dim)

    def forward(self, eta: Tensor, grid: tuple[int, int]) -> Tensor:
        """Returns `(B, h*w, 4D)` from `(B, h*w, 4D)`; the grid does not matter."""
        return self.linear(eta)


class LRBlock(nn.Module):
    """One block's share of the LR stream.

    Args:
        dim: width D of a token.
        variant: which units of the LR stream the network has.
        dual_attention: whether the frozen block has SD3.5's second attention.
        last: whether it is the last block, whose LR tokens matter through its injection alone.
    """

    def __init__(self, dim: int, variant: Variant, dual_attention: bool, last: bool):
        super().__init__()
        needs_output = not last or variant.lr_injection != "none"
        self.attn = LRAttention(dim, variant, needs_output)
        self.attn2 = LRAttention(dim, variant, needs_output) if dual_attention else None
        self.needs_output = needs_output
        self.last = last
        injections = {"conv": ConvInjection, "linear": LinearInjection}
        self.injection = injections[variant.lr_injection](4 * dim) if variant.lr_injection != "none" else None


class GuidanceEmbedding(nn.Module):
    """The scale of guidance as an input of the network, which is added to the base's embedding of the timestep.

    Its last layer is zero at the start, so a new one changes nothing.

    Args:
        dim: width D of a token.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.sinusoids = Timesteps(SINUSOIDS, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.mlp = TimestepEmbedding(SINUSOIDS, dim)
        zeroed(self.mlp.linear_2)

    def forward(self, scale: Tensor) -> Tensor:
        """Returns `(B, D)` of scales `(B,)`."""
        return self.mlp(self.sinusoids(scale).to(self.mlp.linear_1.weight.dtype))


class LRStream(nn.Module):
    """All weights that are trained and saved: 350,877,696 parameters over SD3.5-medium.

    Args:
        dim: width D of a token.
        dual_attention: for every block, whether it has SD3.5's second attention.
        variant: which units of the LR stream the network has.
        student: how it restores, if it is a student; None: a teacher.
        lora: LoRA layers of the base; None: the base has none.
    """

    def __init__(
        self,
        dim: int,
        dual_attention: list[bool],
        variant: Variant,
        student: Student | None = None,
        lora: LoRALayers | None = None,
    ):
        super().__init__()
        self.variant, self.student = variant, student
        last = len(dual_attention) - 1
        self.blocks = nn.ModuleList(
            LRBlock(dim, variant, dual, last=index == last) for index, dual in enumerate(dual_attention)
        )
        takes_scale = student is not None and student.guidance == "input"
        self.guidance = GuidanceEmbedding(dim) if takes_scale else None
        self.lora = lora

    @classmethod
    def over(
        cls, base: SD3Transformer2DModel, variant: Variant, student: Student | None = None, lora: LoRA | None = None
    ) -> "LRStream":
        """Returns a new LR stream that fits an SD3 transformer, of which only the shape is read."""
        dual_attention = [frozen.attn2 is not None for frozen in base.transformer_blocks]
        return cls(base.inner_dim, dual_attention, variant, student, LoRALayers.over(base, lora))

    @torch.no_grad()
    def copy_output_projections_from(self, base: SD3Transformer2DModel) -> None:
        """Copies the pretrained `to_out` into every `W_out^L`; call it after the base's weights are loaded."""
        for frozen, block in zip(base.transformer_blocks, self.blocks, strict=True):
            for theirs, ours in ((frozen.attn, block.attn), (frozen.attn2, block.attn2)):
                if ours is not None and ours.needs_output:
                    ours.out.load_state_dict(theirs.to_out[0].state_dict())

    def merge(self, base: SD3Transformer2DModel) -> None:
        """Merges every `W^L W` into one matrix, once, for inference. A merged stream cannot be trained or saved."""
        for frozen, block in zip(base.transformer_blocks, self.blocks, strict=True):
            block.attn.merge(frozen.attn)
            if block.attn2 is not None:
                block.attn2.merge(frozen.attn2)


def heads(frozen: Attention, tokens: Tensor, norm: nn.Module | None = None) -> Tensor:
    """Cuts tokens into heads and normalises each, `(B, K, D) -> (B, heads, K, D/heads)`."""
    # They are normalised before they are transposed: CUDA's kernel would copy them otherwise.
    return normed(norm, tokens.unflatten(-1, (frozen.heads, -1))).transpose(1, 2)


def normed(norm: RMSNorm | None, tokens: Tensor) -> Tensor:
    """Returns normalised queries or keys `(..., D/heads)`; SD3.5 has the norms, SD3 has none.

    It is one kernel on a GPU, in the place of the seven that `norm` itself starts.
    """
    if norm is None:
        return tokens
    with without_autocast(tokens.device):
        return F.rms_norm(tokens, norm.dim, norm.weight.to(tokens.dtype), norm.eps)


def zeroed(module: nn.Module) -> nn.Module:
    """Sets all parameters of a module to zero and returns it."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def zero_linear(dim: int) -> nn.Linear:
    """Returns a square linear layer whose weight and bias are zero."""
    return zeroed(nn.Linear(dim, dim))
