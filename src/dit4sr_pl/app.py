"""python -m dit4sr_pl.app [checkpoint=PATH] [port=7860]: a page to restore photos on"""

from __future__ import annotations

import functools
import itertools
import os
import re
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from dit4sr_pl.cli.checkpoint import follow_checkpoint
from dit4sr_pl.cli.checks import (
    SCALES,
    check_backbone,
    check_captioner,
    check_compiler,
    check_cuda_graph,
    check_extra,
    check_scale,
    choose_device,
)
from dit4sr_pl.cli.command import command

if TYPE_CHECKING:
    import gradio as gr

    from dit4sr_pl.images.picture import Picture
    from dit4sr_pl.preparation.captioner import Captioner
    from dit4sr_pl.restoration.restorer import Restorer

FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}  # Gradio's own come from the network


@command("app", serves=True)
def main(cfg: DictConfig) -> None:
    """Serves the page until it is interrupted."""
    cfg = follow_checkpoint(cfg)
    check(cfg)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported

    import gradio as gr
    import torch
    from hydra.utils import instantiate

    from dit4sr_pl.restoration.restorer import Restorer

    cfg.device = choose_device(cfg.device, cfg.model.backbone)
    check_cuda_graph(cfg.cuda_graph, cfg.device)
    device = torch.device(cfg.device)
    parts = instantiate(cfg.model.backbone), instantiate(cfg.sampler)
    options = cfg.offload, cfg.injection_scale, cfg.compile, cfg.cuda_graph
    restorer = Restorer.load(*parts, cfg.checkpoint, device, *options)
    captioner = instantiate(cfg.captioner) if cfg.get("captioner") is not None else None
    blocks = page(restorer, cfg, captioner).queue(max_size=20, default_concurrency_limit=1)
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
    """Checks everything that a user can get wrong before a model is read."""
    check_extra("the page", "app", "gradio")
    check_scale(cfg.scale)
    check_steps(cfg.sampler.steps, cfg.max_steps)
    check_backbone(cfg.model.backbone)
    check_compiler(cfg.compile, "compile")
    try:
        socket.create_server((cfg.host, cfg.port)).close()
    except OSError as error:
        raise ValueError(f"host={cfg.host} port={cfg.port}: {error.strerror}; choose another") from None
    if cfg.get("captioner") is not None:
        check_captioner(cfg.captioner)


