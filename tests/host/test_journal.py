"""The queue outlives the server: a kill at any moment loses no job, and a job that kills the server ends."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.host.conftest import MakeServer
from tests.host.jobs import await_idle, message, outcome, queue_ids, quick, shown
from tests.host.pool import ServerPool
from tests.host.server import JSON, POLL_S, HostServer, HostServerError
from tests.host.workflows import Workflow, node

pytestmark = pytest.mark.host

STATE = "user/__comfy_parallel/queue.sqlite3"
WAIT_S = 60.0


def noting(path: Path, text: str, seconds: float = 0.0, *, ends_server: bool = False) -> Workflow:
    """Notes each of its runs in a file, and shows the text."""
    note = node("CPTNote", path=str(path), text=text, seconds=seconds, ends_server=ends_server)
    return {"note": note, "out": node("CPTOut", value=["note", 0])}


def notes(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


def await_count(path: Path, text: str, count: int = 1) -> None:
    deadline = time.monotonic() + WAIT_S
    while notes(path).count(text) < count:
        assert time.monotonic() < deadline, f"{text} did not run {count} times: {notes(path)}"
        time.sleep(POLL_S)


def kill(server: HostServer) -> None:
    assert server.stop(signal_number=signal.SIGKILL) == -signal.SIGKILL


def await_death(server: HostServer) -> None:
    deadline = time.monotonic() + WAIT_S
    while server.is_running and time.monotonic() < deadline:
        time.sleep(POLL_S)
    assert server.stop() == 99


def number_of(item: Any) -> float:
    number: float = item[0]
    return number


def items(server: HostServer) -> dict[str, Any]:
    """What waits, in its order, by id."""
    return {item[1]: item for item in sorted(server.request("GET", "/queue")[1]["queue_pending"], key=number_of)}


def history(server: HostServer) -> dict[str, JSON]:
    entries: dict[str, JSON] = server.request("GET", "/history")[1]
    return entries


def test_a_kill_loses_nothing_and_repeated_requests_are_known_after_it(make_server: MakeServer, tmp_path: Path) -> None:
    server, file = make_server(slots="cpu,cpu"), tmp_path / "notes"
    done = [server.submit(quick(number), number % 2)["prompt_id"] for number in range(3)]
    failed = server.submit({"fail": node("CPTFail", message="as told"), "out": node("CPTOut", value=["fail", 0])})[
        "prompt_id"
    ]
    server.wait([*done, failed])
    before = history(server)
    running = [server.submit(noting(file, f"runs{slot}", 600), slot)["prompt_id"] for slot in (0, 1)]
    await_count(file, "runs0")
    await_count(file, "runs1")
    first = {"prompt": noting(file, "wait"), "client_id": "somebody", "number": 7.5}
    replies = [server.request("POST", "/prompt", first, headers={"Idempotency-Key": "k-1", "X-TARGET-GPU": "1"})[1]]
    replies += [server.submit(noting(file, f"wait{number}"), number % 2) for number in range(4)]
    replies.append(server.submit(noting(file, "wait4"), front=True))
    waiting = [reply["prompt_id"] for reply in replies]
    deleted = server.submit(noting(file, "deleted"), 0)["prompt_id"]
    assert server.request("POST", "/queue", {"delete": [deleted]})[0] == 200
    pending = items(server)
    kill(server)

    server.start()
    await_count(file, "runs0", 2)  # and "wait4", which is in front of all
    running_now, waiting_now = queue_ids(server)
    assert (running_now, set(waiting_now)) == ([running[0]], {running[1], *waiting[:-1]})
    now = items(server)
    del now[running[1]], pending[waiting[-1]]
    assert list(now.items()) == list(pending.items())
    assert {prompt_id: entry for prompt_id, entry in history(server).items() if prompt_id != waiting[-1]} == before
    assert server.request("POST", "/prompt", first, headers={"Idempotency-Key": "k-1", "X-TARGET-GPU": "1"})[1] == {
        **replies[0],
        "repeated": True,
    }
    fresh = server.submit(noting(file, "fresh"))
    assert fresh["number"] > max(reply["number"] for reply in replies[1:])
    for slot, prompt_id in enumerate(running):  # One after the other, for one of them may have been to blame.
        await_count(file, f"runs{slot}", 2)
        assert queue_ids(server)[0] == [prompt_id]
        server.request("POST", "/interrupt", {"prompt_id": prompt_id})
    entries = server.wait([*running, *waiting, fresh["prompt_id"]])
    assert [entries[prompt_id]["attempts"] for prompt_id in running] == [2, 2]
    assert [entries[prompt_id].get("attempts") for prompt_id in waiting] == [None] * len(waiting)
    assert [outcome(entries[prompt_id]) for prompt_id in waiting] == ["success"] * len(waiting)
    assert entries[waiting[0]]["gpu_id"] == 1
    assert entries[waiting[0]]["prompt"][3]["client_id"] == "somebody"
    counts = {text: notes(file).count(text) for text in notes(file)}
    assert counts == {"runs0": 2, "runs1": 2, "fresh": 1, "wait": 1, **{f"wait{number}": 1 for number in range(5)}}
    assert server.request("POST", "/prompt", first, headers={"Idempotency-Key": "k-1"})[1]["prompt_id"] == waiting[0]
    assert notes(file).count("wait") == 1


def test_a_job_that_ends_the_server_ends_itself_and_spares_the_others(make_server: MakeServer, tmp_path: Path) -> None:
    server, file = make_server(slots="cpu,cpu"), tmp_path / "notes"
    innocent = server.submit(noting(file, "innocent", 1), 0)["prompt_id"]
    await_count(file, "innocent")
    waits = server.submit(quick(5), 0)["prompt_id"]
    killer = str(uuid.uuid4())
    with suppress(OSError):  # It may be quicker than the answer.
        server.submit(noting(file, "kills", ends_server=True), 1, prompt_id=killer)
    await_death(server)
    try:
        server.start()
        await_death(server)
    except (HostServerError, OSError):  # It ended before it was seen to answer.
        assert notes(file).count("kills") == 2
    server.start()
    entries = server.wait([innocent, killer, waits])
    assert [outcome(entries[one]) for one in (innocent, killer, waits)] == ["success", "error", "success"]
    told = message(entries[killer], "execution_error")["exception_message"]
    assert "ended 2 times while it ran this job" in told
    assert "COMFY_PARALLEL_ATTEMPTS=2" in told
    assert (notes(file).count("kills"), notes(file).count("innocent")) == (2, 2)
    await_idle(server)


def test_one_key_or_id_is_one_job_also_for_requests_at_once(shared_server: ServerPool, tmp_path: Path) -> None:
    server, file = shared_server(slots="cpu,cpu"), tmp_path / "notes"

    def post(body: JSON, key: str | None) -> tuple[int, JSON]:
        headers = {} if key is None else {"Idempotency-Key": key}
        status, reply = server.request("POST", "/prompt", body, headers=headers)
        return status, reply

    same_id, new_key = str(uuid.uuid4()), uuid.uuid4().hex
    with ThreadPoolExecutor(8) as pool:
        by_key = list(pool.map(lambda _: post({"prompt": noting(file, "by-key", 0.2)}, new_key), range(8)))
        by_id = list(pool.map(lambda _: post({"prompt": noting(file, "by-id"), "prompt_id": same_id}, None), range(8)))
    for replies in (by_key, by_id):
        assert {status for status, _ in replies} == {200}
        assert len({(reply["prompt_id"], reply["number"]) for _, reply in replies}) == 1
        assert sum("repeated" not in reply for _, reply in replies) == 1
    server.wait([by_key[0][1]["prompt_id"], same_id])
    assert sorted(notes(file)) == ["by-id", "by-key"]
    status, reply = post({"prompt": noting(file, "other")}, new_key)
    assert (status, reply["error"]["type"]) == (422, "idempotency_key_reused")
    for bad in ("", "two words", "x" * 256):
        assert post({"prompt": quick(1)}, bad)[1]["error"]["type"] == "invalid_idempotency_key"
    assert shown(server.run(quick(7))) == 7
    assert sorted(notes(file)) == ["by-id", "by-key"]


def test_secrets_are_not_on_disk_and_only_who_needs_them_ends_as_an_error(make_server: MakeServer) -> None:
    server = make_server(slots="cpu")
    busy = server.submit({"hold": node("CPTSleep", seconds=600, seed=1), "out": node("CPTOut", value=["hold", 0])})
    secret = {"api_key_comfy_org": "comfyui-very-secret"}
    asks = {"key": node("CPTNeedsKey", seed=1), "out": node("CPTOut", value=["key", 0])}
    needs = server.submit(asks, extra_data=dict(secret))["prompt_id"]
    other = server.submit(quick(3), extra_data=dict(secret))["prompt_id"]
    kill(server)
    files = [path for path in server.base_dir.joinpath(STATE).parent.iterdir() if path.is_file()]
    assert files
    assert not any(b"very-secret" in path.read_bytes() for path in files)
    server.start()
    server.request("POST", "/interrupt", {"prompt_id": busy["prompt_id"]})
    entries = server.wait([needs, other])
    assert "needs api_key_comfy_org" in message(entries[needs], "execution_error")["exception_message"]
    assert shown(entries[other]) == 3
    again = server.submit(asks, extra_data=dict(secret))["prompt_id"]
    assert shown(server.wait([again])[again]) is True


def test_a_file_that_cannot_be_used_is_told_and_jobs_run_in_memory(make_server: MakeServer) -> None:
    server = make_server(slots="cpu")
    kept = server.run(quick(1))["prompt"][1]
    kill(server)
    state = server.base_dir / STATE
    good = state.read_bytes(), state.with_name(f"{state.name}-wal").read_bytes()
    state.with_name(f"{state.name}-wal").unlink()
    state.write_bytes(b"no database" * 1000)
    server.start()
    assert shown(server.run(quick(2))) == 2
    queue = server.request("GET", "/health")[1]["queue"]
    assert queue["state"] == "degraded"
    assert str(state) in queue["error"]
    assert "move the file away" in queue["error"]
    assert "move the file away" in server.request("GET", "/ready")[1]["degraded"]
    assert server.log().count("the queue is kept in memory only") == 1
    kill(server)
    assert state.read_bytes() == b"no database" * 1000, "it may be all that is left of the jobs"

    for path, content in zip((state, state.with_name(f"{state.name}-wal")), good, strict=True):
        path.write_bytes(content)
    server.start()
    assert list(history(server)) == [kept]
    assert server.request("GET", "/health")[1]["queue"] == {"state": "ok", "error": None}
    with closing(sqlite3.connect(state, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        meanwhile = server.run(quick(4))["prompt"][1]
        assert "locked" in server.request("GET", "/health")[1]["queue"]["error"]
        other.execute("ROLLBACK")
        deadline = time.monotonic() + WAIT_S
        while server.request("GET", "/health")[1]["queue"]["state"] != "ok" and time.monotonic() < deadline:
            time.sleep(POLL_S)
        assert other.execute("SELECT prompt_id FROM ends ORDER BY position").fetchall() == [(kept,), (meanwhile,)]


@pytest.mark.usefixtures("with_default_signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_stop_by_the_operator_does_not_count_as_an_attempt(
    make_server: MakeServer, tmp_path: Path, number: signal.Signals
) -> None:
    server, file = make_server(slots="cpu,cpu", env={"COMFY_PARALLEL_ATTEMPTS": "1"}), tmp_path / "notes"
    running = [server.submit(noting(file, f"runs{slot}", 3), slot)["prompt_id"] for slot in (0, 1)]
    for count in (1, 2):
        await_count(file, "runs0", count)
        server.stop(signal_number=number)
        server.start()
    entries = server.wait(running)
    assert [outcome(entry) for entry in entries.values()] == ["success"] * 2
    assert [entry.get("attempts") for entry in entries.values()] == [None] * 2


def test_a_copy_of_the_files_at_any_moment_holds_every_accepted_job(make_server: MakeServer, tmp_path: Path) -> None:
    """As a power cut leaves them: the server stands still, and goes on from the copy."""
    server, file = make_server(slots="cpu,cpu"), tmp_path / "notes"
    running = server.submit(noting(file, "runs", 600), 1)["prompt_id"]
    await_count(file, "runs")
    ends, accepted = threading.Event(), []

    def submit_on() -> None:
        while not ends.is_set():
            with suppress(OSError, HostServerError):
                accepted.append(server.submit(quick(len(accepted)), 0)["prompt_id"])

    clients = [threading.Thread(target=submit_on) for _ in range(3)]
    for client in clients:
        client.start()
    deadline = time.monotonic() + WAIT_S
    while len(accepted) < 30:
        assert time.monotonic() < deadline
        time.sleep(POLL_S)
    os.kill(server.pid, signal.SIGSTOP)
    known, state = list(accepted), server.base_dir / STATE
    copies = tmp_path / "copies"
    copies.mkdir()
    for path in state.parent.glob(f"{state.name}*"):
        shutil.copy(path, copies)
    ends.set()
    kill(server)
    for client in clients:
        client.join(WAIT_S)
    for path in state.parent.glob(f"{state.name}*"):
        path.unlink()
    for path in copies.iterdir():
        shutil.copy(path, state.parent)
    server.start()
    await_count(file, "runs", 2)
    server.request("POST", "/interrupt", {"prompt_id": running})
    entries = server.wait([running, *known])
    assert {outcome(entries[prompt_id]) for prompt_id in known} == {"success"}
    assert entries[running]["attempts"] == 2


def test_a_full_disk_is_told_and_loses_nothing_once_there_is_room(make_server: MakeServer, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small disk needs root: {mounted.stderr.decode().strip()}")
    try:
        server = make_server(slots="cpu", env={"COMFY_PARALLEL_STATE": str(disk / "queue.sqlite3")})
        before = server.run(quick(1))["prompt"][1]
        with suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(b"0" * 4096)
        large = {"prompt": quick(2), "extra_data": {"note": "x" * 200_000}}
        status, reply = server.request("POST", "/prompt", large)
        assert status == 200
        assert outcome(server.wait([reply["prompt_id"]])[reply["prompt_id"]]) == "success"
        told = server.request("GET", "/health")[1]["queue"]
        assert told["state"] == "degraded"
        assert "full" in told["error"]
        (disk / "filler").unlink()
        deadline = time.monotonic() + WAIT_S
        while server.request("GET", "/health")[1]["queue"]["state"] != "ok":
            assert time.monotonic() < deadline
            time.sleep(POLL_S)
        kill(server)
        server.start()
        assert list(history(server)) == [before, reply["prompt_id"]]
        kill(server)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_off_writes_nothing(make_server: MakeServer) -> None:
    server = make_server(slots="cpu", env={"COMFY_PARALLEL_STATE": "off"})
    server.run(quick(1))
    assert server.request("GET", "/health")[1]["queue"] == {"state": "off", "error": None}
    assert not (server.base_dir / STATE).parent.exists()
