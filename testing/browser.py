"""A headless Chromium for tests of pages as users see them."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.remote.webelement import WebElement

# The browser itself sends nothing to the network.
OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]

# Components keep their elements in shadow roots, which selectors do not enter.
EVERYWHERE = """
    const found = node => [
        ...node.querySelectorAll(arguments[0]),
        ...[...node.querySelectorAll("*")].flatMap(inner => inner.shadowRoot ? found(inner.shadowRoot) : []),
    ];
    return found(document);
"""


@contextmanager
def chromium(profile: Path, size: tuple[int, int] = (1600, 1000)) -> Iterator[Chrome]:
    """Opens a window of `size` pixels with a new profile in the folder `profile`.

    If Chromium or its driver is missing, the test is skipped; under CI, which has to install them, it fails.
    """
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        missing = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        missing("no chromium with chromedriver on this machine: apt-get install chromium chromium-driver")
    options = ChromeOptions()
    options.binary_location = binary
    for option in [*OPTIONS, f"--window-size={size[0]},{size[1]}", f"--user-data-dir={profile}"]:
        options.add_argument(option)
    window = Chrome(options, Service(driver))
    try:
        yield window
    finally:
        window.quit()


def everywhere(window: Chrome, selector: str) -> list[WebElement]:
    """Returns the elements of a CSS selector in the document and in all of its shadow roots."""
    return window.execute_script(EVERYWHERE, selector)
