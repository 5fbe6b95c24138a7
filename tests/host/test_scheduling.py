"""Waiting jobs are moved, ordered, shared fairly and limited; an interrupt reaches the jobs of whoever asks."""

from __future__ import annotations

import http.client
import json
import uuid
from typing import Any

import pytest

from tests.host.conftest import MakeServer
from tests.host.jobs import await_idle, held, hold, outcome, queue_ids, quick, release, start_held
from tests.host.pool import ServerPool
from tests.host.server import JSON, HostServer

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def server(shared_server: ServerPool) -> HostServer:
    return shared_server(slots="cpu,cpu,cpu,cpu")


@pytest.fixture(scope="module")
def limited(make_module_server: MakeServer) -> HostServer:
    """Three slots, and few jobs may wait."""
    limits = {
        "COMFY_PARALLEL_MAX_WAITING": "7",
        "COMFY_PARALLEL_MAX_WAITING_PER_CLIENT": "5",
        "COMFY_PARALLEL_MAX_RUNNING_PER_CLIENT": "2",
    }
    return make_module_server(slots="cpu,cpu,cpu", env=limits)


def change(server: HostServer, job_id: str, **body: object) -> tuple[int, JSON]:
    status, reply = server.request("POST", f"/parallel/jobs/{job_id}", body)
    return status, reply


def ended_order(server: HostServer, job_ids: list[str]) -> list[str]:
    """The ids in the order in which the jobs ended, which is that of the history."""
    server.wait(job_ids)
    return [job_id for job_id in server.request("GET", "/history")[1] if job_id in job_ids]


