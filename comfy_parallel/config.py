"""The one configuration object, read from the environment and checked at start."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any

from comfy_parallel.errors import ConfigError

SWITCH = "COMFY_MULTI_GPU_SCHED"
WEIGHTS = ("map", "copy", "off")
PACK_MODES = ("auto", "trust", "alone")
SPREAD, IN_ORDER = "spread", "in-order"
CLIENT_ORDERS = (SPREAD, IN_ORDER)
REPORT, FAIL, REQUEUE = STALL_POLICIES = ("report", "fail", "requeue")
MOST_PRIORITY = 1000  # of a job, up and down
THREAD, PROCESS = "thread", "process"  # how a slot runs
LOST = ("requeue", "fail")
WEIGHT_DTYPES = ("default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2")  # of the host's loader of diffusion models
_DEVICE = re.compile(r"(cpu|mps|(?:cuda|xpu):(?:0|[1-9][0-9]{0,2}))(?:=(thread|process))?")


@dataclass(frozen=True, slots=True)
class PackModes:
    """What to do about jobs with nodes of packs: `mode` in general, and for the packs that were named (in lower case).

    `auto` isolates what is safe to isolate and runs the rest alone, `trust` does neither, `alone` runs all of a
    pack's jobs alone.
    """

    mode: str = "auto"
    named: tuple[tuple[str, str], ...] = ()

    def of(self, pack: str) -> str:
        """The mode of a pack, by the name of its folder."""
        return dict(self.named).get(pack.lower(), self.mode)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The scheduler's settings; `None` means no limit.

    Attributes:
        client_order: whether several jobs of one client may run at once (`spread`), or one at a time (`in-order`).
        fair_by: who gets a fair share: each `client`, each `user`, each value of a `header:NAME`; `off` for nobody.
        affinity: how many jobs may overtake the first that waits because a slot holds their models, if it is more than
            the number of slots; 0 for none.
        max_waiting: how many jobs may wait in all before new ones are refused.
        max_waiting_per_client: the same, of one client.
        max_running_per_client: how many jobs of one client may run at once.
    """

    client_order: str = SPREAD
    fair_by: str = "client"
    affinity: int = 16
    max_waiting: int | None = None
    max_waiting_per_client: int | None = None
    max_running_per_client: int | None = None

    def most_at_once(self, client_order: str | None) -> int | None:
        """How many jobs of one client may run at once, when a job asks for this order, or for none."""
        if (client_order or self.client_order) == IN_ORDER:
            return 1
        return self.max_running_per_client


