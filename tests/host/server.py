"""Starts a real ComfyUI process for tests, and talks to it."""

from __future__ import annotations

import json as jsonlib
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from email.message import Message
from pathlib import Path
from typing import IO, Any

import websocket

from tests.costs import started
from tests.host.memory import used_bytes
from tests.ports import free_port

JSON = dict[str, Any]

REPO_DIR = Path(__file__).resolve().parents[2]
NODES_DIR = Path(__file__).resolve().parent / "nodes"
START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 60.0
REQUEST_TIMEOUT_S = 60.0
POLL_S = 0.05
LOG_TAIL_CHARS = 6000
MEETINGS = "COMFYUI_TEST_MEETINGS"  # where nodes/meetings.py keeps files, for jobs of several processes
TRUST_TEST_NODES = f"auto,comfy_parallel_test_{NODES_DIR.name}=trust"  # Their jobs meet in process-wide state.


def without_front_end(directory: Path) -> list[str]:
    """Arguments for a host that has no front end installed. Makes `directory` and an empty page in it."""
    directory.mkdir(exist_ok=True)
    (directory / "index.html").write_text("<html></html>")
    return ["--front-end-root", str(directory)]


def of_kind_under_test(slots: str) -> str:
    """Slots as asked for; those of no named kind run in processes where `COMFY_PARALLEL_TEST_SLOTS=process`."""
    if os.environ.get("COMFY_PARALLEL_TEST_SLOTS") != "process":
        return slots
    return ",".join(f"{name}=process" if name == "cpu" else name for name in slots.split(","))


class HostServerError(RuntimeError):
    """The host did not start, died, refused a job or did not finish it in time."""


def clean_environment() -> dict[str, str]:
    """This process's environment without anything that configures comfy_parallel."""
    ours = ("COMFY_MULTI_GPU_SCHED", "COMFY_NUM_GPUS", "COMFY_PARALLEL_")
    return {key: value for key, value in os.environ.items() if not key.startswith(ours)}


