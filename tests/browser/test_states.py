"""The dashboard in states that a real host is seldom in: many slots, none ready, refused, restarted, odd texts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome

from comfy_parallel.http import dashboard
from tests.browser.axe import faults
from tests.browser.dashboard_server import DashboardServer, Parts
from tests.browser.test_dashboard import PHONE, Dashboard

pytestmark = pytest.mark.browser

HTML = '<img src=x onerror="window.hit = 1"><script>window.hit = 1</script>&amp;${hit}{time}' + "x" * 400
CHOSEN = {"state", "outcome", "kind", "worker", "health", "mode"}  # texts that the server chooses out of a few
JOB = {
    **{"prompt_id": "p", "started_at": 1.0, "waited_s": 0.5, "interrupted": False, "share": None, "node": "n"},
    **{"value": 3, "max": 4, "nodes_done": 1, "nodes": 2, "preview": 1},
}
WAITS = {"prompt_id": "w", "gpu_id": 1, "priority": 0, "queued_at": 1.0, "nodes": 2, "alone": True}
PICTURE = {"filename": "f.png", "subfolder": "s", "type": "output"}
ENDED = {
    **{"prompt_id": "e", "gpu_id": 0, "outcome": "failed", "waited_s": 0.5, "ran_s": 1.0, "ended_at": 2.0},
    **{"image": PICTURE, "error": "why"},
}
ROWS = "return document.querySelectorAll('#waiting tr, #weights tr').length"
WORKERS = [("process", "starting"), ("process", "waiting"), ("remote", "unreachable"), ("thread", None)]
FILE = {"name": "m", "size_bytes": 7, "mapped_bytes": 1, "copied_bytes": 2, "converted_bytes": 3, "slots": [0]}


@pytest.fixture
def server(chromium: Chrome, monkeypatch: pytest.MonkeyPatch) -> Iterator[DashboardServer]:
    served = DashboardServer("cpu", "cpu")
    monkeypatch.setattr(dashboard, "overview", served.overview)
    served.restart("cpu", "cpu")  # with that
    yield served
    served.stop()
    chromium.get("about:blank")


def full(parts: Parts) -> Parts:
    """Something in every place of the page."""
    slots = {name: slot for name, slot in parts.items() if name.startswith("slot/")}
    for slot in slots.values():
        slot |= {"job": JOB, "error": "why", "models": [{"name": "m", "loaded_bytes": 5}], "device_name": "d"}
        slot["graphs"] = {"on": False, "reason": "r", "captures": 0, "replays": 0}
    weights = {"mode": "auto", "files": [FILE]}
    return parts | {"waiting": {"total": 2, "jobs": [WAITS]}, "recent": [ENDED], "weights": weights}


def with_text(value: Any, name: str = "") -> Any:
    """The same with HTML for each text that is not one of a few."""
    if isinstance(value, dict):
        return {key: with_text(part, key) for key, part in value.items()}
    if isinstance(value, list):
        return [with_text(part) for part in value]
    return HTML if isinstance(value, str) and name not in CHOSEN else value


def test_what_strangers_wrote_is_text_in_every_place_and_breaks_no_line(
    chromium: Chrome, server: DashboardServer
) -> None:
    server.change = lambda parts: with_text(full(parts))
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    try:
        page = Dashboard(chromium, server.url)
        shown = page.wait("all of it", lambda: page.js("return document.body.innerText") or None)
        page.wait("a row of each table", lambda: page.js(ROWS) == 2)
        page.press("#waiting .move")
        page.press("#move [value=cancel]")
        assert "onerror=" in shown
        foreign = "return document.querySelectorAll('img[src=x], body script, [onerror]').length + (window.hit ?? 0)"
        assert page.js(foreign) == 0
        assert page.js("return document.documentElement.scrollWidth <= innerWidth")
    finally:
        chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_64_slots_none_of_them_ready_in_processes_and_on_other_machines(
    chromium: Chrome, server: DashboardServer, cache_dir: Path
) -> None:
    def none_ready(parts: Parts) -> Parts:
        for number in range(64):
            slot = parts[f"slot/{number}"]
            slot["kind"], slot["worker"] = WORKERS[number % 4]
            slot |= {"state": "starting" if number % 2 else "failed", "health": "broken", "error": f"why {number}"}
            slot |= {"device_name": None, "vram": None, "models": None, "graphs": dict.fromkeys(slot["graphs"])}
        return parts

    server.change = none_ready
    server.restart(*["cpu"] * 64)
    page = Dashboard(chromium, server.url)
    page.wait("64 cards", lambda: page.js("return document.querySelectorAll('#slots .slot').length") == 64)
    assert [page.text(".device", slot) for slot in range(4)] == [
        *("cpu · own process (starts)", "cpu · own process (starts again soon)"),
        *("cpu · other machine (not reachable)", "cpu"),
    ]
    assert page.text(".trouble", 63) == "why 63"
    assert page.text(".steps", 0) == ""  # not that they run eagerly, which is not known
    assert page.js("return document.title") == "0/64 · comfy_parallel"
    assert faults(chromium, cache_dir) == []


def test_a_server_that_comes_back_with_other_slots_is_shown_as_it_is_now(
    chromium: Chrome, server: DashboardServer
) -> None:
    page = Dashboard(chromium, server.url)
    server.stop()
    page.wait("the banner", lambda: "No connection to the server" in page.text("#banner"))
    server._start(("cpu", "cpu", "cpu"))
    page.wait("three cards", lambda: page.js("return document.querySelectorAll('#slots .slot').length") == 3)
    assert page.js("return [document.body.dataset.connection, document.querySelector('#banner').hidden]") == [
        "live",
        True,
    ]


def test_why_a_server_refuses_is_said_and_a_password_is_not_asked_for_again_and_again(
    chromium: Chrome, server: DashboardServer
) -> None:
    page = Dashboard(chromium, server.url)
    page.js("const real = setTimeout; window.setTimeout = (run, ms) => real(run, ms / 20)")  # it tries again soon
    server.refuse(503, {"message": "too many read", "details": "close one"})
    page.wait("the reason", lambda: "(too many read; close one)" in page.text("#banner"))
    server.refuse(200)
    page.wait("live data", lambda: page.js("return document.body.dataset.connection") == "live")
    server.refuse(401, {"message": "No valid token"})
    page.wait("what to do", lambda: "Load this page again" in page.text("#banner"))
    before = len(server.asked)
    time.sleep(1)
    assert len(server.asked) == before
    server.refuse(200)
    Dashboard(chromium, server.url)


def test_buttons_work_on_a_page_that_was_opened_with_a_password_in_its_address(
    chromium: Chrome, server: DashboardServer
) -> None:
    page = Dashboard(chromium, server.url.replace("//", "//ann:open%20sesame@"))
    assert "ann:" in page.js("return document.baseURI")
    page.press(".pause", 0)
    page.wait("the request", lambda: "/parallel/pause" in server.asked)


def test_pages_that_nobody_sees_leave_the_browsers_six_connections_to_others(
    chromium: Chrome, server: DashboardServer
) -> None:
    first = chromium.current_window_handle
    tabs = []
    try:
        for _ in range(7):
            chromium.switch_to.new_window("tab")
            tabs.append(chromium.current_window_handle)
            Dashboard(chromium, server.url)
    finally:
        for tab in tabs:
            chromium.switch_to.window(tab)
            chromium.close()
        chromium.switch_to.window(first)
