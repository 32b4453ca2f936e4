"""python -m dit4sr_pl.app [checkpoint=PATH] [port=7860]: a page to restore photos on"""

from __future__ import annotations

import os
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
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
from dit4sr_pl.common.processes import signals_exit
from dit4sr_pl.page.fields import SEEDS, Limits, bytes_of, number, text
from dit4sr_pl.page.folder import PageFolder, page_folder
from dit4sr_pl.page.hosts import Hosts, listen, url

if TYPE_CHECKING:
    from torch import nn

    from dit4sr_pl.page.blocks import Page
    from dit4sr_pl.preparation.captioner import Captioner
    from dit4sr_pl.restoration.restorer import Restorer

PROMPTS = ("added_prompt", "negative_prompt")  # of the sampler


@command("app", serves=True)
def main(cfg: DictConfig) -> None:
    """Serves the page until it is interrupted."""
    cfg = follow_checkpoint(cfg)
    check(cfg)
    with listen(cfg.host, cfg.port) as place, signals_exit(signal.SIGTERM, signal.SIGHUP):
        restorer, captioner = load(cfg)
        parent = Path(os.environ.get("GRADIO_TEMP_DIR") or tempfile.gettempdir())
        with page_folder(parent, bytes_of(cfg.max_stored, "max_stored")) as folder:
            serve(cfg, place, folder, restorer, captioner)


def serve(
    cfg: DictConfig, place: socket.socket, folder: PageFolder, restorer: Restorer, captioner: Captioner | None
) -> None:
    """Serves the page on a socket until a signal comes."""
    # Gradio reads both when it is imported, or builds a page.
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(folder.path)}

    from dit4sr_pl.page.server import Server

    with without_proxies():
        page = make_page(cfg, folder, restorer, captioner)
        hosts = Hosts.of(cfg.host, cfg.hosts)
        blocks = page.blocks(cfg.scale, cfg.prompt, cfg.seed)
        application = page.application(blocks, hosts, bytes_of(cfg.max_file_size, "max_file_size"), cfg.queue)
    ready = lambda: print(url(cfg.host, place.getsockname()[1]), flush=True)  # noqa: E731
    Server(application, ready, page.worker.end).run([place])


@contextmanager
def without_proxies() -> Iterator[None]:
    """Hides the proxies of the environment during the block.

    Gradio makes clients when it is imported, which the page does not use; for some proxies they need more packages.
    """
    proxies = {name: os.environ.pop(name) for name in [*os.environ] if name.lower().endswith("_proxy")}
    try:
        yield
    finally:
        os.environ |= proxies


def make_page(cfg: DictConfig, folder: PageFolder, restorer: Restorer, captioner: Captioner | None) -> Page:
    """Returns the page with the limits of a config."""
    from dit4sr_pl.page.blocks import Page
    from dit4sr_pl.page.visitors import Visitors
    from dit4sr_pl.page.worker import Worker

    worker = Worker(networks(restorer, captioner))
    return Page(restorer, worker, limits(cfg), SCALES, folder, Visitors(folder.leave), captioner)


def networks(restorer: Restorer, captioner: Captioner | None) -> list[nn.Module]:
    """Returns what computes on the device at length: between two calls of these, work can be stopped.

    Text encoders, which are read when a prompt needs them, take a moment for the longest prompt.
    """
    vae = restorer.backbone.coder.vae
    return [restorer.net, vae.encoder, vae.decoder, *([] if captioner is None else [captioner.model])]


def load(cfg: DictConfig) -> tuple[Restorer, Captioner | None]:
    """Returns the network and the caption model, if the config has one."""
    import torch
    from hydra.utils import instantiate

    from dit4sr_pl.restoration.restorer import Restorer

    cfg.device = choose_device(cfg.device, cfg.model.backbone)
    check_cuda_graph(cfg.cuda_graph, cfg.device)
    device = torch.device(cfg.device)
    parts = instantiate(cfg.model.backbone), instantiate(cfg.sampler)
    options = cfg.offload, cfg.injection_scale, cfg.compile, cfg.cuda_graph
    restorer = Restorer.load(*parts, cfg.checkpoint, device, *options)
    return restorer, instantiate(cfg.captioner) if cfg.get("captioner") is not None else None


def limits(cfg: DictConfig) -> Limits:
    """Returns the limits of a config."""
    return Limits(**{name: cfg[name] for name in Limits.__dataclass_fields__})


def check(cfg: DictConfig) -> None:
    """Checks everything that a user can get wrong before a model is read."""
    check_extra("the page", "app", "gradio")
    check_scale(cfg.scale)
    most = limits(cfg)
    number(*SEEDS, whole=True)(cfg.seed, "seed")
    number(1, most.max_steps, whole=True, limit=", the page's max_steps")(cfg.sampler.steps, "steps")
    number(0, most.max_guidance, limit=", the page's max_guidance")(cfg.sampler.guidance_scale, "guidance_scale")
    for key, prompt in (("prompt", cfg.prompt), *((f"sampler.{key}", cfg.sampler[key]) for key in PROMPTS)):
        text(most.max_text)(prompt, key)
    number(1, 10**6, whole=True)(cfg.queue, "queue")
    for key in ("max_file_size", "max_stored"):
        bytes_of(cfg[key], key)
    check_backbone(cfg.model.backbone)
    check_compiler(cfg.compile, "compile")
    if cfg.get("captioner") is not None:
        check_captioner(cfg.captioner)


if __name__ == "__main__":
    main()
