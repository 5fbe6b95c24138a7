"""In ComfyUI's own page: the tab with the slots, and the choice of the slot that the Run button's jobs go to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome

from tests.browser.axe import faults
from tests.browser.page import NO_TOUR, Page
from tests.host.jobs import hold, interrupt, outcome
from tests.host.pool import ServerPool
from tests.host.server import JSON, HostServer
from tests.host.workflows import Workflow, node

pytestmark = pytest.mark.browser

TAB = ".comfy_parallel-tab-button"
ROOT = "[...document.querySelectorAll('*')].find(one => one.shadowRoot?.querySelector('article, select'))?.shadowRoot"
NODE_WORDS = """
const { description, input } = LiteGraph.registered_node_types.CheckpointLoaderSimpleMultiGPU.nodeData;
return [description, input.optional.device[1].tooltip];
"""
NODE_TEXTS = {
    "en": (
        "Loads as the plain loader does, on the device that you choose; other slots do not see the choice.",
        "Where this model lives and computes. slot: on the device of the slot that runs the job.",
    ),
    "zh": (
        "与普通加载器一样加载，但放在你选择的设备上；其他槽位不受影响。",
        "此模型存放和计算的地方。slot：运行任务的槽位的设备。",
    ),
}
LOCALES = {"en": "Open the dashboard", "zh": "打开仪表板"}


class Sidebar:
    """The tab, opened on ComfyUI's page."""

    def __init__(self, page: Page) -> None:
        self.page = page
        page.press(TAB)
        page.wait("the slots", lambda: len(self.js(f"return [...{ROOT}.querySelectorAll('article')]")) == 2)

    def js(self, script: str, *arguments: Any) -> Any:
        return self.page.driver.execute_script(script, *arguments)

    def choose(self, value: str) -> None:
        script = f"""
        const select = {ROOT}.querySelector('select');
        select.value = arguments[0];
        select.dispatchEvent(new Event('change'));
        return select.value;
        """
        assert self.js(script, value) == value

    def choices(self) -> list[str]:
        found: list[str] = self.js(f"return [...{ROOT}.querySelectorAll('option')].map(one => one.textContent)")
        return found

    def chosen(self) -> str:
        return str(self.js(f"return {ROOT}.querySelector('select').value"))

    def text(self, slot: int) -> str:
        return str(self.js(f"return {ROOT}.querySelectorAll('article')[arguments[0]].innerText", slot))

    def press(self, slot: int, name: str) -> None:
        button = f"{ROOT}.querySelectorAll('article')[arguments[0]].querySelector('.' + arguments[1])"
        self.page.wait(f"{name} enabled", lambda: self.js(f"return {button}.disabled", slot, name) is False)
        self.js(f"{button}.click()", slot, name)


@pytest.fixture
def server(chromium: Chrome, shared_server: ServerPool) -> Iterator[HostServer]:
    server = shared_server(slots="cpu,cpu")
    yield server
    server.request("POST", "/settings", {"Comfy.Locale": "en"})
    server.request("POST", "/parallel/resume", {})
    server.request("POST", "/queue", {"clear": True})
    server.request("POST", "/interrupt", {})


@pytest.fixture
def open_page(chromium: Chrome, server: HostServer, tmp_path: Path) -> Callable[[], Page]:
    """Opens the page as it is for who comes first: with nothing chosen."""

    def opened() -> Page:
        page = Page(chromium, server, tmp_path)
        chromium.execute_script("sessionStorage.clear()")
        chromium.refresh()
        page.run_button()
        return page

    return opened


def quick(seed: int) -> Workflow:
    return {"1": node("CPTConstInt", value=seed), "2": node("CPTOut", value=["1", 0])}


def ended(server: HostServer, page: Page, value: int) -> JSON:
    """The job with this number in its first node, once it has ended."""

    def found() -> JSON | None:
        history: dict[str, JSON] = server.request("GET", "/history")[1]
        return next(
            (one for one in history.values() if one["prompt"][2].get("1", {}).get("inputs") == {"value": value}), None
        )

    return page.wait(f"the end of the job with {value}", found)


def test_the_run_buttons_jobs_go_to_the_chosen_slot_also_after_a_reload(
    open_page: Callable[[], Page], server: HostServer
) -> None:
    page = open_page()
    sidebar = Sidebar(page)
    assert sidebar.choices() == ["auto", "Slot 0 · cpu", "Slot 1 · cpu"]
    assert sidebar.chosen() == "auto"
    for value, slot in ((9001, 1), (9002, 0), (9003, 1)):  # An idle server would give all of them to one slot.
        sidebar.choose(str(slot))
        page.load(quick(value))
        page.run()
        assert ended(server, page, value)["gpu_id"] == slot
    page.driver.refresh()
    page.run_button()
    assert Sidebar(page).chosen() == "1"


