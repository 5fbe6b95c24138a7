"""`gpu_config.json`: the front's ComfyUI (`master`), the other ComfyUIs that work for it (`workers`), and settings.

A configuration keeps the JSON that it was read from. What is known of that is checked and typed; a change is written
into a copy of the JSON, so what is not known, or was left out, stays as it is.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from comfy_parallel.core.shown import shown
from comfy_parallel.errors import ConfigError

JSON = dict[str, Any]

LOCAL, REMOTE, CLOUD = "local", "remote", "cloud"
MOST_WORKERS = 999
# The settings that are known: kind and default.
SETTINGS: dict[str, tuple[type, Any]] = {
    "debug": (bool, False),
    "auto_launch_workers": (bool, False),
    "stop_workers_on_master_exit": (bool, True),
    "master_delegate_only": (bool, False),
    "websocket_orchestration": (bool, True),
    "has_auto_populated_workers": (bool, False),
    "worker_probe_concurrency": (int, 8),
    "worker_prep_concurrency": (int, 4),
    "media_sync_concurrency": (int, 2),
    "media_sync_timeout_seconds": (int, 120),
    "worker_timeout_seconds": (int, 60),
}
_THIS_MACHINE = ("", "localhost", "127.0.0.1", "::1")
_HOST = re.compile(r"[A-Za-z0-9.:_\[\]-]{1,253}")
_ADDRESS = re.compile(r"https?://[A-Za-z0-9.:_\[\]-]{1,253}(/[!-~]*)?")
_SHELL = re.compile(r"[;|&`$<>\x00-\x1f\x7f]")
_LONGEST = 1000  # characters of a name or of arguments


@dataclass(frozen=True, slots=True, kw_only=True)
class Master:
    """The ComfyUI that gives out work; `None` where the file says nothing. `host`: its address as workers reach it."""

    name: str
    host: str
    port: int | None
    cuda_device: int | None
    extra_args: str
    json: JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """Another ComfyUI.

    Attributes:
        id: unique, as text; in the file it may be a number.
        host: a name or an address; empty for this machine. Of `cloud` workers it may be a whole http(s) address.
        cuda_device: the GPU of a local worker, as the driver counts; None leaves it to the worker.
        enabled: whether it takes part.
        type: `local`, `remote` or `cloud`; where the file does not say, `host` decides.
    """

    id: str
    name: str
    host: str
    port: int
    cuda_device: int | None
    enabled: bool
    extra_args: str
    type: str
    json: JSON

    @property
    def is_local(self) -> bool:
        """Whether it runs on this machine, so that it can be started and stopped from here."""
        return self.type == LOCAL

    @property
    def arguments(self) -> list[str]:
        """`extra_args`, one by one."""
        return shlex.split(self.extra_args)

    @property
    def url(self) -> str:
        """Where it is reached: `http://127.0.0.1:8189`."""
        if "://" in self.host:
            return self.host.rstrip("/")
        host = self.host or "127.0.0.1"
        shown_host = f"[{host}]" if ":" in host and not host.startswith("[") else host
        scheme = "https" if self.type == CLOUD and self.port == 443 else "http"
        return f"{scheme}://{shown_host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuConfig:
    """All that the file says; `json` is the file's own object."""

    master: Master
    workers: tuple[Worker, ...]
    settings: Mapping[str, Any]
    json: JSON

    def setting(self, name: str) -> Any:
        """The value of a setting, or its default; None for one that is neither known nor in the file."""
        return self.settings.get(name, SETTINGS.get(name, (object, None))[1])

    def worker(self, worker_id: object) -> Worker | None:
        """The worker with this id."""
        return next((worker for worker in self.workers if worker.id == str(worker_id)), None)

    def enabled_workers(self) -> list[Worker]:
        """Those that take part, in the file's order."""
        return [worker for worker in self.workers if worker.enabled]

    def with_worker(self, worker_id: object, changes: JSON) -> GpuConfig:
        """With these fields of a worker changed; a worker that is not there is added. Raises ConfigError."""
        workers: list[JSON] = [dict(worker.json) for worker in self.workers]
        for worker in workers:
            if str(worker["id"]) == str(worker_id):
                _change(worker, {name: value for name, value in changes.items() if name != "id"})
                break
        else:
            workers.append(added := {"id": worker_id})
            _change(added, changes)
        return parse({**self.json, "workers": workers})

    def without_worker(self, worker_id: object) -> GpuConfig:
        """Without this worker, if it is there."""
        return parse({**self.json, "workers": [w.json for w in self.workers if w.id != str(worker_id)]})

    def with_master(self, changes: JSON) -> GpuConfig:
        """With these fields of the master changed. Raises ConfigError."""
        master = dict(self.master.json)
        _change(master, changes)
        return parse({**self.json, "master": master})

    def with_setting(self, name: str, value: Any) -> GpuConfig:
        """With a setting changed. Raises ConfigError."""
        return parse({**self.json, "settings": {**self.settings, name: value}})

    def with_all(self, changes: JSON) -> GpuConfig:
        """With whole parts of the file replaced (`workers`, others), or changed (`master`, `settings`).

        Raises:
            ConfigError: when the result is no configuration.
        """
        merged: JSON = {**self.json, **changes}
        for name in ("master", "settings"):
            if isinstance(changes.get(name), dict):
                merged[name] = {**cast(JSON, self.json.get(name) or {}), **changes[name]}
        return parse(merged)

    def text(self) -> str:
        """As it is written to the file."""
        return json.dumps(self.json, indent=2, ensure_ascii=False) + "\n"


