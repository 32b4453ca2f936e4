"""Trains tiny-sd3's transformer on latents of its autoencoder, as SD3 trains: rectified flow on empty prompts.

    python scripts/tiny_base.py --photos outputs/tiny/photos --pipeline src/dit4sr_pl/assets/tiny-sd3

Crops of several shapes, so that the transformer knows positions from 8x8 to 16x16 tokens (128 to 256 pixels). Latents
are computed once and kept beside the state. The same command continues a run that was stopped.
"""

import argparse
import copy
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import SD3Transformer2DModel
from photos import Photos
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit4sr_pl.backbone.autoencoder import LatentCoder, draw_noise
from dit4sr_pl.backbone.flow import RectifiedFlow, interpolate
from dit4sr_pl.backbone.sd3 import Backbone
from dit4sr_pl.common.randomness import generator

CONFIG = dict(
    sample_size=32,
    patch_size=2,
    in_channels=16,
    out_channels=16,
    num_layers=8,
    attention_head_dim=32,
    num_attention_heads=6,
    caption_projection_dim=192,
    joint_attention_dim=64,
    pooled_projection_dim=64,
    pos_embed_max_size=64,
    dual_attention_layers=(0, 1, 2, 3),
    qk_norm="rms_norm",
)
SHAPES = ((16, 16), (16, 16), (16, 16), (24, 24), (32, 32), (16, 32), (32, 16))  # latents; 8 pixels each
TOKENS_PER_STEP = 32 * 64
PEAK_LEARNING_RATE, WARM_UP, EMA_DECAY = 1e-3, 300, 0.9993
SAVE_EVERY = 250


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True, help="folder of PNG tiles (tiny_photos.py)")
    parser.add_argument("--pipeline", type=Path, required=True, help="all but the transformer (tiny_pipeline.py)")
    parser.add_argument("--state", type=Path, default=Path("outputs/tiny/base"), help="folder to go on from")
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    # Moments of unused weights fade into denormals, which cost a CPU a factor of ten; before any thread starts.
    torch.set_flush_denormal(True)
    backbone = Backbone(str(args.pipeline), "float32", t5_tokens=8)
    latents = encode_photos(args.photos, backbone.coder, args.state / "latents.pt")
    embeds, pooled = backbone.prompts([""], torch.device("cpu"))
    flow = RectifiedFlow(backbone.scheduler, "velocity")

    torch.manual_seed(args.seed)
    net = SD3Transformer2DModel(**CONFIG)
    start_blocks_at_zero(net)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=1e-2)
    print(f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f}M parameters, {len(latents)} latents", flush=True)

    first, state_file = 0, args.state / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        net.load_state_dict(state["net"]), ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]

    start, losses = time.perf_counter(), []
    for step in range(first, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LEARNING_RATE * schedule(step, args.steps)
        clean = crop_latents(latents, np.random.default_rng((args.seed, step)))
        generators = [generator("cpu", args.seed, step, i) for i in range(len(clean))]
        timestep, sigma = flow.draw_timesteps(generators)
        noise = draw_noise(clean.shape[1:], generators)
        # A CPU's flash attention is slow in the backward pass.
        with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16):
            velocity = net(
                hidden_states=interpolate(clean, noise, sigma),
                encoder_hidden_states=embeds.expand(len(clean), -1, -1),
                pooled_projections=pooled.expand(len(clean), -1),
                timestep=timestep,
            ).sample
        loss = flow.loss(velocity, clean, noise, sigma).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            decay = min(EMA_DECAY, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)

        losses.append(loss.item())
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == args.steps:
            print(f"{step + 1} loss {np.mean(losses):.4f} {time.perf_counter() - start:.0f}s", flush=True)
            losses.clear()
            save(net, ema, optimizer, step + 1, state_file, args.pipeline)


def schedule(step: int, steps: int) -> float:
    return min((step + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * step / steps))


def start_blocks_at_zero(net: SD3Transformer2DModel) -> None:
    """DiT's adaLN-Zero: every block starts as the identity, the output at zero."""
    for block in net.transformer_blocks:
        for linear in (block.norm1.linear, block.norm1_context.linear):
            torch.nn.init.zeros_(linear.weight), torch.nn.init.zeros_(linear.bias)
    for linear in (net.norm_out.linear, net.proj_out):
        torch.nn.init.zeros_(linear.weight), torch.nn.init.zeros_(linear.bias)


@torch.no_grad()
def encode_photos(photos: Path, coder: LatentCoder, cache: Path) -> torch.Tensor:
    """Scaled latents `(2N, 16, 32, 32)` of every 256x256 tile and its mirror image."""
    if cache.exists():
        return torch.load(cache, weights_only=True)
    tiles = torch.from_numpy(Photos(photos).tiles).permute(0, 3, 1, 2)
    tiles = torch.cat([tiles, tiles.flip(-1)])
    with torch.autocast("cpu", torch.bfloat16):
        latents = torch.cat([coder.encode(batch / 255) for batch in tiles.split(16)])
    cache.parent.mkdir(parents=True, exist_ok=True)
    torch.save(latents.half(), cache)
    return latents.half()


def crop_latents(latents: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """A batch `(B, 16, h, w)` of one shape, about `TOKENS_PER_STEP` tokens of 2x2 latents."""
    height, width = SHAPES[rng.integers(len(SHAPES))]
    crops = []
    for _ in range(TOKENS_PER_STEP * 4 // (height * width)):
        top, left = rng.integers(32 - height + 1), rng.integers(32 - width + 1)
        crops.append(latents[rng.integers(len(latents)), :, top : top + height, left : left + width])
    return torch.stack(crops).float()


def save(net, ema, optimizer, step: int, state_file: Path, pipeline: Path) -> None:
    copy.deepcopy(ema).half().save_pretrained(pipeline / "transformer")
    state = {"net": net.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    torch.save(state, state_file.with_suffix(".tmp"))
    state_file.with_suffix(".tmp").replace(state_file)


if __name__ == "__main__":
    main()
