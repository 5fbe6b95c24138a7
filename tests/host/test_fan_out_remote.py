"""Slots on other machines take part in shared jobs as others do, as the job's own slot and as participants."""

from __future__ import annotations

import signal

import pytest

from tests.host.conftest import MakeServer
from tests.host.jobs import eventually, interrupt, outcome, slots_shown
from tests.host.server import HostServer
from tests.host.test_fan_out_processes import (
    LIMIT_S,
    await_processes,
    check_all_take_part,
    check_lists_and_parts,
    check_same_images,
    previews,
    told,
    values,
)

pytestmark = [pytest.mark.host, pytest.mark.timeout(900)]

HERE, THERE = 0, 1


@pytest.fixture(scope="module")
def other(make_module_server: MakeServer) -> HostServer:
    return make_module_server(slots="cpu")


@pytest.fixture(scope="module")
def server(make_module_server: MakeServer, other: HostServer) -> HostServer:
    made = make_module_server(slots="cpu", env={"COMFY_PARALLEL_REMOTE": other.url, "COMFY_PARALLEL_BREAKER": "off"})
    await_processes(made)
    return made


@pytest.mark.parametrize("slot", [HERE, THERE], ids=["a job here", "a job there"])
def test_images_of_all_machines_are_the_same(server: HostServer, slot: int) -> None:
    check_same_images(server, slot)


@pytest.mark.parametrize("slot", [HERE, THERE], ids=["a job here", "a job there"])
def test_all_machines_take_part(server: HostServer, slot: int) -> None:
    check_all_take_part(server, slot, seconds=2.0)


@pytest.mark.parametrize("slot", [HERE, THERE], ids=["a job here", "a job there"])
def test_previews_of_all_reach_the_client_told_apart(server: HostServer, slot: int) -> None:
    assert previews(server, slot) == {(None, slot): 3, (1, 1 - slot): 3}


@pytest.mark.parametrize("slot", [HERE, THERE], ids=["a job here", "a job there"])
def test_lists_and_parts_are_divided_among_them(server: HostServer, slot: int) -> None:
    check_lists_and_parts(server, slot, images=70)


def test_an_interrupt_ends_shares_there(server: HostServer, other: HostServer) -> None:
    job_id = server.submit(told(200, seconds=60.0), HERE)["prompt_id"]
    eventually(lambda: slots_shown(other)[0]["running_count"], "nothing runs there", LIMIT_S)
    interrupt(server, job_id)
    assert outcome(server.wait([job_id], LIMIT_S)[job_id]) == "interrupted"
    eventually(lambda: not slots_shown(other)[0]["running_count"], "a share still runs", LIMIT_S)


def test_a_machine_that_dies_during_its_share_costs_no_image(server: HostServer, other: HostServer) -> None:
    """`benchmarks/fan_out.py --remote --kills 100` does it a hundred times."""
    job_id = server.submit(told(300, seconds=1.0, count=5), HERE)["prompt_id"]
    eventually(lambda: slots_shown(other)[0]["running_count"], "no share runs there", LIMIT_S)
    other.stop(signal_number=signal.SIGKILL)
    assert [seed for seed, _ in values(server.wait([job_id], LIMIT_S)[job_id])] == [300, 301, 302, 303, 304]
