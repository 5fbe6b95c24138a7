"""What a web server before one ComfyUI is to do: a port per slot, one for all, TLS and passwords."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

from comfy_parallel.errors import ConfigError

MOST_SLOTS = 99
_SIGNS = {"nginx": "$", "caddy": "{}"}  # What the program would read as a variable.


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What the configuration is for: `port` leads to all slots, `port + 1` to slot 0, and so on.

    `program` listens on `address`, or on every IPv4 address of the machine where it is None. `tls` names the files of a
    certificate and of its key; who has passwords is in `password_file`, which htpasswd made, or in `passwords`, names
    with their hashes. A request must carry one of `tokens`, if there are any. Raises ConfigError where this cannot be
    served.
    """

    program: str = "nginx"
    gpus: int
    port: int = 8180
    comfyui_port: int = 8188
    address: IPv4Address | IPv6Address | None = None
    tls: tuple[str, str] | None = None
    password_file: str | None = None
    passwords: tuple[tuple[str, str], ...] = ()
    tokens: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.gpus <= MOST_SLOTS:
            raise ConfigError(f"--gpus is {self.gpus}; say how many slots the server has, from 1 to {MOST_SLOTS}")
        if not 1 <= self.port <= 65535 - self.gpus:
            raise ConfigError(
                f"--port is {self.port}; {self.gpus} slots need {self.gpus} more ports after it, "
                f"so say one from 1 to {65535 - self.gpus}"
            )
        if not 1 <= self.comfyui_port <= 65535:
            raise ConfigError(f"--comfyui-port is {self.comfyui_port}; say the port ComfyUI listens on, 1 to 65535")
        if self.comfyui_port in self.ports:
            raise ConfigError(
                f"the ports {self.port} to {self.ports[-1]} include {self.comfyui_port}, where ComfyUI listens; say "
                "another --port, or start ComfyUI with another --port and name that as --comfyui-port"
            )
        for path in (*(self.tls or ()), *filter(None, [self.password_file])):
            if not path.isprintable() or any(sign in path for sign in _SIGNS[self.program]):
                signs = " ".join(_SIGNS[self.program])
                raise ConfigError(
                    f"{self.program} cannot be given the file name {path!r}; use one without {signs} and control "
                    "characters"
                )

    @property
    def ports(self) -> range:
        """Every port nginx listens on: all slots, slot 0, slot 1, …"""
        return range(self.port, self.port + self.gpus + 1)

    @property
    def has_auth(self) -> bool:
        """Whether a request must carry a password or a token."""
        return bool(self.password_file or self.passwords or self.tokens)

    @property
    def is_secret(self) -> bool:
        """Whether the configuration holds what only its owner should read."""
        return bool(self.passwords or self.tokens)

    def warnings(self) -> list[str]:
        """What an operator should know who lets others reach these ports, one sentence or two each."""
        if self.address is not None and self.address.is_loopback:
            return []
        where = "on every address of this machine" if self.address is None else f"on {self.address}"
        found = []
        if not self.has_auth:
            found.append(
                f"{self.program} listens {where}, and asks for no password: who reaches these ports can run "
                "jobs and see all images. Use --auth, or --listen 127.0.0.1, or let a firewall guard the ports."
            )
        if self.tls is None:
            found.append(
                f"{self.program} listens {where} without TLS: others on the way can read and change all that is "
                "sent, passwords included. Use --tls, or --listen 127.0.0.1."
            )
        return found


def address(text: str) -> IPv4Address | IPv6Address:
    """The IP address to listen on; raises ConfigError where it is none."""
    try:
        found: IPv4Address | IPv6Address | None = ip_address(text.removeprefix("[").removesuffix("]"))
    except ValueError:
        found = None
    if found is None or "%" in text:  # neither nginx nor Caddy knows zones
        raise ConfigError(f"--listen is {text!r}; say an IP address of this machine, such as 127.0.0.1 or ::1")
    return found


def slots(entry: Entry) -> Iterator[tuple[int, int]]:
    """Each slot with its port."""
    return enumerate(entry.ports[1:])


def quoted(text: str) -> str:
    """In double quotes, as both programs read them."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def comments(entry: Entry) -> Iterator[str]:
    """Where each port leads, as lines of a comment."""
    first, last = entry.ports[1], entry.ports[-1]
    ports, slots = (
        (f":{first}", "slot 0") if first == last else (f":{first} ... :{last}", f"slot 0 ... slot {entry.gpus - 1}")
    )
    example = min(2, entry.gpus - 1)
    yield f"#   {f':{entry.port}':19}  all slots; the client may choose one with X-TARGET-GPU, else the server does"
    yield f"#   {f':{entry.port}/gpu{example}/':19}  the same as a path: slot {example}, for any slot the server has"
    yield f"#   {ports:19}  {slots}, whatever the client asks for"


def warning_comments(entry: Entry) -> str:
    """The warnings as comments, each ended by a line."""
    return "".join(f"#\n{_comment(f'WARNING: {warning}')}\n" for warning in entry.warnings())


def _comment(sentence: str) -> str:
    return textwrap.fill(sentence, 110, initial_indent="# ", subsequent_indent="#   ")
