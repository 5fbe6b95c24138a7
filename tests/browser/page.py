"""ComfyUI's page in a browser, used as people use it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from selenium.common.exceptions import (
    ElementClickInterceptedException,
    ElementNotInteractableException,
    JavascriptException,
    NoSuchElementException,
    StaleElementReferenceException,
    TimeoutException,
)
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from tests.host.server import HostServer
from tests.host.workflows import Workflow

TIMEOUT_S = 60.0
POLL_S = 0.1
UNREADY = (  # what a page says while it draws itself
    ElementClickInterceptedException,
    ElementNotInteractableException,
    JavascriptException,
    NoSuchElementException,
    StaleElementReferenceException,
)
NO_TOUR = {"Comfy.TutorialCompleted": True}  # which a first visit starts with

FILE_INPUT = "#comfy-file-input"  # behind the menu's "Open"
RUN_BUTTON = "button[data-testid=queue-button], [data-testid=queue-button] > button:first-child"  # new pages, old pages
ASSETS_BUTTON = ".assets-tab-button"
FIT_BUTTON = "button[aria-label^='Fit View']"

NODE_TYPES = "return window.app?.graph?._nodes.map(node => node.type)"
NODE_IMAGES = "app.graph._nodes.filter(node => node.type == arguments[0]).flatMap(node => node.imgs ?? [])"
VISIBLE_IMAGES = """
[...document.images].filter(image => image.checkVisibility() && image.src.includes(`filename=${arguments[0]}&`))
"""
PIXELS = """
const [image] = %s;
if (!image?.complete || !image.naturalWidth) return null;
const canvas = document.createElement("canvas");
[canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
const context = canvas.getContext("2d");
context.drawImage(image, 0, 0);
return [...context.getImageData(0, 0, canvas.width, canvas.height).data];
"""

T = TypeVar("T")


class Page:
    """The page of one host.

    Args:
        driver: a started Chromium.
        server: the host whose page to open.
        folder: for the workflow files that the page opens, and a picture of the page when a wait fails.
    """

    def __init__(self, driver: Chrome, server: HostServer, folder: Path) -> None:
        self.driver = driver
        self.folder = folder
        server.request("POST", "/settings", NO_TOUR)
        driver.get_log("browser")  # of pages before this one
        driver.get(server.url)
        self.run_button()

    def load(self, workflow: Workflow) -> None:
        """Open a workflow from a file."""
        path = self.folder / "workflow.json"
        path.write_text(json.dumps(workflow))
        self.driver.find_element(By.CSS_SELECTOR, FILE_INPUT).send_keys(str(path))
        types = sorted(node["class_type"] for node in workflow.values())
        self.wait("the workflow's nodes", lambda: sorted(self.driver.execute_script(NODE_TYPES) or []) == types)

    def run(self) -> None:
        """Press the Run button."""
        self.press(RUN_BUTTON)

    def press(self, selector: str) -> None:
        """Press what the page shows there, once that can be pressed: the page may draw it anew at any moment."""

        def pressed() -> bool:
            self.driver.find_element(By.CSS_SELECTOR, selector).click()
            return True

        self.wait(f"{selector} to press", pressed)

    def run_button(self) -> WebElement:
        """The Run button, once the page has it."""
        return self.wait("the Run button", self._run_button)

    def title(self) -> str:
        """What the tab says: the progress of a running job, else the workflow's name."""
        return self.driver.title

    def show_all_nodes(self) -> None:
        """Bring all nodes into view: the page loads the images of no others."""
        self.press(FIT_BUTTON)

    def open_assets(self) -> None:
        """Show the panel with the images of all jobs."""
        self.press(ASSETS_BUTTON)

    def asset(self, file_name: str) -> bytes | None:
        """The pixels of the image with this name, once the page shows it."""
        return self._pixels(VISIBLE_IMAGES, file_name)

    def node_image(self, node_type: str) -> bytes | None:
        """The pixels of the image on a node, once it is there."""
        return self._pixels(NODE_IMAGES, node_type)

    def errors(self) -> set[str]:
        """What the console shows in red, without numbers, which differ from time to time.

        Failures to reach other hosts are left out: the tests have no network.
        """
        entries: list[dict[str, str]] = self.driver.get_log("browser")
        severe = [entry["message"] for entry in entries if entry["level"] == "SEVERE"]
        return {re.sub(r"\d+", "0", text) for text in severe if not re.search(r"https?://(?!127\.0\.0\.1)", text)}

    def wait(self, what: str, condition: Callable[[], T | None]) -> T:
        """The condition's result, once it is true."""
        waiting = WebDriverWait(self.driver, TIMEOUT_S, POLL_S, UNREADY)
        try:
            return waiting.until(lambda _: condition() or False)
        except TimeoutException:
            picture = self.folder / "page.png"
            self.driver.save_screenshot(str(picture))
            lines = [f"{what} did not come in {TIMEOUT_S} s; the page then: {picture}", "its errors:", *self.errors()]
            raise AssertionError("\n".join(lines)) from None

    def _run_button(self) -> WebElement | None:
        return next(iter(self.driver.find_elements(By.CSS_SELECTOR, RUN_BUTTON)), None)

    def _pixels(self, images: str, argument: str) -> bytes | None:
        """Red, green, blue and alpha of each pixel of the first image."""
        pixels: list[int] | None = self.driver.execute_script(PIXELS % images, argument)
        return None if pixels is None else bytes(pixels)
