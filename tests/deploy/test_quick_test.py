"""quick_test.sh: passes against a server that is right, and fails against every other."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.host.server import HostServer
from tests.ports import free_port

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(180)]

SCRIPT = Path(__file__).resolve().parents[2] / "quick_test.sh"


def quick_test(url: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", **env}
    return subprocess.run([SCRIPT, "--url", url, *args], env=environment, capture_output=True, text=True, timeout=120)


class FakeServer(ThreadingHTTPServer):
    """Answers like a scheduler with two slots that has one defect."""

    daemon_threads = True

    def __init__(self, defect: str) -> None:
        super().__init__(("127.0.0.1", 0), FakeHandler)
        self.defect = defect
        self.jobs: dict[str, dict[str, Any]] = {}
        self.deleted: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class FakeHandler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self) -> None:
        if self.path == "/queue/all":
            if self.server.defect == "stock":
                self.reply(404, "404: Not Found")
            else:
                self.reply(200, self.overview())
        else:
            job = self.path.rpartition("/")[2]
            finished = self.server.defect != "stuck"
            self.reply(200, {job: self.server.jobs[job]} if finished else {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/queue":
            self.server.deleted += body["delete"]
            self.reply(200, {})
        else:
            self.submit(self.headers["X-TARGET-GPU"])

    def submit(self, target: str) -> None:
        defect = self.server.defect
        if target in ("-1", "99", "one") and defect != "clamps":
            shown = "bad_request" if defect == "wrong error" else "invalid_target_gpu"
            self.reply(400, {"error": {"type": shown}, "node_errors": {}})
            return
        job = f"job-{len(self.server.jobs)}"
        slot = int(target) if target in ("0", "1") else 1
        state = "error" if defect == "jobs fail" else "success"
        messages = [["execution_start", {"timestamp": 1000}], ["execution_success", {"timestamp": 1250}]]
        kept = {"moves": 0, "gone": 7}.get(defect, slot)
        self.server.jobs[job] = {"gpu_id": kept, "status": {"status_str": state, "messages": messages}}
        promised = None if target == "auto" else {"misleads": 0}.get(defect, slot)
        self.reply(200, {"prompt_id": job, "gpu_id": promised})

    def overview(self) -> dict[str, Any]:
        lists = ("running", "pending", "queue_running", "queue_pending", "models")
        slot = {
            "device": "cpu",
            "device_name": "CPU",
            "state": "idle",
            "running_count": 0,
            "pending_count": 0,
            "metrics": {},
            "vram": {},
            **{name: [] for name in lists},
        }
        queues = [{"gpu_id": 0, **slot}, {"gpu_id": 1, **slot}]
        if self.server.defect == "a field less":
            del queues[1]["vram"]
        if self.server.defect == "a slot less":
            del queues[1]
        totals = {"unassigned": [], "total_running": 0, "total_pending": 0}
        return {"mode": "multi-gpu", "num_gpus": 2, "queues": queues, **totals}

    def reply(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def fake_server(defect: str) -> Iterator[FakeServer]:
    server = FakeServer(defect)
    thread = threading.Thread(target=server.serve_forever, args=[0.02])
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_passes_against_a_real_server_with_four_slots(host: HostServer) -> None:
    done = quick_test(host.url + "/")
    assert done.returncode == 0, done.stdout + done.stderr
    header, *rows, verdict = done.stdout.splitlines()
    assert header.split() == ["slot", "device", "job", "state", "seconds"]
    assert [row.split()[0] for row in rows] == ["0", "1", "2", "3", "auto:"]
    assert all("cpu" in row and "success" in row for row in rows)
    assert verdict == "passed: 4 slots, 5 jobs, each where it belongs"


def test_passes_against_a_fake_without_a_defect_whatever_proxy_is_set() -> None:
    with fake_server("none") as server:
        done = quick_test(server.url, http_proxy="http://127.0.0.1:1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[1].split() == ["0", "cpu", "job-0", "success", "0.25"]


@pytest.mark.parametrize(
    ("defect", "complaint"),
    [
        ("stock", "the scheduler is off"),
        ("a field less", "has no 'vram'"),
        ("a slot less", "num_gpus is 2"),
        ("clamps", "X-TARGET-GPU: 99 should be refused"),
        ("wrong error", "X-TARGET-GPU: 99 should be refused"),
        ("misleads", "POST /prompt for slot 1 answered gpu_id 0"),
        ("moves", "the job for slot 1 ran on gpu_id 0"),
        ("gone", "the job for auto ran on gpu_id 7, which is no slot"),
        ("jobs fail", "the job for 0 is error"),
    ],
)
def test_fails_and_says_what_is_wrong(defect: str, complaint: str) -> None:
    with fake_server(defect) as server:
        done = quick_test(server.url)
    assert done.returncode == 1
    assert complaint in done.stderr
    assert "passed" not in done.stdout


def test_gives_up_in_time_and_takes_its_jobs_out_of_the_queue() -> None:
    with fake_server("stuck") as server:
        done = quick_test(server.url, "--timeout", "0.3")
        assert server.deleted == list(server.jobs)
    assert done.returncode == 1
    assert "not finished" in done.stderr


def test_fails_when_nothing_answers() -> None:
    done = quick_test(f"http://127.0.0.1:{free_port()}")
    assert done.returncode == 1
    assert "start_multi_gpu.sh" in done.stderr


def test_needs_a_python() -> None:
    done = quick_test("http://127.0.0.1:1", COMFYUI_PYTHON="/nowhere/python")
    assert done.returncode == 1
    assert "/nowhere/python" in done.stderr
