"""Where a request's job runs, what each route shows and changes, and that stock's replies keep their shape."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.host.conftest import MakeServer
from tests.host.jobs import (
    await_idle,
    eventually,
    held,
    hold,
    meet,
    message,
    new_key,
    outcome,
    progress,
    queue_ids,
    quick,
    release,
    run_on_each,
    shown,
    start_held,
)
from tests.host.pool import ServerPool
from tests.host.server import JSON, HostServer
from tests.host.workflows import Workflow, node, txt2img

pytestmark = pytest.mark.host

NUM_SLOTS = 3
SLOTS = range(NUM_SLOTS)
MANY = 1000
NO_TARGET: tuple[JSON, ...] = ({}, {"slot": "auto"}, {"extra_data": {"target_gpu": "auto"}}, {"extra_data": {}})


@pytest.fixture(scope="module")
def server(make_module_server: MakeServer) -> HostServer:
    return make_module_server(slots=",".join(["cpu"] * NUM_SLOTS))


@pytest.fixture(scope="module")
def stock(shared_server: ServerPool) -> HostServer:
    return shared_server(slots=None)


@pytest.fixture(scope="module")
def first_by_default(make_module_server: MakeServer) -> HostServer:
    return make_module_server(slots="cpu,cpu", env={"COMFY_PARALLEL_DEFAULT_GPU": "0"})


def where() -> Workflow:
    return {"where": node("CPTWhere"), "out": node("CPTOut", value=["where", 0])}


def get(server: HostServer, path: str, slot: int | str | None = None) -> Any:
    return call(server, "GET", path, slot=slot)


def call(server: HostServer, method: str, path: str, body: Any = None, slot: int | str | None = None) -> Any:
    headers = {} if slot is None else {"X-TARGET-GPU": str(slot)}
    status, reply = server.request(method, path, body, headers=headers)
    assert status == 200, reply
    return reply


def gpu_ids_in_queue(server: HostServer) -> dict[str, Any]:
    queue = get(server, "/queue")
    return {item[1]: item[3]["gpu_id"] for item in (*queue["queue_running"], *queue["queue_pending"])}


def finished(server: HostServer, ids: Sequence[str]) -> list[int]:
    """The jobs' positions in `ids`, in the order in which they ended."""
    server.wait(ids)
    return [ids.index(job_id) for job_id in get(server, "/history") if job_id in ids]


# Where a job goes.


@pytest.mark.parametrize("path", ["/prompt", "/api/prompt"])
@pytest.mark.parametrize("slot", SLOTS)
def test_the_header_names_the_slot(server: HostServer, slot: int, path: str) -> None:
    reply = call(server, "POST", path, {"prompt": where()}, slot)
    job_id = reply["prompt_id"]
    assert reply["gpu_id"] == slot
    entry = server.wait([job_id])[job_id]
    assert (entry["gpu_id"], entry["prompt"][3]["gpu_id"]) == (slot, slot)
    seen = json.loads(shown(entry))
    there = server.slot_there(slot)
    assert (seen["slot"], seen["thread"]) == (there, f"slot-{there}-cpu")
    assert (seen["currently_running"], seen["last_prompt_id"]) == (1, job_id)


@pytest.mark.parametrize("value", [0, 2, "1", " 2 "])
def test_the_body_names_the_slot(server: HostServer, value: int | str) -> None:
    reply = server.submit(where(), extra_data={"target_gpu": value})
    assert reply["gpu_id"] == int(value)
    seen = json.loads(shown(server.wait([reply["prompt_id"]])[reply["prompt_id"]]))
    assert seen["slot"] == server.slot_there(int(value))


def test_the_header_wins_over_the_body(server: HostServer) -> None:
    with held(server, 0):
        named = server.submit(where(), 2, extra_data={"target_gpu": 0})
        auto = server.submit(where(), "auto", extra_data={"target_gpu": 0})
        assert (named["gpu_id"], auto["gpu_id"]) == (2, None)
        entries = server.wait([named["prompt_id"], auto["prompt_id"]])
    assert entries[named["prompt_id"]]["gpu_id"] == 2
    assert entries[auto["prompt_id"]]["gpu_id"] in (1, 2)


