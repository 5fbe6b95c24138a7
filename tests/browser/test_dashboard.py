"""The dashboard in Chromium, on a real host with jobs."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote_plus

import pytest
from selenium.common.exceptions import JavascriptException
from selenium.webdriver import Chrome, Keys
from selenium.webdriver.support.wait import WebDriverWait

from tests.browser.axe import faults
from tests.browser.proxy import Proxy
from tests.host.jobs import hold, interrupt, outcome, quick
from tests.host.pool import ServerPool
from tests.host.server import JSON, HostServer
from tests.host.workflows import Workflow, node, txt2img

pytestmark = pytest.mark.browser

TIMEOUT_S = 60.0
T = TypeVar("T")
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
CARD = "document.querySelectorAll('#slots .slot')[arguments[0]]"


class Dashboard:
    """The page, in the words of its reader."""

    def __init__(self, driver: Chrome, url: str, language: str = "en") -> None:
        self.driver = driver
        driver.get(f"{url}/parallel/")
        driver.execute_script("localStorage.setItem('comfy_parallel.language', arguments[0])", language)
        driver.refresh()
        self.wait("live data", lambda: self.js("return document.body.dataset.connection") == "live")
        driver.get_log("browser")

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def wait(self, what: str, condition: Callable[[], T | None]) -> T:
        """The condition's result, once it is true."""
        waiting = WebDriverWait(self.driver, TIMEOUT_S, 0.1, [JavascriptException])
        return waiting.until(lambda _: condition() or False, f"{what} did not come in {TIMEOUT_S} s")

    def text(self, selector: str, slot: int | None = None) -> str:
        root = "document" if slot is None else CARD
        found = self.js(f"return {root}.querySelector(arguments[1])?.innerText ?? ''", slot, selector)
        return str(found).replace("\xa0", " ")

    def press(self, selector: str, slot: int | None = None) -> None:
        root = "document" if slot is None else CARD
        button = self.wait(selector, lambda: self.js(f"return {root}.querySelector(arguments[1])", slot, selector))
        self.wait(f"{selector} enabled", button.is_enabled)
        button.click()

    def state(self, slot: int) -> str:
        return str(self.js(f"return {CARD}.dataset.state", slot))

    def await_state(self, slot: int, state: str) -> None:
        self.wait(f"slot {slot} {state}", lambda: self.state(slot) == state)

    def row(self, job_id: str) -> Any:
        """The waiting job's row, once it is there."""
        find = "return document.querySelector(`#waiting tr[data-key='${arguments[0]}']`)"
        return self.wait(f"the row of {job_id}", lambda: self.js(find, job_id))


@pytest.fixture
def server(chromium: Chrome, shared_server: ServerPool) -> Iterator[HostServer]:
    server = shared_server(slots="cpu,cpu")
    yield server
    server.request("POST", "/parallel/resume", {})
    server.request("POST", "/queue", {"clear": True})
    server.request("POST", "/interrupt", {})


@pytest.fixture
def page(chromium: Chrome, server: HostServer) -> Iterator[Dashboard]:
    yield Dashboard(chromium, server.url)
    errors = [entry["message"] for entry in chromium.get_log("browser") if entry["level"] == "SEVERE"]
    assert errors == []


def painting(seed: int, *, steps: int, ms: int) -> Workflow:
    """Shows its progress and previews for a while, then saves an image."""
    work = node("CPTProgress", steps=steps, ms=ms, seed=seed)
    return {"work": work, "save": node("SaveImage", images=["work", 0], filename_prefix="dashboard")}


def submit(server: HostServer, workflow: Workflow, slot: int | str | None = None) -> str:
    return str(server.submit(workflow, slot)["prompt_id"])


def entry_of(server: HostServer, job_id: str) -> JSON:
    return server.wait([job_id])[job_id]


def test_a_running_job_is_shown_with_progress_and_preview_until_it_is_interrupted(
    page: Dashboard, server: HostServer
) -> None:
    job = submit(server, painting(0x4080C0, steps=5000, ms=20), 1)
    page.await_state(1, "running")
    page.wait("its steps", lambda: "/ 5,000" in page.text(".step", 1))
    assert page.text(".node", 1) == "CPTProgress"
    loaded = f"const image = {CARD}.querySelector('img'); return image.complete && image.naturalWidth"
    assert page.wait("its preview", lambda: page.js(loaded, 1)) == 64
    before = page.text(".step", 1)
    page.wait("progress", lambda: page.text(".step", 1) != before)
    page.press(".interrupt", 1)
    assert outcome(entry_of(server, job)) == "interrupted"
    page.wait("it among those that ended", lambda: job[:8] in page.text("#recent li:first-child"))
    assert "interrupted" in page.text("#recent li:first-child")
    page.await_state(1, "idle")


