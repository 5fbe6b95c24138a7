"""Whether a ComfyUI can listen where it is to."""

from __future__ import annotations

import errno
import socket

from comfy_parallel.errors import ConfigError


def check(listen: str | None, port: int, remedy: str) -> None:
    """Raises ConfigError with this remedy where the port is taken or an address is not this machine's.

    `listen`: addresses with commas between, as ComfyUI's; None for 127.0.0.1.
    """
    for address in (listen or "127.0.0.1").split(","):
        try:
            _bind(address.strip(), port)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ConfigError(f"port {port} is taken: another program listens there; {remedy}") from error
            raise ConfigError(f"nothing can listen on port {port} of {address}: {error.strerror}; {remedy}") from error


def _bind(address: str, port: int) -> None:
    family, kind, _, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        probe.bind(where)
