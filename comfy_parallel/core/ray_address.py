"""The Ray cluster that `COMFY_PARALLEL_RAY` names."""

from __future__ import annotations

import re
from dataclasses import dataclass

from comfy_parallel.errors import ConfigError

AUTO = "auto"
_MOST_SLOTS = 512
_WRITTEN = re.compile(r"(auto|[A-Za-z0-9.-]+:[0-9]{1,5}|\[[0-9a-fA-F:]+\]:[0-9]{1,5})(?:#slots=([1-9][0-9]{0,2}))?")


@dataclass(frozen=True, slots=True)
class RayAddress:
    """Where a cluster is. `address`: `auto`, the one that this machine belongs to, or `host:port`. `slots`: how many
    slots it is; None for as many as it has GPUs when the server starts."""

    address: str
    slots: int | None = None


def parse(value: str) -> RayAddress | None:
    """What the variable says; None when it is empty.

    Raises:
        ConfigError: when it is no address of a cluster.
    """
    if not value:
        return None
    written = _WRITTEN.fullmatch(value)
    if written is None or int(written[2] or 1) > _MOST_SLOTS:
        hint = "; ray:// is Ray's client, which is not used" if value.startswith("ray://") else ""
        raise ConfigError(
            f"COMFY_PARALLEL_RAY={value!r}: write auto, or host:port as `ray start` was given it, like 10.0.0.2:6379,"
            f" and behind it #slots=8 where not all machines are there yet{hint}"
        )
    return RayAddress(written[1], int(written[2]) if written[2] else None)
