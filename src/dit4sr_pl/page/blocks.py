"""The page in Gradio: what a visitor sees, and what its buttons call."""

import html
import itertools
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gradio as gr
from fastapi import FastAPI
from gradio.context import LocalContext
from starlette.types import ASGIApp
from torch import Tensor

from dit4sr_pl.common.students import fixed_settings, student_label
from dit4sr_pl.images.files import open_image, read_image
from dit4sr_pl.images.formats import PICTURE_SUFFIXES
from dit4sr_pl.images.picture import Picture
from dit4sr_pl.images.picture_files import read_header, read_picture, write_picture
from dit4sr_pl.images.resize import enlarge
from dit4sr_pl.page.fields import SEEDS, Field, Limits, checked, choice, fixed, number, result_names, text, upload
from dit4sr_pl.page.folder import PageFolder
from dit4sr_pl.page.hosts import Hosts
from dit4sr_pl.page.requests import RequestFilter
from dit4sr_pl.page.visitors import Visitors
from dit4sr_pl.page.worker import Stopped, Worker
from dit4sr_pl.restoration.color import COLORS
from dit4sr_pl.restoration.pictures import FAILURES, PictureRestorer
from dit4sr_pl.restoration.restorer import Restorer
from dit4sr_pl.restoration.sizes import result_size

FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}  # Gradio's own come from the network
FIELDS = {"steps": "steps", "guidance": "guidance_scale", "negative_prompt": "negative_prompt"}  # settings by field
PATIENCE = 5  # seconds in which a program that has sent a request has to begin to wait for the result
SESSIONS = 1000  # whose settings Gradio keeps in memory


