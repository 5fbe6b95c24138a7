"""The server's side of a Ray cluster: its slots, and where Ray runs the ComfyUI of each."""

from __future__ import annotations

import itertools
import logging
import secrets
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from comfy_parallel.config import SWITCH
from comfy_parallel.core.ray_address import RayAddress
from comfy_parallel.core.remotes import Remote
from comfy_parallel.errors import ConfigError, RemoteError
from comfy_parallel.fleet.command import PASSED_ON, STATE
from comfy_parallel.fleet.link import Link, pair
from comfy_parallel.fleet.local_workers import for_workers
from comfy_parallel.fleet.ray.driver import FD, SAYS
from comfy_parallel.fleet.remote.host import RemoteHost
from comfy_parallel.fleet.supervisor import Command, Supervisor
from comfy_parallel.fleet.worker_side import SECRET

logger = logging.getLogger(__name__)

_REPOSITORY = Path(__file__).resolve().parents[3]
_MAIN = "import sys; sys.path.insert(0, sys.argv[1]); from comfy_parallel.fleet.ray import driver; driver.main()"
_ANSWERS_WITHIN_S = 120.0
_READER_ENDS_S = 10.0
# Where a worker keeps its files is not for the server to say.
_FOLDERS = frozenset(("--output-directory", "--input-directory", "--temp-directory", "--user-directory"))


