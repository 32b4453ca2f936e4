"""python -m dit4sr_pl.app [checkpoint=PATH] [port=7860]: a page to restore photos on"""

from __future__ import annotations

import functools
import itertools
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from dit4sr_pl.config import check_backbone, choose_device, command

if TYPE_CHECKING:
    import gradio as gr
    import torch
    from PIL import Image

    from dit4sr_pl.restorer import Restorer

FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}  # Gradio's own come from the network


@command("app")
def main(cfg: DictConfig) -> None:
    check(cfg)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported

    import gradio as gr
    import torch
    from hydra.utils import instantiate

    from dit4sr_pl.restorer import Restorer

    device = torch.device(choose_device(cfg.device))
    restorer = Restorer.load(instantiate(cfg.model.backbone), instantiate(cfg.sampler), cfg.checkpoint, device)
    # One image at a time has the memory to itself.
    blocks = page(restorer, cfg).queue(max_size=20, default_concurrency_limit=1)
    blocks.launch(
        server_name=cfg.host,
        server_port=cfg.port,
        share=False,
        quiet=True,
        max_file_size=cfg.max_file_size,
        footer_links=[],
        theme=gr.themes.Default(**FONTS),
        prevent_thread_lock=True,
    )
    print(f"http://{cfg.host}:{cfg.port}", flush=True)
    blocks.block_thread()


def check(cfg: DictConfig) -> None:
    if find_spec("gradio") is None:
        raise ValueError('the page needs Gradio; install it with pip install "dit4sr_pl[app]"')
    if cfg.scale < 1:
        raise ValueError(f"scale={cfg.scale}: must be 1 or more")
    check_backbone(cfg.model.backbone)
    try:
        socket.create_server((cfg.host, cfg.port)).close()
    except OSError as error:
        raise ValueError(f"host={cfg.host} port={cfg.port}: {error.strerror}; choose another") from None


def page(restorer: Restorer, cfg: DictConfig) -> gr.Blocks:
    """The page: a photo and its settings on the left, the enlarged and the restored image on the right."""
    import gradio as gr

    from dit4sr_pl.color import ALIGNMENTS
    from dit4sr_pl.images import IMAGE_SUFFIXES

    sampler = cfg.sampler
    with gr.Blocks(title="DiT4SR", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks, gr.Row():
        with gr.Column(scale=1):
            file = gr.File(label="LR image", file_types=list(IMAGE_SUFFIXES), height=120)
            prompt = gr.Textbox(cfg.prompt, label="caption")
            with gr.Row():
                scale = gr.Number(cfg.scale, label="scale", minimum=1, min_width=80)
                seed = gr.Number(cfg.seed, label="seed", precision=0, min_width=80)
            with gr.Row():
                steps = gr.Number(sampler.steps, label="steps", minimum=1, precision=0, min_width=80)
                guidance = gr.Number(sampler.guidance_scale, label="guidance", min_width=80)
            color = gr.Dropdown(list(ALIGNMENTS), value=sampler.color, label="colour alignment")
            button = gr.Button("Restore", variant="primary")
        with gr.Column(scale=3):
            slider = gr.ImageSlider(label="bicubic | restored", format="png", interactive=False, max_height=1000)
        inputs = [file, scale, prompt, steps, guidance, color, seed]
        button.click(answer(restorer, cfg.max_pixels), inputs, slider)
    return blocks


def answer(restorer: Restorer, max_pixels: int) -> Callable:
    """What the button calls: `restored`, with progress on the page and mistakes as messages there."""
    import gradio as gr
    import torch

    def restore_file(file, scale, prompt, steps, guidance, color, seed, progress=gr.Progress()):  # noqa: B008
        settings = {"steps": steps, "guidance_scale": guidance, "color": color}
        try:
            if file is None or None in (scale, steps, guidance, seed):
                raise ValueError("give an image, and a number for scale, steps, guidance and seed")
            show = functools.partial(progress, desc="restoring")
            return restored(restorer, Path(file), scale, prompt, seed, settings, max_pixels, show)
        except (ValueError, torch.OutOfMemoryError) as error:
            message = str(error).replace(f"{Path(file or '').parent}/", "")
            raise gr.Error(message, print_exception=False) from None

    return restore_file


def restored(
    restorer: Restorer,
    file: Path,
    scale: float,
    prompt: str,
    seed: int,
    settings: dict,
    max_pixels: int,
    show: Callable[[tuple[int, int]], None],
) -> tuple[Image.Image, Image.Image]:
    """The bicubically enlarged and the restored image; `show` is told how many network evaluations are done, of how
    many.

    Raises:
        ValueError: no readable image, a result of more than `max_pixels`, settings that cannot be.
    """
    from dit4sr_pl.images import read_image
    from dit4sr_pl.jobs import result_size
    from dit4sr_pl.latents import enlarge
    from dit4sr_pl.picture import picture_size
    from dit4sr_pl.restorer import Restorer

    height, width = result_size(picture_size(file), scale)  # before anything is decoded
    if scale < 1 or width * height > max_pixels:
        raise ValueError(f"{width}x{height} pixels: at most {max_pixels} are restored, at a scale of 1 or more")
    lr = read_image(file)[None].to(restorer.backbone.device) / 255
    size = result_size(lr.shape[-2:], scale)
    chosen = Restorer(restorer.net, restorer.backbone, replace(restorer.sampler, **settings))
    done, total = itertools.count(1), chosen.evaluations
    sr = chosen(lr, size, [prompt], [file.stem], seed, lambda: show((next(done), total)))
    return to_pillow(enlarge(lr, size)), to_pillow(sr)


def to_pillow(image: torch.Tensor) -> Image.Image:
    """`(1, 3, H, W)` in 0..1"""
    from diffusers.image_processor import VaeImageProcessor

    return VaeImageProcessor(do_normalize=False).postprocess(image.cpu(), "pil")[0]


if __name__ == "__main__":
    main()
