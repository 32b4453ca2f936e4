"""Trains tiny-sd3's autoencoder: diffusers' `AutoencoderDC`, 8x down, 16 channels.

    python scripts/tiny_vae.py --photos outputs/tiny/photos --output outputs/tiny/vae

Its pixel-unshuffle shortcuts make the start nearly linear, which two CPU cores need. The loss is L1 plus MSE:
no learned metric, so that the demo's ST-LPIPS stays a test. The decoder sees slightly noisy latents, because at
sampling time it gets the transformer's, not the encoder's. The same command continues a run that was stopped.
"""

import argparse
import copy
import time
from pathlib import Path

import torch
from diffusers import AutoencoderDC
from diffusers.models.autoencoders.autoencoder_dc import ResBlock
from photos import Photos, held_out_crops, psnr

CONFIG = dict(
    latent_channels=16,
    encoder_block_out_channels=(48, 48, 96, 192),
    decoder_block_out_channels=(48, 48, 96, 192),
    encoder_layers_per_block=(0, 1, 1, 2),
    decoder_layers_per_block=(0, 1, 2, 4),
    encoder_qkv_multiscales=((), (), (), ()),
    decoder_qkv_multiscales=((), (), (), ()),
    encoder_block_types="ResBlock",
    decoder_block_types="ResBlock",
)
CROP, BATCH, PEAK_LEARNING_RATE, EMA_DECAY, LATENT_NOISE = 64, 16, 2e-3, 0.999, 0.03
SAVE_EVERY = 250


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True, help="folder of PNG tiles (tiny_photos.py)")
    parser.add_argument("--output", type=Path, required=True, help="folder for the diffusers model and the state")
    parser.add_argument("--steps", type=int, default=14_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    vae = AutoencoderDC(**CONFIG).to(memory_format=torch.channels_last)
    for module in vae.modules():
        if isinstance(module, ResBlock):  # residual branches start at zero: the first steps fit a linear code
            torch.nn.init.zeros_(module.norm.weight)
    ema = copy.deepcopy(vae).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-3)
    photos, test = Photos(args.photos), held_out_crops(128)
    print(f"{sum(p.numel() for p in vae.parameters()) / 1e6:.2f}M parameters, {len(photos)} tiles", flush=True)

    first, state_file = 0, args.output / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        vae.load_state_dict(state["vae"]), ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]

    start = time.perf_counter()
    for step in range(first, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LEARNING_RATE * min((step + 1) / 200, 1 - step / args.steps)
        images = photos.batch(BATCH, CROP, seed=(args.seed, step)).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(images).latent
            noise = LATENT_NOISE * latents.detach().std() * torch.randn_like(latents)
            restored = vae.decode(latents + noise).sample
        error = restored.float() - images
        loss = error.abs().mean() + error.square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(vae.parameters()), 1 - decay)

        if (step + 1) % SAVE_EVERY == 0 or step + 1 == args.steps:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                score = psnr(ema.decode(ema.encode(test).latent).sample.float(), test)
            print(f"{step + 1} loss {loss.item():.4f} psnr {score:.2f} {time.perf_counter() - start:.0f}s", flush=True)
            save(vae, ema, optimizer, step + 1, photos, args.output)


@torch.no_grad()
def save(vae, ema, optimizer, step: int, photos: Photos, folder: Path) -> None:
    """The EMA weights as a diffusers folder, its latents scaled to unit variance, and the state to go on from."""
    folder.mkdir(parents=True, exist_ok=True)
    latents = ema.encode(photos.batch(64, 128, seed=(0, 0))).latent
    ema.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    ema.save_pretrained(folder)
    state = {"vae": vae.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    torch.save(state, folder / "state.tmp")
    (folder / "state.tmp").replace(folder / "state.pt")


if __name__ == "__main__":
    main()