@pytest.mark.parametrize("target", NO_TARGET, ids=str)
def test_without_a_target_the_slot_is_known_once_one_takes_the_job(server: HostServer, target: JSON) -> None:
    with held(server, *SLOTS) as running, server.websocket() as client:
        reply = server.submit(hold(), client_id=client.client_id, **target)
        job_id = reply["prompt_id"]
        assert reply["gpu_id"] is None
        assert gpu_ids_in_queue(server)[job_id] is None
        assert [item[1] for item in get(server, "/queue/all")["unassigned"]] == [job_id]
        release(server, running[2])
        started = client.wait_for(lambda event: event["data"].get("prompt_id") == job_id)
        assert started["data"]["gpu_id"] == 2
        assert gpu_ids_in_queue(server)[job_id] == 2
        assert get(server, "/queue/all")["queues"][2]["running"] == [job_id]
        assert release(server, job_id)[job_id]["gpu_id"] == 2
        assert client.wait_for_end(job_id)["data"]["gpu_id"] == 2


@pytest.mark.parametrize(
    ("target", "placed"),
    [({}, 0), ({"slot": 1}, 1), ({"extra_data": {"target_gpu": 1}}, 1), *((one, None) for one in NO_TARGET[1:3])],
    ids=str,
)
def test_a_default_slot_takes_what_has_no_target(
    first_by_default: HostServer, target: JSON, placed: int | None
) -> None:
    server = first_by_default
    with held(server, 0) as running:
        reply = server.submit(where(), **target)
        assert reply["gpu_id"] == placed
        if placed == 0:
            assert get(server, "/queue/all")["queues"][0]["pending"] == [reply["prompt_id"]]
            release(server, *running)
        entry = server.wait([reply["prompt_id"]])[reply["prompt_id"]]
    assert entry["gpu_id"] == (1 if placed is None else placed)


@pytest.mark.parametrize(("target", "busy"), [(2, []), (None, [0])])
def test_a_job_that_queues_itself_again_stays_on_its_slot(
    server: HostServer, target: int | None, busy: list[int]
) -> None:
    run_on_each(server, [quick(slot) for slot in SLOTS])
    again = {"again": node("CPTRequeue", times=3), "out": node("CPTOut", value=["again", 0])}
    with held(server, *busy):
        first = server.submit(again, target)["prompt_id"]
        ids = [first + "+" * count for count in range(4)]
        entries = server.wait(ids)
    assert [shown(entries[job_id]) for job_id in ids] == [3, 2, 1, 0]
    ran_on = {entry["gpu_id"] for entry in entries.values()}
    assert len(ran_on) == 1
    assert ran_on <= ({1, 2} if target is None else {target})


@pytest.mark.parametrize("targets", [(0, 1), (2, 0), (None, None), (1, None)], ids=str)
def test_jobs_of_two_slots_run_at_the_same_time(server: HostServer, targets: tuple[int | None, ...]) -> None:
    key = new_key()
    ids = [server.submit(meet(key, 2), slot)["prompt_id"] for slot in targets]
    entries = server.wait(ids)
    assert {outcome(entry) for entry in entries.values()} == {"success"}
    assert len({entry["gpu_id"] for entry in entries.values()}) == 2


def test_jobs_of_one_slot_and_of_stock_never_run_at_the_same_time(server: HostServer, stock: HostServer) -> None:
    for host, slot in ((server, 1), (stock, None)):
        key = new_key()
        ids = [host.submit(meet(key, 2, timeout=0.5), slot)["prompt_id"] for _ in range(2)]
        errors = [message(entry, "execution_error") for entry in host.wait(ids).values()]
        assert ["1 of 2 jobs" in error["exception_message"] for error in errors] == [True, True]


# In what order jobs run.


def test_own_jobs_and_jobs_for_any_slot_run_by_number_then_arrival(server: HostServer) -> None:
    jobs = [(5, None), (1, 0), (3, "auto"), (1, None), (2.5, 0), (-1, None), (3, 0), (-1, 0), (1, None)]
    with held(server, *SLOTS) as running:
        ids = [server.submit(quick(i), slot, number=number)["prompt_id"] for i, (number, slot) in enumerate(jobs)]
        release(server, running[0])
        order = finished(server, ids)
    assert order == sorted(range(len(jobs)), key=lambda index: jobs[index][0])