def send(
    server: HostServer, path: str, body: bytes, address: str = "127.0.0.1", headers: dict[str, str] | None = None
) -> tuple[int, Any]:
    """A POST from one of this machine's addresses."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60, source_address=(address, 0))
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json", **(headers or {})})
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read() or "null")
    finally:
        connection.close()


def prompt_body(workflow: JSON, **fields: Any) -> bytes:
    return json.dumps({"prompt": workflow, **fields}).encode()


# Changing what waits.


def test_a_waiting_job_is_moved_to_a_free_slot(server: HostServer) -> None:
    with held(server, 0):
        job_id = server.submit(quick(1001), 0)["prompt_id"]
        assert queue_ids(server, 0)[1] == [job_id]
        assert change(server, job_id, slot=2) == (200, {"prompt_id": job_id, "gpu_id": 2, "priority": 0})
        assert server.wait([job_id])[job_id]["gpu_id"] == 2


def test_a_bound_job_is_let_go_anywhere(server: HostServer) -> None:
    with held(server, 1):
        job_id = server.submit(quick(1002), 1)["prompt_id"]
        assert change(server, job_id, slot="auto")[1]["gpu_id"] is None
        assert server.wait([job_id])[job_id]["gpu_id"] != 1


def test_a_waiting_job_gets_another_priority(server: HostServer) -> None:
    with held(server, 3) as running:
        ids = [server.submit(quick(1010 + number), 3)["prompt_id"] for number in range(4)]
        assert change(server, ids[2], priority=5)[0] == 200
        assert change(server, ids[0], priority=-5)[0] == 200
        pending = server.request("GET", "/queue/all")[1]["queues"][3]["pending"]
        assert pending == [ids[2], ids[1], ids[3], ids[0]]
        release(server, *running)
        assert ended_order(server, ids) == pending
    assert server.wait(ids)[ids[2]]["prompt"][3]["priority"] == 5


def test_a_job_brings_its_priority(server: HostServer) -> None:
    with held(server, 2) as running:
        ids = [
            server.submit(quick(1020 + number), 2, extra_data={"priority": number})["prompt_id"] for number in range(3)
        ]
        release(server, *running)
        assert ended_order(server, ids) == ids[::-1]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({}, "nothing to change"),
        ({"slot": 9}, "names no slot"),
        ({"slot": True}, "names no slot"),
        ({"priority": "high"}, "whole number"),
        ({"priority": True}, "whole number"),
        ({"priority": 10**6}, "whole number"),
        ({"colour": 1}, "no property of a job"),
    ],
)
def test_a_change_that_means_nothing_is_refused(server: HostServer, body: JSON, text: str) -> None:
    with held(server, 0):
        job_id = server.submit(quick(1003), 0)["prompt_id"]
        status, reply = change(server, job_id, **body)
        assert status == 400
        assert text in reply["error"]["message"] + reply["error"]["details"]


def test_only_what_waits_is_changed(server: HostServer) -> None:
    with held(server, 0) as running:
        assert change(server, running[0], slot=1)[0] == 409
    assert change(server, running[0], slot=1)[0] == 409
    status, reply = change(server, "no-such-job", priority=1)
    assert (status, reply["error"]["type"]) == (404, "not_waiting")


def test_a_priority_that_is_no_number_is_refused(server: HostServer) -> None:
    status, reply = server.request("POST", "/prompt", {"prompt": quick(1), "extra_data": {"priority": "soon"}})
    assert status == 400
    assert "extra_data.priority" in reply["error"]["message"]


# The order of one client's jobs.

KRITA = {"skip_zrok_interstitial": "1"}
PLAIN = {"Content-Type": "text/plain;charset=UTF-8"}


@pytest.mark.parametrize(
    ("client_id", "fields", "headers"),
    [
        ("asks-in-body", {"extra_data": {"client_order": "in-order"}}, {}),
        ("asks-by-header", {}, {"X-Client-Order": "in-order"}),
        ("krita", {"prompt_id": str(uuid.uuid4())}, KRITA),
    ],
)
def test_a_client_written_for_one_worker_gets_its_jobs_one_at_a_time(
    server: HostServer, client_id: str, fields: JSON, headers: dict[str, str]
) -> None:
    assert_it_waits(server, client_id, prompt_body(quick(1030), client_id=client_id, **fields), headers)


@pytest.mark.parametrize("place", [{}, {"number": 3}])
def test_the_sdk_that_sends_text_gets_them_one_at_a_time_whatever_its_id(server: HostServer, place: JSON) -> None:
    body = {"client_id": "chosen-by-its-user", "prompt": quick(1032 + len(place)), **place}
    assert_it_waits(server, "chosen-by-its-user", json.dumps(body).encode(), PLAIN)


def test_a_script_that_sends_json_as_text_may_use_all_slots(server: HostServer) -> None:
    with server.websocket("a-script") as client:
        first = start_held(server, client, 0)
        body = {"prompt": quick(1035), "client_id": "a-script"}
        second = send(server, "/prompt", json.dumps(body).encode(), headers=PLAIN)[1]["prompt_id"]
        assert outcome(server.wait([second])[second]) == "success"
        release(server, first)


def assert_it_waits(server: HostServer, client_id: str, body: bytes, headers: dict[str, str]) -> None:
    """This request's job waits while another of its client runs, and jobs of others do not."""
    with server.websocket(client_id) as client:
        first = start_held(server, client, 0)
        status, second = send(server, "/prompt", body, headers=headers)
        assert status == 200, second
        others = server.submit(quick(1031), client_id="somebody else")["prompt_id"]
        assert outcome(server.wait([others])[others]) == "success"
        assert second["prompt_id"] in queue_ids(server)[1]
        entries = release(server, first) | server.wait([second["prompt_id"]])
    assert outcome(entries[second["prompt_id"]]) == "success"


def test_jobs_of_other_clients_run_side_by_side(server: HostServer) -> None:
    with server.websocket() as client:
        first = start_held(server, client, 0)
        second = server.submit(quick(1040), client_id=client.client_id)["prompt_id"]
        assert outcome(server.wait([second])[second]) == "success"
        release(server, first)


def test_an_order_that_is_unknown_is_refused(server: HostServer) -> None:
    status, reply = send(server, "/prompt", prompt_body(quick(1)), headers={"X-Client-Order": "sometimes"})
    assert status == 400
    assert "in-order" in reply["error"]["details"]


# Fair shares and limits.


def test_who_sends_one_job_does_not_wait_for_all_of_another(server: HostServer) -> None:
    with held(server, 1) as running:
        many = [server.submit(quick(1050 + number), 1, "many")["prompt_id"] for number in range(6)]
        one = server.submit(quick(1060), 1, "one")["prompt_id"]
        first = server.submit(quick(1061), 1, "many", front=True)["prompt_id"]
        pending = server.request("GET", "/queue/all")[1]["queues"][1]["pending"]
        assert pending[0] == first
        assert pending.index(one) <= 3
        assert [job_id for job_id in pending if job_id in many] == many
        release(server, *running)
        assert ended_order(server, [*many, one, first]) == pending