def page(restorer: Restorer, cfg: DictConfig, captioner: Captioner | None = None) -> gr.Blocks:
    """Builds the page: a photo and its settings on the left, the enlarged and the restored image on the right."""
    import gradio as gr

    from dit4sr_pl.images.picture import PICTURE_SUFFIXES
    from dit4sr_pl.restoration.color import ALIGNMENTS

    sampler = cfg.sampler
    with gr.Blocks(title="DiT4SR", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks, gr.Row():
        with gr.Column(scale=1):
            file = gr.File(label="LR image", file_types=list(PICTURE_SUFFIXES), height=120)
            prompt = gr.Textbox(cfg.prompt, label="caption", lines=2)
            if captioner is not None:
                describe = gr.Button("Describe the image")
            with gr.Accordion("Prompts", open=False):
                added = gr.Textbox(sampler.added_prompt, label="added prompt", lines=2)
                negative = gr.Textbox(sampler.negative_prompt, label="negative prompt", lines=2)
            with gr.Row():
                scale = gr.Number(cfg.scale, label="scale", minimum=SCALES[0], maximum=SCALES[1], min_width=80)
                seed = gr.Number(cfg.seed, label="seed", precision=0, min_width=80)
            with gr.Row():
                bounds = {"minimum": 1, "maximum": cfg.max_steps}
                steps = gr.Number(sampler.steps, label="steps", **bounds, precision=0, min_width=80)
                guidance = gr.Number(sampler.guidance_scale, label="guidance", min_width=80)
            color = gr.Dropdown(list(ALIGNMENTS), value=sampler.color, label="colour alignment")
            button = gr.Button("Restore", variant="primary")
        with gr.Column(scale=3):
            slider = gr.ImageSlider(label="bicubic | restored", format="png", interactive=False, max_height=1000)
        inputs = [file, scale, prompt, steps, guidance, color, seed, added, negative]
        one = {"concurrency_id": "device", "concurrency_limit": 1}  # one image at a time has the memory to itself
        button.click(answer(restorer, cfg, slider.GRADIO_CACHE), inputs, slider, **one)
        if captioner is not None:
            describe.click(describer(captioner), file, prompt, **one)
    return blocks


def answer(restorer: Restorer, cfg: DictConfig, folder: str) -> Callable:
    """Returns what the button calls: it restores, writes below `folder`, and shows progress and mistakes on the
    page.
    """
    import gradio as gr

    from dit4sr_pl.images.picture import write_picture
    from dit4sr_pl.restoration.pictures import FAILURES

    bar = gr.Progress()

    def restore_file(file, scale, prompt, steps, guidance, color, seed, added=None, negative=None, progress=bar):
        sampler_options = {"steps": steps, "guidance_scale": guidance, "color": color}
        prompts = {"added_prompt": added, "negative_prompt": negative}
        sampler_options |= {key: text for key, text in prompts.items() if text is not None}
        try:
            if file is None or None in (scale, steps, guidance, seed):
                raise ValueError("give an image, and a number for scale, steps, guidance and seed")
            show = functools.partial(progress, desc="restoring")
            pictures = restored(restorer, cfg, Path(file), scale, prompt, seed, sampler_options, show)
            results = Path(mkdtemp(dir=folder))
            files = results / f"{Path(file).stem}.bicubic.png", results / f"{Path(file).stem}.png"
            try:
                for result, picture in zip(files, pictures, strict=True):
                    write_picture(result, picture)
            except BaseException:
                shutil.rmtree(results)  # the page deletes only what it has shown
                raise
            for note in picture.notes:
                gr.Info(note)
            return files
        except (*FAILURES, OSError) as error:
            raise gr.Error(message_of(error), print_exception=False) from None

    return restore_file


def describer(captioner: Captioner) -> Callable:
    """Returns what the button for captions calls: it describes the uploaded image, for the visitor to change."""
    import gradio as gr

    from dit4sr_pl.images.files import read_image
    from dit4sr_pl.restoration.pictures import FAILURES

    def describe_file(file):
        try:
            if file is None:
                raise ValueError("give an image")
            return captioner([read_image(Path(file))])[0]
        except (*FAILURES, OSError) as error:
            raise gr.Error(message_of(error), print_exception=False) from None

    return describe_file


def message_of(error: Exception) -> str:
    """Returns an error's first line without the server's folders."""
    return re.sub(r"/\S*/", "", str(error).partition("\n")[0] or "out of memory")


def restored(
    restorer: Restorer,
    cfg: DictConfig,
    file: Path,
    scale: float,
    prompt: str,
    seed: int,
    sampler_options: dict,
    show: Callable[[tuple[int, int]], None],
) -> tuple[Picture, Picture]:
    """Returns the bicubically enlarged and the restored picture.

    Args:
        restorer: the network with its sampler.
        cfg: the page's config.
        file: the visitor's picture.
        scale: factor of the sides.
        prompt: caption, may be empty.
        seed: seed of the noise.
        sampler_options: fields of `Sampler` that the visitor chose.
        show: called with the number of network evaluations that are done and the number of all.

    Raises:
        ValueError: the picture cannot be read, the result would exceed `cfg.max_pixels`, or a setting is out of range.
    """
    from dit4sr_pl.images.picture import read_header, read_picture
    from dit4sr_pl.images.resize import enlarge
    from dit4sr_pl.restoration.pictures import PictureRestorer
    from dit4sr_pl.restoration.restorer import Restorer
    from dit4sr_pl.restoration.worklist import result_size

    check_scale(scale)
    check_steps(sampler_options["steps"], cfg.max_steps)
    height, width = result_size(read_header(file).size, scale)  # before anything is decoded
    if width * height > cfg.max_pixels:
        raise ValueError(f"{width}x{height} pixels: at most {cfg.max_pixels} are restored")
    chosen = Restorer(restorer.net, restorer.backbone, replace(restorer.sampler, **sampler_options))
    done, total = itertools.count(1), chosen.evaluations
    bicubic = lambda lr, size, *_, on_step: enlarge(lr, size)  # noqa: E731
    before, after = (PictureRestorer(each, scale, "bicubic", seed) for each in (bicubic, chosen))
    one = [read_picture(file)], [file.stem], [prompt]
    return before(*one, lambda _: None)[0], after(*one, lambda _: show((next(done), total)))[0]


def check_steps(steps: int, most: int) -> None:
    """Raises ValueError unless a visitor may ask for this number of steps."""
    if not isinstance(steps, int) or not 1 <= steps <= most:
        raise ValueError(f"steps={steps}: must be a whole number from 1 to {most}, the page's max_steps")


if __name__ == "__main__":
    main()
