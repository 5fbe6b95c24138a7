"""A remote slot, and the ComfyUI that it speaks to."""

from __future__ import annotations

import json
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from comfy_parallel.core.remotes import parse
from comfy_parallel.errors import JobLost
from comfy_parallel.fleet.remote import host as host_module
from comfy_parallel.fleet.remote import job as job_module
from comfy_parallel.fleet.remote.hosts import Hosts
from comfy_parallel.slots import items
from comfy_parallel.slots.slot import Run, Slot, entered
from tests.unit.fleet.remote.comfy import Comfy

LIMIT_S = 60.0
PROMPT = {"1": {"class_type": "Out", "inputs": {"name": "a", "file": "in.png", "text": "in.png"}}}


class Server:
    """The host's, as far as it is told something."""

    def __init__(self) -> None:
        self.client_id: Any = None
        self.last_node_id: Any = None
        self.sockets_metadata: dict[Any, Any] = {}
        self.sent: list[tuple[Any, Any, Any]] = []

    def send_sync(self, event: Any, data: Any, sid: Any = None) -> None:
        self.sent.append((event, data, sid))


class Executor:
    """The host's, as far as its results are read."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.success: bool | None = None
        self.status_messages: list[Any] = []
        self.history_result: Any = None

    def add_message(self, event: str, data: Any, broadcast: bool) -> None:
        self.status_messages.append((event, data))


class Running:
    """A job on a thread of its slot."""

    def __init__(self, slot: Slot, prompt: Any, extra_data: Any = None, features: Any = None) -> None:
        self.server = Server()
        self.executor = Executor(self.server)
        self.error: BaseException | None = None
        if features:
            self.server.sockets_metadata["me"] = {"feature_flags": features}
        self._slot, self._arguments = slot, (prompt, "here", {"client_id": "me", **(extra_data or {})}, ["1"])
        slot.run = self.run = Run("here", "me")
        self._thread = threading.Thread(target=self._execute, daemon=True)
        self._thread.start()

    def _execute(self) -> None:
        with entered(self._slot):
            try:
                assert self._slot.process is not None
                self._slot.process.execute(self.executor, *self._arguments)
            except Exception as error:  # noqa: BLE001 - `wait` raises it
                self.error = error

    def wait(self) -> Executor:
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive(), "the job does not end"
        if self.error is not None:
            raise self.error
        return self.executor


@pytest.fixture(autouse=True)
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The host's folders and modules."""
    folders = SimpleNamespace(
        get_directory_by_type=lambda kind: str(tmp_path / kind),
        get_save_image_path=lambda prefix, base: (base, prefix, 7, "", prefix),
    )
    monkeypatch.setitem(sys.modules, "folder_paths", folders)
    monkeypatch.setitem(sys.modules, "nodes", SimpleNamespace(NODE_CLASS_MAPPINGS={}))
    monkeypatch.setitem(sys.modules, "execution", SimpleNamespace())
    monkeypatch.setattr(job_module, "REFUSED_S", 0.5)
    monkeypatch.setattr(host_module, "_LONGEST_PAUSE_S", 0.2)
    (tmp_path / "input").mkdir()
    (tmp_path / "output").mkdir()
    return tmp_path


@pytest.fixture
def comfy() -> Iterator[Comfy]:
    made = Comfy(token="s3cret")
    yield made
    made.close()


@pytest.fixture
def slot(comfy: Comfy) -> Iterator[Slot]:
    """A slot on it, once that can be used."""
    hosts = Hosts(parse(comfy.url, "s3cret"))
    made = Slot(0, "cpu", "remote0")
    front = SimpleNamespace(mutex=threading.RLock(), _dispatcher=SimpleNamespace(dispatch=lambda: None))
    hosts.serve(front, [made], requeues=True, sends_keys=False)
    hosts.start()
    assert made.process is not None
    made.process.await_ready()
    yield made
    hosts.stop()


