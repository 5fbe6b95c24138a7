"""A running server answers what docs/openapi.yaml promises, to requests that schemathesis makes up: never 5xx."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.host.jobs import quick
from tests.host.pool import ServerPool
from tests.host.server import HostServer

pytestmark = [pytest.mark.host, pytest.mark.timeout(600)]

SPEC = Path(__file__).resolve().parents[2] / "docs" / "openapi.yaml"
# What is not described is no answer: an undocumented 5xx fails the second of these as well.
CHECKS = "status_code_conformance,content_type_conformance,response_schema_conformance"
CLOSING = r"^/parallel/(pause|resume|drain)$"
ENDLESS = r"^/parallel/events$"
# These change a file and start ComfyUIs: tests/unit/http/test_distributed.py sends them what is wrong.
WORKERS = r"^/(distributed|multigpu)/|^/parallel/workers"


@pytest.fixture
def server(shared_server: ServerPool) -> Iterator[HostServer]:
    server = shared_server(slots="cpu,cpu")
    yield server
    assert server.request("POST", "/parallel/resume", {})[0] == 200
    server.request("POST", "/queue", {"clear": True})


def run(server: HostServer, *options: str, checks: str) -> str:
    """What schemathesis says; fails when it found anything."""
    program = Path(sys.executable).parent / "schemathesis"
    limits = [
        "--max-examples",
        "8",
        "--seed",
        "1",
        "--phases",
        "examples,coverage,fuzzing",
        "--generation-database",
        "none",
    ]
    command = [program, "run", SPEC, "--url", server.url, "--checks", checks, *limits, "--no-color", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, cwd=server.base_dir)
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}\n{server.log()[-3000:]}"
    print(done.stdout)
    return done.stdout


def operations_in(output: str) -> int:
    found = re.search(r"Tested: +(\d+)", output)
    assert found is not None, output
    return int(found[1])


def test_no_request_makes_it_fail_and_every_answer_is_as_described(server: HostServer) -> None:
    output = run(
        server,
        *("--exclude-path-regex", f"{CLOSING}|{ENDLESS}|{WORKERS}"),
        checks=f"not_a_server_error,{CHECKS}",
    )
    assert operations_in(output) >= 15
    assert server.run(quick(1), 0)["status"]["status_str"] == "success"


def test_slots_are_closed_and_opened_as_described(server: HostServer) -> None:
    assert operations_in(run(server, "--include-path-regex", CLOSING, checks=f"not_a_server_error,{CHECKS}")) == 3
