"""The MM-DiT-Control block (paper Figure 3): a frozen MM-DiT block and its share of the LR stream, run together."""

import torch
import torch.nn.functional as F
from diffusers.models.attention import FeedForward, JointTransformerBlock
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from dit4sr_pl.common.precision import without_autocast
from dit4sr_pl.model.lr_cache import Kept, keep
from dit4sr_pl.model.lr_stream import LRAttention, LRBlock, heads
from dit4sr_pl.model.variant import Variant

QKV = tuple[Tensor | None, Tensor, Tensor]


class MMDiTControlBlock(nn.Module):
    """One block that takes three streams; `noise` and `lr` share every frozen weight, `text` has its own.

        noise ──norm1──┬────────┬──────┬─────+──norm2──MLP.in──φ──(+)──MLP.out──+──
                       │ joint  │ noise│     │                     │ s·injection
        lr ────norm1───┤ atten- ├─attn2┤─────+──norm2──MLP.in──η───┴───MLP.out──+──
                       │  tion  │ +lr  │
        text ──norm1c──┴────────┴──────┴─────+──norm2c─MLPc────────────────────+──

    Gates and outer residuals are SD3's own. In variant A the attention runs over `[noise, text]` and `[lr]` apart.

    Args:
        frozen: diffusers' block.
        lr: the block's trainable share of the LR stream.
        variant: which units of the LR stream the network has.
    """

    def __init__(self, frozen: JointTransformerBlock, lr: LRBlock, variant: Variant):
        super().__init__()
        self.frozen = frozen
        self.lr = lr
        self.joint = variant.lr_integration == "joint"
        self.injection_scale = variant.injection_scale

    def forward(
        self, noise: Tensor, lr: Tensor, text: Tensor, time: Tensor, grid: tuple[int, int], kept: Kept | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Runs the three streams through the block.

        Args:
            noise: noise tokens, `(B, h*w, D)`.
            lr: LR tokens, `(B, h*w, D)`, or none, `(B, 0, D)`, where `kept` stands for them.
            text: text tokens, `(B, T, D)`.
            time: embedding of timestep and prompt, `(B, D)`.
            grid: `(h, w)`, the sides of the token grid.
            kept: what the other streams read of the LR stream, see `LRCache`; LR tokens replace it. None: nothing is
                kept.

        Returns:
            The three streams after the block; the last block skips text, and the LR steps that nothing reads.
        """
        frozen = self.frozen

        # 1. Norms and modulation, which noise and LR share.
        time = F.silu(time)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, *dual = modulation(frozen.norm1.linear, time)
        noise_norm, lr_norm = standardized(frozen.norm1.norm, noise), standardized(frozen.norm1.norm, lr)
        if frozen.context_pre_only:
            text_scale, text_shift = modulation(frozen.norm1_context.linear, time)
        else:
            text_shift, text_scale, text_gate, *text_mlp = modulation(frozen.norm1_context.linear, time)
        text_in = modulate(standardized(frozen.norm1_context.norm, text), text_shift, text_scale)

        # 2. LR Integration, one attention over [X, L, text], and LR Residual, L_out = W_out^L (Attention_L + L_in).
        noise_in, lr_in = modulate(noise_norm, shift, scale), modulate(lr_norm, shift, scale)
        noise_attn, lr_attn, text_attn = self.attend(noise_in, lr_in, text_in, kept)
        noise = gated(noise, gate, noise_attn)
        if self.lr.needs_output:
            lr = gated(lr, gate, lr_attn)

        # 3. SD3.5's second attention over [X, L], without text.
        if dual:
            shift2, scale2, gate2 = dual
            noise_in2, lr_in2 = modulate(noise_norm, shift2, scale2), modulate(lr_norm, shift2, scale2)
            noise_attn2, lr_attn2, _ = self.attend(noise_in2, lr_in2, None, kept)
            noise = gated(noise, gate2, noise_attn2)
            if self.lr.needs_output:
                lr = gated(lr, gate2, lr_attn2)

        # 4. MLPs with LR Injection between their layers: phi(X) += s * DWConv3x3(eta(L)).
        phi = mlp_in(frozen.ff, modulate(standardized(frozen.norm2, noise), shift_mlp, scale_mlp))
        if self.lr.needs_output:
            eta = mlp_in(frozen.ff, modulate(standardized(frozen.norm2, lr), shift_mlp, scale_mlp))
        if self.lr.injection is not None:
            phi = torch.add(phi, self.injected(eta, grid, kept), alpha=self.injection_scale)
        noise = gated(noise, gate_mlp, mlp_out(frozen.ff, phi))
        if not self.lr.last:
            lr = gated(lr, gate_mlp, mlp_out(frozen.ff, eta))

        # 5. The text stream, as in SD3.
        if not frozen.context_pre_only:
            text_shift_mlp, text_scale_mlp, text_gate_mlp = text_mlp
            text = gated(text, text_gate, text_attn)
            text_in = modulate(standardized(frozen.norm2_context, text), text_shift_mlp, text_scale_mlp)
            text = gated(text, text_gate_mlp, frozen.ff_context(text_in))
        return noise, lr, text

    def attend(
        self, noise: Tensor, lr: Tensor, text: Tensor | None, kept: Kept | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Returns the output of `attn` over `[noise, lr, text]` or, if `text` is None, of `attn2` over `[noise, lr]`.

        Each output has passed its stream's output projection; it is None for a stream without queries.
        """
        name = "attn2" if text is None else "attn"
        frozen, ours = getattr(self.frozen, name), getattr(self.lr, name)
        noise_qkv, lr_qkv, *text_qkv = self.projections(frozen, ours, noise, lr, text)

        if self.joint:
            queries, keys, values = lr_qkv
            lr_qkv = queries, keep(kept, f"{name}.keys", keys), keep(kept, f"{name}.values", values)
            noise_attended, lr_attended, *text_attended = joint_attention(noise_qkv, lr_qkv, *text_qkv)
        else:
            noise_attended, *text_attended = joint_attention(noise_qkv, *text_qkv)
            (lr_attended,) = joint_attention(lr_qkv)

        noise_out = frozen.to_out[0](noise_attended)
        lr_out = None if lr_attended is None else ours.output(lr_attended, lr)
        text_out = None if not text_attended or text_attended[0] is None else frozen.to_add_out(text_attended[0])
        return noise_out, lr_out, text_out

    def injected(self, eta: Tensor, grid: tuple[int, int], kept: Kept | None) -> Tensor:
        """Returns LR Injection of the LR stream's activations `eta`, `(B, h*w, 4D)`, or the one that was kept."""
        fresh = self.lr.injection(eta, grid) if eta.shape[1] else eta
        return keep(kept, "injection", fresh)

    def projections(
        self, frozen: Attention, ours: LRAttention, noise: Tensor, lr: Tensor, text: Tensor | None
    ) -> list[QKV]:
        """Returns (query, key, value) of the noise stream, the LR stream and, if given, the text stream."""
        noise_qkv = noise_projections(frozen, noise)
        lr_qkv = ours.queries(frozen, lr), ours.keys(frozen, lr, noise_qkv[1]), ours.values(frozen, lr)
        return [noise_qkv, lr_qkv] if text is None else [noise_qkv, lr_qkv, text_projections(frozen, text)]


def joint_attention(*streams: QKV) -> tuple[Tensor | None, ...]:
    """Attends in one softmax over the keys of all streams.

    Args:
        streams: (query, key, value) per stream, each `(B, heads, tokens, D/heads)`; the query may be None.

    Returns:
        `(B, tokens, D)` per stream; None for a stream without queries.
    """
    queries = torch.cat([q for q, _, _ in streams if q is not None], dim=2)
    keys = torch.cat([k for _, k, _ in streams], dim=2)
    values = torch.cat([v for _, _, v in streams], dim=2)
    attended = attention(queries, keys, values).transpose(1, 2).flatten(2)
    by_stream = iter(attended.split([q.shape[2] for q, _, _ in streams if q is not None], dim=1))
    return tuple(next(by_stream) if q is not None else None for q, _, _ in streams)


def attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Returns softmax attention; all arguments are `(B, heads, tokens, D/heads)`."""
    # In bfloat16 on a CPU the fused kernel's backward pass takes up to five times as long as plain products.
    if values.requires_grad and values.dtype == torch.bfloat16 and values.device.type == "cpu":
        # PyTorch 2.14.1's compiler makes NaN of the keys' gradients if queries are scaled before the product.
        scores = queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5
        return scores.softmax(dim=-1) @ values
    return F.scaled_dot_product_attention(queries, keys, values)


def noise_projections(frozen: Attention, tokens: Tensor) -> QKV:
    """Returns (query, key, value) of the noise stream by the frozen weights."""
    queries, keys = heads(frozen, frozen.to_q(tokens), frozen.norm_q), heads(frozen, frozen.to_k(tokens), frozen.norm_k)
    return queries, keys, heads(frozen, frozen.to_v(tokens))


def text_projections(frozen: Attention, tokens: Tensor) -> QKV:
    """Returns (query, key, value) of the text stream by the frozen weights; in the last block the query is None."""
    queries = None if frozen.context_pre_only else heads(frozen, frozen.add_q_proj(tokens), frozen.norm_added_q)
    return (
        queries,
        heads(frozen, frozen.add_k_proj(tokens), frozen.norm_added_k),
        heads(frozen, frozen.add_v_proj(tokens)),
    )


def modulation(linear: nn.Linear, time: Tensor) -> tuple[Tensor, ...]:
    """Returns shift, scale and gate of the attention, of the MLP and of the second attention, each `(B, 1, D)`."""
    return linear(time).unsqueeze(1).chunk(linear.out_features // linear.in_features, dim=-1)


def standardized(norm: nn.LayerNorm, tokens: Tensor) -> Tensor:
    """Returns tokens with mean 0 and variance 1, in their own dtype; autocast on a GPU would return float32."""
    with without_autocast(tokens.device):
        return F.layer_norm(tokens, norm.normalized_shape, eps=norm.eps)


def modulate(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Returns AdaLN's `shift + tokens * (1 + scale)`."""
    return torch.addcmul(shift, tokens, 1 + scale)


def gated(tokens: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """Returns the outer residual `tokens + gate * update`, in one pass over memory."""
    return torch.addcmul(tokens, gate, update)


def mlp_in(ff: FeedForward, tokens: Tensor) -> Tensor:
    """Returns the 4D-wide activations after the first linear layer and GELU, which LR Injection adds to."""
    return ff.net[0](tokens)


def mlp_out(ff: FeedForward, activations: Tensor) -> Tensor:
    """Returns the MLP's output from its 4D-wide activations."""
    return ff.net[2](activations)