def test_auto_jobs_go_where_there_is_room(open_page: Callable[[], Page], server: HostServer) -> None:
    page = open_page()
    sidebar = Sidebar(page)
    for slot, value in ((0, 9011), (1, 9012)):
        holder = str(server.submit(hold(value), slot)["prompt_id"])
        page.wait("the holder", lambda slot=slot: "CPTSleep" in sidebar.text(slot))
        page.load(quick(value))
        page.run()
        assert ended(server, page, value)["gpu_id"] == 1 - slot
        interrupt(server, holder)
        server.wait([holder])


def test_a_slots_job_is_shown_and_interrupted_and_the_slot_paused(
    open_page: Callable[[], Page], server: HostServer
) -> None:
    page = open_page()
    sidebar = Sidebar(page)
    job = str(
        server.submit(
            {"work": node("CPTProgress", steps=5000, ms=20, seed=9), "out": node("CPTOut", value=["work", 0])}, 1
        )["prompt_id"]
    )
    page.wait("the job", lambda: "CPTProgress" in sidebar.text(1))
    page.wait("its preview", lambda: sidebar.js(f"return {ROOT}.querySelectorAll('img')[1].naturalWidth") == 64)
    sidebar.press(1, "interrupt")
    assert outcome(server.wait([job])[job]) == "interrupted"
    sidebar.press(1, "pause")
    page.wait("the pause", lambda: "paused" in sidebar.text(1))
    sidebar.press(1, "resume")
    page.wait("an idle slot", lambda: "idle" in sidebar.text(1))


def test_html_in_what_a_job_is_called_is_shown_as_text(open_page: Callable[[], Page], server: HostServer) -> None:
    page = open_page()
    sidebar = Sidebar(page)
    work = node("CPTProgress", steps=5000, ms=20, seed=10) | {"_meta": {"title": "<img src=x onerror=window.hit=1>"}}
    job = str(server.submit({"work": work, "out": node("CPTOut", value=["work", 0])}, 1)["prompt_id"])
    page.wait("the title", lambda: work["_meta"]["title"] in sidebar.text(1))
    assert sidebar.js(f"return [{ROOT}.querySelectorAll('img[src=x]').length, window.hit ?? null]") == [0, None]
    sidebar.press(1, "interrupt")
    server.wait([job])


def test_who_takes_part_in_shared_jobs_is_chosen_and_shares_are_told_apart(
    open_page: Callable[[], Page], server: HostServer
) -> None:
    page = open_page()
    sidebar = Sidebar(page)
    box = f"{ROOT}.querySelectorAll('.takes-part')[arguments[0]]"
    page.wait("both chosen", lambda: all(sidebar.js(f"return {box}.checked", slot) for slot in (0, 1)))
    sidebar.js(f"{box}.click()", 1)
    page.wait("the choice", lambda: server.request("GET", "/parallel/participants")[1] == {"gpu_ids": [0]})
    sidebar.js(f"{box}.click()", 1)
    page.wait("both again", lambda: server.request("GET", "/parallel/participants")[1] == {"gpu_ids": [0, 1]})
    job = str(
        server.submit(
            {
                "seed": node("DistributedSeed", seed=9100),
                "work": node("CPTProgress", steps=5000, ms=20, seed=["seed", 0]),
                "all": node("ParallelCollector", value=["work", 0]),
                "out": node("CPTOut", value=["all", 0]),
            },
            0,
        )["prompt_id"]
    )
    page.wait("the share", lambda: "share 2 of 2" in sidebar.text(1))
    page.wait("its preview", lambda: sidebar.js(f"return {ROOT}.querySelectorAll('img')[1].naturalWidth") == 64)
    assert "of 2" not in sidebar.text(0)
    sidebar.press(1, "interrupt")
    assert outcome(server.wait([job])[job]) == "interrupted"


def test_an_interrupt_without_a_job_says_whose_it_is(open_page: Callable[[], Page]) -> None:
    page = open_page()
    script = """
    const done = arguments[0], { api } = window.comfyAPI.api, sent = [];
    const real = window.fetch;
    window.fetch = (url, options) => { sent.push([String(url), options?.body]); return real(url, options); };
    const end = () => { window.fetch = real; done([sent, api.clientId]); };
    api.interrupt().then(() => api.interrupt("nobody's")).then(end);
    """
    sent, client_id = page.driver.execute_async_script(script)
    bodies = [body for url, body in sent if url.endswith("/interrupt")]
    assert bodies == [f'{{"client_id":"{client_id}"}}', '{"prompt_id":"nobody\'s"}']


@pytest.mark.parametrize("locale", LOCALES)
def test_the_tab_speaks_the_pages_language_and_axe_finds_no_fault_in_it(
    open_page: Callable[[], Page], server: HostServer, cache_dir: Path, locale: str
) -> None:
    server.request("POST", "/settings", {**NO_TOUR, "Comfy.Locale": locale})
    page = open_page()
    sidebar = Sidebar(page)
    assert sidebar.js(f"return {ROOT}.querySelector('a').textContent") == LOCALES[locale]
    said, tip = sidebar.js(NODE_WORDS)
    ours, expected_tip = NODE_TEXTS[locale]
    assert said.endswith(ours)
    assert tip == expected_tip
    assert faults(page.driver, cache_dir, within=".sidebar-content-container, .side-bar-panel") == []
