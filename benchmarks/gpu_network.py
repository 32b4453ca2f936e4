"""Sections of gpu.py about the network as a whole: evaluations, training steps, restored images, the state before."""

import copy
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UniPCMultistepScheduler
from gpu_measuring import GIB, Bench, distance, summary
from gpu_models import (
    PUBLISHED,
    TINY,
    CUDAGraphs,
    LatentCoder,
    RandomBackbone,
    SuperResolutionData,
    SuperResolutionModule,
    capture_graphs,
    compile_blocks,
    degradation,
    generator,
    inputs,
    make_network,
    merge,
    module,
    restore,
    sampler,
    two_matrices,
)
from lightning import Callback, LightningDataModule, Trainer
from PIL import Image
from torch.utils.data import DataLoader

from dit4sr_pl.model import DiT4SRTransformer

BASE = Path(__file__).resolve().parents[1] / ".base"


def forward(bench: Bench, rows: dict) -> None:
    """Measures an evaluation with 333 text tokens, for one image under guidance (2 sequences) and for eight (16)."""
    backbone = RandomBackbone(bench, 256)
    network = make_network(backbone.transformer)
    unmerged = copy.deepcopy(network.lr_stream)
    merge(network)
    counts = (2, 4) if bench.toy else (2, 16)
    with torch.no_grad():
        for count in counts:
            rows[f"{count} sequences"] = evaluations(bench, network, inputs(bench, backbone, count))
        given, row = inputs(bench, backbone, 2), rows["2 sequences"]
        plain = network(*given)
        merged = exchange(network, torch.nn.Module.to(unmerged, backbone.dtype))
        row["ours, W^L W in every call"] = bench.time(lambda: network(*given))
        with two_matrices():
            row["ours, two matrices as released"] = bench.time(lambda: network(*given))
            row["two matrices against merged"] = distance(network(*given), plain)
        exchange(network, merged)
        if "--before" in sys.argv:
            return
        compile_blocks(network, "inductor" if bench.cuda else "eager")
        for count in counts[:1] if bench.toy else counts:
            compiled(bench, network, inputs(bench, backbone, count), rows[f"{count} sequences"])


def evaluations(bench: Bench, network, given: tuple) -> dict:
    """Returns the times of one evaluation, not compiled."""
    noisy, _, timestep, embeds, pooled = given
    ours, row = partial(network, *given), {}
    row["diffusers"] = bench.time(lambda: network.base(noisy, embeds, pooled, timestep))
    row["ours"] = bench.time(ours)
    row["kernels"] = bench.kernels(ours)
    plain, time_embed = ours(), network.base.time_text_embed(timestep, pooled)
    linears = [norm.linear for each in network.base.transformer_blocks for norm in (each.norm1, each.norm1_context)]
    row["modulations of all blocks"] = bench.time(lambda: [linear(F.silu(time_embed)) for linear in linears])
    for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION") if bench.cuda else ():
        with torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, name)):
            row[f"ours, {name}"] = bench.time(ours)
            row[f"{name} against ours"] = distance(ours(), plain)
    if bench.cuda and "--before" not in sys.argv:
        graphed = partial(CUDAGraphs(network.forward), *given)
        row["ours, CUDA graph"] = bench.time(graphed)
        row["CUDA graph against ours"] = distance(graphed(), plain)
    return row


def compiled(bench: Bench, network, given: tuple, row: dict) -> None:
    """Adds the times of an evaluation whose blocks are compiled."""
    ours, began = partial(network, *given), time.monotonic()
    ours()
    bench.wait()
    row["seconds to compile"] = round(time.monotonic() - began, 1)
    row["ours, compiled"] = bench.time(ours)
    row["kernels, compiled"] = bench.kernels(ours)
    if bench.cuda:
        row["ours, compiled, CUDA graph"] = bench.time(partial(CUDAGraphs(network.forward), *given))


def exchange(network, stream):
    """Puts an LR stream into a network and returns the one before."""
    before, network.lr_stream = network.lr_stream, stream
    for block, share in zip(network.blocks, stream.blocks, strict=True):
        block.lr = share
    return before


