"""Sections of gpu.py about parts: the machine, degradation, autoencoder, text encoder, single kernels."""

import copy
import json
import sys
import time
from functools import partial

import diffusers
import torch
import torch.nn.functional as F
from gpu_measuring import GIB, Bench, distance
from gpu_models import PUBLISHED, LatentCoder, RandomBackbone, degradation, draw_noise, generator
from torch import Tensor, nn


def environment(bench: Bench, rows: dict) -> None:
    """Measures what the machine can do, which bounds everything else."""
    rows |= {"python": sys.version.split()[0], "torch": torch.__version__, "diffusers": diffusers.__version__}
    if not bench.cuda:
        return
    card = torch.cuda.get_device_properties(bench.device)
    rows |= {"card": card.name, "memory, GiB": round(card.total_memory / GIB, 1), "CUDA": torch.version.cuda}
    rows["cuDNN"] = torch.backends.cudnn.version()
    rows["order of attention backends"] = " ".join(str(each) for each in torch._C._get_sdp_priority_order())
    here, there = (torch.randn(2**30, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    rows["copy, TB/s"] = 2 * here.nbytes / bench.time(lambda: there.copy_(here))["ms"] / 1e9
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    rows["bfloat16 products, TFLOP/s"] = 2 * 8192**3 / bench.time(lambda: a @ b)["ms"] / 1e9
    small = torch.ones(8, device="cuda")
    rows["launch, us"] = bench.time(lambda: [small.add_(1) for _ in range(1000)])["launch_ms"]


def degrading(bench: Bench, rows: dict) -> None:
    """Measures the degradation of 8 crops on the device and on the CPU."""
    chain, count, side = degradation(), 2 if bench.toy else 8, 256 if bench.toy else 512
    images = torch.rand(count, 3, side, side, generator=generator("cpu", "images"))
    params, there = chain.draw(range(count), (side, side)), images.to(bench.device)
    rows["draw"] = bench.time(lambda: chain.draw(range(count), (side, side)), 5)
    rows["on the device"] = bench.time(lambda: chain(there, params), 5)
    rows["kernels"] = bench.kernels(lambda: chain(there, params))
    rows["waits of the host"] = bench.waits_of(lambda: chain(there, params))
    began = time.perf_counter()
    here = chain(images, params)[0]
    rows["on the CPU, s"] = round(time.perf_counter() - began, 3)
    rows["LR values that differ between CPU and device"] = changed(chain(there, params)[0], here)
    precise = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # as in training
    rows["LR values that TensorFloat-32 changes"] = changed(chain(there, params)[0], here)
    torch.set_float32_matmul_precision(precise)
    latents = torch.empty(8, 16, 64, 64, device=bench.device)
    draws = [generator("cpu", index) for index in range(8)]
    rows["noise of 8 latents"] = bench.time(lambda: draw_noise(latents.shape[1:], draws), 5)


def changed(ours: Tensor, reference: Tensor) -> float:
    """Returns the share of 8-bit values that differ."""
    return float(((ours.cpu() - reference.cpu()).abs() > 1e-3).float().mean())


def autoencoder(bench: Bench, rows: dict) -> None:
    """Measures encoding and decoding: together and one by one, by memory format, compiled."""
    coder = LatentCoder(RandomBackbone(bench, 77).vae)
    count, side = (2, 64) if bench.toy else (8, 512)
    images = torch.rand(count, 3, side, side, device=bench.device)
    with torch.autocast(bench.device.type, torch.bfloat16, enabled=bench.cuda, cache_enabled=False):
        rows["encode, under autocast"] = bench.time(lambda: coder.encode(images), 5)
        plain = coder.encode(images)
    rows["encode"] = bench.time(lambda: coder.encode(images), 5)
    rows["autocast against without"] = distance(plain, coder.encode(images))
    latents = coder.encode(images)
    rows["decode"] = bench.time(lambda: coder.decode(latents), 5)
    rows["decode one by one"] = bench.time(lambda: [coder.decode(each) for each in latents.split(1)], 5)
    rows["encode one"] = bench.time(lambda: coder.encode(images[:1]))
    rows["decode one"] = bench.time(lambda: coder.decode(latents[:1]))
    coder.vae.to(memory_format=torch.channels_last)
    last = images.contiguous(memory_format=torch.channels_last)
    rows["encode, channels last"] = bench.time(lambda: coder.encode(last), 5)
    rows["decode, channels last"] = bench.time(lambda: coder.decode(latents), 5)
    rows["channels last against plain"] = distance(coder.encode(last), latents)
    if bench.cuda and bench.left > 90:
        coder.vae.decoder.compile(dynamic=False)
        began = time.monotonic()
        rows["decode, compiled"] = bench.time(lambda: coder.decode(latents), 5)
        rows["seconds to compile"] = round(time.monotonic() - began, 1)


def text(bench: Bench, rows: dict) -> None:
    """Measures T5-XXL with random weights: 8 prompts one by one and together."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(**json.loads((PUBLISHED / "text_encoder_3/config.json").read_text()))
    if bench.toy:
        config.num_layers, config.d_model, config.d_ff, config.num_heads, config.d_kv = 1, 32, 32, 1, 16
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(bench.device):
            t5 = T5EncoderModel(config).eval()
    finally:
        torch.set_default_dtype(dtype)
    with torch.no_grad():
        for tokens in (77, 256):
            ids = torch.randint(0, config.vocab_size, (8, tokens), device=bench.device)
            row = rows[f"8 prompts of {tokens} tokens"] = {}
            row["one by one"] = bench.time(lambda ids=ids: [t5(each) for each in ids.split(1)], 3, 1)
            row["together"] = bench.time(lambda ids=ids: t5(ids), 3, 1)
            row["together against one by one"] = distance(t5(ids)[0][:1], t5(ids[:1])[0])


def kernels(bench: Bench, rows: dict) -> None:
    """Measures single operations at the network's sizes, each next to its alternatives."""
    half = torch.bfloat16 if bench.cuda else torch.float32
    sizes = ((1, 2, 16),) if bench.toy else ((2, 24, 2381), (2, 24, 2048), (8, 24, 2202))
    for batch, heads, tokens in sizes:
        rows[f"attention {batch} x {tokens}"] = attention(bench, (batch, heads, tokens, 64), half)
    for batch in (2,) if bench.toy else (2, 16):
        width, side = (64, 4) if bench.toy else (1536, 32)
        rows[f"norms, batch {batch}"] = norms(bench, batch, side * side, width, half)
        rows[f"injection, batch {batch}"] = injection(bench, batch, side, 4 * width, half)
        rows[f"products, batch {batch}"] = products(bench, batch * side * side, width, half)


def attention(bench: Bench, shape: tuple[int, ...], half: torch.dtype) -> dict:
    """Returns the times of attention by each backend, and its error against float64."""
    row, names = {}, ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION") if bench.cuda else ("MATH",)
    q, k, v = (torch.randn(shape, device=bench.device, dtype=half, requires_grad=True) for _ in range(3))
    reference = (q[0, 0].double() @ k[0, 0].double().T / 8).softmax(-1) @ v[0, 0].double()
    run, grad = partial(F.scaled_dot_product_attention, q, k, v), torch.randn_like(q)
    for name in names:
        with torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, name)):
            with torch.no_grad():
                row[name] = bench.time(run)
                row[f"{name}, error"] = distance(run()[0, 0], reference)
            row[f"{name}, with backward"] = bench.time(lambda: run().backward(grad), 5)
    return row