def test_front_and_numbers_order_jobs_as_on_stock(server: HostServer, stock: HostServer) -> None:
    front, back = {"front": True}, {"front": False}
    bodies: list[JSON] = [{}, front, {}, back, front, {"number": 0.5}, {"number": -1e9}, {}]
    orders = []
    for host, slots in ((server, SLOTS), (stock, [0])):
        host.run(quick(0))  # so that 0 is no job's number any more
        with held(host, *slots) as running:
            targets = [(None, 0)[index % 2] for index in range(len(bodies))]
            ids = [host.submit(quick(i), targets[i], **body)["prompt_id"] for i, body in enumerate(bodies)]
            release(host, running[0])
            orders.append(finished(host, ids))
    assert orders[0] == orders[1] == [6, 4, 1, 5, 0, 2, 3, 7]


def test_neither_jobs_with_nor_without_a_target_starve(server: HostServer) -> None:
    """From full queues, a slot runs its own jobs and those for any slot in the order in which they came."""
    targets = [*SLOTS, *SLOTS, None, *SLOTS, *SLOTS, None, None, None, None, 2, None, None, *SLOTS, None] * 4
    with held(server, *SLOTS):
        ids = [server.submit(quick(i), slot, number=0)["prompt_id"] for i, slot in enumerate(targets)]
    entries = server.wait(ids)
    order = finished(server, ids)
    for slot in SLOTS:
        taken = [index for index in order if entries[ids[index]]["gpu_id"] == slot]
        assert {targets[index] for index in taken} <= {None, slot}
        assert taken == sorted(taken)


def test_1000_jobs_run_once_each(server: HostServer) -> None:
    before = counters(server)
    with server.websocket() as client, ThreadPoolExecutor(4) as pool:
        targets = [None, *SLOTS] * MANY
        jobs = [(quick(10**6 + i), targets[i], client.client_id) for i in range(MANY)]
        ids = [reply["prompt_id"] for reply in pool.map(lambda job: server.submit(*job), jobs)]
        await_idle(server)
        last = server.submit(quick(1), 0, client.client_id)["prompt_id"]
        client.wait_for_end(last)  # The events of one client keep their order: by now all have come.
        ends = Counter(event["data"]["prompt_id"] for event in client.of_type("execution_success"))
    history = get(server, "/history")
    assert [shown(history[job_id]) for job_id in ids] == [10**6 + i for i in range(MANY)]
    assert ends == Counter([*ids, last])
    ran = Counter(("jobs_total", str(history[job_id]["gpu_id"]), "succeeded") for job_id in (*ids, last))
    assert counters(server) - before == ran
    assert len(ran) == NUM_SLOTS


# What the queue's routes show and change.


@dataclass
class Full:
    """A job that must not end on every slot, one that waits for it, and one that waits for any slot."""

    running: list[str]
    waiting: list[str]
    auto: str


@contextmanager
def full(server: HostServer) -> Iterator[Full]:
    with held(server, *SLOTS) as running:
        waiting = [server.submit(quick(slot), slot)["prompt_id"] for slot in SLOTS]
        yield Full(running, waiting, server.submit(quick(NUM_SLOTS))["prompt_id"])
        call(server, "POST", "/queue", {"clear": True})


def test_the_queue_of_a_slot_and_of_all(server: HostServer) -> None:
    with full(server) as jobs:
        for slot in SLOTS:
            assert queue_ids(server, slot) == ([jobs.running[slot]], [jobs.waiting[slot]])
        for every in (None, "auto"):
            running, waiting = queue_ids(server, every)
            assert (running, sorted(waiting)) == (jobs.running, sorted([*jobs.waiting, jobs.auto]))


@pytest.mark.parametrize("path", ["/queue", "/api/queue"])
def test_clearing_a_slots_queue_and_all(server: HostServer, path: str) -> None:
    with full(server) as jobs:
        call(server, "POST", path, {"clear": True}, slot=1)
        left = [jobs.auto, jobs.waiting[0], jobs.waiting[2]]
        assert sorted(queue_ids(server)[1]) == sorted(left)
        call(server, "POST", path, {"clear": True}, slot="auto")
        assert queue_ids(server) == (jobs.running, [])
    assert not {*jobs.waiting, jobs.auto} & set(get(server, "/history"))