def test_jobs_above_the_limits_are_refused_and_none_is_lost(limited: HostServer) -> None:
    with held(limited, 0, 1) as running, held(limited, 2) as last:
        own = [limited.submit(quick(number), 0, "a")["prompt_id"] for number in range(5)]
        status, reply = limited.request("POST", "/prompt", {"prompt": quick(9), "client_id": "a"})
        assert (status, reply["error"]["type"]) == (429, "queue_full")
        assert "COMFY_PARALLEL_MAX_WAITING_PER_CLIENT" in reply["error"]["details"]
        own += [limited.submit(quick(10 + number))["prompt_id"] for number in range(2)]
        connection = http.client.HTTPConnection("127.0.0.1", limited.port, timeout=60)
        connection.request("POST", "/prompt", prompt_body(quick(99)), {"Content-Type": "application/json"})
        refused = connection.getresponse()
        assert (refused.status, refused.headers["Retry-After"]) == (429, "10")
        connection.close()
        assert sorted(queue_ids(limited)[1]) == sorted(own)
        release(limited, *running, *last)
        assert {outcome(entry) for entry in limited.wait(own).values()} == {"success"}


def test_a_client_runs_no_more_jobs_than_it_may(limited: HostServer) -> None:
    with limited.websocket() as client:
        running = [start_held(limited, client, slot) for slot in (0, 1)]
        third = limited.submit(quick(20), client_id=client.client_id)["prompt_id"]
        other = limited.submit(quick(21), client_id="another")["prompt_id"]
        limited.wait([other])
        assert queue_ids(limited) == (running, [third])
        release(limited, *running)
        limited.wait([third])
    await_idle(limited)


# Whose jobs an interrupt without an id reaches.


def test_a_client_that_says_who_it_is_ends_its_own_jobs(server: HostServer) -> None:
    with server.websocket() as mine, server.websocket() as theirs:
        own = [start_held(server, mine, 0), start_held(server, mine, 1)]
        other = start_held(server, theirs, 2)
        status, reply = send(server, "/interrupt", json.dumps({"client_id": mine.client_id}).encode())
        assert (status, sorted(reply["interrupted"])) == (200, sorted(own))
        assert {outcome(entry) for entry in server.wait(own).values()} == {"interrupted"}
        status, reply = send(server, "/interrupt", json.dumps({"client_id": mine.client_id}).encode())
        assert (status, reply) == (200, {"interrupted": []}), "it has none any more, and others' are not its"
        assert queue_ids(server)[0] == [other]
        release(server, other)


@pytest.mark.parametrize("how", ["address", "forwarded", "user"])
def test_without_an_id_a_peer_ends_its_own_jobs(server: HostServer, how: str) -> None:
    address, headers = {
        "address": ("127.0.0.7", {}),
        "forwarded": ("127.0.0.1", {"X-Forwarded-For": "10.1.2.3, 198.51.100.7"}),
        "user": ("127.0.0.1", {"comfy-user": "somebody_1700000000"}),
    }[how]
    with held(server, 0) as others, server.websocket() as client:
        body = prompt_body(hold(7), client_id=client.client_id)
        status, accepted = send(server, "/prompt", body, address, {"X-TARGET-GPU": "1", **headers})
        assert status == 200
        client.wait_for(lambda event: event["type"] == "executing")
        status, reply = send(server, "/interrupt", b"", address, headers)
        assert (status, reply) == (200, {"interrupted": [accepted["prompt_id"]]})
        assert outcome(server.wait([accepted["prompt_id"]])[accepted["prompt_id"]]) == "interrupted"
        assert send(server, "/interrupt", b"{}", address, headers)[1] == {"interrupted": []}
        assert queue_ids(server)[0] == others


@pytest.mark.parametrize(("address", "body"), [("127.0.0.9", b"{}"), ("127.0.0.1", b'{"all": true}')])
def test_an_operator_ends_all(server: HostServer, address: str, body: bytes) -> None:
    with held(server, 0, 3) as running:
        status, reply = send(server, "/interrupt", body, address)
        assert (status, sorted(reply["interrupted"])) == (200, sorted(running))
        assert {outcome(entry) for entry in server.wait(running).values()} == {"interrupted"}


# The end of a job.


def test_the_history_is_there_when_a_client_hears_of_the_end(server: HostServer) -> None:
    with server.websocket() as client:
        for number in range(40):
            job_id = server.submit(quick(2000 + number), number % 4, client.client_id)["prompt_id"]
            client.wait_for(
                lambda event, job_id=job_id: (
                    event["type"] == "execution_success" and event["data"]["prompt_id"] == job_id
                )
            )
            assert job_id in server.request("GET", f"/history/{job_id}")[1]
