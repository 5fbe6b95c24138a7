"""The complete ComfyUIs on this machine that `gpu_config.json` names: started and stopped by this server.

They are started as this server was, by the same Python and with the same arguments, and end with it.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from comfy_parallel.config import Config
from comfy_parallel.core.gpu_config import GpuConfig, Worker
from comfy_parallel.core.shown import shown
from comfy_parallel.errors import BadRequest, ConfigError, NoSuchWorker
from comfy_parallel.fleet import ports, whole_host
from comfy_parallel.fleet.gpu_config_file import GpuConfigFile, named_file
from comfy_parallel.fleet.log_file import LogFile
from comfy_parallel.fleet.watched_host import WatchedHost
from comfy_parallel.fleet.whole_host import Install, WholeHost
from comfy_parallel.host import facts
from comfy_parallel.isolation import save_numbers
from comfy_parallel.isolation.shared_numbers import SharedNumbers
from comfy_parallel.weights import sharing

logger = logging.getLogger(__name__)

# Arguments of this server that are not for its workers, and whether a value follows.
_NOT_FOR_WORKERS = {
    "--port": True,
    "--listen": None,  # It may.
    "--cuda-device": True,
    "--default-device": True,
    "--tls-keyfile": True,
    "--tls-certfile": True,
    "--auto-launch": False,
    "--quick-test-for-ci": False,
}


class LocalWorkers:
    """What runs of the workers in `file`. Any thread may use it; to stop a worker takes seconds.

    `is_cpu`: this server computes on the CPU, and so do they. `join()`: they are to share weights with this server from
    now on; returns what their environment tells them of that.
    """

    def __init__(
        self,
        file: GpuConfigFile,
        install: Install,
        arguments: Sequence[str],
        *,
        is_cpu: bool,
        join: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        self.file, self._install, self._is_cpu, self._join = file, install, is_cpu, join
        self._arguments = for_workers(arguments)
        self._lock = threading.RLock()
        self._running: dict[str, WatchedHost] = {}
        self._shares_numbers = False

    def worker(self, worker_id: str) -> Worker:
        """The worker with this id.

        Raises:
            BadRequest: when there is none, or the file cannot be read.
        """
        config = self.read()
        worker = config.worker(worker_id)
        if worker is None:
            raise NoSuchWorker(shown(worker_id), ", ".join(worker.id for worker in config.workers))
        return worker

    def read(self) -> GpuConfig:
        """What the file says. Raises BadRequest."""
        try:
            return self.file.read()
        except ConfigError as error:
            raise BadRequest("invalid_config", str(error), "correct the file, or move it away") from error

    def launch(self, worker_id: str) -> Worker:
        """Have the worker run; one that does goes on.

        Raises:
            BadRequest: when it cannot be started here.
        """
        with self._lock:
            worker = self.worker(worker_id)
            if not self.is_running(worker.id):
                host = self._host(worker)
                self._share_numbers()
                install = replace(self._install, env={**self._install.env, **self._join()})
                self._running[worker.id] = WatchedHost(host, install)
                self._running[worker.id].start()
                logger.info("comfy_parallel: worker %s (%s) starts on %s", worker.id, worker.name, host.url)
            return worker

    def stop(self, worker_id: str) -> Worker:
        """Have the worker not run. Raises BadRequest where there is none."""
        worker = self.worker(worker_id)
        with self._lock:
            running = self._running.get(worker.id)
        if running is not None and running.state != "stopped":
            running.stop()
            logger.info("comfy_parallel: worker %s (%s) was stopped", worker.id, worker.name)
        return worker

    def is_running(self, worker_id: str) -> bool:
        """Whether it was started here and not stopped since."""
        running = self._running.get(worker_id)
        return running is not None and running.state != "stopped"

    def log(self, worker_id: str, lines: int) -> tuple[str, list[str]]:
        """The worker's log file, and its last lines. Raises BadRequest where there is none."""
        file = self._log_file(self.worker(worker_id))
        return str(file.path), file.tail(lines)

    def state(self, worker: Worker) -> dict[str, Any]:
        """What runs of a worker."""
        running = self._running.get(worker.id)
        if running is None:
            return {"state": "stopped", "pid": None, "restarts": 0, "last_end": None}
        ended = {"restarts": running.restarts, "last_end": running.last_end}
        return {"state": running.state, "pid": running.pid, **ended}

    def free_memory(self) -> None:
        """Have those that run unload their models; returns when each was told, or does not answer."""
        for running in list(self._running.values()):
            if running.state == "ready":
                _post(f"{running.host.url}/free", {"unload_models": True, "free_memory": True})

    def launch_at_start(self) -> None:
        """Start those that take part, where the settings say so. A worker that cannot be started is logged."""
        try:
            config = self.read()
            if config.setting("auto_launch_workers"):
                for worker in filter(lambda worker: worker.is_local, config.enabled_workers()):
                    self._launch_or_log(worker)
        except BadRequest as error:
            logger.error("comfy_parallel: %s", error.message)

    def stop_all(self) -> None:
        """Stop all that run."""
        for running in list(self._running.values()):
            running.stop()

    def _launch_or_log(self, worker: Worker) -> None:
        try:
            self.launch(worker.id)
        except BadRequest as error:
            logger.error("comfy_parallel: worker %s is not started: %s", worker.id, error.message)

    def _host(self, worker: Worker) -> WholeHost:
        if not worker.is_local:
            raise BadRequest("not_local", f"worker {worker.id} is {worker.type}", "start it on its own machine")
        is_cpu = self._is_cpu or "--cpu" in worker.arguments
        if worker.cuda_device is None and not is_cpu:
            raise BadRequest("invalid_config", f"worker {worker.id} names no GPU", "say its cuda_device")
        try:
            whole_host.refuse_ours(worker.arguments, may_say=whole_host.WORKER_MAY_SAY)
            ports.check(None, worker.port, "end that, or give the worker another port")
        except ConfigError as error:
            raise BadRequest("cannot_launch", f"worker {worker.id}: {error}", "change gpu_config.json") from error
        return WholeHost(
            label=f"worker {worker.id} {worker.name}",
            device="cpu" if is_cpu else f"cuda:{worker.cuda_device}",
            port=worker.port,
            arguments=(*self._arguments, *worker.arguments),
            num_hosts=1 + len(self._running),
        )

    def _log_file(self, worker: Worker) -> LogFile:
        running = self._running.get(worker.id)
        if running is not None:
            return running.log
        host = WholeHost(label=worker.name, device="cpu", port=worker.port)
        return LogFile(whole_host.log_file(host, self._install))

    def _share_numbers(self) -> None:
        """From now on the jobs here and there save into the same folders."""
        if not self._shares_numbers:
            save_numbers.share(SharedNumbers(self._install.folder / "numbers"))
            self._shares_numbers = True


