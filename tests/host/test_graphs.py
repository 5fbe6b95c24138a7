"""Which steps of real jobs are replayed, and that a replay needs only what a recording holds.

On CPU slots a stand-in for a recording computes again what was recorded.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.host.conftest import server_factory
from tests.host.graph_cases import FIRST, Case, Steps, cases, run_case, sd15
from tests.host.models import cached_shapes
from tests.host.server import HostServer

pytestmark = [pytest.mark.host, pytest.mark.timeout(600)]

ARGS = ["--use-pytorch-cross-attention"]  # The host's other attention chooses by free memory, and so is not recorded.
FAKE_GRAPHS = {"CPT_FAKE_GRAPHS": "1"}


@pytest.fixture(scope="module")
def shapes_dir(host_dir: Path, cache_dir: Path) -> Path:
    return cached_shapes(host_dir, cache_dir)


@contextmanager
def one_slot(host_dir: Path, base_dir: Path, models: Path, env: dict[str, str | None]) -> Iterator[HostServer]:
    with server_factory(host_dir, lambda: base_dir, models) as make:
        yield make(slots="cpu", env=env, args=ARGS)


@pytest.fixture(scope="module")
def eager(host_dir: Path, shapes_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostServer]:
    off = {"COMFY_PARALLEL_GRAPHS": "off"}
    with one_slot(host_dir, tmp_path_factory.mktemp("eager"), shapes_dir, dict(off)) as server:
        yield server


@pytest.fixture(scope="module")
def graphs(host_dir: Path, shapes_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostServer]:
    with one_slot(host_dir, tmp_path_factory.mktemp("graphs"), shapes_dir, dict(FAKE_GRAPHS)) as server:
        yield server


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_replays_equal_eager_steps(case: Case, eager: HostServer, graphs: HostServer) -> None:
    before = Steps.of(graphs, 0)
    with ThreadPoolExecutor(2) as pool:
        expected, found = pool.map(lambda server: run_case(server, case, 0), (eager, graphs))
    assert len(set(expected)) == len(case.jobs), "jobs that equal each other show little"
    assert [one == other for one, other in zip(expected, found, strict=True)] == [True] * len(case.jobs)
    assert Steps.of(graphs, 0).since(before).unlike(case) == ""


def test_jobs_of_one_shape_share_one_recording(graphs: HostServer) -> None:
    before = Steps.of(graphs, 0)
    jobs = (sd15(1, height=72), sd15(2, height=72, text="a much longer text, " * 3), sd15(3, height=72, steps=7))
    run_case(graphs, Case("one shape", jobs), 0)
    seen = Steps.of(graphs, 0).since(before)
    assert (seen.captures, seen.replays, seen.eager) == (1, 4 + 4 + 7 - 2, {FIRST: 1})


def test_off_is_off(eager: HostServer) -> None:
    status, reply = eager.request("GET", "/queue/all")
    seen = reply["queues"][0]["graphs"]
    assert (status, seen["on"], seen["captures"], seen["replays"], seen["eager"]) == (200, False, 0, 0, {})
    assert eager.log().count(f"slot 0 (cpu): every step runs eagerly: {seen['reason']}") == 1
    assert "COMFY_PARALLEL_GRAPHS is off" in seen["reason"]


def test_a_slot_on_a_cpu_says_why_it_records_nothing(graphs: HostServer) -> None:
    assert graphs.log().count("slot 0 (cpu): every step runs eagerly: steps are recorded on NVIDIA GPUs only") == 1
