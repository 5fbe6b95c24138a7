"""Fixtures that start a real Chromium and the hosts whose page it shows."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver

from tests.conftest import missing
from tests.host.conftest import MakeServer, server_factory

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM_FLAGS = (
    "--headless=new",
    "--no-sandbox",  # Chromium has none for root
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--force-color-profile=srgb",
    "--window-size=1400,2000",  # The page loads an image only when it comes into view.
)


def program(*names: str) -> str:
    """The path of the first program that is installed."""
    found = [path for name in names if (path := shutil.which(name))]
    return found[0] if found else missing(f"{names[0]} is not installed; run: bash tests/setup.sh --browser")


@pytest.fixture(scope="module")
def chromium() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = program(*CHROMIUM_NAMES)
    for flag in CHROMIUM_FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(program("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def make_page_server(
    chromium: webdriver.Chrome, host_dir: Path, models_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MakeServer]:
    """Starts hosts; asks for Chromium first, because nobody needs them without."""
    with server_factory(host_dir, lambda: tmp_path_factory.mktemp("host"), models_dir) as make:
        yield make
