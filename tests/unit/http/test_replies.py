"""Replies repeat what clients sent in few characters."""

from __future__ import annotations

import json

import pytest
from aiohttp import web

from comfy_parallel.errors import BadRequest, Draining
from comfy_parallel.http import replies

LONG = "x" * 1_000_000


def test_a_refusal_is_short_in_the_reply_and_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    response = replies.refusal(BadRequest("kind", LONG, LONG))
    assert response.status == 400
    assert isinstance(response.body, bytes)
    assert len(response.body) < 6000
    assert json.loads(response.body)["error"]["type"] == "kind"
    assert len(caplog.text) < 6000


def test_a_refusal_for_now_says_when_to_come_back() -> None:
    response = replies.refusal(Draining("slot 3", "wait"))
    assert (response.status, response.headers["Retry-After"]) == (503, "10")
    assert isinstance(response.body, bytes)
    assert json.loads(response.body) == {
        "error": {
            "type": "draining",
            "message": "slot 3 is draining and takes no new jobs",
            "details": "wait",
            "extra_info": {},
        },
        "node_errors": {},
    }
    assert "Retry-After" not in replies.refusal(BadRequest("kind", "a", "b")).headers


def test_a_refusal_of_the_hosts_is_shortened_wherever_it_is_long() -> None:
    reply = {"error": {"details": LONG, "extra_info": {"list": [LONG, 1, None]}}, "node_errors": {LONG: {"a": True}}}
    text = replies.shortened(json.dumps(reply).encode())
    assert len(text) < 10_000
    short = json.loads(text)
    assert short["error"]["extra_info"]["list"][1:] == [1, None]
    assert list(short["node_errors"].values()) == [{"a": True}]


@pytest.mark.parametrize("reply", [b'{"error":   "short"}', b"no JSON " + LONG.encode(), b""])
def test_what_is_short_or_no_json_stays_as_it_is(reply: bytes) -> None:
    assert replies.shortened(reply) == reply


def test_only_a_reply_with_that_status_and_a_body_is_completed() -> None:
    def completed(response: web.StreamResponse) -> web.StreamResponse:
        replies.complete(response, lambda body: body + b"!", status=400)
        return response

    assert completed(web.Response(status=400, body=b"a")).body == b"a!"  # type: ignore[attr-defined]
    assert completed(web.Response(status=200, body=b"a")).body == b"a"  # type: ignore[attr-defined]
    assert completed(web.Response(status=400)).body is None  # type: ignore[attr-defined]
    assert completed(web.StreamResponse(status=400)).status == 400


def test_the_slot_is_added_to_a_submitted_jobs_reply_only() -> None:
    assert json.loads(replies.with_gpu_id(1, b'{"prompt_id": "a"}\n')) == {"prompt_id": "a", "gpu_id": 1}
    assert json.loads(replies.with_gpu_id(None, b'{"prompt_id": "a"}')) == {"prompt_id": "a", "gpu_id": None}
    assert replies.with_gpu_id(1, b'{"error": {}}') == b'{"error": {}}'
