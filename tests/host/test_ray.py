"""The machines of a real Ray cluster are slots: jobs, the death of a machine, its return."""

from __future__ import annotations

import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from tests.host.conftest import MakeServer
from tests.host.jobs import eventually, new_key, outcome, slots_shown
from tests.host.server import JSON, HostServer
from tests.host.test_fan_out import SEED, alone, pixels, shared
from tests.host.test_fan_out_processes import run, told, values
from tests.host.workflows import Workflow, node, txt2img

cluster_utils = pytest.importorskip("ray.cluster_utils", reason="Ray is not installed: pip install ray")

pytestmark = [pytest.mark.host, pytest.mark.timeout(600)]

LIMIT_S = 240.0
MACHINE: JSON = {"num_cpus": 0, "num_gpus": 0, "resources": {"comfy_slot": 1}, "include_dashboard": False}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two machines, as far as Ray is concerned; the first has the cluster's head."""
    of_pytest = signal.getsignal(signal.SIGTERM)
    made = cluster_utils.Cluster(initialize_head=True, head_node_args=MACHINE)
    made.add_node(**MACHINE)
    yield made
    made.shutdown()
    signal.signal(signal.SIGTERM, of_pytest)  # Ray's would end the tests that follow when they send themselves one.


@pytest.fixture(scope="module")
def front(make_module_server: MakeServer, cluster: Any) -> HostServer:
    made = make_module_server(slots="cpu", env={"COMFY_PARALLEL_RAY": cluster.address})
    await_workers(made, ["ready", "ready"])
    return made


def states(server: HostServer) -> list[str]:
    return [slot["worker"]["state"] for slot in slots_shown(server)[1:]]


def await_workers(server: HostServer, expected: list[str]) -> None:
    eventually(lambda: sorted(states(server)) == expected, f"the workers are not {expected}", LIMIT_S)


def slow(number: int, seconds: float = 3.0) -> Workflow:
    work = node("CPTSlow", value=number, seconds=seconds, salt=new_key())
    return {"work": work, "out": node("CPTOut", value=["work", 0])}


def numbers(entries: dict[str, JSON]) -> list[int]:
    assert {outcome(entry) for entry in entries.values()} == {"success"}
    return [int(entry["outputs"]["out"]["value"][0].partition("@")[0]) for entry in entries.values()]


def test_each_machine_gives_the_bytes_of_the_front(front: HostServer) -> None:
    ids = [front.submit(txt2img(seed=11, steps=2), slot)["prompt_id"] for slot in (0, 1, 2)]
    pictures = []
    for entry in front.wait(ids, LIMIT_S).values():
        assert outcome(entry) == "success", entry["status"]
        (image,) = entry["outputs"]["save"]["images"]
        with Image.open(front.base_dir / "output" / image["filename"]) as picture:
            pictures.append(picture.tobytes())
    assert pictures[1:] == pictures[:1] * 2
    assert len(front.output_files()) == 3


def test_shares_of_a_job_come_through_the_object_store(front: HostServer) -> None:
    expected = alone(front, 3)
    for slot in (0, 1):
        assert pixels(front, run(front, shared(SEED), slot)) == expected
        entry = run(front, told(100, seconds=2.0, count=3), slot)
        assert [seed for seed, _ in values(entry)] == [100, 101, 102]
        assert len({process for _, process in values(entry)}) == 3


def test_strangers_are_not_answered(front: HostServer) -> None:
    for slot in slots_shown(front)[1:]:
        for path in ("/queue", "/ws", "/system_stats"):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(slot["worker"]["address"] + path, timeout=60)


def test_a_machine_that_dies_costs_no_job_and_is_used_again_when_it_returns(front: HostServer, cluster: Any) -> None:
    ids = [front.submit(slow(number))["prompt_id"] for number in range(6)]
    eventually(lambda: all(slot["running_count"] for slot in slots_shown(front)), "not all slots run", LIMIT_S)
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
    assert numbers(front.wait(ids, LIMIT_S)) == list(range(6))
    await_workers(front, ["ready", "unreachable"])
    cluster.add_node(**MACHINE)
    await_workers(front, ["ready", "ready"])
    ids = [front.submit(slow(number, 0.0), slot)["prompt_id"] for number, slot in ((7, 1), (8, 2))]
    assert numbers(front.wait(ids, LIMIT_S)) == [7, 8]