@pytest.mark.parametrize("path", ["/queue", "/api/queue"])
def test_deleting_from_a_slots_queue_and_from_all(server: HostServer, path: str) -> None:
    with full(server) as jobs:
        everything = {"delete": [*jobs.waiting, jobs.auto, *jobs.running]}
        call(server, "POST", path, everything, slot=2)
        assert sorted(queue_ids(server)[1]) == sorted([*jobs.waiting[:2], jobs.auto])
        call(server, "POST", path, {"delete": [jobs.auto, jobs.waiting[0]]})
        assert queue_ids(server) == (jobs.running, [jobs.waiting[1]])
        assert get(server, "/queue/all")["total_pending"] == 1


@pytest.mark.parametrize(("slot", "freed"), [(1, {1}), (None, {0, 1, 2}), ("auto", {0, 1, 2})])
@pytest.mark.parametrize("path", ["/free", "/api/free"])
def test_freeing_memory_empties_the_caches_of_a_slot_or_of_all(
    server: HostServer, path: str, slot: int | str | None, freed: set[int]
) -> None:
    jobs = [quick(50)] * NUM_SLOTS
    run_on_each(server, jobs)
    assert [uncached(entry) for entry in run_on_each(server, jobs)] == [False] * NUM_SLOTS
    call(server, "POST", path, {"free_memory": True}, slot)
    # A slot frees before the next job, or after it when that one was there first.
    soon, later = ([uncached(entry) for entry in run_on_each(server, jobs)] for _ in range(2))
    assert {i for i in SLOTS if soon[i] or later[i]} == freed


def uncached(entry: JSON) -> bool:
    return not message(entry, "execution_cached")["nodes"]


PARTS = 3  # of a checkpoint that are loaded


def test_unloading_models_of_a_slot_and_the_models_shown(server: HostServer) -> None:
    entries = run_on_each(server, [txt2img(1, steps=1), txt2img(2, steps=1)])
    assert [outcome(entry) for entry in entries] == ["success", "success"]
    before: list[list[JSON]] = []

    def are_shown() -> bool:
        before[:] = models(server)  # A process tells them every second, so they may be those of a moment in the job.
        return [len(of_slot) for of_slot in before] == [PARTS, PARTS, 0]

    eventually(are_shown, f"{PARTS} are not shown")
    assert all(set(model) == {"name", "loaded_bytes"} for of_slot in before for model in of_slot)
    assert all(model["name"] and model["loaded_bytes"] > 0 for model in before[1])
    call(server, "POST", "/free", {"unload_models": True}, slot=0)
    server.run(quick(60), 0)
    server.run(quick(61), 0)  # By now the slot has done what was asked for before the first of them.
    eventually(lambda: models(server) == [[], before[1], []], "they are shown still")
    call(server, "POST", "/free", {"unload_models": True, "free_memory": True})
    for number in (62, 63):
        run_on_each(server, [quick(number)] * NUM_SLOTS)
    eventually(lambda: models(server) == [[], [], []], "they are shown still")


def models(server: HostServer) -> list[list[JSON]]:
    return [queue["models"] for queue in get(server, "/queue/all")["queues"]]


# The pages that only this server has.


