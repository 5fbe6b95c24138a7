"""nginx/comfy_parallel.conf in a real nginx, before a real ComfyUI with four slots."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.conftest import Need
from tests.deploy.entries import WEBSOCKETS, assert_hears_its_own_job, assert_takes_files_as_large_as_comfyui_does
from tests.deploy.real_nginx import (
    ALL_SLOTS,
    COMFYUI,
    SLOT_PORTS,
    Echo,
    Nginx,
    Reply,
    complaints,
    running_echo,
    running_nginx,
    write_config,
)
from tests.host.server import HostServer

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(180)]

CONFIG = Path(__file__).resolve().parents[2] / "nginx" / "comfy_parallel.conf"

MakeNginx = Callable[[int], Nginx]


@pytest.fixture(scope="module")
def make_nginx(need: Need, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeNginx]:
    """`make_nginx(port)` starts an nginx before what listens there."""
    with ExitStack() as started:

        def make(backend_port: int) -> Nginx:
            home = tmp_path_factory.mktemp("nginx")
            return started.enter_context(running_nginx(need("nginx"), home, CONFIG.read_text(), backend_port))

        yield make


@pytest.fixture(scope="module")
def nginx(make_nginx: MakeNginx, host: HostServer) -> Nginx:
    return make_nginx(host.port)


@pytest.fixture
def echo() -> Iterator[Echo]:
    with running_echo() as heard:
        yield heard


@pytest.fixture
def before_echo(make_nginx: MakeNginx, echo: Echo) -> Nginx:
    return make_nginx(echo.port)


def job(**fields: Any) -> dict[str, Any]:
    """A job of another colour each time: one seen before would not run."""
    image = {"width": 16, "height": 16, "batch_size": 1, "color": uuid.uuid4().int % (1 << 24)}
    prompt = {
        "1": {"class_type": "EmptyImage", "inputs": image},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }
    return {"prompt": prompt, **fields}


def submit(nginx: Nginx, port: int, path: str = "/prompt", body: Any = None, **headers: str) -> dict[str, Any]:
    reply = nginx.call(port, "POST", path, body or job(), **headers)
    assert reply.status == 200, reply.body
    accepted: dict[str, Any] = reply.json
    return accepted


def slot_that_ran(host: HostServer, accepted: dict[str, Any]) -> int:
    job_id = accepted["prompt_id"]
    entry = host.wait([job_id])[job_id]
    assert entry["status"]["status_str"] == "success"
    slot: int = entry["gpu_id"]
    return slot


def test_nginx_accepts_the_shipped_file(need: Need, tmp_path: Path) -> None:
    write_config(tmp_path, CONFIG.read_text(), {COMFYUI: COMFYUI})
    assert (tmp_path / "comfy_parallel.conf").read_text() == CONFIG.read_text()
    assert complaints(need("nginx"), tmp_path) == ""


@pytest.mark.parametrize(("slot", "port"), list(enumerate(SLOT_PORTS)))
def test_a_slots_port_leads_to_its_slot_whatever_the_client_asks_for(
    nginx: Nginx, host: HostServer, slot: int, port: int
) -> None:
    other = (slot + 1) % 4
    body = job(extra_data={"target_gpu": other})
    for accepted in (submit(nginx, port), submit(nginx, port, "/api/prompt", body, X_TARGET_GPU=str(other))):
        assert accepted["gpu_id"] == slot
        assert slot_that_ran(host, accepted) == slot


def test_the_common_port_leaves_the_choice_to_the_server_or_to_the_client(nginx: Nginx, host: HostServer) -> None:
    accepted = submit(nginx, ALL_SLOTS)
    assert accepted["gpu_id"] is None
    assert slot_that_ran(host, accepted) in range(4)
    by_header = submit(nginx, ALL_SLOTS, X_TARGET_GPU="3")
    by_body = submit(nginx, ALL_SLOTS, body=job(extra_data={"target_gpu": 2}))
    assert (slot_that_ran(host, by_header), slot_that_ran(host, by_body)) == (3, 2)


def test_the_path_form_names_the_slot(nginx: Nginx, host: HostServer) -> None:
    for path, slot in [("/gpu1/prompt", 1), ("/gpu2/api/prompt", 2)]:
        assert slot_that_ran(host, submit(nginx, ALL_SLOTS, path, X_TARGET_GPU="0")) == slot
    assert nginx.call(ALL_SLOTS, "GET", "/gpu3/history?max_items=1").status == 200
    moved = nginx.call(ALL_SLOTS, "GET", "/gpu3")
    assert (moved.status, moved.headers["location"]) == (301, "/gpu3/")


def test_names_with_an_escaped_slash_survive_the_path_form(nginx: Nginx) -> None:
    path = "/gpu1/api/userdata/workflows%2Fa%20b.json"
    assert nginx.call(ALL_SLOTS, "POST", path, {"saved": True}).status == 200
    assert nginx.call(ALL_SLOTS, "GET", path).json == {"saved": True}


@pytest.mark.parametrize("path", ["/gpu4/prompt", "/gpu99/api/prompt"])
def test_a_slot_that_does_not_exist_is_refused_by_the_server(nginx: Nginx, path: str) -> None:
    reply = nginx.call(ALL_SLOTS, "POST", path, job())
    assert (reply.status, reply.json["error"]["type"]) == (400, "invalid_target_gpu")


def test_a_slots_port_does_not_know_the_path_form(nginx: Nginx) -> None:
    assert nginx.call(8182, "POST", "/gpu3/prompt", job()).status in (404, 405)


def test_queue_is_the_slots_own_through_its_port(nginx: Nginx, host: HostServer) -> None:
    assert nginx.call(8181, "GET", "/queue").json == {"queue_running": [], "queue_pending": []}
    assert len(nginx.call(ALL_SLOTS, "GET", "/queue/all").json["queues"]) == 4


@pytest.mark.parametrize(("port", "path", "slot"), WEBSOCKETS)
def test_a_websocket_hears_its_own_job_with_previews(
    nginx: Nginx, host: HostServer, port: int, path: str, slot: int | None
) -> None:
    assert_hears_its_own_job(nginx, host, port, path, slot)


def test_files_as_large_as_comfyui_takes_pass_and_larger_ones_do_not(nginx: Nginx, host: HostServer) -> None:
    assert_takes_files_as_large_as_comfyui_does(nginx, host)


def test_a_browsers_origin_is_compared_with_the_address_it_used(nginx: Nginx) -> None:
    own, foreign = f"http://127.0.0.1:{nginx.ports[8181]}", "http://127.0.0.1:1"
    assert nginx.call(8181, "POST", "/prompt", job(), Origin=own).status == 200
    assert nginx.call(8181, "POST", "/prompt", job(), Origin=foreign).status == 403


def test_bodies_larger_than_nginxs_own_default_pass(nginx: Nginx) -> None:
    reply = nginx.call(8181, "POST", "/prompt", {"padding": "x" * 3_000_000})
    assert (reply.status, reply.json["error"]["type"]) == (400, "no_prompt")


@pytest.mark.parametrize(("port", "path"), [(8184, "/prompt"), (8182, "/api/prompt"), (ALL_SLOTS, "/gpu1/prompt")])
def test_a_burst_of_jobs_is_limited_and_nothing_else_is(
    make_nginx: MakeNginx, host: HostServer, port: int, path: str
) -> None:
    fresh = make_nginx(host.port)
    replies: list[Reply] = []
    while len(replies) < 400 and 429 not in [reply.status for reply in replies]:
        replies.append(fresh.call(port, "POST", path, {}))
    *accepted, limited = replies
    assert {reply.status for reply in accepted} == {400}  # the server's answer to a job without a prompt
    assert len(accepted) >= 21
    assert (limited.status, limited.headers["retry-after"]) == (429, "1")
    assert limited.json["error"]["type"] == "too_many_jobs"
    elsewhere = [(port, "GET", "/queue"), (port, "GET", "/prompt"), (8183, "POST", "/prompt")]
    for other_port, method, other_path in elsewhere:
        statuses = {fresh.call(other_port, method, other_path, {}).status for _ in range(21)}
        assert statuses <= {200, 400}


def test_no_accepted_job_of_a_burst_is_lost_and_a_refused_one_may_come_again(
    make_nginx: MakeNginx, host: HostServer
) -> None:
    fresh = make_nginx(host.port)
    replies = [fresh.call(8182, "POST", "/prompt", job()) for _ in range(60)]
    accepted = [reply.json["prompt_id"] for reply in replies if reply.status == 200]
    refused = [reply for reply in replies if reply.status != 200]
    assert {(reply.status, reply.headers["retry-after"]) for reply in refused} <= {(429, "1")}
    assert len(accepted) >= 21
    again = submit_until_taken(fresh, 8182)
    ended = host.wait([*accepted, again])
    assert {(entry["gpu_id"], entry["status"]["status_str"]) for entry in ended.values()} == {(1, "success")}
    assert len(set(accepted)) == len(accepted)


def submit_until_taken(nginx: Nginx, port: int) -> str:
    """Send a job as often as it is refused, each time after as long as the answer says."""
    while (reply := nginx.call(port, "POST", "/prompt", job())).status == 429:
        time.sleep(float(reply.headers["retry-after"]))
    assert reply.status == 200
    return str(reply.json["prompt_id"])


def test_connections_to_comfyui_are_kept_and_used_again(before_echo: Nginx, echo: Echo) -> None:
    for _ in range(5):
        before_echo.call(8181, "GET", "/queue", Connection="close")
    assert len({request["peer"] for request in echo.requests}) == 1
    for request in echo.requests:
        assert not {"connection", "upgrade"} & set(request["headers"])


def test_an_upgrade_is_asked_for_only_when_the_client_does(before_echo: Nginx, echo: Echo) -> None:
    before_echo.call(8181, "GET", "/ws", Upgrade="websocket", Connection="Upgrade")
    headers = echo.requests[0]["headers"]
    assert (headers["upgrade"], headers["connection"]) == ("websocket", "upgrade")


def test_comfyui_hears_the_address_as_it_came_and_who_asked(before_echo: Nginx, echo: Echo) -> None:
    before_echo.call(8182, "GET", "/a%2Fb?c=%20d", X_TARGET_GPU="0", Host="example.org:8182")
    before_echo.call(ALL_SLOTS, "GET", "/gpu12/a%2Fb?c=%20d")
    before_echo.call(ALL_SLOTS, "GET", "/a%2Fb")
    by_port, by_path, common = echo.requests
    assert (by_port["path"], by_path["path"], common["path"]) == ("/a%2Fb?c=%20d", "/a%2Fb?c=%20d", "/a%2Fb")
    assert (by_port["headers"]["x-target-gpu"], by_path["headers"]["x-target-gpu"]) == ("1", "12")
    assert "x-target-gpu" not in common["headers"]
    assert by_port["headers"]["host"] == "example.org:8182"
    assert by_port["headers"]["x-forwarded-for"] == "127.0.0.1"
