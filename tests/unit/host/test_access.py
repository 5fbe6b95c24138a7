"""Who lets others reach ComfyUI is told that it has no password, and no TLS."""

from __future__ import annotations

import pytest

from comfy_parallel.host.access import warnings


@pytest.mark.parametrize(
    "listen", ["127.0.0.1", "127.1.2.3", "::1", "localhost", "127.0.0.1,::1", " 127.0.0.1 , ::1 ", ""]
)
def test_only_this_machine_is_no_matter(listen: str) -> None:
    assert warnings(listen, 8188, has_tls=False) == []


@pytest.mark.parametrize(
    ("listen", "named"),
    [
        ("0.0.0.0", "0.0.0.0"),
        ("0.0.0.0,::", "0.0.0.0, ::"),
        ("127.0.0.1,192.168.0.5", "192.168.0.5"),
        ("comfy.example.org", "comfy.example.org"),
        ("fe80::1%eth0", "fe80::1%eth0"),
    ],
)
def test_others_are(listen: str, named: str) -> None:
    said = warnings(listen, 8190, has_tls=False)
    assert ["no password" in said[0], "without TLS" in said[1], len(said)] == [True, True, 2]
    assert all(f"ComfyUI listens on port 8190 of {named} " in line and "--listen 127.0.0.1" in line for line in said)
    assert len(warnings(listen, 8190, has_tls=True)) == 1
