"""Trains tiny-sd3's autoencoder: diffusers' `AutoencoderDC`, 8x down, 16 channels.

    python scripts/tiny_vae.py --photos outputs/tiny/photos/train --output outputs/tiny/vae

It starts as the best linear code of 8x8 pixel blocks (PCA), which its shortcuts and zeroed residual branches let it
hold exactly, and learns from there: two CPU cores cannot afford to find that code by gradient descent. The loss is L1
plus MSE: no learned metric, so that the demo's ST-LPIPS stays a test. The decoder sees slightly noisy latents, because
at sampling time it gets the transformer's, not the encoder's. The same command continues a run that was stopped.
"""

import argparse
import copy
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC
from diffusers.models.autoencoders.autoencoder_dc import DCDownBlock2d, DCUpBlock2d, ResBlock
from photos import Photos, held_out_crops, psnr

CONFIG = dict(
    latent_channels=16,
    encoder_block_out_channels=(12, 12, 48, 192),  # 3 * 4, * 4, * 4: nothing is lost on the way down
    decoder_block_out_channels=(48, 48, 96, 192),
    encoder_layers_per_block=(0, 1, 2, 2),
    decoder_layers_per_block=(0, 1, 2, 4),
    encoder_qkv_multiscales=((), (), (), ()),
    decoder_qkv_multiscales=((), (), (), ()),
    encoder_block_types="ResBlock",
    decoder_block_types="ResBlock",
    encoder_out_shortcut=False,
    decoder_in_shortcut=False,
)
CROP, BATCH, PEAK_LEARNING_RATE, EMA_DECAY, LATENT_NOISE = 64, 16, 1e-3, 0.999, 0.03
STILL, OFFSET = 3.0, 1.5  # see start_at_linear_code
SAVE_EVERY = 250


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True, help="folder of tiles (tiny_photos.py)")
    parser.add_argument("--output", type=Path, required=True, help="folder for the diffusers model and the state")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    # Moments of unused weights fade into denormals, which cost a CPU a factor of ten; before any thread starts.
    torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)
    photos, test = Photos(args.photos), held_out_crops(128)
    vae = AutoencoderDC(**CONFIG).to(memory_format=torch.channels_last)
    start_at_linear_code(vae, photos)
    ema = copy.deepcopy(vae).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-3)
    print(f"{sum(p.numel() for p in vae.parameters()) / 1e6:.2f}M parameters, {len(photos)} tiles", flush=True)

    first, state_file = 0, args.output / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        vae.load_state_dict(state["vae"]), ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]

    print(f"start: psnr {score(ema, test):.2f}", flush=True)
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
            seconds = time.perf_counter() - start
            print(f"{step + 1} loss {loss.item():.4f} psnr {score(ema, test):.2f} {seconds:.0f}s", flush=True)
            save(vae, ema, optimizer, step + 1, photos, args.output)


@torch.no_grad()
def start_at_linear_code(vae: AutoencoderDC, photos: Photos) -> None:
    """Makes encoder and decoder the first 16 principal components of 8x8 blocks, and back.

    Components are divided by the square root of their standard deviation: between pixel scale, which drowns fine
    detail in the flow's noise, and whitening, which makes it as loud as the picture.
    """
    for module in vae.modules():
        if isinstance(module, ResBlock):
            zero(module.norm)
        elif isinstance(module, DCDownBlock2d | DCUpBlock2d):
            zero(module.conv)
    blocks = pixels_by_block(photos.batch(512, 128, seed=(0, 0)))
    _, singular, components = torch.pca_lowrank(blocks, q=16, center=False, niter=4)
    gain = (singular / len(blocks) ** 0.5).rsqrt()

    encoder, decoder = vae.encoder, vae.decoder
    set_center(encoder.conv_in.conv, torch.eye(3))  # the blocks after it shuffle pixels by their shortcuts alone
    set_center(encoder.conv_out, (components * gain).T)

    set_center(decoder.conv_in, components / gain)
    for up in (decoder.up_blocks[2][0], decoder.up_blocks[1][0]):
        inputs, outputs = up.conv.in_channels, up.conv.out_channels
        pixels = 192 if inputs == 192 else 48
        shortcut = torch.eye(inputs).repeat_interleave(outputs // inputs, dim=0)
        set_center(up.conv, torch.eye(outputs, inputs) * (torch.arange(outputs) < pixels)[:, None] - shortcut)
    # The last normalisation keeps the pixels' scale if most of what it sees is constant.
    up.conv.bias[48:] = STILL
    rms = STILL * (36 / 48) ** 0.5
    decoder.norm_out.weight[:12], decoder.norm_out.bias[:12] = rms, OFFSET
    set_center(decoder.conv_out.conv, torch.eye(12, 48))
    decoder.conv_out.conv.bias.fill_(-OFFSET)


def pixels_by_block(images: torch.Tensor) -> torch.Tensor:
    """`(B, 3, H, W) -> (B*H/8*W/8, 192)`, in the order of three pixel-unshuffles."""
    for _ in range(3):
        images = F.pixel_unshuffle(images, 2)
    return images.permute(0, 2, 3, 1).flatten(0, 2)


def zero(module: torch.nn.Module) -> None:
    for parameter in module.parameters():
        torch.nn.init.zeros_(parameter)


def set_center(conv: torch.nn.Conv2d, matrix: torch.Tensor) -> None:
    """Makes a 3x3 convolution the matrix `(out, in)` at its centre."""
    zero(conv)
    conv.weight[:, :, 1, 1] = matrix


@torch.no_grad()
def score(vae: AutoencoderDC, images: torch.Tensor) -> float:
    return psnr(vae.decode(vae.encode(images).latent).sample, images)


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