def _change(target: JSON, changes: JSON) -> None:
    """Set fields; None takes one away."""
    for name, value in changes.items():
        if value is None:
            target.pop(name, None)
        else:
            target[name] = value


def parse_text(text: str) -> GpuConfig:
    """The configuration in a file's text.

    Raises:
        ConfigError: naming the entry, its value and what to write instead.
    """
    try:
        data = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"gpu_config.json is no JSON: {error}; correct it, or move it away to begin anew") from error
    return parse(data)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def parse(data: Any) -> GpuConfig:
    """The configuration in a JSON value. Raises ConfigError, as `parse_text`."""
    whole = _object(data, "gpu_config.json")
    master = _master(_object(whole.get("master") or {}, "master"))
    listed = _kind(whole.get("workers") or [], list, "workers")
    if len(listed) > MOST_WORKERS:
        raise ConfigError(f"gpu_config.json: {len(listed)} workers; list at most {MOST_WORKERS}")
    workers = tuple(_worker(_object(entry, f"workers[{at}]"), f"workers[{at}]") for at, entry in enumerate(listed))
    settings = _object(whole.get("settings") or {}, "settings")
    for name, value in settings.items():
        if name in SETTINGS:
            _setting(value, SETTINGS[name][0], f"settings.{name}")
    _refuse_doubles(master, workers)
    return GpuConfig(master=master, workers=workers, settings=settings, json=whole)


def _master(entry: JSON) -> Master:
    return Master(
        name=_text(entry, "name", "master", "Master"),
        host=_host(entry, "master", REMOTE),
        port=_whole(entry, "port", "master", 1, 65535),
        cuda_device=_whole(entry, "cuda_device", "master", 0, 999),
        extra_args=_arguments(entry, "master"),
        json=entry,
    )