@dataclass(frozen=True, slots=True, kw_only=True)
class Webhooks:
    """Where the end of a job may be told, and how that is signed.

    Attributes:
        url: told of every job that names no address itself.
        hosts: `name` or `name:port` of the addresses that jobs may name.
        secret: the key of the signatures.
    """

    url: str | None = None
    hosts: tuple[str, ...] = ()
    secret: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What the user asked for. `None` means: decide from what the machine has."""

    enabled: bool = False
    num_gpus: int | None = None
    devices: tuple[str, ...] | None = None
    kinds: tuple[str | None, ...] = ()
    workers: str = "threads"
    worker_lost: str = "requeue"
    worker_silent_s: float = 300.0
    slots_per_gpu: int = 1
    default_slot: int | None = None
    strict: bool = False
    weights: str | None = None
    ram_gb: float | None = None
    preload: tuple[str, ...] = ()
    graphs: bool = True
    max_nodes: int | None = None
    packs: PackModes = PackModes()
    drain_s: float = 0.0
    breaker: int = 5
    policy: Policy = Policy()
    trusted_proxies: tuple[str, ...] = ()
    state: str | None = None
    exit_on_failed: bool = False
    warm_up: bool = True
    stall_s: float = 0.0
    stall: str = FAIL
    state_fsync: bool = False
    attempts: int = 2
    webhooks: Webhooks = Webhooks()
    serial_nodes: tuple[str, ...] = ()
    gpu_config: str | None = None
    remote: str = field(default="", repr=False)  # may hold passwords; core/remotes.py reads it
    remote_token: str = field(default="", repr=False)
    remote_keys: bool = False
    ray: str = ""  # core/ray_address.py reads it

    @property
    def shares_gpus(self) -> bool:
        """Whether several slots of this process compute on one device that is no CPU."""
        devices = self.devices or ("",)
        slots = [device for device in devices for _ in range(self.slots_per_gpu)]
        kinds = self.slot_kinds(len(slots))
        named = [device for device, kind in zip(slots, kinds, strict=True) if device != "cpu" and kind == THREAD]
        return len(set(named)) < len(named)

    def slot_kinds(self, num_slots: int) -> tuple[str, ...]:
        """`thread` or `process` for each slot, in their order."""
        usual = PROCESS if self.workers == "processes" else THREAD
        named = self.kinds or (None,) * (num_slots // self.slots_per_gpu)
        return tuple(kind or usual for kind in named for _ in range(self.slots_per_gpu))

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Config:
        """Read the configuration.

        Raises:
            ConfigError: naming the variable, its value and what to write instead.
        """
        return cls._of_all(env) if _flag(env, SWITCH) else cls()

    @classmethod
    def _of_all(cls, env: Mapping[str, str]) -> Config:
        return cls(
            enabled=True,
            num_gpus=_count(env, "COMFY_NUM_GPUS"),
            devices=_devices(env, "COMFY_PARALLEL_DEVICES"),
            kinds=_kinds(env, "COMFY_PARALLEL_DEVICES"),
            workers=_choice(env, "COMFY_PARALLEL_WORKERS", ("threads", "processes", "auto")) or "threads",
            worker_lost=_choice(env, "COMFY_PARALLEL_WORKER_LOST", LOST) or "requeue",
            worker_silent_s=_seconds(env, "COMFY_PARALLEL_WORKER_SILENT_S") or 300.0,
            slots_per_gpu=_count(env, "COMFY_PARALLEL_SLOTS_PER_GPU") or 1,
            default_slot=_default_slot(env, "COMFY_PARALLEL_DEFAULT_GPU"),
            strict=_flag(env, "COMFY_PARALLEL_STRICT"),
            weights=_choice(env, "COMFY_PARALLEL_WEIGHTS", WEIGHTS),
            ram_gb=_gigabytes(env, "COMFY_PARALLEL_RAM_GB"),
            preload=_names(env, "COMFY_PARALLEL_PRELOAD"),
            graphs=_auto_or_off(env, "COMFY_PARALLEL_GRAPHS"),
            max_nodes=_count(env, "COMFY_PARALLEL_MAX_NODES", most=9_999_999),
            packs=_pack_modes(env, "COMFY_PARALLEL_PACKS"),
            drain_s=_seconds(env, "COMFY_PARALLEL_DRAIN_S"),
            breaker=_count_or_off(env, "COMFY_PARALLEL_BREAKER", 5),
            policy=_policy(env),
            state=env.get("COMFY_PARALLEL_STATE", "").strip() or None,
            warm_up=_auto_or_off(env, "COMFY_PARALLEL_WARM_UP"),
            exit_on_failed=_flag(env, "COMFY_PARALLEL_EXIT_ON_FAILED"),
            stall_s=_seconds(env, "COMFY_PARALLEL_STALL_S"),
            stall=_choice(env, "COMFY_PARALLEL_STALL", STALL_POLICIES) or FAIL,
            state_fsync=_flag(env, "COMFY_PARALLEL_STATE_FSYNC"),
            attempts=_count(env, "COMFY_PARALLEL_ATTEMPTS", most=99) or 2,
            trusted_proxies=_names(env, "COMFY_PARALLEL_TRUSTED_PROXIES"),
            webhooks=_webhooks(env),
            serial_nodes=_names(env, "COMFY_PARALLEL_SERIAL_NODES"),
            gpu_config=env.get("COMFY_PARALLEL_GPU_CONFIG", "").strip() or None,
            remote=env.get("COMFY_PARALLEL_REMOTE", "").strip(),
            remote_token=env.get("COMFY_PARALLEL_REMOTE_TOKEN", "").strip(),
            remote_keys=_flag(env, "COMFY_PARALLEL_REMOTE_KEYS"),
            ray=env.get("COMFY_PARALLEL_RAY", "").strip(),
        )


_PREFIX = "COMFY_PARALLEL_"
_NOT_FOR_USERS = {
    "COMFY_PARALLEL_CACHE",
    "COMFY_PARALLEL_GROUP",
    "COMFY_PARALLEL_REQUIRE_GPU",
    "COMFY_PARALLEL_REQUIRE_HOST",
    "COMFY_PARALLEL_SECRET",
}
_SIMILAR = 0.82  # of difflib's ratio: COMFY_NUM_GPU and COMFY_MULTI_GPU are, COMFYUI_PATH is not.


class _Asked(dict[str, str]):
    """An environment without variables, which remembers for which it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = {SWITCH}

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return default


