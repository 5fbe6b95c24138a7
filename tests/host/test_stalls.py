"""A job without a sign of life fails with the reason, or runs once more; others go on."""

from __future__ import annotations

import pytest

from tests.host.conftest import MakeServer
from tests.host.jobs import hold, message, outcome, progress, quick

pytestmark = pytest.mark.host

STALL_S = 4  # on a busy machine a lively job rests for a second or two


@pytest.mark.parametrize("policy", ["fail", "requeue"])
def test_a_stalled_job_ends_with_the_reason(make_server: MakeServer, policy: str) -> None:
    server = make_server(slots="cpu,cpu", env={"COMFY_PARALLEL_STALL_S": str(STALL_S), "COMFY_PARALLEL_STALL": policy})
    with server.websocket() as client:
        stalled = server.submit(hold(), 0, client.client_id)["prompt_id"]
        lively = server.submit(progress(1, steps=70, ms=100), 1)["prompt_id"]
        entries = server.wait([stalled, lively])
        begun = [
            event
            for event in client.events
            if event["type"] == "execution_start" and event["data"]["prompt_id"] == stalled
        ]
    assert outcome(entries[lively]) == "success", "it shows each step"
    assert outcome(entries[stalled]) == "error"
    assert f"no sign of life for {STALL_S} s" in message(entries[stalled], "execution_error")["exception_message"]
    assert len(begun) == (2 if policy == "requeue" else 1)
    assert ("runs once more" in server.log() or "waits again" in server.log()) is (policy == "requeue")
    assert outcome(server.run(quick(1), 0)) == "success"