def test_jobs_that_ended_are_shown_with_picture_or_error(page: Dashboard, server: HostServer) -> None:
    good = server.run(painting(7, steps=1, ms=1), 0)
    message = f"no luck {uuid.uuid4().hex[:6]}"
    bad = {"fail": node("CPTFail", message=message), "out": node("CPTOut", value=["fail", 0])}
    assert outcome(server.run(bad, 1)) == "error"
    page.wait("the error", lambda: message in page.text("#recent"))
    name = next(iter(good["outputs"].values()))["images"][0]["filename"]
    loaded = "return document.querySelector(`#recent img[src*='${arguments[0]}']`)?.naturalWidth"
    assert page.wait("the picture", lambda: page.js(loaded, name)) == 16
    page.wait("the chart", lambda: "jobs ended" in page.text("#rate-text"))
    assert page.js("return document.querySelectorAll('.chart canvas').length") == 2


def test_html_in_what_a_job_is_called_and_says_is_shown_as_text(page: Dashboard, server: HostServer) -> None:
    html = f"<img src=x onerror=window.hit=1> {uuid.uuid4().hex[:6]}"
    titled = painting(0x11, steps=5000, ms=20)
    titled["work"]["_meta"] = {"title": html}
    running = submit(server, titled, 1)
    page.wait("the title", lambda: page.text(".node", 1) == html)
    saved = painting(0x12, steps=1, ms=1)
    saved["save"]["inputs"]["filename_prefix"] = html
    name = next(iter(server.run(saved, 0)["outputs"].values()))["images"][0]["filename"]
    bad = {"fail": node("CPTFail", message=html), "out": node("CPTOut", value=["fail", 0])}
    assert outcome(server.run(bad, 0)) == "error"
    page.wait("the error", lambda: html in page.text("#recent"))
    shown = "return document.querySelector(`#recent img[src*='${arguments[0]}']`)?.naturalWidth"
    assert name.startswith(html)
    page.wait("the picture", lambda: page.js(shown, quote_plus(name)))
    assert page.js("return [document.querySelectorAll('img[src=x]').length, window.hit ?? null]") == [0, None]
    interrupt(server, running)
    server.wait([running])


def test_a_slot_is_paused_and_resumed(page: Dashboard, server: HostServer) -> None:
    page.press(".pause", 0)
    page.await_state(0, "paused")
    bound, other = submit(server, quick(901), 0), submit(server, quick(902), "auto")
    assert entry_of(server, other)["gpu_id"] == 1
    page.row(bound)
    assert server.request("GET", f"/history/{bound}")[1] == {}
    page.press(".resume", 0)
    assert entry_of(server, bound)["gpu_id"] == 0
    page.wait("an empty queue", lambda: "No job waits." in page.text("#waiting-empty"))


def test_all_slots_are_drained_and_resumed(page: Dashboard, server: HostServer) -> None:
    page.press("#drain-all")
    for slot in (0, 1):
        page.await_state(slot, "paused")
    page.wait("what is refused", lambda: "refuses new jobs" in page.text("#totals"))
    assert server.request("POST", "/prompt", {"prompt": quick(903)})[0] == 503
    page.press("#resume-all")
    page.await_state(0, "idle")
    server.run(quick(904))


def test_a_waiting_job_is_cancelled_and_the_keyboard_keeps_its_place(page: Dashboard, server: HostServer) -> None:
    holder = submit(server, hold(905), 0)
    kept, cancelled = submit(server, quick(906), 0), submit(server, quick(907), 0)
    page.row(kept)
    page.js("arguments[0].querySelector('.cancel').focus()", page.row(cancelled))
    another = submit(server, quick(908), 0)
    page.row(another)
    label = page.js("return document.activeElement.getAttribute('aria-label')")
    assert label == f"Cancel: {cancelled[:8]}…"
    page.driver.switch_to.active_element.send_keys(Keys.ENTER)
    page.wait("the row's end", lambda: cancelled[:8] not in page.text("#waiting"))
    interrupt(server, holder)
    server.wait([kept, another])
    assert server.request("GET", f"/history/{cancelled}")[1] == {}


def move(page: Dashboard, job_id: str, slot: str, priority: str) -> None:
    page.js("arguments[0].querySelector('.move').click()", page.row(job_id))
    page.js("document.querySelector('#move-slot').value = arguments[0]", slot)
    page.js("document.querySelector('#move-priority').value = arguments[0]", priority)
    page.press("#move .main")


