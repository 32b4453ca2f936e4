"""The page as a user sees it, with the command, its server and a browser."""

import dataclasses
import io
import os
import re
import socket
import subprocess
import sys
from urllib.request import urlopen

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from selenium.webdriver import Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from skimage import data

from dit4sr_pl.app import check
from dit4sr_pl.backbone.sd3 import Backbone
from dit4sr_pl.cli.command import read_conf
from dit4sr_pl.images.files import read_image
from dit4sr_pl.images.resize import enlarge
from dit4sr_pl.restoration.restorer import Restorer
from testing.toy_llava import save_toy_llava
from testing.toy_runs import SAMPLER, SHIPPED


@pytest.fixture(scope="module")
def restorer() -> Restorer:
    sampler = dataclasses.replace(SAMPLER, **SHIPPED)
    return Restorer.load(Backbone("tiny-sd3", "float32", 8), sampler, "tiny-dit4sr", torch.device("cpu"))


@pytest.fixture
def photo(tmp_path):
    Image.fromarray(data.astronaut()[80:128, 200:264]).save(tmp_path / "wow! a$b{c}.png")
    return tmp_path / "wow! a$b{c}.png"


@pytest.fixture
def address(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    save_toy_llava(tmp_path / "llava")
    toy = [f"captioner.name={tmp_path / 'llava'}", "captioner.max_tokens=6", "captioner.dtype=float32"]
    command = [sys.executable, "-m", "dit4sr_pl.app", f"port={port}", "sampler.steps=2", "captioner=llava", *toy]
    environment = os.environ | {"GRADIO_TEMP_DIR": str(tmp_path / "uploads")}
    proxies = ("http_proxy", "https_proxy", "all_proxy")  # that no connection of the page to itself goes through
    environment |= {name: "socks5://127.0.0.1:9" for proxy in proxies for name in (proxy, proxy.upper())}
    with (tmp_path / "stderr").open("w") as stderr:
        app = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=tmp_path, env=environment)
    try:
        assert app.stdout.readline() == f"http://127.0.0.1:{port}\n", (tmp_path / "stderr").read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        app.terminate()
        app.communicate(timeout=30)
    assert app.returncode == 143 and list((tmp_path / "uploads").iterdir()) == []


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

    fill(browser, "steps", 100)
    browser.find_element(By.XPATH, "//button[normalize-space()='Restore']").click()
    wait.until(lambda window: "restoring" in window.find_element(By.TAG_NAME, "body").text)
    browser.find_element(By.XPATH, "//button[normalize-space()='Stop']").click()
    wait.until(lambda window: "restoring" not in window.find_element(By.TAG_NAME, "body").text)
    fill(browser, "steps", 101)
    browser.find_element(By.XPATH, "//button[normalize-space()='Restore']").click()
    shown = lambda window: window.find_element(By.CSS_SELECTOR, "[data-testid=toast-body]").text  # noqa: E731
    assert "steps=101: must be a whole number from 1 to 100" in wait.until(shown)
    browser.find_element(By.CSS_SELECTOR, "[data-testid=toast-close]").click()
    fill(browser, "steps", 2)

    browser.find_element(By.CSS_SELECTOR, "button[aria-label='Remove this file'], button[aria-label='Clear']").click()
    wait.until(lambda window: window.find_elements(By.CSS_SELECTOR, "input[type=file]"))
    restore_there(browser, broken)
    toast = wait.until(shown)
    assert "broken.png: not a readable image" in toast and "/" not in toast

    lr = read_image(photo)[None] / 255
    levels = lambda images: (images[0] * 255).round().byte().permute(1, 2, 0)  # noqa: E731
    assert torch.equal(before, levels(enlarge(lr, (192, 256))))
    assert torch.equal(after, levels(restorer(lr, (192, 256), [""], ["wow! a$b{c}"], seed=7)))
    assert (tmp_path / "stderr").read_text() == ""


def test_without_gradio_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match=r"the page needs gradio; pip install 'dit4sr_pl\[app\]'"):
        check(OmegaConf.create({}))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("sampler.steps=101", "steps=101: must be a whole number from 1 to 100, the page's max_steps"),
        ("sampler.guidance_scale=31", "guidance_scale=31: must be a number from 0 to 30, the page's max_guidance"),
        ("seed=1.5", "seed=1.5: must be a whole number"),
        ("max_stored=none", "max_stored=none: must be a size such as 50mb"),
        ("max_seconds=0", "max_seconds=0: must be a number above 0"),
        ("queue=0", "queue=0: must be a whole number"),
        (f"sampler.negative_prompt={'x' * 2001}", "sampler.negative_prompt: 2001 characters; at most 2000 are read"),
    ],
)
def test_a_setting_that_visitors_could_not_send_is_refused_at_the_start(setting, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check(read_conf("app", setting))


def test_hosts_may_be_given_as_urls_have_them():
    for host in ("::1", "[::1]", "127.0.0.1", "page.example"):
        cfg = read_conf("app", f"host={host}", f"hosts=[{host},other.example]")
        assert (cfg.host, list(cfg.hosts)) == (host, [host, "other.example"])