def eventually(holds: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def started(comfy: Comfy, slot: Slot, prompt: Any = PROMPT, **options: Any) -> Running:
    """A job that runs there."""
    running = Running(slot, prompt, **options)
    eventually(lambda: comfy.running or running.error, "the job was not sent")
    assert running.error is None
    return running


def test_what_is_told_there_is_told_here(comfy: Comfy, slot: Slot, host: Path) -> None:
    assert comfy.token is not None
    running = started(comfy, slot, extra_data={"extra_pnginfo": {"a": 1}, "priority": 3, "api_key_comfy_org": "key"})
    there = comfy.jobs[0]["prompt_id"]
    comfy.tell("execution_start", timestamp=1, gpu_id=9)
    comfy.tell("executing", node="1", display_node="shown")
    comfy.tell("progress_state", nodes={"1": {"prompt_id": there}})
    comfy.show(1, struct.pack(">I", 2) + b"png")
    comfy.show(3, b"text")
    metadata = json.dumps({"node_id": "1", "prompt_id": there, "image_type": "image/jpeg"}).encode()
    comfy.show(4, struct.pack(">I", len(metadata)) + metadata + b"jpeg")
    comfy.tell("status", status={})
    outputs = {"images": [{"filename": "x_00001_.png", "subfolder": "", "type": "output"}]}
    comfy.tell("executed", node="1", output=outputs)
    comfy.tell("execution_success", timestamp=2)
    comfy.end({"1": outputs})
    executor = running.wait()
    told = {"images": [{"filename": "x_00007_.png", "subfolder": "", "type": "output"}]}
    assert executor.success is True
    assert executor.history_result == {"outputs": {"1": told}, "meta": {}}
    assert executor.status_messages == [
        ("execution_start", {"prompt_id": "here"}),
        ("execution_success", {"prompt_id": "here"}),
    ]
    assert (host / "output" / "x_00007_.png").read_bytes() == b"picture"
    kinds = [event for event, _, _ in running.server.sent]
    assert kinds == ["executing", "progress_state", 2, 3, 4, "executed"]
    assert {sid for _, _, sid in running.server.sent} == {"me"}
    assert running.server.sent[1][1]["nodes"] == {"1": {"prompt_id": "here"}}
    (form, picture, most), more = running.server.sent[4][1]
    assert (form, most, more["prompt_id"]) == ("JPEG", None, "here")
    written = SimpleNamespace(write=lambda data: written.__dict__.update(data=data))
    picture.save(written, format="JPEG", quality=95)
    assert written.data == b"jpeg"
    assert running.server.sent[5][1] == {"prompt_id": "here", "node": "1", "output": told}
    assert running.server.last_node_id is None
    sent = comfy.jobs[0]
    assert sent["extra_data"] == {"extra_pnginfo": {"a": 1}, "comfy_parallel_forwarded": True}
    assert sent["partial_execution_targets"] == ["1"]
    assert sent["prompt"] == PROMPT
    assert there != "here"
    assert comfy.history == {}


def test_what_the_client_can_take_is_said_before_the_job_is_sent(comfy: Comfy, slot: Slot) -> None:
    for comfy.says_features in (True, False):
        running = started(comfy, slot, features={"supports_preview_metadata": True})
        assert comfy.jobs[-1]["knew_features"] is comfy.says_features
        comfy.end()
        assert running.wait().success is True


def test_a_broken_connection_costs_nothing_while_the_job_is_known(comfy: Comfy, slot: Slot) -> None:
    running = started(comfy, slot)
    comfy.tell("execution_start")
    comfy.cut()
    comfy.end({"1": {"text": ["late"]}}, [["execution_start", {}], ["execution_success", {"x": 1}]], quietly=True)
    executor = running.wait()
    assert executor.history_result["outputs"] == {"1": {"text": ["late"]}}
    assert [event for event, _ in executor.status_messages] == ["execution_start", "execution_success"]


def test_an_end_of_which_the_word_was_lost_is_found(comfy: Comfy, slot: Slot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_module, "_SILENT_S", 0.1)
    running = started(comfy, slot)
    comfy.end({"1": {"text": ["silent"]}}, [["execution_start", {}], ["execution_success", {}]], quietly=True)
    assert running.wait().history_result["outputs"] == {"1": {"text": ["silent"]}}


def test_a_host_that_was_started_again_has_lost_its_job(comfy: Comfy, slot: Slot) -> None:
    running = started(comfy, slot)
    comfy.running.clear()
    comfy.cut()
    with pytest.raises(JobLost, match="does not know the job") as lost:
        running.wait()
    assert (lost.value.has_begun, lost.value.may_run_again) == (True, True)


def test_a_host_that_is_gone_gives_its_job_back_and_is_used_again_when_it_returns(comfy: Comfy, slot: Slot) -> None:
    running = started(comfy, slot)
    assert slot.process is not None
    assert slot.process.report["device_name"] == "card"
    comfy.close()
    with pytest.raises(JobLost, match="cannot be reached"):
        running.wait()
    assert (slot.process.state, slot.process.report) == ("unreachable", {})
    back = Comfy(comfy.port, comfy.token)
    back.running = list(comfy.running)  # It was not started again, but out of reach.
    slot.process.await_ready()
    assert (slot.process.state, slot.process.restarts) == ("ready", 1)
    eventually(lambda: back.interrupted == comfy.running, "the lost job was not ended there")
    back.close()


def test_interrupts_reach_it_and_nobody_else(comfy: Comfy, slot: Slot) -> None:
    running = started(comfy, slot)
    running.run.interrupted = True
    eventually(lambda: comfy.interrupted == [comfy.jobs[0]["prompt_id"]], "it was not interrupted")
    comfy.tell("execution_interrupted", node_id="1")
    comfy.end()
    assert [event for event, _ in running.wait().status_messages] == ["execution_interrupted"]
    comfy.running, comfy.interrupted = ["anothers"], []
    waits = Running(slot, PROMPT)
    eventually(lambda: comfy.pending, "the job was not sent")
    waits.run.interrupted = True
    assert [event for event, _ in waits.wait().status_messages] == ["execution_interrupted"]
    assert (comfy.pending, comfy.interrupted, comfy.running) == ([], [], ["anothers"])


def test_a_job_that_it_refuses_goes_elsewhere_and_says_why(comfy: Comfy, slot: Slot) -> None:
    errors = {"1": {"errors": [{"message": "Value not in list", "details": "name: 'a'"}]}}
    comfy.refusal = 400, {"error": {"message": "Prompt outputs failed validation"}, "node_errors": errors}
    item = items.QueueItem((0, "here", PROMPT, {}, ["1"]))
    assert item.barred == {}
    with pytest.raises(JobLost) as lost:
        Running(slot, PROMPT).wait()
    assert not lost.value.has_begun
    assert "node 1: Value not in list: name: 'a'" in item.barred[0]
    comfy.refusal = None
    comfy.node_errors = errors
    with pytest.raises(JobLost, match="part of the job"):
        Running(slot, PROMPT).wait()
    eventually(lambda: comfy.interrupted == [comfy.jobs[0]["prompt_id"]], "the rest of it runs on")


def test_a_host_that_takes_no_jobs_for_now_is_left_alone_for_a_while(comfy: Comfy, slot: Slot) -> None:
    comfy.refusal = 503, {"error": {"message": "draining"}}
    with pytest.raises(JobLost, match="503") as lost:
        Running(slot, PROMPT).wait()
    assert not lost.value.has_begun
    assert slot.process is not None
    assert slot.process.state == "unreachable"
    slot.process.await_ready()


def test_a_stalled_job_is_given_up(comfy: Comfy, slot: Slot) -> None:
    running = started(comfy, slot)
    assert slot.process is not None
    slot.process.kill("no sign of life")
    with pytest.raises(JobLost, match="no sign of life"):
        running.wait()
    eventually(lambda: comfy.interrupted == comfy.running, "it runs on")


def test_jobs_are_judged_by_what_it_has(comfy: Comfy, slot: Slot) -> None:
    def why_not(prompt: Any, extra_data: Any = None) -> str | None:
        return items.QueueItem((0, "one", prompt, extra_data or {}, [])).barred.get(0)

    assert why_not(PROMPT) is None
    lacking = {"1": {"class_type": "Out", "inputs": {"name": "x.ckpt"}}}
    assert why_not(lacking) == "cannot run on remote0: no model x.ckpt"
    assert why_not({"1": {"class_type": "In"}}) == "cannot run on remote0: no node class In"
    assert why_not(PROMPT, {"comfy_parallel_forwarded": True}) == "cannot run on remote0: it came from another server"


def test_inputs_are_sent_once_and_renamed_only_where_that_is_safe(comfy: Comfy, slot: Slot, host: Path) -> None:
    (host / "input" / "sub").mkdir()
    (host / "input" / "sub" / "ä b.png").write_bytes(b"mine")
    (host / "input" / "taken").write_bytes(b"mine")
    comfy.files["input", "", "taken"] = b"theirs"
    inputs = {"name": "taken [input]", "file": "sub/ä b.png", "many": ["sub/ä b.png", ["2", 0]], "link": ["taken", 0]}
    running = started(comfy, slot, {"1": {"class_type": "Out", "inputs": inputs}})
    comfy.end()
    running.wait()
    assert comfy.files["input", "sub", "ä b.png"] == b"mine"
    assert (comfy.files["input", "", "taken"], comfy.files["input", "", "other taken"]) == (b"theirs", b"mine")
    assert comfy.jobs[0]["prompt"]["1"]["inputs"] == {**inputs, "name": "other taken [input]"}
    with pytest.raises(JobLost, match="another file 'taken' is there"):
        Running(slot, {"1": {"class_type": "Out", "inputs": {"text": "taken"}}}).wait()


def test_memory_is_freed_there(comfy: Comfy, slot: Slot) -> None:
    assert slot.process is not None
    slot.process.set_flags({"unload_models": True})
    assert comfy.freed == [{"unload_models": True}]


def test_a_token_that_it_does_not_take_is_told_and_not_shown(comfy: Comfy, caplog: pytest.LogCaptureFixture) -> None:
    comfy.token = "another"
    hosts = Hosts(parse(comfy.url, "s3cret"))
    assert "answered 401; set COMFY_PARALLEL_REMOTE_TOKEN" in caplog.text
    assert "s3cret" not in caplog.text
    assert [place for _, _, place in hosts.places] == ["remote0"]
    hosts.stop()


def test_each_slot_of_one_with_this_package_is_a_slot(comfy: Comfy) -> None:
    queues = [{"gpu_id": 0, "kind": "thread"}, {"gpu_id": 1, "kind": "remote"}, {"gpu_id": 2, "kind": "process"}]
    comfy.all_queues = {"queues": [{**one, "device_name": "card", "vram": {"free_bytes": 1}} for one in queues]}
    hosts = Hosts(parse(comfy.url, "s3cret"))
    assert [place for _, _, place in hosts.places] == ["remote0:0", "remote0:1"]
    made = [Slot(0, "cpu", "remote0:0"), Slot(1, "cpu", "remote0:1")]
    hosts.serve(SimpleNamespace(), made, requeues=True, sends_keys=False)
    hosts.start()
    assert made[1].process is not None
    made[1].process.await_ready()
    assert made[1].process.report["memory"] == {"free_bytes": 1}
    running = started(comfy, made[1])
    assert comfy.jobs[0]["headers"]["X-TARGET-GPU"] == "2"
    comfy.end()
    running.wait()
    hosts.stop()
