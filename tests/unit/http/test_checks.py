"""What clients send is checked before the host acts on it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from comfy_parallel.errors import BadRequest
from comfy_parallel.http.checks import check_interrupt, check_page, check_prompt, check_queue_change, parse_object

NODE = {"class_type": "KSampler", "inputs": {}}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"{}", {}),
        (b' {"a": [1]} ', {"a": [1]}),
        ('{"text": "caf\u00e9"}'.encode(), {"text": "café"}),
    ],
)
def test_an_object_is_parsed(body: bytes, expected: dict[str, Any]) -> None:
    assert parse_object(body, charset="utf-8") == expected


def test_the_body_is_read_in_its_charset() -> None:
    assert parse_object('{"text": "é"}'.encode("latin-1"), charset="latin-1") == {"text": "é"}


@pytest.mark.parametrize("body", [b"", b"  \n"])
def test_an_empty_body_is_an_empty_object_only_where_that_is_allowed(body: bytes) -> None:
    assert parse_object(body, charset="utf-8", may_be_empty=True) == {}
    with pytest.raises(BadRequest, match="no JSON"):
        parse_object(body, charset="utf-8")


@pytest.mark.parametrize(
    ("body", "charset", "message"),
    [
        (b"{", "utf-8", "no JSON"),
        (b"prompt=1", "utf-8", "no JSON"),
        (b"\xff\xfe", "utf-8", "no JSON"),
        (b"{}", "no-such-charset", "no JSON"),
        (b"{}", "hex", "no JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "utf-8", "no JSON"),
        (b"[" * 100_000, "utf-8", "no JSON"),
        (b"[]", "utf-8", "a list"),
        (b'"text"', "utf-8", "a string"),
        (b"1", "utf-8", "a number"),
        (b"1.5", "utf-8", "a number"),
        (b"true", "utf-8", "a boolean"),
        (b"null", "utf-8", "null"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_what_is_no_object_is_refused(body: bytes, charset: str, message: str) -> None:
    with pytest.raises(BadRequest, match=message) as refusal:
        parse_object(body, charset=charset)
    assert refusal.value.type == "invalid_request"
    assert "JSON object" in refusal.value.details


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"prompt": {}},
        {"prompt": {"1": NODE}, "client_id": "c", "prompt_id": "p", "extra_data": {"client_id": "c"}},
        {"prompt": {"1": {"class_type": "KSampler"}}},
        {"prompt": {"1": {}}},
        {"client_id": None, "prompt_id": None},
        {"client_id": 7, "prompt_id": 7},
        {"partial_execution_targets": None},
        {"partial_execution_targets": ["1"]},
        {"front": True, "unknown": [1, {}]},
        *({"number": number} for number in (0, -1, 1.5, "3", 10**300)),
    ],
    ids=str,
)
def test_prompts_that_the_host_can_judge_are_left_to_it(data: dict[str, Any]) -> None:
    before = json.dumps(data)
    check_prompt(data)
    assert json.dumps(data) == before


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": "{}"}, "prompt"),
        ({"prompt": {"1": None}}, "prompt['1']"),
        ({"prompt": {"1": []}}, "prompt['1']"),
        ({"prompt": {"1": {"class_type": 1}}}, "prompt['1'].class_type"),
        ({"prompt": {"1": {"class_type": None}}}, "prompt['1'].class_type"),
        ({"prompt": {"1": {"class_type": "KSampler", "inputs": []}}}, "prompt['1'].inputs"),
        ({"prompt": {"1": {"class_type": "KSampler", "inputs": None}}}, "prompt['1'].inputs"),
        ({"prompt": {"1": NODE, "2": 5}}, "prompt['2']"),
        ({"extra_data": None}, "extra_data"),
        ({"extra_data": [1]}, "extra_data"),
        ({"extra_data": {"client_id": {}}}, "extra_data.client_id"),
        ({"client_id": []}, "client_id"),
        ({"prompt_id": {}}, "prompt_id"),
        ({"partial_execution_targets": {}}, "partial_execution_targets"),
        *(
            ({"number": number}, "number")
            for number in ("first", "", None, True, [], {}, "nan", float("nan"), float("inf"), "-inf", 10**400)
        ),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_a_malformed_prompt_is_refused_by_the_name_of_what_is_wrong(data: dict[str, Any], named: str) -> None:
    with pytest.raises(BadRequest) as refusal:
        check_prompt(data)
    assert refusal.value.message.startswith(f"{named} is ")
    assert refusal.value.details
    assert len(refusal.value.message) < 150


LONG = "n" * 1001


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"prompt_id": LONG}, "prompt_id"),
        ({"client_id": LONG}, "client_id"),
        ({"extra_data": {"client_id": LONG}}, "extra_data.client_id"),
        ({"prompt": {LONG: NODE}}, "the node id"),
        ({"prompt": {LONG: None}}, "the node id"),
        ({"prompt": {LONG: {"class_type": "KSampler"}}}, "the node id"),
        ({"prompt": {"1": {"class_type": LONG, "inputs": {}}}}, "prompt['1'].class_type"),
        ({"prompt": {"1": {"class_type": LONG}}}, "prompt['1'].class_type"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_names_and_ids_have_a_length_that_can_be_repeated(data: dict[str, Any], named: str) -> None:
    with pytest.raises(BadRequest, match="1001 characters") as refusal:
        check_prompt(data)
    assert refusal.value.message.startswith(named)
    assert LONG not in refusal.value.message
    check_prompt(json.loads(json.dumps(data).replace(LONG, LONG[1:]).replace("null", json.dumps(NODE))))


@pytest.mark.parametrize("data", [{}, {"clear": True}, {"delete": []}, {"delete": ["a", "b"]}])
def test_queue_changes(data: dict[str, Any]) -> None:
    check_queue_change(data)


@pytest.mark.parametrize("delete", [None, "a", {"a": 1}, 5, [["a"]], [{}]])
def test_what_to_delete_is_a_list_of_ids(delete: Any) -> None:
    with pytest.raises(BadRequest, match="delete"):
        check_queue_change({"delete": delete})


@pytest.mark.parametrize("data", [{}, {"prompt_id": None}, {"prompt_id": ""}, {"prompt_id": "p"}])
def test_interrupts(data: dict[str, Any]) -> None:
    check_interrupt(data)


@pytest.mark.parametrize("prompt_id", [1, ["p"], {}, True])
def test_an_interrupt_names_its_job_by_a_string(prompt_id: Any) -> None:
    with pytest.raises(BadRequest, match="prompt_id"):
        check_interrupt({"prompt_id": prompt_id})


@pytest.mark.parametrize("query", [{}, {"max_items": "10"}, {"offset": "-1"}, {"max_items": "0", "offset": "5"}])
def test_pages(query: dict[str, str]) -> None:
    check_page(query)


@pytest.mark.parametrize("name", ["max_items", "offset"])
@pytest.mark.parametrize("value", ["", "-", "--5", "5-", "all", "1.5", "+5", " 5", "٥", "²", "5_0", "9" * 5000])
def test_a_page_is_given_in_numbers_that_the_host_can_read(name: str, value: str) -> None:
    with pytest.raises(BadRequest, match=name):
        check_page({name: value})