def known_variables() -> set[str]:
    """The names of all variables that the configuration is read from."""
    asked = _Asked()
    Config._of_all(asked)
    return asked.names


def misspelt(env: Mapping[str, str]) -> list[str]:
    """One sentence for each variable that is none of ours but looks like it, with the nearest that is."""
    if env.get(SWITCH, "").strip() == "0":
        return []  # Off is stock.
    known = sorted(known_variables())
    found = {name: _nearest(name, known) for name in sorted(env) if name not in known and name not in _NOT_FOR_USERS}
    return [
        f"{name} is no variable of comfy_parallel and has no effect; did you mean {nearest}?"
        for name, nearest in found.items()
        if nearest is not None
    ]


def _nearest(name: str, known: list[str]) -> str | None:
    is_ours = name.upper().startswith(_PREFIX)
    if not is_ours and "COM" not in name.upper():
        return None
    likeness = {other: SequenceMatcher(None, name.upper(), other).ratio() for other in known}
    nearest = max(known, key=lambda other: (other.startswith(name.upper()), likeness[other]))
    return nearest if is_ours or likeness[nearest] >= _SIMILAR else None


def _flag(env: Mapping[str, str], name: str) -> bool:
    value = env.get(name, "").strip()
    if value not in ("", "0", "1"):
        raise ConfigError(f"{name}={value!r}: set it to 1 (on) or 0 (off)")
    return value == "1"


def _auto_or_off(env: Mapping[str, str], name: str) -> bool:
    value = env.get(name, "").strip()
    if value not in ("", "auto", "off"):
        raise ConfigError(f"{name}={value!r}: set it to auto or off")
    return value != "off"


def _count(env: Mapping[str, str], name: str, *, most: int = 999) -> int | None:
    value = env.get(name, "").strip()
    if not value:
        return None
    if not re.fullmatch(r"[0-9]{1,7}", value) or not 1 <= int(value) <= most:
        raise ConfigError(f"{name}={value!r}: set it to a whole number from 1 to {most}, or leave it unset")
    return int(value)


def _count_or_off(env: Mapping[str, str], name: str, default: int) -> int:
    value = env.get(name, "").strip()
    if value in ("0", "off"):
        return 0
    if value and not re.fullmatch(r"[1-9][0-9]{0,2}", value):
        raise ConfigError(f"{name}={value!r}: set it to a whole number from 1 to 999, or to 0 to switch it off")
    return int(value or default)


def _choice(env: Mapping[str, str], name: str, choices: tuple[str, ...]) -> str | None:
    value = env.get(name, "").strip()
    if not value:
        return None
    if value not in choices:
        raise ConfigError(f"{name}={value!r}: set it to {', '.join(choices[:-1])} or {choices[-1]}")
    return value


def _names(env: Mapping[str, str], name: str) -> tuple[str, ...]:
    return tuple(filter(None, map(str.strip, env.get(name, "").split(","))))


def _webhooks(env: Mapping[str, str]) -> Webhooks:
    url = env.get("COMFY_PARALLEL_WEBHOOK", "").strip() or None
    hosts = _names(env, "COMFY_PARALLEL_WEBHOOK_HOSTS")
    secret = env.get("COMFY_PARALLEL_WEBHOOK_SECRET", "")
    if url is not None and not re.fullmatch(r"https?://[^/@\s]+(/\S*)?", url):
        raise ConfigError(f"COMFY_PARALLEL_WEBHOOK={url!r}: set it to an address like https://example.com/jobs")
    for host in hosts:
        if not re.fullmatch(r"[A-Za-z0-9.-]+(:[0-9]{1,5})?", host):
            raise ConfigError(f"COMFY_PARALLEL_WEBHOOK_HOSTS: {host!r} is no host; write example.com or 10.0.0.2:9000")
    if (url or hosts) and not secret:
        raise ConfigError("COMFY_PARALLEL_WEBHOOK_SECRET is empty: set it to the key that signs webhooks")
    return Webhooks(url=url, hosts=hosts, secret=secret)


