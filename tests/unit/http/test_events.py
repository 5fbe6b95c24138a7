"""What is JSON is encoded once, and what is none is said where it came from."""

from __future__ import annotations

import json
from typing import Any

import pytest

from comfy_parallel.http import events


def endless() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["again"] = value
    return value


def deep() -> list[Any]:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    return value


NO_JSON = {"bytes": b"x", "set": {1}, "object": object(), "endless": endless(), "deep": deep(), "key": {(1, 2): 3}}


@pytest.mark.parametrize("kind", NO_JSON)
def test_what_is_no_json_names_the_event(kind: str) -> None:
    with pytest.raises(TypeError, match="the event 'mine' cannot be sent to a client, because it is no JSON"):
        events.encoded("mine", {"value": NO_JSON[kind]})


@pytest.mark.parametrize("kind", NO_JSON)
def test_an_output_that_is_no_json_is_refused(kind: str) -> None:
    with pytest.raises(TypeError, match="what the node shows"):
        events.check_output({"images": [NO_JSON[kind]]})


@pytest.mark.parametrize("ui", [None, {}, {"text": ["ö", 1, None]}, {"nan": [float("nan")]}])
def test_what_the_host_sends_is_no_matter(ui: Any) -> None:
    events.check_output(ui)


def test_a_message_is_as_the_host_writes_it() -> None:
    data = {"node": "ö", "prompt_id": "p", "value": 1.5}
    for given in (data, events.encoded("progress", data)):
        assert events.text_of({"type": "progress", "data": given}) == json.dumps({"type": "progress", "data": data})


@pytest.mark.parametrize(
    "change", ["data['b'] = 2", "data.pop('a')", "data.update(b=2)", "data |= {'b': 2}", "del data['a']"]
)
def test_what_a_node_pack_changes_is_sent_as_changed(change: str) -> None:
    data = events.encoded("mine", {"a": 1})
    exec(change)
    assert json.loads(events.text_of({"type": "mine", "data": data}) or "")["data"] == dict(data)


def test_what_cannot_be_sent_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert events.text_of({"type": "mine", "data": {"value": {1}}}) is None
    assert "the event 'mine' is not sent, because it is no JSON" in caplog.text
