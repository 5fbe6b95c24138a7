"""Replayed steps give, bit for bit, what eager steps give on the same GPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy
import pytest

from tests.gpu.conftest import MakeGpuServer
from tests.gpu.test_gpus import jobs_in_any_order
from tests.host.graph_cases import Case, Steps, cases, run_case, sd15
from tests.host.jobs import interrupt, outcome
from tests.host.server import POLL_S, HostServer
from tests.host.test_parity import GROUPS, differing, run_jobs

pytestmark = [pytest.mark.gpu, pytest.mark.host, pytest.mark.timeout(400)]

MIXED_JOBS = 504
ENDLESS = 5000  # steps
PREVIEWS = ["--preview-method", "latent2rgb"]


@dataclass
class Servers:
    """Two that step eagerly and one that records, each with a slot on every GPU."""

    eager: HostServer
    again: HostServer
    graphs: HostServer
    table: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def num_slots(one_gpu: Any) -> int:
    """One per GPU, of which one is enough."""
    import torch

    return torch.cuda.device_count()


@pytest.fixture(scope="module")
def servers(make_gpu_server: MakeGpuServer, num_slots: int) -> Iterator[Servers]:
    def start(mode: str) -> HostServer:
        return make_gpu_server(slots="", args=PREVIEWS, env={"COMFY_PARALLEL_GRAPHS": mode})

    with ThreadPoolExecutor(3) as pool:
        started = Servers(*pool.map(start, ("off", "off", "auto")))
    yield started
    print("\n", f"{'case':32}{'replays':>8}{'captures':>9}  eager steps by reason", *started.table, sep="\n")


def side_by_side(*work: tuple[Any, ...]) -> list[Any]:
    """The results of calls `(function, *arguments)` made at once."""
    with ThreadPoolExecutor(len(work)) as pool:
        return [future.result() for future in [pool.submit(*call) for call in work]]


def difference(expected: list[bytes], found: list[bytes]) -> str:
    """Which jobs' latents differ, and by how much; empty when none does."""
    return ", ".join(
        f"job {index}: {numpy.abs(numpy.frombuffer(one, 'f4') - numpy.frombuffer(other, 'f4')).max():.2g}"
        for index, (one, other) in enumerate(zip(expected, found, strict=True))
        if one != other
    )


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_replays_equal_eager_steps(case: Case, servers: Servers, num_slots: int) -> None:
    before = [Steps.of(servers.graphs, slot) for slot in range(num_slots)[:2]]
    expected, again, *found = side_by_side(
        (run_case, servers.eager, case, 0),
        (run_case, servers.again, case, 0),
        *((run_case, servers.graphs, case, slot) for slot in range(len(before))),
    )
    seen = [Steps.of(servers.graphs, slot).since(earlier) for slot, earlier in enumerate(before)]
    servers.table.append(f"{case.name:32}{seen[0].replays:8}{seen[0].captures:9}  {seen[0].eager}")
    assert difference(expected, again) == "", "eager differs from eager"
    assert [difference(expected, of_slot) for of_slot in found] == [""] * len(before)
    assert [steps.unlike(case) for steps in seen] == [""] * len(before)
    assert len(set(expected)) == len(case.jobs), "jobs that equal each other show little"


def test_a_slot_that_was_interrupted_between_replays_goes_on_as_before(servers: Servers) -> None:
    jobs = Case("after an interrupt", (sd15(200), sd15(201)))
    run_case(servers.graphs, Case("before", (sd15(202), sd15(203))), 0)
    before = Steps.of(servers.graphs, 0)
    endless = servers.graphs.submit(sd15(204, steps=ENDLESS), 0)["prompt_id"]
    while Steps.of(servers.graphs, 0).since(before).replays < 10:
        time.sleep(POLL_S)
    interrupt(servers.graphs, endless)
    assert outcome(servers.graphs.wait([endless])[endless]) == "interrupted"
    stopped = Steps.of(servers.graphs, 0)
    expected, found = side_by_side((run_case, servers.eager, jobs, 0), (run_case, servers.graphs, jobs, 0))
    assert difference(expected, found) == ""
    seen = Steps.of(servers.graphs, 0).since(stopped)
    assert (seen.captures, seen.replays, seen.eager) == (0, 8, {})
    assert stopped.since(before).replays < ENDLESS


def test_previews_are_sent_between_replays(servers: Servers) -> None:
    run_case(servers.graphs, Case("before", (sd15(210), sd15(211))), 0)
    before = Steps.of(servers.graphs, 0)
    with servers.graphs.websocket() as client:
        job_id = servers.graphs.submit(sd15(212, steps=8), 0, client.client_id)["prompt_id"]
        client.wait_for_end(job_id)
        assert len(client.frames) >= 4
    assert Steps.of(servers.graphs, 0).since(before).replays == 8


def test_graph_memory_is_shown_and_given_back(servers: Servers, num_slots: int) -> None:
    slot = num_slots - 1
    run_case(servers.graphs, Case("before", (sd15(220), sd15(221))), slot)

    def size() -> int:
        found: int = servers.graphs.request("GET", "/queue/all")[1]["queues"][slot]["graphs"]["size_bytes"]
        return found

    assert size() > 0
    servers.graphs.request(
        "POST", "/free", {"unload_models": True, "free_memory": True}, headers={"X-TARGET-GPU": str(slot)}
    )
    deadline = time.monotonic() + 30
    while size() and time.monotonic() < deadline:
        time.sleep(POLL_S)
    assert size() == 0


def test_hundreds_of_mixed_jobs_over_all_slots(servers: Servers, num_slots: int) -> None:
    jobs = jobs_in_any_order(MIXED_JOBS // len(GROUPS))
    before = [Steps.of(servers.graphs, slot) for slot in range(num_slots)]
    in_order, in_reverse, found = side_by_side(
        (run_jobs, servers.eager, jobs), (run_jobs, servers.again, jobs[::-1]), (run_jobs, servers.graphs, jobs)
    )
    assert differing(jobs, in_order, in_reverse) == [], "eager differs from eager"
    assert differing(jobs, in_order, found) == []
    assert {entry["gpu_id"] for entry in found.entries.values()} == set(range(num_slots))
    for slot, earlier in enumerate(before):
        seen = Steps.of(servers.graphs, slot).since(earlier)
        servers.table.append(f"{f'mixed, slot {slot}':32}{seen.replays:8}{seen.captures:9}  {seen.eager}")
        assert seen.replays > seen.captures