@dataclass(frozen=True)
class Page:
    """The page: its fields, and the work that its buttons start.

    Args:
        restorer: the network with its sampler, whose settings the page starts with.
        worker: the device.
        limits: what a visitor may ask for.
        scales: smallest and largest scale.
        folder: the page's files.
        visitors: who is there.
        captioner: function from uint8 RGB images `(3, H, W)` to captions; None: the page has no button for it.
    """

    restorer: Restorer
    worker: Worker
    limits: Limits
    scales: tuple[float, float]
    folder: PageFolder
    visitors: Visitors
    captioner: Callable[[list[Tensor]], list[str]] | None = None

    def fields(self) -> dict[str, dict[str, Field]]:
        """Returns what each function is sent, by its name."""
        limits, file = self.limits, upload(self.folder.path)
        restoring = {
            "file": file,
            "scale": number(*self.scales),
            "caption": text(limits.max_text),
            "steps": number(1, limits.max_steps, whole=True, limit=", the page's max_steps"),
            "guidance": number(0, limits.max_guidance, limit=", the page's max_guidance"),
            "color": choice(COLORS),
            "seed": number(*SEEDS, whole=True),
            "added_prompt": text(limits.max_text),
            "negative_prompt": text(limits.max_text),
        }
        for name in self.fixed_fields:
            reason = f"the network is a student ({student_label(self.student)})"
            restoring[name] = fixed(getattr(self.restorer.sampler, FIELDS[name]), reason)
        return {"restore_file": restoring, "describe_file": {"file": file}}

    @property
    def student(self) -> dict[str, object] | None:
        """How the network samples, if it is a student; None: it is a teacher."""
        student = getattr(self.restorer.net, "student", None)
        return student and student.as_dict()

    @property
    def fixed_fields(self) -> list[str]:
        """Names of the fields that a visitor cannot choose, since the network is a student."""
        return [name for name, setting in FIELDS.items() if setting in fixed_settings(self.student)]

    def blocks(self, scale: float, prompt: str, seed: int) -> gr.Blocks:
        """Builds the page: a photo and its settings on the left, the enlarged and the restored image on the right.

        Args:
            scale: the factor of the sides that the page starts with.
            prompt: likewise, the caption.
            seed: likewise.
        """
        sampler, limits, visible = self.restorer.sampler, self.limits, lambda name: name not in self.fixed_fields
        written = {"lines": 2, "max_length": limits.max_text}
        with gr.Blocks(title="DiT4SR", analytics_enabled=False, delete_cache=(600, 3600)) as blocks, gr.Row():
            with gr.Column(scale=1):
                file = gr.File(label="LR image", file_types=list(PICTURE_SUFFIXES), height=120)
                caption = gr.Textbox(prompt, label="caption", **written)
                describe = gr.Button("Describe the image", visible=self.captioner is not None)
                with gr.Accordion("Prompts", open=False):
                    added = gr.Textbox(sampler.added_prompt, label="added prompt", **written)
                    written |= {"visible": visible("negative_prompt")}
                    negative = gr.Textbox(sampler.negative_prompt, label="negative prompt", **written)
                with gr.Row():
                    bounds = dict(zip(("minimum", "maximum"), self.scales, strict=True))
                    factor = gr.Number(scale, label="scale", **bounds, min_width=80)
                    start = gr.Number(seed, label="seed", precision=0, min_width=80)
                with gr.Row():
                    bounds = {"minimum": 1, "maximum": limits.max_steps, "precision": 0}
                    bounds |= {"visible": visible("steps"), "min_width": 80}
                    steps = gr.Number(sampler.steps, label="steps", **bounds)
                    bounds = {"minimum": 0, "maximum": limits.max_guidance}
                    bounds |= {"visible": visible("guidance"), "min_width": 80}
                    guidance = gr.Number(sampler.guidance_scale, label="guidance", **bounds)
                color = gr.Dropdown(list(COLORS), value=sampler.color, label="colour alignment")
                with gr.Row():
                    button = gr.Button("Restore", variant="primary", min_width=80)
                    stop = gr.Button("Stop", variant="stop", min_width=80)
            with gr.Column(scale=3):
                slider = gr.ImageSlider(label="bicubic | restored", format="png", interactive=False, max_height=1000)
            inputs = [file, factor, caption, steps, guidance, color, start, added, negative]
            # Values were checked before, so Gradio hands them on as they came. One image has the memory to itself.
            options = {"preprocess": False, "concurrency_id": "device", "concurrency_limit": 1}
            works = [button.click(self.restore_file, inputs, slider, **options)]
            if self.captioner is not None:
                works.append(describe.click(self.describe_file, file, caption, **options))
            stop.click(None, cancels=works)
            # With an event for it, browsers keep a connection by which `Visitors` sees that the page is open.
            blocks.unload(lambda: None)
        return blocks

    def restore_file(
        self,
        file: dict,
        scale: float,
        caption: str,
        steps: int,
        guidance: float,
        color: str,
        seed: int,
        added_prompt: str,
        negative_prompt: str,
        request: gr.Request,
        progress=gr.Progress(),  # noqa: B008  Gradio looks for it here
    ) -> tuple[Path, Path]:
        """Returns the files of the enlarged and of the restored picture; arguments are checked `fields`.

        Raises:
            gr.Error: it cannot be restored, or was stopped; the page shows the message.
        """
        options = {"steps": steps, "guidance_scale": guidance, "color": color}
        options |= {"added_prompt": added_prompt, "negative_prompt": negative_prompt}
        show, source = partial(progress, desc="restoring"), Path(file["path"])
        with self.answering(request.session_hash, file) as check:
            pictures = self.restored(source, file["orig_name"], scale, caption, seed, options, show)
            check()
            size = sum(map(bytes_of_pixels, pictures))
            results = self.folder.new_result(request.session_hash, size, self.visitors.is_there)
            files = [results / name for name in result_names(file["orig_name"])]
            for result, picture in zip(files, pictures, strict=True):
                write_picture(result, picture)
            for note in pictures[1].notes:
                gr.Info(html.escape(note, quote=False))
        return tuple(files)

    def describe_file(self, file: dict, request: gr.Request) -> str:
        """Returns a caption of an uploaded image, for the visitor to change; errors are those of `restore_file`."""
        source = Path(file["path"])
        with self.answering(request.session_hash, file):
            check_still(source)
            self.limits.check_size(read_header(source).size)  # before it is decoded
            return self.captioner([read_image(source)])[0]

    @contextmanager
    def answering(self, session: str, file: dict) -> Iterator[Callable[[], None]]:
        """Holds the device during the block, which gets a function that ends it if nobody waits for the answer any
        more; an error that a visitor can do something about becomes one that the page shows.
        """
        self.folder.hold(session, file["path"])
        try:
            with self.worker.working(still_wanted(self.visitors), self.limits.max_seconds) as check:
                yield check
        except Stopped:
            raise gr.Error("stopped", print_exception=False) from None
        except (*FAILURES, OSError) as error:
            named = str(error).replace(file["path"], file["orig_name"])
            raise gr.Error(message_of(named), print_exception=False) from None
        finally:
            if not self.visitors.is_there(session):
                self.folder.leave(session, results=False)

    def restored(
        self,
        file: Path,
        name: str,
        scale: float,
        caption: str,
        seed: int,
        sampler_options: dict,
        show: Callable[[tuple[int, int]], None],
    ) -> tuple[Picture, Picture]:
        """Returns the bicubically enlarged and the restored picture.

        Args:
            file: the visitor's picture.
            name: its name on the visitor's machine, which its noise depends on.
            scale: factor of the sides.
            caption: caption, may be empty.
            seed: seed of the noise.
            sampler_options: fields of `Sampler` that the visitor chose.
            show: called with the number of network evaluations that are done and the number of all.

        Raises:
            ValueError: the picture cannot be read, or is more work than one request may ask for.
        """
        check_still(file)
        lr = read_header(file).size  # before anything is decoded
        sampler = self.restorer.sampler.changed(**sampler_options)
        chosen = Restorer(self.restorer.net, self.restorer.backbone, sampler)
        self.check_work(chosen, lr, result_size(lr, scale))
        picture = read_picture(file)
        if sorted(picture.color.shape[-2:]) != sorted(lr):  # the picture may have been turned upright
            raise ValueError("the pixels in the file are not as many as its header says")
        done, total = itertools.count(1), chosen.evaluations
        bicubic = lambda lr, size, *_, on_step: enlarge(lr, size)  # noqa: E731
        before, after = (PictureRestorer(each, scale, "bicubic", seed) for each in (bicubic, chosen))
        one = [picture], [Path(name).stem], [caption]
        return before(*one, lambda _: None)[0], after(*one, lambda _: show((next(done), total)))[0]

    def check_work(self, chosen: Restorer, lr: tuple[int, int], size: tuple[int, int]) -> None:
        """Raises ValueError if an image of these sizes is more work than one request may ask for."""
        coder, patch = chosen.backbone.coder, chosen.net.patch_size
        self.limits.check_size(size)
        for passed in chosen.sampler.fitted(lr, size, coder.factor, patch)[0]:
            self.limits.check_size(passed)
        work, most = chosen.tile_evaluations(lr, size), self.limits.max_evaluations
        if work > most:
            raise ValueError(
                f"{size[1]}x{size[0]} pixels in {chosen.sampler.steps} steps take {work} evaluations of the network, "
                f"and one image may take {most}; choose fewer steps or a smaller scale"
            )

    def application(self, blocks: gr.Blocks, hosts: Hosts, max_file_size: int, queue: int) -> ASGIApp:
        """Returns the page as a web server runs it.

        Args:
            blocks: the page.
            hosts: the names under which it answers.
            max_file_size: bytes of an uploaded file.
            queue: visitors that may wait.
        """
        blocks.queue(max_size=queue, default_concurrency_limit=1, api_open=False)
        blocks.state_session_capacity = SESSIONS
        app = gr.mount_gradio_app(
            FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
            blocks,
            path="/",
            allowed_paths=[str(self.folder.path)],  # else results whose names begin with a dot are refused
            max_file_size=max_file_size,
            footer_links=[],
            run_history=False,
            show_error=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            theme=gr.themes.Default(**FONTS),
        )
        blocks.is_running = blocks.has_launched = True  # as `launch` sets it; Gradio checks no paths before
        fields, checks = self.fields(), {}
        for function in blocks.fns.values():
            if function.api_name in fields:
                checks[function._id] = checks[function.api_name] = partial(checked, fields[function.api_name])
        return RequestFilter(app, hosts, self.folder, self.visitors, checks, max_file_size)