class Cluster:
    """The slots of a cluster, as remotes whose addresses come when Ray has started them.

    Args:
        comfyui: this ComfyUI's folder, and that of the others where their machines do not say another.
        arguments: of this ComfyUI's command line.
        has_database: whether that knows `--database-url`.
        skips_own_node: the GPUs of this machine are slots already.

    Raises:
        ConfigError: when it cannot be used.
    """

    def __init__(
        self,
        where: RayAddress,
        comfyui: str,
        arguments: Sequence[str],
        env: Mapping[str, str],
        *,
        has_database: bool,
        skips_own_node: bool,
    ) -> None:
        self._where, self._skips_own_node, self._env = where, skips_own_node, env
        self._comfyui, self._arguments = comfyui, arguments_of_workers(arguments, has_database)
        self._secret = secrets.token_urlsafe(32)
        self._hosts: list[RemoteHost] = []
        self._link: Link | None = None
        self._reader: threading.Thread | None = None
        self._orders: list[tuple[bool, dict[str, Any]]] = []
        self._numbers = itertools.count()
        self._waiting: dict[int, Future[Any]] = {}
        self._lock = threading.Lock()
        self._first: Future[tuple[int, int]] = Future()
        self._supervisor = Supervisor("ray", self._prepare, lambda: self._first.done(), say=_say, ended=self._end)
        self._supervisor.start()
        self._orders = self._ordered(*self._await_units())

    @property
    def remotes(self) -> tuple[Remote, ...]:
        """One for each slot, without an address yet."""
        return tuple(Remote(f"ray{index}", "", slots=1) for index in range(len(self._orders)))

    def follow(self, hosts: Sequence[RemoteHost]) -> None:
        """Have Ray start the ComfyUIs of these hosts, and tell each its address."""
        self._hosts = list(hosts)
        for index, host in enumerate(self._hosts):
            host.values = RayValues(self, index)
        self._send(self._orders)

    def call(self, what: str, *args: Any) -> Future[Any]:
        """Have the driver do something.

        Raises:
            RemoteError: where it is not there.
        """
        number, answer = next(self._numbers), Future[Any]()
        with self._lock:
            self._waiting[number] = answer
        if not self._send(number, what, *args):
            with self._lock:
                self._waiting.pop(number, None)
            raise RemoteError("Ray is not connected")
        return answer

    def stop(self) -> None:
        """Let go of the cluster; Ray ends what was started there."""
        self._supervisor.stop()

    def _await_units(self) -> tuple[int, int]:
        try:
            return self._first.result(_ANSWERS_WITHIN_S)
        except TimeoutError:
            problem = f"the cluster did not answer within {_ANSWERS_WITHIN_S:g} s"
        except ConfigError as error:
            problem = str(error)
        self._supervisor.stop()
        raise ConfigError(f"COMFY_PARALLEL_RAY={self._where.address}: {problem}")

    def _ordered(self, gpus: int, units: int) -> list[tuple[bool, dict[str, Any]]]:
        count = self._where.slots or gpus + units
        if not count:
            self._supervisor.stop()
            raise ConfigError(
                f"COMFY_PARALLEL_RAY={self._where.address}: the cluster has no GPU besides this machine's; add"
                " machines to it, or say #slots=4 to wait for them; CPU slots are declared by `ray start --resources"
                " '{\"comfy_slot\": 2}'`"
            )
        with_gpu = count if not units else min(gpus, count)
        return [(index < with_gpu, self._order(index < with_gpu)) for index in range(count)]

    def _order(self, needs_gpu: bool) -> dict[str, Any]:
        env = {name: value for name, value in self._env.items() if name in PASSED_ON}
        env |= {SWITCH: "1", STATE: "off", "COMFY_PARALLEL_GPU_CONFIG": "off", SECRET: self._secret}
        env["COMFY_PARALLEL_DEVICES"] = "cuda:0" if needs_gpu else "cpu"
        arguments = [*self._arguments, *([] if needs_gpu else ["--cpu"])]
        return {"comfyui": self._comfyui, "arguments": arguments, "env": env, "secret": self._secret}

    # The driver.

    def _prepare(self) -> Command:
        link, fd = pair()
        argv = (sys.executable, "-c", _MAIN, str(_REPOSITORY))
        env = {name: value for name, value in self._env.items() if not name.startswith("COMFY_PARALLEL_")}
        self._link = link
        link.send(self._where.address, self._skips_own_node)
        self._reader = threading.Thread(target=self._read, args=(link,), daemon=True, name="ray-link")
        self._reader.start()
        return Command(argv=argv, env={**env, FD: str(fd)}, pass_fds=(fd,))

    def _read(self, link: Link) -> None:
        heard: dict[str, Callable[..., None]] = {
            "units": self._note_units,
            "failed": self._note_failure,
            "at": self._note_place,
        }
        heard |= {"gone": self._note_gone, "answer": self._note_answer}
        try:
            while (message := link.receive()) is not None:
                heard[message[0]](*message[1:])
        except (EOFError, OSError):
            return  # Its end is told by the supervisor.

    def _note_units(self, gpus: int, units: int) -> None:
        if self._first.done():  # It was started again.
            self._send(self._orders)
        else:
            self._first.set_result((gpus, units))

    def _note_failure(self, problem: str) -> None:
        if self._first.done():
            logger.error("comfy_parallel: Ray: %s", problem)
        else:
            self._first.set_exception(ConfigError(problem))

    def _note_place(self, index: int, url: str, machine: str) -> None:
        host = self._hosts[index]
        logger.info("comfy_parallel: %s runs on %s (%s)", host.remote.name, machine, url)
        host.move(Remote(host.remote.name, url, f"Bearer {self._secret}", slots=1))

    def _note_gone(self, index: int, reason: str) -> None:
        self._hosts[index].lose(f"Ray: {reason}")

    def _note_answer(self, number: int, is_done: bool, answer: Any) -> None:
        with self._lock:
            waiting = self._waiting.pop(number)
        if is_done:
            waiting.set_result(answer)
        else:
            waiting.set_exception(RemoteError(f"Ray: {answer}"))

    def _end(self, reason: str) -> None:
        """The driver has ended, and with it all that it had Ray start."""
        if self._reader is not None:
            self._reader.join(_READER_ENDS_S)
        with self._lock:
            link, self._link = self._link, None
            lost, self._waiting = self._waiting, {}
        if link is not None:
            link.close()
        for answer in lost.values():
            answer.set_exception(RemoteError(f"the process that speaks with Ray {reason}"))
        if not self._first.done():
            self._first.set_exception(ConfigError(f"the process that speaks with Ray {reason}"))
        for host in self._hosts:
            host.lose(f"the process that speaks with Ray {reason}")

    def _send(self, *message: Any) -> bool:
        link = self._link
        try:
            if link is not None:
                link.send(*message)
                return True
        except OSError:
            logger.info("comfy_parallel: the process that speaks with Ray has just ended")
        return False


class RayValues:
    """Values of one slot's ComfyUI on their way through Ray's object store."""

    def __init__(self, cluster: Cluster, index: int) -> None:
        self._cluster, self._index = cluster, index

    def fetch(self, path: str) -> Future[Any]:
        """The bytes that are there under this path."""
        return self._cluster.call("fetch", self._index, path)

    def bring(self, path: str, value: bytes) -> Future[Any]:
        """Put these bytes there."""
        return self._cluster.call("bring", self._index, path, value)


def _say(line: str) -> None:
    """What the driver says is for the log; what Ray adds about its own processes is long, and seldom of use."""
    logger.log(logging.INFO if line.startswith(SAYS) else logging.DEBUG, "[ray] %s", line.removeprefix(SAYS))


def arguments_of_workers(arguments: Sequence[str], has_database: bool) -> list[str]:
    """This server's arguments without those that are its own or its machine's."""
    kept: list[str] = []
    skips = False
    for argument in for_workers(arguments):
        name, equals, _ = argument.partition("=")
        if skips:
            skips = False
        elif name in _FOLDERS or name == "--database-url":
            skips = not equals
        elif name not in ("--cpu", "--enable-assets"):
            kept.append(argument)
    return [*kept, *(["--database-url", "sqlite:///:memory:"] if has_database else [])]