class HostServer:
    """One ComfyUI, by default on the CPU, with its own base directory.

    Args:
        host_dir: an unmodified ComfyUI checkout.
        base_dir: holds models/, custom_nodes/, input/, output/, temp/, user/ and comfyui.log.
        slots: COMFY_PARALLEL_DEVICES, or None for a host with the scheduler off.
        env: more environment variables; they win over the defaults, and None takes one away.
        args: more command line arguments for main.py.
        link: install this repository and the test nodes as custom nodes.
        packs: folders of more custom nodes.
        is_cpu: start it with --cpu.
        may_be_stock: accept a host whose scheduler stayed off although slots were asked for.
    """

    def __init__(
        self,
        host_dir: Path,
        base_dir: Path,
        *,
        slots: str | None = "cpu,cpu",
        env: Mapping[str, str | None] | None = None,
        args: Sequence[str] = (),
        link: bool = True,
        packs: Iterable[Path] = (),
        is_cpu: bool = True,
        may_be_stock: bool = False,
    ) -> None:
        self.host_dir = host_dir.resolve()
        self.base_dir = base_dir.resolve()
        self.slots = None if slots is None else of_kind_under_test(slots)
        self.env = dict(env or {})
        self.args = [*(["--cpu"] if is_cpu else []), *args]
        self.may_be_stock = may_be_stock
        self.port = free_port()
        self.log_path = self.base_dir / "comfyui.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._websockets: list[WebSocketClient] = []
        self._make_base_dir(link, packs)

    @property
    def kinds(self) -> list[str]:
        """`thread` or `process` for each slot."""
        return [name.partition("=")[2] or "thread" for name in (self.slots or "").split(",")]

    def slot_there(self, slot: int) -> int:
        """The number of a slot as its jobs see it: a process of its own has but one."""
        return 0 if self.kinds[slot] == "process" else slot

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return self._running_process().pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pss_bytes(self) -> int:
        """Proportional set size of the host's process, which changes with what others map of the same files."""
        return self._memory("Pss")

    @property
    def used_bytes(self) -> int:
        """Memory that the host's process needs, whatever runs beside it."""
        return used_bytes(self.pid)

    @property
    def rss_bytes(self) -> int:
        """Resident set size of the host's process."""
        return self._memory("Rss")

    def __enter__(self) -> HostServer:
        self.start()
        return self

    def __exit__(self, *_exc_info: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the host and return when it answers."""
        if self._process is not None:
            raise HostServerError(f"the host in {self.base_dir} is already started; stop() it first")
        began = time.monotonic()
        with self.log_path.open("ab") as log:
            self._process = self._spawn(log)
        try:
            self._await_answer()
            self._check_slots()
            if "process" in self.kinds and not self.may_be_stock:
                self._await_processes()
            started.append(time.monotonic() - began)
        except BaseException:
            self.stop()
            raise

    def stop(self, *, signal_number: int = signal.SIGTERM) -> int | None:
        """Stop the host; its exit status, or None when it was not started."""
        for client in self._websockets:
            client.close()
        self._websockets.clear()
        process, self._process = self._process, None
        if process is None:
            return None
        process.send_signal(signal_number)
        try:
            return process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait(STOP_TIMEOUT_S)

    def request(
        self,
        method: str,
        path: str,
        json: Any = None,
        data: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> tuple[int, Any]:
        """Status and body: JSON parsed, other text as str, anything else as bytes."""
        sent = dict(headers or {})
        if json is not None:
            data = jsonlib.dumps(json).encode()
            sent.setdefault("Content-Type", "application/json")
        call = urllib.request.Request(self.url + path, data=data, headers=sent, method=method)
        try:
            with urllib.request.urlopen(call, timeout=timeout_s) as reply:
                return reply.status, parse_body(reply.headers, reply.read())
        except urllib.error.HTTPError as refusal:
            with refusal:
                return refusal.code, parse_body(refusal.headers, refusal.read())

    def submit(
        self,
        workflow: JSON,
        slot: int | str | None = None,
        client_id: str | None = None,
        **body: Any,
    ) -> JSON:
        """Queue a job; the host's reply, which holds its `prompt_id`."""
        if client_id is not None:
            body["client_id"] = client_id
        headers = {} if slot is None else {"X-TARGET-GPU": str(slot)}
        status, reply = self.request("POST", "/prompt", {"prompt": workflow, **body}, headers=headers)
        if status != 200:
            raise HostServerError(f"POST /prompt answered {status}: {reply}")
        accepted: JSON = reply
        return accepted

    def wait(self, ids: Iterable[str], timeout_s: float = 120) -> dict[str, JSON]:
        """Each job's history entry, once all of them are there."""
        waiting = list(ids)
        entries: dict[str, JSON] = {}
        deadline = time.monotonic() + timeout_s
        while waiting:
            job_id = waiting[0]
            entry = self.request("GET", f"/history/{job_id}")[1].get(job_id)
            if entry is not None:
                entries[waiting.pop(0)] = entry
            elif time.monotonic() > deadline:
                raise HostServerError(self._with_log(f"jobs not finished after {timeout_s} s: {waiting}"))
            else:
                self._pause()
        return entries

    def run(self, workflow: JSON, slot: int | str | None = None, timeout_s: float = 120) -> JSON:
        """Submit one job and return its history entry."""
        job_id = self.submit(workflow, slot)["prompt_id"]
        return self.wait([job_id], timeout_s)[job_id]

    def websocket(self, client_id: str | None = None, **features: bool) -> WebSocketClient:
        """A connected WebSocket client, which stop() closes."""
        client = WebSocketClient(self, client_id, **features)
        self._websockets.append(client)
        return client

    def output_files(self) -> list[Path]:
        return sorted(path for path in (self.base_dir / "output").rglob("*") if path.is_file())

    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def _make_base_dir(self, link: bool, packs: Iterable[Path]) -> None:
        for name in ("models", "custom_nodes", "input", "output", "temp", "user"):
            (self.base_dir / name).mkdir(parents=True, exist_ok=True)
        links = {"comfy_parallel": REPO_DIR, "comfy_parallel_test_nodes": NODES_DIR} if link else {}
        links |= {pack.name: pack for pack in packs}
        for name, target in links.items():
            path = self.base_dir / "custom_nodes" / name
            if path.is_symlink() and path.readlink() != target:  # made from another copy of this repository
                path.unlink()
            if not path.is_symlink():
                path.symlink_to(target, target_is_directory=True)

    def _command(self) -> list[str]:
        options = ["--base-directory", str(self.base_dir), "--port", str(self.port)]
        options += ["--disable-api-nodes", "--database-url", "sqlite:///:memory:"]
        return [sys.executable, "main.py", *options, *self.args]

    def _environment(self) -> dict[str, str]:
        environment = clean_environment()
        environment.setdefault("OMP_NUM_THREADS", "1")
        if self.slots is not None:
            environment["COMFY_MULTI_GPU_SCHED"] = "1"
            environment["COMFY_PARALLEL_DEVICES"] = self.slots  # "" leaves the choice to the scheduler
            environment["COMFY_PARALLEL_PACKS"] = TRUST_TEST_NODES
        if "process" in self.kinds:
            environment[MEETINGS] = str(self.base_dir / "meetings")
        environment.update({name: value for name, value in self.env.items() if value is not None})
        return {name: value for name, value in environment.items() if self.env.get(name, value) is not None}

    def _memory(self, kind: str) -> int:
        lines = Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{kind}:"))

    def _spawn(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self._command(),
            cwd=self.host_dir,
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )

    def _await_answer(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if time.monotonic() > deadline:
                raise HostServerError(self._with_log(f"the host did not answer in {START_TIMEOUT_S} s"))
            self._pause()

    def _check_slots(self) -> None:
        """ComfyUI goes on without a custom node that fails, and stock ComfyUI would pass many tests."""
        if self.slots is None or self.may_be_stock:
            return
        if self.request("GET", "/queue/all")[0] != 200:
            raise HostServerError(self._with_log("the host runs without the scheduler"))

    def _await_processes(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while any(one["worker"] and one["worker"]["state"] != "ready" for one in self._shown_slots()):
            if time.monotonic() > deadline:
                raise HostServerError(self._with_log(f"its processes are not ready after {START_TIMEOUT_S} s"))
            self._pause()

    def _shown_slots(self) -> list[JSON]:
        shown: list[JSON] = self.request("GET", "/queue/all")[1]["queues"]
        return shown

    def _answers(self) -> bool:
        """Whether this very host does: another one may have taken the port before it was bound."""
        try:
            status, reply = self.request("GET", "/system_stats")
        except OSError:  # nothing listens yet
            return False
        return status == 200 and str(self.base_dir) in reply["system"]["argv"]

    def _running_process(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise HostServerError(f"the host in {self.base_dir} is not started")
        return self._process

    def _pause(self) -> None:
        """Wait a moment; raise at once if the host ends meanwhile."""
        try:
            status = self._running_process().wait(POLL_S)
        except subprocess.TimeoutExpired:
            return
        raise HostServerError(self._with_log(f"the host ended with status {status}"))

    def _with_log(self, message: str) -> str:
        return f"{message}\n--- end of {self.log_path}:\n{self.log()[-LOG_TAIL_CHARS:]}"


def parse_body(headers: Message, body: bytes) -> Any:
    kind = headers.get_content_type()
    if kind == "application/json":
        return jsonlib.loads(body)
    if kind.startswith("text/") or not body:
        return body.decode()
    return body


class WebSocketClient:
    """Collects one client's events and binary frames in its own thread.

    Args:
        server: a started host.
        client_id: the id to submit jobs with; a new one by default.
        features: what this client tells the host it supports, e.g. `supports_preview_metadata=True`.
    """

    def __init__(self, server: HostServer, client_id: str | None = None, **features: bool) -> None:
        self.client_id = client_id or uuid.uuid4().hex
        self._changed = threading.Condition()
        self._messages: list[JSON | bytes] = []
        self._is_closed = False
        self._socket = websocket.WebSocket()
        self._socket.connect(f"ws://127.0.0.1:{server.port}/ws?clientId={self.client_id}")  # type: ignore[no-untyped-call]
        if features:
            self._socket.send(jsonlib.dumps({"type": "feature_flags", "data": features}))
        self._thread = threading.Thread(target=self._collect, name="websocket-client", daemon=True)
        self._thread.start()

    def __enter__(self) -> WebSocketClient:
        return self

    def __exit__(self, *_exc_info: object) -> None:
        self.close()

    @property
    def is_closed(self) -> bool:
        with self._changed:
            return self._is_closed

    @property
    def messages(self) -> list[JSON | bytes]:
        """Events and frames in the order they came."""
        with self._changed:
            return list(self._messages)

    @property
    def events(self) -> list[JSON]:
        """The JSON messages: `{"type": …, "data": {…}}`."""
        return [message for message in self.messages if isinstance(message, dict)]

    @property
    def frames(self) -> list[bytes]:
        """The binary messages, previews with their header."""
        return [message for message in self.messages if isinstance(message, bytes)]

    def wait_for(self, predicate: Callable[[JSON], bool], timeout_s: float = 120) -> JSON:
        """The first event, past or future, for which the predicate is true."""
        found: list[JSON] = []

        def arrived() -> bool:
            found[:] = [m for m in self._messages if isinstance(m, dict) and predicate(m)][:1]
            return bool(found) or self._is_closed

        with self._changed:
            self._changed.wait_for(arrived, timeout_s)
            kinds = [m["type"] for m in self._messages if isinstance(m, dict)]
        if not found:
            raise HostServerError(f"no such event within {timeout_s} s; received: {kinds}")
        return found[0]

    def wait_for_end(self, job_id: str, timeout_s: float = 120) -> JSON:
        """The event that ends a job: success, error or interruption."""
        ends = ("execution_success", "execution_error", "execution_interrupted")
        return self.wait_for(lambda event: event["type"] in ends and event["data"]["prompt_id"] == job_id, timeout_s)

    def of_type(self, *kinds: str) -> list[JSON]:
        return [event for event in self.events if event["type"] in kinds]

    def close(self) -> None:
        if self._socket.sock is not None:
            # A plain close() does not wake the thread blocked in recv().
            self._socket.abort()  # type: ignore[no-untyped-call]
        self._thread.join(STOP_TIMEOUT_S)
        self._socket.close()

    def _collect(self) -> None:
        try:
            while True:
                self._keep(self._socket.recv())
        except (OSError, websocket.WebSocketException):
            self._finish()

    def _keep(self, message: str | bytes) -> None:
        if message == "":  # what recv() returns for the host's close frame
            raise websocket.WebSocketConnectionClosedException("closed by the host")
        with self._changed:
            self._messages.append(jsonlib.loads(message) if isinstance(message, str) else message)
            self._changed.notify_all()

    def _finish(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
