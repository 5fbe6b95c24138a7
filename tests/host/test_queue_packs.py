"""Node packs that wrap or replace the host's queue: every slot's jobs go through what they have put there."""

from __future__ import annotations

import functools
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from tests.host.conftest import MakeServer
from tests.host.jobs import await_idle, held, meet, new_key, outcome, queue_ids, quick, release
from tests.host.server import POLL_S, HostServer

pytestmark = pytest.mark.host

PACKS = Path(__file__).resolve().parent / "queue_packs"
WRAPPING = ("on_object", "on_class", "replaced", "boxed", "subclass", "holder", "store", "worker")
PAUSING = ("store", "pausing", "polling")
Hosts = Callable[..., HostServer]


@pytest.fixture(scope="module")
def hosts(make_module_server: MakeServer, tmp_path_factory: pytest.TempPathFactory) -> Hosts:
    """`hosts(pack)` is a running host with this pack, the same one for all tests."""
    return functools.cache(
        lambda pack, **options: make_module_server(home_of(tmp_path_factory.mktemp("packs"), pack), **options)
    )


def home_of(base: Path, pack: str) -> Path:
    package = base / "custom_nodes" / f"pack_{pack}"
    package.mkdir(parents=True)
    shutil.copy(PACKS / "seen.py", package)
    shutil.copy(PACKS / f"{pack}.py", package / "__init__.py")
    return base


def seen(server: HostServer) -> dict[str, list[str]]:
    """The jobs that each of the pack's methods has seen."""
    found: dict[str, list[str]] = {}
    for method, prompt_id in server.request("GET", "/pack/seen")[1]:
        found.setdefault(method, []).append(prompt_id)
    return found


def seen_of(server: HostServer, method: str, ids: Iterable[str]) -> Counter[str]:
    """How often a method has seen each of these jobs."""
    return Counter(job_id for job_id in seen(server)[method] if job_id in ids)


def await_seen(server: HostServer, method: str, expected: Counter[str]) -> None:
    deadline = time.monotonic() + 60
    while (found := seen_of(server, method, expected)) != expected:
        assert time.monotonic() < deadline, f"{method} has seen {found}, not {expected}"
        time.sleep(POLL_S)


def run_together(server: HostServer, *, may_bind: bool = True) -> list[str]:
    """Two jobs that meet, so on two slots at once, some for any slot and one bound to each; all end well."""
    key = new_key()
    ids = [server.submit(meet(key, 2))["prompt_id"] for _ in range(2)]
    ids += [server.submit(quick(random.getrandbits(40)))["prompt_id"] for _ in range(6)]
    bound = [server.submit(quick(random.getrandbits(40)), slot)["prompt_id"] for slot in ((0, 1) if may_bind else ())]
    entries = server.wait([*ids, *bound])
    assert {outcome(entry) for entry in entries.values()} == {"success"}
    assert {entries[job_id]["gpu_id"] for job_id in ids[:2]} == {0, 1}
    assert [entries[job_id]["gpu_id"] for job_id in bound] == [0, 1][: len(bound)]
    await_idle(server)
    return [*ids, *bound]


@pytest.mark.parametrize("pack", WRAPPING)
def test_every_slots_jobs_go_through_the_packs_methods(hosts: Hosts, pack: str) -> None:
    server = hosts(pack)
    ids = run_together(server, may_bind=pack != "boxed")  # Nobody but the pack can read a target out of its boxes.
    once = Counter(ids)
    await_seen(server, "task_done", once)  # Some packs note it when it is done, so after the job is in the history.
    for method in ("put", "get"):
        assert seen_of(server, method, once) == once, method
    assert "stays OFF" not in server.log()
    if pack == "worker":
        assert sorted(seen(server)["worker"]) == ["slot-0-cpu", "slot-1-cpu"]


def test_what_waits_is_changed_through_the_packs_methods(hosts: Hosts) -> None:
    server = hosts("on_object")
    with held(server, 0, 1):
        first, second, third = (server.submit(quick(number))["prompt_id"] for number in range(3))
        server.request("POST", "/queue", {"delete": [second]})
        assert sorted(queue_ids(server)[1]) == sorted([first, third])
        server.request("POST", "/queue", {"clear": True})
        assert queue_ids(server)[1] == []
    found = seen(server)
    assert [len(found[method]) for method in ("delete_queue_item", "wipe_queue")] == [1, 1]
    run_together(server)


@pytest.mark.parametrize("pack", ["replaced"])
def test_jobs_of_a_replaced_queue_wait_are_deleted_and_interrupted(hosts: Hosts, pack: str) -> None:
    server = hosts(pack)
    with held(server, 0, 1) as running:
        waiting = [server.submit(quick(number), slot)["prompt_id"] for number, slot in enumerate((0, 1, None))]
        assert {queue["gpu_id"]: queue["running"] for queue in server.request("GET", "/queue/all")[1]["queues"]} == {
            0: running[:1],
            1: running[1:],
        }
        server.request("POST", "/queue", {"delete": [waiting[0]]})
        assert set(queue_ids(server)[1]) == set(waiting[1:])
        assert outcome(release(server, running[1])[running[1]]) == "interrupted"
        entries = server.wait(waiting[1:])
    assert [entries[job_id]["gpu_id"] for job_id in waiting[1:]] == [1, 1]


def test_a_wrapper_that_comes_while_the_slots_work_is_used(hosts: Hosts) -> None:
    server = hosts("late")
    run_together(server)
    assert server.request("POST", "/pack/wrap")[0] == 200
    run_together(server)  # Each slot is still in the `get` of before, once.
    ids = run_together(server)
    assert set(ids) <= set(seen(server)["get"])


@pytest.mark.parametrize("pack", PAUSING)
def test_a_pack_that_pauses_the_queue_holds_all_slots(hosts: Hosts, pack: str) -> None:
    server = hosts(pack)
    run_together(server)
    server.request("POST", "/pack/pause")
    time.sleep(0.2)
    ids = [server.submit(quick(number))["prompt_id"] for number in (1, 2, 3)]
    time.sleep(1.0)
    assert not set(ids) & set(server.request("GET", "/history")[1])
    server.request("POST", "/pack/resume")
    assert {outcome(entry) for entry in server.wait(ids).values()} == {"success"}
    run_together(server)


def test_a_queue_that_has_nothing_of_the_hosts_starts_as_stock_with_one_warning(hosts: Hosts) -> None:
    server = hosts("foreign", may_be_stock=True)
    ids = [server.submit(quick(number))["prompt_id"] for number in (1, 2)]
    entries = server.wait(ids)
    assert {outcome(entry) for entry in entries.values()} == {"success"}
    assert all("gpu_id" not in entry for entry in entries.values())
    assert server.request("GET", "/queue/all")[0] == 404
    assert Counter(seen(server)["get"])[ids[0]] == 1
    assert server.log().count("stays OFF") == 1
    assert "ForeignQueue" in server.log()
    assert "pack_foreign" in server.log()
