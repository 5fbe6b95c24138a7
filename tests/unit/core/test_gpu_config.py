"""`gpu_config.json`: what is known is checked, and all else stays."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfy_parallel.core.gpu_config import SETTINGS, parse, parse_text
from comfy_parallel.errors import ConfigError

THREE: dict[str, Any] = {
    "master": {"port": 8080, "cuda_device": 0, "extra_args": "--mmap-torch-files --listen"},
    "workers": [
        {"id": 1, "name": "GPU 1", "cuda_device": 1, "port": 8180, "enabled": True, "extra_args": "--listen"},
        {"id": 2, "name": "GPU 2", "cuda_device": 2, "port": 8280, "enabled": False, "extra_args": "--reserve-vram 2"},
        {"id": 3, "name": "Remote GPU", "host": "192.168.1.100", "port": 8190, "enabled": True, "colour": "red"},
    ],
    "settings": {},
}
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
unknown = st.dictionaries(st.text(min_size=1).map(lambda name: f"x-{name}"), values, max_size=3)
names = st.text(max_size=20)
arguments = st.lists(st.sampled_from(["--lowvram", "--listen", "--reserve-vram 2", "'a b'"]), max_size=3).map(" ".join)
masters = st.builds(
    lambda known, other: {**known, **other},
    st.fixed_dictionaries(
        {},
        optional={
            "name": names,
            "host": st.sampled_from(["", "10.0.0.1", "front.example", "https://front.example/x"]),
            "port": st.integers(1, 1000),
            "cuda_device": st.integers(0, 999),
            "extra_args": arguments,
        },
    ),
    unknown,
)
workers = st.builds(
    lambda known, other: {**known, **other},
    st.fixed_dictionaries(
        {"port": st.integers(1001, 65535)},
        optional={
            "name": names,
            "host": st.sampled_from(["", "localhost", "10.0.0.1", "gpu-2.example", "::1", "fe80::2"]),
            "cuda_device": st.integers(0, 999) | st.none(),
            "enabled": st.booleans(),
            "extra_args": arguments,
            "type": st.sampled_from(["local", "remote", "cloud"]),
        },
    ),
    unknown,
)
settings = st.builds(
    lambda known, other: {**known, **other},
    st.fixed_dictionaries(
        {},
        optional={
            name: st.booleans() if kind is bool else st.integers(1, 86400) for name, (kind, _) in SETTINGS.items()
        },
    ),
    unknown,
)


@st.composite
def documents(draw: st.DrawFn) -> dict[str, Any]:
    listed = draw(st.lists(workers, max_size=4, unique_by=lambda worker: worker["port"]))
    for at, worker in enumerate(listed):
        worker["id"] = draw(st.sampled_from([at, str(at), f"worker-{at}"]))
    whole = {"master": draw(masters), "workers": listed, "settings": draw(settings), **draw(unknown)}
    left_out = draw(st.sets(st.sampled_from(["master", "workers", "settings"])))
    return {name: value for name, value in whole.items() if name not in left_out}


@given(documents())
def test_what_is_read_is_written_again(document: dict[str, Any]) -> None:
    assert json.loads(parse_text(json.dumps(document)).text()) == document


@given(documents(), st.booleans())
def test_a_change_changes_nothing_else(document: dict[str, Any], enabled: bool) -> None:
    config = parse(document)
    for worker in config.workers:
        changed = config.with_worker(worker.id, {"enabled": enabled})
        assert changed.worker(worker.id).enabled is enabled  # type: ignore[union-attr]
        assert changed.json == {
            **document,
            "workers": [
                {**entry, "enabled": enabled} if str(entry["id"]) == worker.id else entry
                for entry in document["workers"]
            ],
        }
    assert config.with_setting("debug", enabled).json["settings"] == {**document.get("settings", {}), "debug": enabled}
    assert config.json == document


@given(values)
def test_whatever_it_is_given_it_reads_it_or_says_what_is_wrong(value: Any) -> None:
    for document in (value, {"master": value}, {"workers": value}, {"workers": [value]}, {"settings": value}):
        assert problem_of(document) is None or "gpu_config.json" in str(problem_of(document))


def problem_of(document: Any) -> ConfigError | None:
    try:
        parse(document)
    except ConfigError as error:
        return error
    return None


def test_the_published_example_is_read() -> None:
    config = parse(THREE)
    assert config.master.port == 8080
    assert [(w.id, w.name, w.type, w.port, w.cuda_device, w.enabled) for w in config.workers] == [
        ("1", "GPU 1", "local", 8180, 1, True),
        ("2", "GPU 2", "local", 8280, 2, False),
        ("3", "Remote GPU", "remote", 8190, None, True),
    ]
    assert [worker.url for worker in config.workers] == [
        "http://127.0.0.1:8180",
        "http://127.0.0.1:8280",
        "http://192.168.1.100:8190",
    ]
    assert config.worker(2).arguments == ["--reserve-vram", "2"]  # type: ignore[union-attr]
    assert [worker.id for worker in config.enabled_workers()] == ["1", "3"]


def test_what_is_left_out_has_a_default() -> None:
    config = parse({"workers": [{"id": "a", "port": "8189"}]})
    (worker,) = config.workers
    assert (worker.name, worker.host, worker.port, worker.enabled, worker.extra_args) == (
        "Worker a",
        "",
        8189,
        False,
        "",
    )
    assert config.setting("stop_workers_on_master_exit") is True
    assert config.setting("unheard of") is None
    assert config.master.port is None


def test_workers_come_and_go() -> None:
    config = parse(THREE).with_worker("4", {"port": 8400, "cuda_device": 3}).without_worker(1)
    assert [worker.id for worker in config.workers] == ["2", "3", "4"]
    assert config.without_worker("nobody").json == config.json
    assert "cuda_device" not in config.with_worker("4", {"cuda_device": None}).worker("4").json  # type: ignore[union-attr]


def test_parts_are_replaced_or_merged() -> None:
    config = parse(THREE).with_all({"master": {"name": "front"}, "settings": {"debug": True}, "tunnel": {"pid": 1}})
    assert config.json["master"] == {**THREE["master"], "name": "front"}
    assert config.json["tunnel"] == {"pid": 1}
    assert config.json["workers"] == THREE["workers"]


@pytest.mark.parametrize(
    ("document", "told"),
    [
        ([], "gpu_config.json is"),
        ({"workers": {}}, None),
        ({"workers": {"a": 1}}, "workers is"),
        ({"workers": [1]}, "workers[0] is 1; write an object"),
        ({"workers": [{"port": 8189}]}, "workers[0].id is missing"),
        ({"workers": [{"id": True, "port": 8189}]}, "workers[0].id is True"),
        ({"workers": [{"id": 1}]}, "workers[0].port is missing"),
        ({"workers": [{"id": 1, "port": 0}]}, "workers[0].port is 0; write a whole number from 1 to 65535"),
        ({"workers": [{"id": 1, "port": 1.5}]}, "workers[0].port is 1.5"),
        ({"workers": [{"id": 1, "port": 1, "host": "a b"}]}, "workers[0].host"),
        ({"workers": [{"id": 1, "port": 1, "host": "user@h"}]}, "workers[0].host"),
        ({"workers": [{"id": 1, "port": 1, "type": "moon"}]}, "write local, remote or cloud"),
        ({"workers": [{"id": 1, "port": 1, "enabled": "yes"}]}, "workers[0].enabled is 'yes'; write true or false"),
        ({"workers": [{"id": 1, "port": 1, "cuda_device": -1}]}, "workers[0].cuda_device is -1"),
        ({"workers": [{"id": 1, "port": 1, "extra_args": "--a; rm"}]}, "leave ';' out"),
        ({"workers": [{"id": 1, "port": 1, "extra_args": "'"}]}, "correct the quotes"),
        ({"workers": [{"id": 1, "port": 1}, {"id": "1", "port": 2}]}, "workers[0] and workers[1] have the same id"),
        ({"workers": [{"id": 1, "port": 1}, {"id": 2, "port": 1}]}, "workers[0] and workers[1] have the same port"),
        ({"master": {"port": 1}, "workers": [{"id": 1, "port": 1}]}, "master and workers[0] have the same port"),
        ({"settings": {"debug": 1}}, "settings.debug is 1; write true or false"),
        ({"settings": {"worker_timeout_seconds": 0}}, "settings.worker_timeout_seconds is 0"),
    ],
)
def test_what_cannot_be_used_is_named(document: Any, told: str | None) -> None:
    if told is None:
        assert parse(document).workers == ()
        return
    with pytest.raises(ConfigError) as refusal:
        parse(document)
    assert told in str(refusal.value)


@pytest.mark.parametrize("text", ["", "{", '{"a": NaN}', "[" * 100_000])
def test_what_is_no_json_is_told(text: str) -> None:
    with pytest.raises(ConfigError, match="is no JSON"):
        parse_text(text)