def _worker(entry: JSON, where: str) -> Worker:
    worker_id = entry.get("id")
    if isinstance(worker_id, bool) or not isinstance(worker_id, str | int) or not 0 < len(str(worker_id)) <= _LONGEST:
        raise _wrong(where, "id", worker_id, "give each worker a number or a text of its own")
    kind = entry.get("type", None)
    if kind not in (None, LOCAL, REMOTE, CLOUD):
        raise _wrong(where, "type", kind, "write local, remote or cloud, or leave it out")
    host = _host(entry, where, kind or REMOTE)
    port = _whole(entry, "port", where, 1, 65535)
    if port is None:
        raise _wrong(where, "port", None, "say the port that the worker listens on, from 1 to 65535")
    return Worker(
        id=str(worker_id),
        name=_text(entry, "name", where, f"Worker {worker_id}"),
        host=host,
        port=port,
        cuda_device=_whole(entry, "cuda_device", where, 0, 999),
        enabled=bool(_setting(entry.get("enabled", False), bool, f"{where}.enabled")),
        extra_args=_arguments(entry, where),
        type=kind or (LOCAL if host in _THIS_MACHINE else REMOTE),
        json=entry,
    )


def _refuse_doubles(master: Master, workers: tuple[Worker, ...]) -> None:
    ids: dict[str, int] = {}
    ports = {} if master.port is None else {master.port: "master"}
    for at, worker in enumerate(workers):
        if worker.id in ids:
            raise ConfigError(
                f"gpu_config.json: workers[{ids[worker.id]}] and workers[{at}] have the same id, {shown(worker.id)}; "
                "give one of them another"
            )
        ids[worker.id] = at
        if worker.is_local and worker.port in ports:
            raise ConfigError(
                f"gpu_config.json: {ports[worker.port]} and workers[{at}] have the same port, {worker.port}, on this "
                "machine; give one of them another"
            )
        if worker.is_local:
            ports[worker.port] = f"workers[{at}]"


def _object(value: Any, where: str) -> JSON:
    return cast(JSON, _kind(value, dict, where))


def _kind(value: Any, kind: type, where: str) -> Any:
    if not isinstance(value, kind):
        wanted = "an object" if kind is dict else "a list"
        raise ConfigError(f"gpu_config.json: {where} is {shown(value)}; write {wanted}")
    return value


def _setting(value: Any, kind: type, where: str) -> Any:
    if kind is bool and not isinstance(value, bool):
        raise ConfigError(f"gpu_config.json: {where} is {shown(value)}; write true or false")
    if kind is int and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 86400):
        raise ConfigError(f"gpu_config.json: {where} is {shown(value)}; write a whole number from 1 to 86400")
    return value


def _text(entry: JSON, name: str, where: str, default: str) -> str:
    value = entry.get(name)
    if value is None:
        return default
    if not isinstance(value, str) or len(value) > _LONGEST:
        raise _wrong(where, name, value, f"write a text of at most {_LONGEST} characters")
    return value or default


def _host(entry: JSON, where: str, kind: str) -> str:
    value = _text(entry, "host", where, "")
    if value and not _HOST.fullmatch(value) and not (kind != LOCAL and _ADDRESS.fullmatch(value)):
        raise _wrong(where, "host", value, "write a name or an address, such as 192.168.1.100, without the port")
    return value


def _whole(entry: JSON, name: str, where: str, least: int, most: int) -> int | None:
    value = entry.get(name)
    if value is None:
        return None
    number = int(value) if isinstance(value, str) and re.fullmatch(r"[0-9]{1,5}", value) else value
    if isinstance(number, bool) or not isinstance(number, int) or not least <= number <= most:
        raise _wrong(where, name, value, f"write a whole number from {least} to {most}")
    return number


def _arguments(entry: JSON, where: str) -> str:
    value = _text(entry, "extra_args", where, "")
    wrong = _SHELL.search(value)
    if wrong:
        raise _wrong(where, "extra_args", value, f"no shell reads it, so leave {wrong[0]!r} out")
    try:
        shlex.split(value)
    except ValueError as error:
        raise _wrong(where, "extra_args", value, f"correct the quotes ({error})") from error
    return value


def _wrong(where: str, name: str, value: Any, remedy: str) -> ConfigError:
    what = "is missing" if value is None else f"is {shown(value)}"
    return ConfigError(f"gpu_config.json: {where}.{name} {what}; {remedy}")