def check_still(file: Path) -> None:
    """Raises ValueError if a file has several frames or pages, which nobody counts: there can be 200,000 in 3 MB."""
    with open_image(file) as image:
        if image.format != "MPO" and getattr(image, "is_animated", False):
            raise ValueError("several frames or pages; save one of them as a file of its own")


def bytes_of_pixels(picture: Picture) -> int:
    """Returns the bytes of a picture's pixels, before a PNG compresses them."""
    planes = [picture.color] if picture.alpha is None else [picture.color, picture.alpha]
    return sum(plane.numel() for plane in planes) * picture.bits // 8


def still_wanted(visitors: Visitors) -> Callable[[], bool]:
    """Returns whether somebody waits for what Gradio is computing: it was not cancelled, and its visitor is connected.

    Gradio forgets an event that is cancelled, and marks one whose connection was closed.
    """
    queue, event_id, begin = LocalContext.blocks.get()._queue, LocalContext.event_id.get(), time.monotonic()

    def wanted() -> bool:
        event = queue.event_ids_to_events.get(event_id)
        if event is None or not event.alive:
            return False
        return visitors.is_there(event.session_hash, event_id) or time.monotonic() - begin < PATIENCE

    return wanted


def message_of(error: str) -> str:
    """Returns an error's first line without the server's folders; Gradio shows messages as HTML."""
    return html.escape(re.sub(r"/\S*/", "", error.partition("\n")[0] or "out of memory"), quote=False)