def test_queue_all(server: HostServer) -> None:
    with server.websocket() as watcher:
        running = [start_held(server, watcher, slot) for slot in (0, 2)]
        waiting = [server.submit(quick(number), 0)["prompt_id"] for number in range(2)]
        reply = get(server, "/queue/all")
        scoped = [get(server, "/queue", slot) for slot in SLOTS]
        call(server, "POST", "/queue", {"clear": True})
        release(server, *running)
    queues = reply.pop("queues")
    totals = {"num_gpus": NUM_SLOTS, "total_running": 2, "total_pending": 2}
    assert reply == {
        "mode": "multi-gpu",
        "unassigned": [],
        "waiting_to_run_alone": [],
        "kinds": None,
        "takes_shares": True,
        **totals,
    }
    for slot, queue in enumerate(queues):
        assert set(queue.pop("metrics")) > {"jobs_succeeded", "jobs_failed", "jobs_interrupted", "worker_restarts"}
        vram = queue.pop("vram")
        assert vram["total_bytes"] > vram["free_bytes"] > 0
        assert isinstance(queue.pop("models"), list)
        assert {name: queue.pop(name) for name in ("queue_running", "queue_pending")} == scoped[slot]
        assert (queue.pop("worker") is None) == (server.kinds[slot] == "thread")
        graphs = queue.pop("graphs")
        assert (graphs["on"], "computes on cpu" in graphs["reason"]) == (False, True)
        assert queue == {
            "gpu_id": slot,
            "device": "cpu",
            "device_name": "cpu",
            "state": ["running", "idle", "running"][slot],
            "why_suspended": None,
            "is_stalled": False,
            "kind": server.kinds[slot],
            "health": "ok",
            "error": None,
            "running": [[running[0]], [], [running[1]]][slot],
            "pending": [waiting, [], []][slot],
            "running_count": [1, 0, 1][slot],
            "pending_count": [2, 0, 0][slot],
            "cannot_run": {},
        }


def test_queue_all_and_its_unassigned_jobs_in_the_hosts_shape(server: HostServer) -> None:
    with full(server) as jobs:
        reply, queue = get(server, "/queue/all"), get(server, "/queue")
        assert (reply["total_running"], reply["total_pending"]) == (NUM_SLOTS, NUM_SLOTS + 1)
        assert reply["unassigned"] == [item for item in queue["queue_pending"] if item[1] == jobs.auto]
        small = get(server, "/debug/queues")
        assert small["queues"] == [{"gpu_id": slot, "queued": 1, "running": 1} for slot in SLOTS]


def samples(server: HostServer, path: str = "/metrics") -> dict[tuple[str, ...], float]:
    """Our metrics by name and by those of the labels gpu_id, outcome and kind that they have."""
    found: dict[tuple[str, ...], float] = {}
    for family in text_string_to_metric_families(get(server, path)):
        for one in family.samples:
            labels = [one.labels[name] for name in ("gpu_id", "outcome", "kind") if name in one.labels]
            assert one.labels.get("device", "cpu") == "cpu"
            found[(one.name.removeprefix("comfy_parallel_"), *labels)] = one.value
    return found


def counters(server: HostServer) -> Counter[tuple[str, ...]]:
    """How many jobs ended how on which slot."""
    return Counter({key: int(value) for key, value in samples(server).items() if key[0] == "jobs_total"})


def test_metrics_agree_with_what_ran(server: HostServer) -> None:
    before = samples(server)
    failing = {"fail": node("CPTFail", message="failed"), "out": node("CPTOut", value=["fail", 0])}
    with full(server) as jobs:
        busy = samples(server)
        release(server, jobs.running[0])
        server.wait([jobs.waiting[0], jobs.auto])
    for workflow, slot in ((quick(70), 1), (quick(71), 1), (failing, 2), (failing, 2), (failing, 0)):
        server.run(workflow, slot)
    after = samples(server)
    assert [busy["slot_running", str(slot)] for slot in SLOTS] == [1] * NUM_SLOTS
    assert [busy["jobs_pending", name] for name in ("0", "1", "2", "auto")] == [1] * 4
    assert [after["slot_running", str(slot)] for slot in SLOTS] == [0] * NUM_SLOTS
    assert [after["jobs_pending", name] for name in ("0", "1", "2", "auto")] == [0] * 4
    gained = {key: after[key] - before[key] for key in after if key[0] == "jobs_total"}
    # The first slot, free before the others, has also run the job that waited for it and the one for any slot.
    assert gained == {
        ("jobs_total", "0", "succeeded"): 2, ("jobs_total", "0", "failed"): 1, ("jobs_total", "0", "interrupted"): 1,
        ("jobs_total", "1", "succeeded"): 2, ("jobs_total", "1", "failed"): 0, ("jobs_total", "1", "interrupted"): 1,
        ("jobs_total", "2", "succeeded"): 0, ("jobs_total", "2", "failed"): 2, ("jobs_total", "2", "interrupted"): 1,
    }  # fmt: skip
    for name in ("busy_seconds_total", "wait_seconds_total"):
        assert all(after[name, str(slot)] > before[name, str(slot)] for slot in SLOTS)
    assert [after[name, "0"] for name in ("out_of_memory_total", "worker_restarts_total")] == [0, 0]
    assert after["device_memory_bytes", "total"] > after["device_memory_bytes", "free"] > 0
    shown_too = [queue["metrics"] for queue in get(server, "/queue/all")["queues"]]
    for kind in ("succeeded", "failed", "interrupted"):
        totals = [after["jobs_total", str(slot), kind] for slot in SLOTS]
        assert [one[f"jobs_{kind}"] for one in shown_too] == totals