def for_workers(arguments: Sequence[str]) -> tuple[str, ...]:
    """This server's arguments without those that are its own."""
    kept: list[str] = []
    skips: bool | None = False
    for argument in arguments:
        if skips or (skips is None and not argument.startswith("-")):
            skips = False
            continue
        name, equals, _ = argument.partition("=")
        skips = False
        if name not in _NOT_FOR_WORKERS:
            kept.append(argument)
        elif not equals:
            skips = _NOT_FOR_WORKERS[name]
    return tuple(kept)


def _post(url: str, body: dict[str, Any]) -> None:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=10.0):
            return
    except (OSError, urllib.error.URLError) as error:
        logger.warning("comfy_parallel: %s: %s", url, error)


_workers: LocalWorkers | None = None


def current() -> LocalWorkers | None:
    """This server's; None where COMFY_PARALLEL_GPU_CONFIG is off."""
    return _workers


def use(config: Config, env: Mapping[str, str]) -> None:
    """Know of the workers in the file that the configuration names. `env`: what this process was started with."""
    global _workers
    _workers = None
    file = named_file(config.gpu_config, facts.gpu_config_file())
    if file is not None:
        is_cpu = facts.device_type() == "cpu"
        _workers = LocalWorkers(file, _install(env), own_arguments(), is_cpu=is_cpu, join=sharing.join_others)


def launch_at_start() -> None:
    """Start those that are to start with this server; returns at once."""
    if _workers is not None:
        _workers.launch_at_start()


def _install(env: Mapping[str, str]) -> Install:
    return Install(
        comfyui=facts.directory(),
        python=sys.executable,
        folder=facts.gpu_config_file().with_name("workers"),
        has_database=facts.has_argument("database_url"),
        env={name: value for name, value in env.items() if not name.startswith("COMFY_PARALLEL_WEBHOOK")},
        visible=None,  # Their devices are counted as the driver counts.
    )


def own_arguments() -> list[str]:
    """What ComfyUI was called with; nothing where it is not the program that runs."""
    script = os.path.abspath(sys.argv[0])
    return list(sys.argv[1:]) if os.path.basename(script) == "main.py" else []