def _policy(env: Mapping[str, str]) -> Policy:
    affinity = env.get("COMFY_PARALLEL_AFFINITY", "").strip() or "16"
    if not re.fullmatch(r"[0-9]{1,3}", affinity):
        raise ConfigError(
            f"COMFY_PARALLEL_AFFINITY={affinity!r}: set it to a number of jobs from 0 to 999, or leave it unset"
        )
    return Policy(
        client_order=_choice(env, "COMFY_PARALLEL_CLIENT_ORDER", CLIENT_ORDERS) or SPREAD,
        fair_by=_fair_by(env, "COMFY_PARALLEL_FAIR_BY"),
        affinity=int(affinity),
        max_waiting=_count(env, "COMFY_PARALLEL_MAX_WAITING", most=9_999_999),
        max_waiting_per_client=_count(env, "COMFY_PARALLEL_MAX_WAITING_PER_CLIENT", most=9_999_999),
        max_running_per_client=_count(env, "COMFY_PARALLEL_MAX_RUNNING_PER_CLIENT"),
    )


def _fair_by(env: Mapping[str, str], name: str) -> str:
    value = env.get(name, "").strip() or "client"
    if value not in ("client", "user", "off") and not re.fullmatch(r"header:[A-Za-z0-9-]+", value):
        raise ConfigError(f"{name}={value!r}: set it to client, user, header:NAME or off")
    return value


def _pack_modes(env: Mapping[str, str], name: str) -> PackModes:
    value = env.get(name, "").strip()
    general: list[str] = []
    named: dict[str, str] = {}
    for part in filter(None, map(str.strip, value.split(","))):
        pack, equals, mode = map(str.strip, part.rpartition("="))
        if mode not in PACK_MODES or (equals and not pack):
            raise ConfigError(
                f"{name}={value!r}: {part!r} is no choice; write auto, trust or alone, and for single packs the name of"
                " their folder: auto,ComfyUI-VideoHelperSuite=alone,my_nodes=trust"
            )
        if (pack.lower() in named) if equals else general:
            raise ConfigError(f"{name}={value!r}: {part!r} comes after another choice for the same; leave one of them")
        if equals:
            named[pack.lower()] = mode
        else:
            general.append(mode)
    return PackModes(general[0] if general else "auto", tuple(named.items()))


def _gigabytes(env: Mapping[str, str], name: str) -> float | None:
    value = env.get(name, "").strip()
    if not value:
        return None
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,3})?", value) or float(value) == 0:
        raise ConfigError(f"{name}={value!r}: set it to a number of GiB like 64 or 12.5, or leave it unset")
    return float(value)


def _seconds(env: Mapping[str, str], name: str) -> float:
    value = env.get(name, "").strip()
    if not value:
        return 0.0
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,3})?", value):
        raise ConfigError(f"{name}={value!r}: set it to a number of seconds like 60 or 2.5, or to 0")
    return float(value)


def _devices(env: Mapping[str, str], name: str) -> tuple[str, ...] | None:
    value = env.get(name, "").strip()
    if not value:
        return None
    parts = tuple(part.strip() for part in value.split(","))
    for part in parts:
        if not _DEVICE.fullmatch(part):
            raise ConfigError(
                f"{name}={value!r}: {part!r} is no device; write a comma-separated list like cuda:0,cuda:1 or cpu,cpu,"
                " and cuda:1=process for a slot in a process of its own"
            )
    devices = tuple(part.partition("=")[0] for part in parts)
    if len({device.partition(":")[0] for device in devices}) > 1:
        raise ConfigError(f"{name}={value!r}: all slots must be of one kind, either cuda:N or cpu")
    return devices


def _kinds(env: Mapping[str, str], name: str) -> tuple[str | None, ...]:
    """What each device of the list says of how its slot runs; read after `_devices`, which checks the list."""
    value = env.get(name, "").strip()
    return tuple(part.strip().partition("=")[2] or None for part in value.split(",")) if value else ()


def _default_slot(env: Mapping[str, str], name: str) -> int | None:
    value = env.get(name, "").strip()
    if value in ("", "auto"):
        return None
    if not re.fullmatch(r"[0-9]{1,3}", value):
        raise ConfigError(f"{name}={value!r}: set it to auto or to the number of a slot, counted from 0")
    return int(value)
