"""The page as a user sees it, with the command, its server and a browser."""

import dataclasses
import io
import os
import socket
import subprocess
import sys
from urllib.request import urlopen

import gradio as gr
import imagecodecs
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from selenium.webdriver import Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from skimage import data

from dit4sr_pl.app import answer, check, describer, restored
from dit4sr_pl.backbone.sd3 import Backbone
from dit4sr_pl.images.files import read_image
from dit4sr_pl.images.resize import enlarge
from dit4sr_pl.restoration.pictures import PictureRestorer
from dit4sr_pl.restoration.restorer import Restorer
from dit4sr_pl.restoration.worklist import Entry
from testing.toy_llava import save_toy_llava
from testing.toy_runs import SAMPLER


@pytest.fixture(scope="module")
def restorer() -> Restorer:
    sampler = dataclasses.replace(SAMPLER, color="adain")
    return Restorer.load(Backbone("tiny-sd3", "float32", 8), sampler, "tiny-dit4sr", torch.device("cpu"))


@pytest.fixture
def photo(tmp_path):
    Image.fromarray(data.astronaut()[80:128, 200:264]).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def address(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    save_toy_llava(tmp_path / "llava")
    toy = [f"captioner.name={tmp_path / 'llava'}", "captioner.max_tokens=6", "captioner.dtype=float32"]
    command = [sys.executable, "-m", "dit4sr_pl.app", f"port={port}", "sampler.steps=2", "captioner=llava", *toy]
    environment = os.environ | {"GRADIO_TEMP_DIR": str(tmp_path / "uploads")}
    with (tmp_path / "stderr").open("w") as stderr:
        app = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=tmp_path, env=environment)
    try:
        assert app.stdout.readline() == f"http://127.0.0.1:{port}\n", (tmp_path / "stderr").read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        app.terminate()
        app.communicate(timeout=20)


def fill(window: Chrome, label: str, value: int) -> None:
    box = window.find_element(By.XPATH, f"//label[span[normalize-space()='{label}']]//input")
    box.send_keys(Keys.CONTROL + "a" + Keys.NULL, str(value), Keys.TAB)


def restore_there(window: Chrome, file, **numbers: int) -> None:
    window.find_element(By.CSS_SELECTOR, "input[type=file]").send_keys(str(file))
    WebDriverWait(window, 20).until(lambda window: file.stem in window.find_element(By.TAG_NAME, "body").text)
    for label, value in numbers.items():  # after the upload, when the page is sure to listen
        fill(window, label, value)
    window.find_element(By.XPATH, "//button[normalize-space()='Restore']").click()


def pixels(url: str) -> torch.Tensor:
    with urlopen(url) as file, Image.open(io.BytesIO(file.read())) as image:
        assert image.format == "PNG"
        return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)