def test_a_job_that_is_moved_runs_where_it_was_moved(page: Dashboard, server: HostServer) -> None:
    holder = submit(server, hold(913), 0)
    moved = submit(server, quick(914), 0)
    move(page, moved, "1", "0")
    assert entry_of(server, moved)["gpu_id"] == 1
    page.wait("the toast", lambda: "The job was changed." in page.text("#toasts"))
    interrupt(server, holder)
    assert entry_of(server, holder)["gpu_id"] == 0


def test_a_job_whose_priority_is_raised_runs_before_those_that_came_earlier(
    page: Dashboard, server: HostServer
) -> None:
    holder = submit(server, hold(915), 0)
    first, second = submit(server, quick(916), 0), submit(server, quick(917), 0)
    page.row(first)
    move(page, second, "0", "7")
    page.wait("the new order", lambda: second[:8] in page.text("#waiting tr:first-child"))
    interrupt(server, holder)
    server.wait([first, second])
    ended = page.wait("both ended", lambda: order_of_ends(page, first, second))
    assert ended == [first, second]  # the latest first


def order_of_ends(page: Dashboard, *job_ids: str) -> list[str]:
    shown = page.js("return [...document.querySelectorAll('#recent code')].map(one => one.title)")
    found = [one for one in shown if one in job_ids]
    return found if len(found) == len(job_ids) else []


def test_a_file_is_preloaded(page: Dashboard, server: HostServer) -> None:
    page.press(".preload", 1)
    page.wait("the files", lambda: page.js("return document.querySelector('#preload-file').value") == "a.safetensors")
    page.press("#preload .main")
    page.wait("the toast", lambda: "Loading was queued." in page.text("#toasts"))
    page.wait("the file", lambda: "checkpoints/a.safetensors" in page.text("#weights"))


def test_a_slots_models_are_freed(page: Dashboard, server: HostServer) -> None:
    entry_of(server, submit(server, txt2img(1), 1))
    name = server.request("GET", "/queue/all")[1]["queues"][1]["models"][0]["name"]
    page.wait("its models", lambda: name in page.text(".chips", 1))
    page.press(".free", 1)
    page.wait("the toast", lambda: "memory is freed" in page.text("#toasts"))
    page.wait("none", lambda: name not in page.text(".chips", 1))
    assert server.request("GET", "/queue/all")[1]["queues"][1]["models"] == []


def test_what_the_server_refuses_is_said(page: Dashboard, server: HostServer) -> None:
    holder = submit(server, hold(909), 0)
    gone = submit(server, quick(910), 0)
    page.js("arguments[0].querySelector('.move').click()", page.row(gone))
    server.request("POST", "/queue", {"delete": [gone]})
    page.js("document.querySelector('#move-slot').value = '1'")
    page.press("#move .main")
    page.wait("the reason", lambda: "The server refused" in page.text("#toasts"))
    interrupt(server, holder)
    entry_of(server, holder)
    page.driver.get_log("browser")  # the browser tells a refusal as well


def test_a_lost_connection_is_said_and_comes_back(chromium: Chrome, server: HostServer) -> None:
    proxy = Proxy(server.port)
    try:
        page = Dashboard(chromium, proxy.url)
        proxy.cut()
        page.wait("the banner", lambda: "No connection to the server" in page.text("#banner"))
        assert page.js("return [...document.querySelectorAll('main button')].every(button => button.disabled)")
        proxy.mend()
        page.wait("live data", lambda: page.js("return document.body.dataset.connection") == "live")
        assert page.js("return document.querySelector('#banner').hidden")
        assert page.js(f"return {CARD}.querySelector('.pause').disabled", 0) is False
    finally:
        proxy.close()
        chromium.get_log("browser")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("language", "is_phone"), [("en", False), ("zh", True)])
def test_axe_finds_no_fault(
    chromium: Chrome, server: HostServer, cache_dir: Path, scheme: str, language: str, is_phone: bool
) -> None:
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    if is_phone:
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    try:
        holder = submit(server, hold(911), 0)
        waiting = submit(server, quick(912), 0)
        page = Dashboard(chromium, server.url, language)
        page.row(waiting)
        page.await_state(0, "running")
        assert page.js("return document.documentElement.lang") == {"en": "en", "zh": "zh-CN"}[language]
        assert page.js("return document.documentElement.scrollWidth <= innerWidth")
        assert faults(chromium, cache_dir) == []
        page.js("arguments[0].querySelector('.move').click()", page.row(waiting))
        assert faults(chromium, cache_dir) == []
        interrupt(server, holder)
        server.wait([holder, waiting])
    finally:
        chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
        chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