def norms(bench: Bench, batch: int, tokens: int, width: int, half: torch.dtype) -> dict:
    """Returns the times of an RMS norm over heads."""
    from diffusers.models.normalization import RMSNorm

    norm = RMSNorm(64, 1e-6).to(bench.device, half)
    x = torch.randn(batch, tokens, width // 64, 64, device=bench.device, dtype=half).transpose(1, 2)
    with torch.no_grad():
        row = {"diffusers": bench.time(lambda: norm(x))}
        row["F.rms_norm"] = bench.time(lambda: F.rms_norm(x, (64,), norm.weight, 1e-6))
        if bench.cuda:
            row["compiled"] = bench.time(partial(torch.compile(norm.forward, dynamic=False), x))
        row["F.rms_norm against diffusers"] = distance(F.rms_norm(x, (64,), norm.weight, 1e-6), norm(x))
    return row


def injection(bench: Bench, batch: int, side: int, width: int, half: torch.dtype) -> dict:
    """Returns the times of the depth-wise 3x3 convolution of LR Injection."""
    conv = nn.Conv2d(width, width, 3, padding=1, groups=width).to(bench.device, half)
    last = copy.deepcopy(conv).to(memory_format=torch.channels_last)
    tokens = torch.randn(batch, side * side, width, device=bench.device, dtype=half)
    image = tokens.transpose(1, 2).unflatten(2, (side, side))
    nine = partial(nine_products, image, conv.weight, conv.bias)
    with torch.no_grad():
        row = {"channels last": bench.time(lambda: last(image))}
        row["channels first"] = bench.time(lambda: conv(image.contiguous()))
        if bench.cuda:
            compiled = torch.compile(nine_products, dynamic=False)
            row["nine products, compiled"] = bench.time(partial(compiled, image, conv.weight, conv.bias))
        row["nine products against channels last"] = distance(nine(), last(image))
    leaf = image.detach().requires_grad_()
    row["channels last, with backward"] = bench.time(lambda: last(leaf).sum().backward(), 5)
    return row


def nine_products(image: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Returns a depth-wise 3x3 convolution as nine shifted products, which compile into one kernel."""
    height, width = image.shape[-2:]
    padded, total = F.pad(image, (1, 1, 1, 1)), bias[:, None, None]
    for i in range(3):
        for j in range(3):
            total = total + padded[..., i : i + height, j : j + width] * weight[:, 0, i, j, None, None]
    return total


def products(bench: Bench, tokens: int, width: int, half: torch.dtype) -> dict:
    """Returns the times of matrix products apart and joined, and in float8."""
    w, qkv = (torch.randn(count * width, width, device=bench.device, dtype=half) for count in (1, 3))
    up = torch.randn(4 * width, width, device=bench.device, dtype=half)
    one = torch.randn(tokens, width, device=bench.device, dtype=half)
    both = torch.cat([one, one])
    row = {"q, k, v apart": bench.time(lambda: [one @ w.T for _ in range(3)])}
    row["q, k, v in one"] = bench.time(lambda: one @ qkv.T)
    row["MLP, two streams apart"] = bench.time(lambda: [one @ up.T for _ in range(2)])
    row["MLP, two streams in one"] = bench.time(lambda: both @ up.T)
    if bench.cuda:
        eight, ones = torch.float8_e4m3fn, partial(torch.ones, device="cuda")
        a, b, scales = both.to(eight), up.to(eight), (ones(len(both), 1), ones(1, 4 * width))
        scaled = partial(torch._scaled_mm, a, b.T, *scales, out_dtype=half, use_fast_accum=True)
        row["MLP, two streams in one, float8"] = bench.time(scaled)
    return row