@pytest.mark.slow
@pytest.mark.browser
def test_the_page_shows_what_the_restorer_restores_and_says_what_is_wrong(address, browser, photo, restorer, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(photo.read_bytes()[:-200])
    browser.get(address)
    wait = WebDriverWait(browser, 60)
    wait.until(lambda window: window.find_elements(By.CSS_SELECTOR, "input[type=file]"))
    restore_there(browser, photo, steps=3, seed=7)
    images = wait.until(lambda window: window.find_elements(By.CSS_SELECTOR, "img.preview"))
    before, after = (pixels(image.get_attribute("src")) for image in images)

    browser.find_element(By.XPATH, "//button[normalize-space()='Describe the image']").click()
    wait.until(lambda window: "word" in window.find_element(By.TAG_NAME, "textarea").get_attribute("value"))
    browser.find_element(By.XPATH, "//button[contains(., 'Prompts')]").click()
    wait.until(lambda window: "negative prompt" in window.find_element(By.TAG_NAME, "body").text)

    loaded = "return performance.getEntriesByType('resource').map(each => each.name)"
    elsewhere = [name for name in browser.execute_script(loaded) if not name.startswith(address)]
    assert elsewhere == []

    browser.find_element(By.CSS_SELECTOR, "button[aria-label='Remove this file'], button[aria-label='Clear']").click()
    wait.until(lambda window: window.find_elements(By.CSS_SELECTOR, "input[type=file]"))
    restore_there(browser, broken)
    toast = wait.until(lambda window: window.find_element(By.CSS_SELECTOR, "[data-testid=toast-body]").text)
    assert "broken.png: not a readable image" in toast and "/" not in toast

    lr = read_image(photo)[None] / 255
    levels = lambda images: (images[0] * 255).round().byte().permute(1, 2, 0)  # noqa: E731
    assert torch.equal(before, levels(enlarge(lr, (192, 256))))
    assert torch.equal(after, levels(restorer(lr, (192, 256), [""], ["photo"], seed=7)))
    assert (tmp_path / "stderr").read_text() == ""


def test_large_results_and_wrong_settings_are_refused(photo, restorer):
    cfg = OmegaConf.create({"max_pixels": 10000, "max_steps": 100})
    for scale, steps, message in (
        (4, 2, "256x192 pixels: at most 10000"),
        (1, 0, "steps=0"),
        (1, 10**6, "steps=1000000: must be a whole number from 1 to 100"),
        (9, 2, "scale=9: must be a number from 1 to 8"),
        (0.5, 2, "scale=0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            restored(restorer, cfg, photo, scale, "", 0, {"steps": steps}, show=lambda done: None)


@pytest.mark.slow
def test_a_file_on_the_page_is_the_file_that_restore_writes(restorer, tmp_path):
    levels = np.random.default_rng(0).integers(0, 65536, (9, 7, 4), dtype=np.uint16)
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(levels))
    cfg = OmegaConf.create({"max_pixels": 10**6, "max_steps": 100})
    restore_file = answer(restorer, cfg, str(tmp_path))
    _, after = restore_file(str(tmp_path / "a.png"), 2, "", 2, 1.0, "adain", 3, progress=lambda *_, **__: None)
    chosen = Restorer(restorer.net, restorer.backbone, dataclasses.replace(restorer.sampler, steps=2))
    pictures = PictureRestorer(chosen, 2, "bicubic", 3)
    entry = Entry(tmp_path / "a.png", tmp_path / "out" / "a.png", "a", (9, 7), True)
    assert [outcome.failure for outcome in pictures.run([[entry]], lambda pixels: None)] == [None]
    assert after.name == "a.png" and after.read_bytes() == entry.target.read_bytes()
    assert imagecodecs.png_decode(after.read_bytes()).shape == (18, 14, 4)


def test_prompts_on_the_page_are_the_samplers_and_a_button_describes_the_image(restorer, photo, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("dit4sr_pl.app.restored", lambda *arguments: asked.append(arguments) or 1 / 0)
    cfg = OmegaConf.create({"max_pixels": 10**6, "max_steps": 100})
    for prompts in ((), ("sharp", "")):
        with pytest.raises(ZeroDivisionError):
            answer(restorer, cfg, str(tmp_path))(str(photo), 2, "a cat", 2, 1.0, "none", 3, *prompts)
    plain, given = (arguments[6] for arguments in asked)
    assert given == plain | {"added_prompt": "sharp", "negative_prompt": ""} and "added_prompt" not in plain
    describe = describer(lambda images: [f"An image of {tuple(images[0].shape)}."])
    assert describe(str(photo)) == "An image of (3, 48, 64)."
    (tmp_path / "broken.png").write_bytes(photo.read_bytes()[:-200])
    for file, message in ((None, "give an image"), (str(tmp_path / "broken.png"), "^'?broken.png: not a readable")):
        with pytest.raises(gr.Error, match=message):
            describe(file)


def test_without_gradio_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match=r"the page needs gradio; pip install 'dit4sr_pl\[app\]'"):
        check(OmegaConf.create({}))


def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        backbone = {"name": "x", "dtype": "float32", "quantization": None, "embeddings": None}
        cfg = {"scale": 4, "sampler": {"steps": 1}, "max_steps": 1, "model": {"backbone": backbone}}
        cfg |= {"host": "127.0.0.1", "port": port, "compile": False}
        with pytest.raises(ValueError, match=f"port={port}: Address already in use"):
            check(OmegaConf.create(cfg))
