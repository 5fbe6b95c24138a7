"""Settings of the process that a job leaves changed are put back at its end, and said; ordinary jobs leave none."""

from __future__ import annotations

import time

import pytest

from tests.host.jobs import new_key, outcome
from tests.host.pool import ServerPool
from tests.host.server import JSON, POLL_S, HostServer
from tests.host.workflows import Workflow, img2img, node, txt2img

pytestmark = pytest.mark.host

NAMES = {
    "cwd": "the working directory",
    "umask": "the umask",
    "variable_new": "environment variable CPT_LEFT",
    "variable_changed": "environment variable PATH",
    "variable_gone": "environment variable OMP_NUM_THREADS",
    "recursion_limit": "the recursion limit",
    "switch_interval": "the switch interval",
    "stdout": "sys.stdout",
    "path": None,  # What a job adds stays, but comes last.
    "warnings": "the warning filters",
    "excepthook": "threading.excepthook",
    "socket_timeout": "the sockets' default time-out",
    "log_level": "level of logger root",
    "log_disabled": "logging.disable",
    "log_handlers": "the root logger's handlers",
    "record_factory": "logging's record factory",
    "print": "builtins.print",
    "temporary": "the folder of temporary files",
    "processes": "the way to start processes",
    "decimal": "decimal's context of new threads",
    "digits": "the longest number in text",
    "mkldnn": "torch.backends.mkldnn.enabled",
    "gc": "garbage collection",
    "signal": "signal handler of SIGUSR2",
    "dtype": "torch's default dtype",
    "deterministic": "torch's deterministic algorithms",
    "precision": "torch's float32 matmul precision",
    "new_precision": "torch.backends.cuda.matmul.fp32_precision",
    "cudnn": "torch.backends.cudnn.benchmark",
    "attention": "torch's math attention",
    "anomaly": "torch's anomaly detection",
    "hooks": "torch's global_forward_hooks",
    "grad": None,  # The host's inference mode puts these two back.
    "threads": "torch's number of threads",
    "device": "torch's default device",
    "autocast": None,
    "numpy_errors": None,  # numpy keeps it per context, and each node runs in one of its own.
}


@pytest.fixture(scope="module")
def server(shared_server: ServerPool) -> HostServer:
    return shared_server(slots="cpu,cpu")


def leave(kind: str, end: str = "return") -> Workflow:
    return {"leave": node("CPTLeave", kind=kind, end=end), "end": node("CPTOut", value=["leave", 0])}


def settings(server: HostServer, slot: int) -> JSON:
    entry = server.run({"show": node("CPTSettings")}, slot)
    found: JSON = entry["outputs"]["show"]["settings"][0]
    return found


def lines_about(server: HostServer, job_id: str) -> list[str]:
    return [line for line in server.log().splitlines() if f"job {job_id}" in line and "; put back to " in line]


def await_same(server: HostServer, slot: int, before: JSON) -> None:
    """The server's own thread puts signal handlers back, soon."""
    deadline = time.monotonic() + 120
    while (now := settings(server, slot)) != before:
        assert time.monotonic() < deadline, {
            name: (before[name], now[name]) for name in now if now[name] != before[name]
        }
        time.sleep(POLL_S)


@pytest.mark.parametrize("kind", NAMES)
def test_it_is_put_back_and_said(server: HostServer, kind: str) -> None:
    before = [settings(server, slot) for slot in range(2)]
    job_id = server.submit(leave(kind), 1)["prompt_id"]
    assert outcome(server.wait([job_id])[job_id]) == "success"
    for slot in range(2):
        await_same(server, slot, before[slot])
    told = lines_about(server, job_id)
    if NAMES[kind] is not None:
        assert [line for line in told if f"left {NAMES[kind]} at" in line], told
    elif kind != "path":
        assert told == []


@pytest.mark.parametrize("end", ["raise", "die"])
@pytest.mark.parametrize("kind", ["cwd", "variable_changed", "dtype", "threads", "log_disabled"])
def test_however_the_job_ends(server: HostServer, kind: str, end: str) -> None:
    before = [settings(server, slot) for slot in range(2)]
    job_id = server.submit(leave(kind, end), 0)["prompt_id"]
    assert outcome(server.wait([job_id])[job_id]) == "error"
    for slot in range(2):
        await_same(server, slot, before[slot])
    assert [line for line in lines_about(server, job_id) if f"left {NAMES[kind]} at" in line]


def leave_beside(server: HostServer, kind: str) -> tuple[JSON, JSON, list[str]]:
    """What a job that has changed a setting finds when another job ends, what that one finds, and their ids."""
    gate = {"key": new_key(), "parties": 2, "stages": "seen"}
    first = {"leave": node("CPTLeave", kind=kind, end="return"), "gate": node("CPTOverlap", value=["leave", 0], **gate)}
    second = {"first": node("CPTSettings"), "gate": node("CPTOverlap", value=["first", 0], **gate)}
    first["show"] = second["show"] = node("CPTSettings", after=["gate", 0])
    with server.websocket() as watcher:
        ids = [server.submit(first, 0, watcher.client_id)["prompt_id"]]
        watcher.wait_for(lambda event: event["type"] == "executing" and event["data"]["node"] == "gate")
        ids.append(server.submit(second, 1)["prompt_id"])
        entries = server.wait(ids)
    assert {outcome(entry) for entry in entries.values()} == {"success"}
    found = entries[ids[0]]["outputs"]["show"], entries[ids[1]]["outputs"]["first"]
    return found[0]["settings"][0], found[1]["settings"][0], ids


@pytest.mark.parametrize("kind", ["dtype", "variable_new"])
def test_a_job_that_began_later_is_not_blamed(server: HostServer, kind: str) -> None:
    before = settings(server, 0)
    own, others, (first, second) = leave_beside(server, kind)
    assert own[kind] == others[kind] != before[kind]
    await_same(server, 1, before)
    assert lines_about(server, first)
    assert not lines_about(server, second)


@pytest.mark.parametrize("kind", ["cwd", "umask"])
def test_what_a_thread_can_have_of_its_own_other_slots_never_see(server: HostServer, kind: str) -> None:
    if "working directory and umask are shared" in server.log():
        pytest.skip("this system does not let threads have one")
    before = settings(server, 1)
    own, others, _ = leave_beside(server, kind)
    assert (own[kind] != before[kind], others) == (True, before)


def test_ordinary_jobs_leave_nothing(server: HostServer) -> None:
    jobs = [txt2img(1), img2img(2), txt2img(3, lora="lora.safetensors"), txt2img(4)]
    ids = [server.submit(job, slot)["prompt_id"] for job in jobs for slot in range(2)]
    assert {outcome(entry) for entry in server.wait(ids).values()} == {"success"}
    assert [line for job_id in ids for line in lines_about(server, job_id)] == []
