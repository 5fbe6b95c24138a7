"""ComfyUI's real page runs jobs on two slots and shows their progress and images, with no error that stock has not."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from selenium.webdriver import Chrome

from tests.browser.page import Page
from tests.host.conftest import MakeServer
from tests.host.jobs import outcome
from tests.host.server import JSON, HostServer
from tests.host.workflows import Workflow, node, txt2img

pytestmark = pytest.mark.browser

NUM_JOBS = 4
SIZE, PREVIEW_SIZE = 16, 64  # of CPTProgress's image and of its previews
WAITING = "[20%][0%] CPTRendezvous"  # the page's title when one of a meeting's five nodes is done, and one waits


@pytest.fixture(scope="module")
def server(make_page_server: MakeServer) -> HostServer:
    return make_page_server(slots="cpu,cpu")


@pytest.fixture(scope="module")
def stock_errors(make_page_server: MakeServer, chromium: Chrome, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """What the console shows when stock ComfyUI runs the same jobs."""
    stock = make_page_server(slots=None)
    folder = tmp_path_factory.mktemp("workflows")
    page = Page(chromium, stock, folder)
    assert_runs_a_job(page, stock)
    errors = page.errors()
    page = Page(chromium, stock, folder)
    page.load(meeting(1))
    for _ in range(NUM_JOBS):
        page.run()
    assert_shows_all(page, stock)
    return errors | page.errors()


@pytest.fixture
def page(chromium: Chrome, server: HostServer, tmp_path: Path) -> Page:
    return Page(chromium, server, tmp_path)


def numbered(workflow: Workflow) -> Workflow:
    """The same workflow with numbers as node names, which the page gives its own."""
    numbers = {name: str(number) for number, name in enumerate(workflow, 1)}

    def renamed(value: object) -> object:
        return [numbers[value[0]], value[1]] if isinstance(value, list) else value

    return {
        numbers[name]: node(part["class_type"], **{key: renamed(value) for key, value in part["inputs"].items()})
        for name, part in workflow.items()
    }


def meeting(parties: int) -> Workflow:
    """A job that waits until `parties` of its kind run at the same time, then makes an image of its seed's colour."""
    return numbered(
        {
            "parties": node("CPTConstInt", value=parties),
            "told": node("CPTOut", value=["parties", 0]),  # The host runs this first: a node that shows something.
            "meet": node("CPTRendezvous", key="page", parties=["parties", 0], timeout=240.0),
            "work": node("CPTProgress", steps=["meet", 0], ms=1, seed=0x4080C0),
            "save": node("SaveImage", images=["work", 0], filename_prefix="meeting"),
        }
    )


def await_jobs(page: Page, server: HostServer, prefix: str, count: int) -> list[JSON]:
    """The history entries of the jobs that save under a prefix, once there are so many."""

    def all_done() -> list[JSON] | None:
        history: dict[str, JSON] = server.request("GET", "/history")[1]
        entries = [entry for entry in history.values() if prefix in str(entry["prompt"][2])]
        return entries if len(entries) == count else None

    return page.wait(f"the end of {count} jobs", all_done)


def saved(server: HostServer, entry: JSON) -> Path:
    """The only image that a job has saved."""
    assert outcome(entry) == "success"
    [image] = [image for output in entry["outputs"].values() for image in output.get("images", ())]
    return server.base_dir / "output" / str(image["filename"])


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.convert("RGBA").tobytes()


def seed_pixels(entry: JSON) -> bytes:
    """The image that CPTProgress makes of the seed which the page has given the job."""
    [seed] = [part["inputs"]["seed"] for part in entry["prompt"][2].values() if "seed" in part["inputs"]]
    return bytes([seed & 255, seed >> 8 & 255, seed >> 16 & 255, 255]) * SIZE**2


def assert_runs_a_job(page: Page, server: HostServer) -> None:
    """The Run button runs a workflow, whose image then is on its node and among the assets."""
    page.load(numbered(txt2img(1, prefix="single")))
    page.run()
    [entry] = await_jobs(page, server, "single", 1)
    file = saved(server, entry)
    page.show_all_nodes()
    page.wait("the image on its node", lambda: page.node_image("SaveImage") == pixels(file))
    page.open_assets()
    page.wait("the image among the assets", lambda: page.asset(file.name) == pixels(file))


def assert_shows_all(page: Page, server: HostServer) -> list[JSON]:
    """All images of the meetings are among the assets, the last one is on its node, and no progress remains."""
    entries = await_jobs(page, server, "meeting", NUM_JOBS)
    files = {saved(server, entry): seed_pixels(entry) for entry in entries}
    assert len(files) == NUM_JOBS
    assert {file: pixels(file) for file in files} == files
    page.show_all_nodes()
    page.wait("an image on its node", lambda: page.node_image("SaveImage") in files.values())
    page.wait("a preview on its node", lambda: len(page.node_image("CPTProgress") or b"") == 4 * PREVIEW_SIZE**2)
    page.wait("the end of all progress", lambda: "%" not in page.title())
    page.open_assets()
    for file, shown in files.items():
        page.wait(f"{file.name} among the assets", lambda file=file, shown=shown: page.asset(file.name) == shown)
    return entries


def test_the_run_button_runs_a_job_and_the_page_shows_its_image(
    page: Page, server: HostServer, stock_errors: set[str]
) -> None:
    assert_runs_a_job(page, server)
    assert page.errors() <= stock_errors


def test_four_jobs_run_on_both_slots_and_the_page_shows_all_of_them(
    page: Page, server: HostServer, stock_errors: set[str]
) -> None:
    page.load(meeting(2))
    page.run()
    page.wait("the first job's progress", lambda: page.title() == WAITING)
    for _ in range(NUM_JOBS - 1):
        page.run()
    entries = assert_shows_all(page, server)
    # Each job has met another one, and a slot runs one job at a time.
    assert Counter(entry["gpu_id"] for entry in entries) == {0: 2, 1: 2}
    assert page.errors() <= stock_errors
