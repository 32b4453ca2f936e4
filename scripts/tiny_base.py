"""Trains tiny-sd3's transformer on latents of its autoencoder, as SD3 trains: rectified flow on empty prompts.

    python scripts/tiny_base.py --photos outputs/tiny/photos --pipeline src/dit4sr_pl/assets/tiny-sd3 --minutes 60
    python scripts/tiny_base.py --photos ... --pipeline ... --minutes 20 --phase decay

The first command trains at a constant learning rate, and the same command resumes where it stopped. The second lets
the learning rate of a copy fall to zero over its time, so that training ends well after any number of constant
minutes; the constant phase can go on from its own state afterwards. Both write their averaged weights, as a whole
pipeline, to `tiny-sd3/` in the folder of the state, and print the held-out loss at several noise levels.

The script runs on two CPU cores or on one GPU and resumes on either: the state of a phase is two files of weights in
half precision, the network's and their average's (23 MiB each; without the second, averaging begins anew). The
optimizer's moments are warmed up anew after a resume. Crops have several shapes, so that the transformer knows
positions from 8x8 to 16x16 tokens (128 to 256 pixels). Latents are computed once and are kept next to the state.
"""

import argparse
import copy
import shutil
import time
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from photos import Photos
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit4sr_pl.backbone.autoencoder import LatentCoder
from dit4sr_pl.backbone.flow import RectifiedFlow, interpolate
from dit4sr_pl.backbone.sd3 import Backbone
from dit4sr_pl.common.files import atomic_write
from dit4sr_pl.common.randomness import generator
from dit4sr_pl.training.learning_rate import LearningRateSchedule

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
TOKENS = {"cpu": 32 * 64, "cuda": 512 * 64}  # per step, all crops together
EMA_DECAY = 0.9993
WARM_UP = 300  # steps
SAVE_EVERY = 180  # seconds
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # sigmas at which the held-out loss is measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True, help="folder with train/ and held_out/ (tiny_photos.py)")
    parser.add_argument("--pipeline", type=Path, required=True, help="the other parts of tiny-sd3 (tiny_pipeline.py)")
    parser.add_argument("--state", type=Path, default=Path("outputs/tiny/base"), help="folder to resume from")
    parser.add_argument("--start", type=Path, help="transformer to start from, if there is no state (default: new)")
    parser.add_argument("--phase", choices=("constant", "decay"), default="constant")
    parser.add_argument("--minutes", type=float, required=True, help="time for training; 0 only measures and writes")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="after the warm-up, before the decay")
    parser.add_argument("--tokens", type=int, help="per step (default: 2048 on a CPU, 32768 on a GPU)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    # Moments of unused weights fade into denormals, which cost a CPU a factor of ten; before any thread starts.
    torch.set_flush_denormal(True)
    device = torch.device(best_device() if args.device == "auto" else args.device)
    backbone = Backbone(str(args.pipeline), "float32", t5_tokens=8)
    backbone.to(device)
    training = Training(args, backbone, device)
    print(f"{training.describe()} on {device}", flush=True)
    training.run(args.minutes * 60)
    training.save()
    write_pipeline(training.ema, args.pipeline, args.state / "tiny-sd3")
    if args.phase == "decay":  # it is complete; the next decay starts from the constant phase again
        for file in training.files(args.phase).values():
            file.unlink()
    print(f"{args.phase} step {training.step}: {training.score()}")


def best_device() -> str:
    """Returns `cuda` if there is a GPU, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


class Training:
    """Network, average, optimizer and data of one phase.

    Args:
        args: of the command line.
        backbone: the frozen parts.
        device: to train on.
    """

    def __init__(self, args: argparse.Namespace, backbone: Backbone, device: torch.device):
        self.device, self.seed, self.phase, self.folder = device, args.seed, args.phase, args.state
        self.learning_rate, self.tokens = args.learning_rate, args.tokens or TOKENS[device.type]
        self.flow = RectifiedFlow(backbone.scheduler, "velocity")
        with torch.no_grad():
            self.embeds, self.pooled = backbone.prompts([""], device)
        self.latents = encode_photos(args.photos / "train", backbone.coder, device, args.state / "train.pt")
        self.held_out = encode_photos(args.photos / "held_out", backbone.coder, device, args.state / "held_out.pt")

        torch.manual_seed(args.seed)
        self.net = start_blocks_at_zero(SD3Transformer2DModel(**CONFIG))
        if args.start:
            self.net = SD3Transformer2DModel.from_pretrained(args.start, torch_dtype=torch.float32)
        self.net.to(device)
        self.ema = copy.deepcopy(self.net).eval().requires_grad_(False)
        self.step, self.progress = 0, 0.0  # progress: share of a decay that is done
        self.load(args.phase if self.files(args.phase)["net"].exists() else "constant")
        schedule = LearningRateSchedule("constant_with_warmup", WARM_UP, 1, 1.0, None, float(args.phase == "decay"))
        self.rising, self.falling = schedule.over(-1, self.learning_rate), schedule.decayed
        for block in self.net.transformer_blocks if args.compile else []:
            block.compile(dynamic=True)
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=1e-2, fused=True
        )

    def describe(self) -> str:
        """Returns sizes and the step to begin at, in one line."""
        parameters = sum(parameter.numel() for parameter in self.net.parameters()) / 1e6
        return f"{parameters:.2f}M parameters, {len(self.latents)} latents, step {self.step}, {self.tokens} tokens"

    def run(self, seconds: float) -> None:
        """Trains for a number of seconds, which the decay of the learning rate fills."""
        begun = saved = time.perf_counter()
        first, progress, losses = self.step, self.progress, []
        while (elapsed := time.perf_counter() - begun) < seconds:
            if self.phase == "decay":
                self.progress = progress + (1 - progress) * elapsed / seconds
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate * self.rising(self.step - first) * self.falling(self.progress)
            losses.append(self.train_step())
            if time.perf_counter() - saved > SAVE_EVERY:
                saved = time.perf_counter()
                rate = (self.step - first) / (saved - begun)
                mean = torch.stack(losses).mean().item()
                print(f"step {self.step} loss {mean:.4f} {rate:.2f} steps/s; {self.score()}", flush=True)
                losses.clear()
                self.save()

    def train_step(self) -> Tensor:
        """Makes one step of a batch that depends on the seed and the step alone, and returns the loss."""
        draws = generator("cpu", self.seed, "base", self.step)
        clean = crop_latents(self.latents, self.tokens, draws)
        timestep, sigma = (values.to(self.device) for values in self.flow.draw_timesteps([draws] * len(clean)))
        noise = torch.randn(clean.shape, device=self.device, generator=generator(self.device, self.seed, self.step))
        loss = self.losses(self.net, clean, noise, timestep, sigma).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        with torch.no_grad():
            decay = min(EMA_DECAY, self.step / (self.step + 9))
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.net.parameters()), 1 - decay)
        return loss.detach()

    def losses(
        self, net: SD3Transformer2DModel, clean: Tensor, noise: Tensor, timestep: Tensor, sigma: Tensor
    ) -> Tensor:
        """Returns a network's loss per image `(B,)`."""
        with attention_of(self.device), torch.autocast(self.device.type, torch.bfloat16, enabled=fast(self.device)):
            velocity = net(
                hidden_states=interpolate(clean, noise, sigma),
                encoder_hidden_states=self.embeds.expand(len(clean), -1, -1),
                pooled_projections=self.pooled.expand(len(clean), -1),
                timestep=timestep,
            ).sample
        return self.flow.loss(velocity, clean, noise, sigma)

    @torch.no_grad()
    def score(self) -> str:
        """Returns the averaged network's held-out loss at each noise level of `LEVELS`, and their mean."""
        clean = self.held_out[:: max(1, len(self.held_out) // 128)].float()
        clean = torch.cat([clean[i::2, :, y : y + 16, x : x + 16] for i, (y, x) in enumerate([(0, 8), (16, 4)])])
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        tables, losses = (self.flow.timesteps, self.flow.sigmas), []
        for level in LEVELS:
            index = (self.flow.sigmas - level).abs().argmin()
            timestep, sigma = (table[index].expand(len(clean)).to(self.device) for table in tables)
            parts = zip(*(part.split(32) for part in (clean, noise, timestep, sigma)), strict=True)
            losses.append(torch.cat([self.losses(self.ema, *part) for part in parts]).mean().item())
        each = " ".join(f"{level}: {loss:.4f}" for level, loss in zip(LEVELS, losses, strict=True))
        return f"held-out loss {sum(losses) / len(losses):.4f} ({each})"

    def files(self, phase: str) -> dict[str, Path]:
        """Returns the files of a phase's state."""
        return {"net": self.folder / f"{phase}.pt", "ema": self.folder / f"{phase}_average.pt"}

    def load(self, phase: str) -> None:
        """Reads the state of a phase, if there is one."""
        files = self.files(phase)
        if files["net"].exists():
            state = torch.load(files["net"], map_location=self.device, weights_only=True)
            average = files["ema"] if files["ema"].exists() else files["net"]
            self.net.load_state_dict(state["weights"])
            self.ema.load_state_dict(torch.load(average, map_location=self.device, weights_only=True)["weights"])
            self.step, self.progress = state["step"], state["progress"]

    def save(self) -> None:
        """Writes the state of the phase."""
        for name, file in self.files(self.phase).items():
            weights = {key: weight.half() for key, weight in getattr(self, name).state_dict().items()}
            with atomic_write(file) as partial:
                torch.save({"weights": weights, "step": self.step, "progress": self.progress}, partial)


def fast(device: torch.device) -> bool:
    """Tells whether a device has instructions for bfloat16; a CPU without them emulates it thirty times slower."""
    return device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()


def attention_of(device: torch.device) -> AbstractContextManager:
    """Returns a context in which attention is fast: a CPU's flash attention is slow in the backward pass."""
    return sdpa_kernel([SDPBackend.MATH] if device.type == "cpu" else list(SDPBackend.__members__.values())[1:])


def start_blocks_at_zero(net: SD3Transformer2DModel) -> SD3Transformer2DModel:
    """Starts every block as the identity and the output at zero, which is DiT's adaLN-Zero."""
    linears = [norm.linear for block in net.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    for linear in (*linears, net.norm_out.linear, net.proj_out):
        torch.nn.init.zeros_(linear.weight), torch.nn.init.zeros_(linear.bias)
    return net


@torch.no_grad()
def encode_photos(photos: Path, coder: LatentCoder, device: torch.device, cache: Path) -> Tensor:
    """Returns scaled latents `(2N, 16, 32, 32)` of the N tiles in a folder and of their mirror images, in float16."""
    if cache.exists():
        cached = torch.load(cache, weights_only=True)
        if cached["names"] == sorted(path.name for path in photos.iterdir()):
            return cached["latents"].to(device)
    tiles = torch.from_numpy(Photos(photos).tiles).permute(0, 3, 1, 2)
    batches = torch.cat([tiles, tiles.flip(-1)]).split(16)
    latents = torch.cat([coder.encode(batch.to(device) / 255).half() for batch in batches])
    with atomic_write(cache) as partial:
        torch.save({"names": sorted(path.name for path in photos.iterdir()), "latents": latents.cpu()}, partial)
    return latents


def crop_latents(latents: Tensor, tokens: int, draws: torch.Generator) -> Tensor:
    """Returns a batch `(B, 16, h, w)` of one shape, with about `tokens` tokens of 2x2 latents."""
    height, width = SHAPES[torch.randint(len(SHAPES), (), generator=draws)]
    batch = max(1, tokens * 4 // (height * width))
    place = lambda count: torch.randint(count, (batch,), generator=draws).to(latents.device)  # noqa: E731
    tile, top, left = place(len(latents)), place(33 - height), place(33 - width)
    rows = top[:, None, None] + torch.arange(height, device=latents.device)[:, None]
    columns = left[:, None, None] + torch.arange(width, device=latents.device)
    return latents[tile[:, None, None], :, rows, columns].permute(0, 3, 1, 2).float().contiguous()


def write_pipeline(transformer: SD3Transformer2DModel, pipeline: Path, output: Path) -> None:
    """Writes a whole pipeline: the given transformer in half precision with the other parts of `pipeline`."""
    shutil.copytree(pipeline, output, dirs_exist_ok=True, ignore=shutil.ignore_patterns("transformer"))
    transformer = copy.deepcopy(transformer).half()
    transformer.register_to_config(_name_or_path="tiny-sd3")  # not the folder it started from
    transformer.save_pretrained(output / "transformer")


if __name__ == "__main__":
    main()