class Clock(Callback):
    """A callback that marks the end of every training step, and watches the last one for waits of the host."""

    def __init__(self, bench: Bench, steps: int):
        self.bench, self.steps, self.marks, self.before = bench, steps, [], 0

    def on_train_batch_end(self, trainer: Trainer, *_) -> None:
        """Marks the moment."""
        self.marks.append(self.bench.mark())
        self.bench.watch(len(self.marks) == self.steps - 1)
        if len(self.marks) == 1 and self.bench.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()

    def row(self, warm: int) -> dict:
        """Returns the median of the steps after the first `warm` ones, and the peak of memory."""
        self.bench.wait()
        pairs = zip(self.marks, self.marks[1:-1], strict=False)  # the last step is watched, which takes time
        times = [self.bench.between(*pair) for pair in pairs][warm:]
        row = {"step, s": round(statistics.median(times) / 1e3, 4)}
        if self.bench.cuda:
            peak = torch.cuda.max_memory_allocated()
            row |= {"peak, GiB": peak / GIB, "peak above weights and moments, GiB": (peak - self.before) / GIB}
        return row


def fit(bench: Bench, training: SuperResolutionModule, data: LightningDataModule, steps: int, warm: int) -> dict:
    """Returns seconds per step, waits of the host and the peak of memory of a training by Lightning."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # hides its list of devices and its tips
    clock = Clock(bench, steps)
    trainer = Trainer(
        accelerator="gpu" if bench.cuda else "cpu",
        devices=1,
        precision="bf16-mixed" if bench.cuda else "32-true",
        max_steps=steps,
        max_epochs=-1,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=[clock],
        **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    )
    with bench.waits() as lines:
        trainer.fit(training, data)
    bench.watch(False)
    return clock.row(warm) | {"waits of the host in a step": summary(lines)}


class OneBatch(LightningDataModule):
    """One batch of training on the device, with all that a step reads, as often as it is asked for."""

    def __init__(self, data: SuperResolutionData, device: torch.device, steps: int):
        super().__init__()
        self.data, self.device, self.steps = data, device, steps

    def setup(self, stage: str) -> None:
        """Makes the batch."""
        data = self.data
        data.step_inputs = getattr(self.trainer.lightning_module, "step_inputs", None)  # since 6d90829
        batch = data.transfer_batch_to_device(next(iter(data.train_dataloader())), self.device, 0)
        self.batches = [data.on_after_batch_transfer(batch, 0)] * self.steps

    def train_dataloader(self) -> DataLoader:
        """Returns the batches."""
        return DataLoader(self.batches, batch_size=None, collate_fn=lambda batch: batch)

    def transfer_batch_to_device(self, batch: dict, device: torch.device, dataloader_idx: int) -> dict:
        """Returns the batch as it is."""
        return batch


def photos(bench: Bench, folder: str, workers: int) -> SuperResolutionData:
    """Returns the data of a training on random photos, which it writes into a folder."""
    side, batch = (256, 2) if bench.toy else (512, 8)
    for index in range(2 * batch):
        pixels = torch.randint(256, (side + 64, side + 64, 3), generator=generator("cpu", index), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(Path(folder) / f"{index}.png")
    options = {"num_workers": workers, "min_gradient": 0.0, "photos_in_memory": 2 * batch}
    return SuperResolutionData(folder, [], degradation(), crop_size=side, batch_size=batch, **options)


def training(bench: Bench, rows: dict) -> None:
    """Measures steps of 8 crops of 512x512 on a batch that is ready: encoding, network, optimizer, Lightning."""
    steps, warm = (3, 0) if bench.toy else (8, 3)
    folder = tempfile.TemporaryDirectory()
    photo_data = photos(bench, folder.name, workers=0)
    data = OneBatch(photo_data, bench.device, steps)
    variants = {"not checkpointed": {"gradient_checkpointing": False}, "checkpointed": {"gradient_checkpointing": True}}
    if "--before" not in sys.argv and bench.cuda:
        variants["compiled, not checkpointed"] = {"gradient_checkpointing": False, "compile": True}
    for name, options in variants.items():
        if options.get("compile") and bench.left < 100:
            continue
        began = time.monotonic()
        row = rows[name] = fit(bench, module(bench, **options), data, steps, warm)
        row["images per second"] = photo_data.batch_size / row["step, s"]
        row["seconds in all"] = round(time.monotonic() - began, 1)
        bench.free()
    folder.cleanup()
    if "--before" not in sys.argv and bench.left > 60:
        for name in ("not checkpointed",) if bench.toy else ("not checkpointed", "checkpointed"):
            rows[name]["activations by plan, GiB"] = planned(bench, variants[name]) / GIB


def planned(bench: Bench, options: dict) -> int:
    """Returns the bytes that `plan` counts for what the peak is measured of."""
    from dit4sr_pl.planning.meta_backbone import MetaBackbone
    from dit4sr_pl.planning.step_cost import step_cost

    meta = MetaBackbone(TINY if bench.toy else PUBLISHED, "bfloat16")
    network = meta.network(partial(DiT4SRTransformer, **options))
    sizes = {"batch": 2, "image": 64} if bench.toy else {"batch": 8, "image": 512}
    optimizer = partial(torch.optim.AdamW, lr=5e-5, fused=True)
    sizes |= {"text_tokens": meta.text_tokens(77), "precision": "bf16-mixed"}
    return step_cost(network, meta.coder(), optimizer, **sizes).activations


def lightning(bench: Bench, rows: dict) -> None:
    """Measures whole training steps: 8 workers that decode and crop, degradation, network."""
    steps, warm = (3, 0) if bench.toy else (14, 5)
    with tempfile.TemporaryDirectory() as folder:
        data = photos(bench, folder, workers=1 if bench.toy else 8)
        rows |= fit(bench, module(bench, gradient_checkpointing=False), data, steps, warm)
    rows["images per second"] = data.batch_size / rows["step, s"]


def restoring(bench: Bench, rows: dict) -> None:
    """Measures 128x128 to 512x512 from pixels to pixels, without captions and files."""
    backbone = RandomBackbone(bench, 256)
    network, coder = make_network(backbone.transformer), LatentCoder(backbone.vae)
    merge(network)
    euler, side = sampler(bench), 32 if bench.toy else 128
    unipc = partial(UniPCMultistepScheduler.from_config, prediction_type="flow_prediction", use_flow_sigmas=True)
    fewer = sampler(bench, solver=unipc, steps=2 if bench.toy else 12)

    def images(net, chosen, count: int) -> torch.Tensor:
        lr = torch.rand(count, 3, side, side, generator=generator("cpu", "images"))
        draws = [generator("cpu", "restore", 0, str(image)) for image in range(count)]
        parts = coder, backbone.prompts, backbone.scheduler
        return restore(net, *parts, chosen, lr, (4 * side, 4 * side), [""] * count, draws, device=bench.device)

    def seconds(net, chosen, count: int) -> float:
        images(net, replace(chosen, steps=2), count)
        times = []
        for _ in range(1 if count > 1 or bench.toy else 3):
            began = time.perf_counter()
            images(net, chosen, count)  # its result is on the CPU
            times.append((time.perf_counter() - began) / count)
        return round(statistics.median(times), 4)

    counts = (1, 2) if bench.toy else (1, 8)
    for count in counts:
        rows[f"{count} at a time, s per image"] = seconds(network, euler, count)
    rows["waits of the host in all steps"] = bench.waits_of(lambda: images(network, euler, 1))
    rows["12 UniPC steps, s per image"] = seconds(network, fewer, 1)
    if bench.cuda:
        plain = images(network, euler, 1)
        capture_graphs(network)
        for count in counts:
            rows[f"CUDA graph, {count} at a time, s per image"] = seconds(network, euler, count)
        rows["CUDA graph against plain"] = distance(images(network, euler, 1), plain)
        rows["CUDA graph, 12 UniPC steps, s per image"] = seconds(network, fewer, 1)
        network.forward = network.forward.function
        compile_blocks(network)
        capture_graphs(network)
        rows["compiled, CUDA graph, s per image"] = seconds(network, euler, 1)


def before(bench: Bench, rows: dict) -> None:
    """Runs `forward` and `training` on the state before, whose sources lie in `.base/`, in a process of its own."""
    folder = bench.out / "before"
    command = [sys.executable, Path(__file__).with_name("gpu.py"), "--only", "forward", "training", "--before"]
    command += ["--out", folder, "--device", str(bench.device), "--minutes", str(max(bench.left, 0) / 60)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(BASE / "src"), os.environ.get("PYTHONPATH", "")])}
    bench.free()
    subprocess.run([*command, *["--toy"] * bench.toy], env=environment, check=True, stdout=subprocess.DEVNULL)
    sections = json.loads((folder / "results.json").read_text())["sections"]
    rows |= {f"{section}, {name}": row for section, found in sections.items() for name, row in found.items()}