# The same under /api, and as on stock.

SAME_AS_STOCK = ("/features", "/embeddings", "/extensions", "/models", "/models/checkpoints", "/object_info")
OUR_SCRIPT = "/extensions/comfy_parallel/comfy_parallel.js"
OWN_PAGES = ("/queue", "/queue/all", "/debug/queues", "/history", "/prompt")
HISTORY_PAGES = (
    "", "?max_items=2", "?max_items=2&offset=1", "?max_items=9&offset=4", "?offset=3", "?offset=0", "?offset=-1",
    "?max_items=0", "?max_items=3&offset=-1", "?max_items=2&offset=99", "?max_items=-1",
)  # fmt: skip
REFUSED: tuple[JSON, ...] = (
    {},
    {"prompt": {}},
    {"prompt": {"out": node("NoSuchNode")}},
    {"prompt": {"out": node("CPTOut")}},
    {"prompt": {"value": node("CPTConstInt", value=1)}},
    {"prompt": {**quick(1), "value": node("CPTConstInt", value=-1)}},
)


def shape(value: Any) -> Any:
    """Names and types of a reply, without what we add."""
    if isinstance(value, dict):
        return {name: shape(one) for name, one in value.items() if name != "gpu_id"}
    return [shape(one) for one in value] if isinstance(value, list) else type(value).__name__


@pytest.mark.parametrize("path", OWN_PAGES)
def test_our_pages_are_the_same_under_api(server: HostServer, path: str) -> None:
    with full(server):
        plain, twin = (get(server, prefix + path) for prefix in ("", "/api"))
        for queue in (*plain.get("queues", ()), *twin.get("queues", ())):
            queue.pop("vram", None)
        assert plain == twin
        assert queue_ids(server, 1) == ids_of(get(server, "/api/queue", 1))


def ids_of(queue: JSON) -> tuple[list[str], list[str]]:
    return [item[1] for item in queue["queue_running"]], [item[1] for item in queue["queue_pending"]]


def test_metrics_are_the_same_under_api(server: HostServer) -> None:
    plain, twin = (samples(server, path) for path in ("/metrics", "/api/metrics"))
    memory = {key for key in plain if key[0] in ("device_memory_bytes", "vram_free_bytes", "vram_used_bytes")}
    assert set(plain) == set(twin)
    assert {key: plain[key] for key in set(plain) - memory} == {key: twin[key] for key in set(twin) - memory}


@pytest.mark.parametrize("path", SAME_AS_STOCK)
def test_pages_that_tell_of_no_job_are_stocks(server: HostServer, stock: HostServer, path: str) -> None:
    for host in (server, stock):
        get(host, path)  # The first reading of some node's inputs makes a folder, which the next one shows.
    plain, twin, stocks = get(server, path), get(server, f"/api{path}"), get(stock, path)
    assert plain == twin
    assert without_ours(plain) == stocks


def without_ours(page: Any) -> Any:
    """What a page tells, but for the nodes and the script that we add."""
    if not isinstance(page, dict):
        return [told for told in page if told != OUR_SCRIPT]
    return {name: told for name, told in page.items() if not is_our_node(told)}


def is_our_node(told: Any) -> bool:
    return isinstance(told, dict) and str(told.get("category", "")).partition("/")[0] in ("multigpu", "parallel")


