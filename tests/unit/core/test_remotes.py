"""Addresses of other ComfyUIs."""

from __future__ import annotations

import base64

import pytest

from comfy_parallel.core import gpu_config
from comfy_parallel.core.remotes import Remote, of_workers, parse
from comfy_parallel.errors import ConfigError


def test_addresses_are_named_in_their_order() -> None:
    assert parse(" http://10.0.0.2:8188/ , https://gpu.example.com/comfy#slots=4,") == (
        Remote("remote0", "http://10.0.0.2:8188"),
        Remote("remote1", "https://gpu.example.com/comfy", slots=4),
    )
    assert parse("") == ()
    assert parse("http://[::1]:8188")[0].url == "http://[::1]:8188"


def test_passwords_are_sent_and_never_shown() -> None:
    basic, own, shared = parse("http://me:s%40cret@a:1,http://:their%2Fs@b:2,http://c:3", "everybodys")
    assert basic.authorization == "Basic " + base64.b64encode(b"me:s@cret").decode()
    assert (own.authorization, shared.authorization) == ("Bearer their/s", "Bearer everybodys")
    assert [one.url for one in (basic, own, shared)] == ["http://a:1", "http://b:2", "http://c:3"]
    assert not any(secret in repr((basic, own, shared)) for secret in ("s@cret", "s%40cret", "their", "everybodys"))


@pytest.mark.parametrize(
    "value",
    [
        "10.0.0.2:8188",
        "ftp://me:secret@host",
        "http://",
        "http://me:secret@host:port",
        "http://me:secret@host:99999",
        "http://host?x=secret",
        "http://me:secret@host#slots=0",
        "http://me:secret@host#slots=65",
        "http://me:sec/ret@host",
        "http://a:1,http://a:1/",
    ],
)
def test_what_is_no_address_is_refused_without_its_password(value: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(value)
    assert "COMFY_PARALLEL_REMOTE" in str(refused.value)
    assert "secret" not in str(refused.value).replace("user:token", "")


@pytest.mark.parametrize(("value", "token"), [("http://a:1", "two words"), ("http://a:1", "a\nb")])
def test_tokens_that_cannot_be_sent_are_refused(value: str, token: str) -> None:
    with pytest.raises(ConfigError, match="COMFY_PARALLEL_REMOTE_TOKEN") as refused:
        parse(value, token)
    assert "two words" not in str(refused.value)


def test_workers_on_other_machines_take_part_when_they_are_enabled() -> None:
    workers = [
        {"id": 1, "name": "big", "host": "10.0.0.2", "port": 8188, "enabled": True},
        {"id": 2, "name": "off", "host": "10.0.0.3", "port": 8188, "enabled": False},
        {"id": 3, "name": "here", "host": "", "port": 8189, "enabled": True},
        {"id": 4, "host": "https://gpu.example.com", "port": 443, "enabled": True, "type": "cloud"},
    ]
    found = of_workers(gpu_config.parse({"workers": workers}), "token")
    assert [one.url for one in found] == ["http://10.0.0.2:8188", "https://gpu.example.com"]
    assert found[0].name == "big"
    assert {one.authorization for one in found} == {"Bearer token"}
    assert "token" not in repr(found)
