"""When one slot's device is lost, the server still tells of the others, and they work on."""

from __future__ import annotations

import pytest

from tests.host.conftest import MakeServer
from tests.host.jobs import outcome, quick
from tests.host.server import HostServer

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def server(make_module_server: MakeServer) -> HostServer:
    """Slot 1 of 3 has lost its device, after a job on each."""
    server = make_module_server(slots="cpu,cpu,cpu")
    for slot in range(3):
        server.run(quick(slot), slot)
    assert server.request("POST", "/test/lose/1")[0] == 200
    return server


def test_every_slot_is_listed_and_the_lost_one_says_why(server: HostServer) -> None:
    status, reply = server.request("GET", "/queue/all")
    assert (status, [slot["health"] for slot in reply["queues"]]) == (200, ["ok", "broken", "ok"])
    first, lost, third = reply["queues"]
    assert (first["error"], third["error"]) == (None, None)
    assert first["vram"]["total_bytes"] > 0
    assert lost["error"]
    assert (lost["vram"], lost["device_name"], lost["state"]) == (None, None, "idle")
    assert lost["metrics"]["jobs_succeeded"] == 1


@pytest.mark.parametrize("path", ["/debug/queues", "/metrics", "/queue", "/system_stats", "/parallel/weights"])
def test_every_page_answers(server: HostServer, path: str) -> None:
    assert server.request("GET", path)[0] == 200


def test_metrics_say_which_slot_is_healthy(server: HostServer) -> None:
    lines = server.request("GET", "/metrics")[1].splitlines()
    healthy = {line.partition(" ")[0]: line.split()[-1] for line in lines if "slot_healthy{" in line}
    assert sorted(healthy.values()) == ["0.0", "1.0", "1.0"]
    assert next(value for name, value in healthy.items() if 'gpu_id="1"' in name) == "0.0"
    assert any(line.startswith("comfy_parallel_device_memory_bytes") for line in lines)


def test_the_others_work_on(server: HostServer) -> None:
    assert [outcome(server.run(quick(slot + 10), slot)) for slot in (0, 2)] == ["success"] * 2


def test_the_reason_is_logged_once(server: HostServer) -> None:
    for _ in range(3):
        server.request("GET", "/queue/all")
    assert server.log().count("its device does not answer") == 1