def test_replies_keep_stocks_shape(server: HostServer, stock: HostServer) -> None:
    replies = []
    for host, slots in ((server, SLOTS), (stock, [0])):
        with held(host, *slots) as running:
            accepted = host.submit(quick(80), 0, "somebody", extra_data={"extra_pnginfo": {"workflow": {}}})
            queue = get(host, "/queue", 0)
            assert ids_of(queue) == (running[:1], [accepted["prompt_id"]])
            pages = [get(host, path) for path in ("/prompt", "/system_stats")]
        entry = host.wait([accepted["prompt_id"]])[accepted["prompt_id"]]
        history = get(host, f"/history/{accepted['prompt_id']}")
        assert history == {accepted["prompt_id"]: entry}
        replies.append([accepted, queue, *pages, entry])
    ours, stocks = replies
    assert [shape(reply) for reply in ours] == [shape(reply) for reply in stocks]
    assert ours[-1]["outputs"] == stocks[-1]["outputs"]
    assert set(ours[0]) - set(stocks[0]) == {"gpu_id"}
    assert set(ours[-1]) - set(stocks[-1]) == {"gpu_id"}
    assert set(ours[1]["queue_pending"][0][3]) - set(stocks[1]["queue_pending"][0][3]) == {"gpu_id"}


def test_a_clients_events_are_stocks(server: HostServer, stock: HostServer) -> None:
    told = []
    for host in (server, stock):
        with host.websocket() as client:
            job_id = host.submit(quick(81), 1, client.client_id)["prompt_id"]
            client.wait_for(lambda event: event["type"] == "executing" and event["data"]["node"] is None)
            told.append([shape(event) for event in client.events if event["data"].get("prompt_id") == job_id])
    assert told[0] == told[1]
    assert [event["type"] for event in told[0]][0] == "str"


@pytest.mark.parametrize("body", REFUSED, ids=str)
def test_what_the_host_refuses_it_refuses_as_stock_does(server: HostServer, stock: HostServer, body: JSON) -> None:
    ours, stocks = (host.request("POST", "/prompt", body) for host in (server, stock))
    assert ours == stocks
    assert ours[0] == 400


def test_one_history_for_all_slots_is_paged_as_on_stock(server: HostServer, stock: HostServer) -> None:
    pages = []
    for host in (server, stock):
        call(host, "POST", "/history", {"clear": True})
        assert get(host, "/history") == {}
        ids = []
        for number in range(7):
            ids.append(host.submit(quick(number), number % NUM_SLOTS)["prompt_id"])
            host.wait(ids)
        pages.append([[ids.index(job_id) for job_id in get(host, f"/history{page}")] for page in HISTORY_PAGES])
        assert [[*get(host, f"/api/history{page}")] for page in HISTORY_PAGES] == [
            [ids[index] for index in page] for page in pages[-1]
        ]
        call(host, "POST", "/history", {"delete": [ids[1], ids[5]]})
        assert [*get(host, "/history")] == [ids[index] for index in (0, 2, 3, 4, 6)]
    assert pages[0] == pages[1]
    assert pages[0][:2] == [[0, 1, 2, 3, 4, 5, 6], [5, 6]]
    assert [entry["gpu_id"] for entry in get(server, "/history").values()] == [0, 2, 0, 1, 0]


def test_the_newer_hosts_jobs_tell_their_slot(server: HostServer, stock: HostServer) -> None:
    if server.request("GET", "/api/jobs")[0] == 404:
        pytest.skip("this host has no GET /api/jobs")
    with full(server) as jobs:
        listed = {job["id"]: job for job in get(server, "/api/jobs?status=pending,in_progress")["jobs"]}
        for of_each_slot in (jobs.running, jobs.waiting):
            assert [listed[job_id]["gpu_id"] for job_id in of_each_slot] == list(SLOTS)
        assert listed[jobs.auto]["gpu_id"] is None
        assert get(server, f"/api/jobs/{jobs.running[2]}")["gpu_id"] == 2
    ours, stocks = (job_as_listed(host) for host in (server, stock))
    assert [one["gpu_id"] for one in ours] == [1, 1]
    assert [shape(one) for one in ours] == [shape(one) for one in stocks]


def job_as_listed(host: HostServer) -> list[JSON]:
    """A finished job in the list and on its own page."""
    job_id = host.submit(progress(90), 1)["prompt_id"]
    host.wait([job_id])
    listed = {job["id"]: job for job in get(host, "/api/jobs")["jobs"]}
    return [listed[job_id], get(host, f"/api/jobs/{job_id}")]
