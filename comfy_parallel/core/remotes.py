"""The addresses of other ComfyUIs, as `COMFY_PARALLEL_REMOTE` or a `gpu_config.json` gives them."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass, field
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from comfy_parallel.core.gpu_config import GpuConfig
from comfy_parallel.errors import ConfigError

_EXAMPLE = "write a comma-separated list like http://10.0.0.2:8188,https://user:token@gpu.example.com#slots=2"
_TOKEN = re.compile(r"[\x21-\x7e]+")
_MOST_SLOTS = 64


@dataclass(frozen=True, slots=True)
class Remote:
    """Another ComfyUI.

    Attributes:
        name: what people see of it: `remote0`.
        url: its address, without a password and without a slash at its end; empty while it has none.
        authorization: the header that it wants, if any; never shown.
        slots: how many of our slots it serves; None for one per GPU that it tells of.
    """

    name: str
    url: str
    authorization: str | None = field(default=None, repr=False)
    slots: int | None = None


def parse(value: str, token: str = "") -> tuple[Remote, ...]:
    """The remotes of a comma-separated list of addresses.

    Args:
        token: for those addresses that have no password of their own.

    Raises:
        ConfigError: naming what cannot be used, never a password.
    """
    if token and not _TOKEN.fullmatch(token):
        raise ConfigError("COMFY_PARALLEL_REMOTE_TOKEN: set it to the token alone, without spaces or quotes")
    texts = [text.strip() for text in value.split(",") if text.strip()]
    remotes = tuple(_remote(f"remote{number}", text, token) for number, text in enumerate(texts))
    for number, remote in enumerate(remotes):
        if any(remote.url == other.url for other in remotes[:number]):
            raise ConfigError(
                f"COMFY_PARALLEL_REMOTE names {remote.url} twice; leave it once, with #slots=2 if need be"
            )
    return remotes


def of_workers(config: GpuConfig, token: str = "") -> tuple[Remote, ...]:
    """The workers on other machines that a `gpu_config.json` names and that are to take part."""
    workers = [worker for worker in config.enabled_workers() if not worker.is_local]
    authorization = f"Bearer {token}" if token else None
    return tuple(Remote(worker.name or f"worker {worker.id}", worker.url, authorization) for worker in workers)


def _remote(name: str, text: str, token: str) -> Remote:
    try:
        parts = urlsplit(text)
        _ = parts.port  # raises for what is no number
    except ValueError as error:
        raise _bad(text) from error
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
        raise _bad(text)
    _, _, place = parts.netloc.rpartition("@")
    url = urlunsplit((parts.scheme, place, parts.path.rstrip("/"), "", ""))
    return Remote(name, url, _authorization(parts, token), _slots(parts.fragment, text))


def _authorization(parts: SplitResult, token: str) -> str | None:
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    if user:
        return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
    return f"Bearer {password or token}" if password or token else None


def _slots(fragment: str, text: str) -> int | None:
    if not fragment:
        return None
    count = re.fullmatch(r"slots=([1-9][0-9]?)", fragment)
    if count is None or int(count[1]) > _MOST_SLOTS:
        raise _bad(text)
    return int(count[1])


def _bad(text: str) -> ConfigError:
    shown = re.sub(r"//.*@", "//…@", re.sub(r"[?].*", "?…", text))
    return ConfigError(f"COMFY_PARALLEL_REMOTE: {shown!r} is no address of a ComfyUI; {_EXAMPLE}")
