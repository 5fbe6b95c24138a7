"""Jobs that run at once do not meet in the host's process-wide state.

`ROWS` says for each row of the hazard table which tests show it, or why none does.
"""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from comfy_parallel import patches
from comfy_parallel.patching import scan
from comfy_parallel.patching.sources import Checkout
from tests.conftest import REPO_DIR
from tests.host import workflows
from tests.host.conftest import ABOUT_ONE_PROCESS, MakeServer
from tests.host.jobs import new_key, outcome, quick, run_on_each, shown
from tests.host.server import NODES_DIR, HostServer
from tests.host.workflows import Workflow, node

pytestmark = pytest.mark.host

SLOTS = "cpu,cpu,cpu,cpu"
NUM_SLOTS = 4
ROUNDS = 40
CORES = os.cpu_count() or 1


@pytest.fixture(scope="module")
def server(make_module_server: MakeServer) -> HostServer:
    return make_module_server(slots=SLOTS, env={"OMP_NUM_THREADS": str(CORES)})


@pytest.fixture(scope="module")
def stock(make_module_server: MakeServer, tmp_path_factory: pytest.TempPathFactory) -> HostServer:
    """A host without this repository, with the test nodes."""
    base_dir = tmp_path_factory.mktemp("stock")
    (base_dir / "custom_nodes").mkdir()
    (base_dir / "custom_nodes" / NODES_DIR.name).symlink_to(NODES_DIR, target_is_directory=True)
    return make_module_server(base_dir, slots=None, link=False)


def looking(class_type: str, **inputs: Any) -> Workflow:
    return {"look": node(class_type, **inputs), "out": node("CPTOut", value=["look", 0])}


def seen_in(entry: dict[str, Any]) -> Any:
    assert outcome(entry) == "success", entry["status"]
    return json.loads(shown(entry))


def look_at_once(server: HostServer, class_type: str, inputs: Sequence[dict[str, Any]]) -> list[Any]:
    """Run one node of a class per slot, all at the same time; what each saw."""
    key = new_key()
    jobs = [looking(class_type, key=key, parties=len(inputs), **own) for own in inputs]
    return [seen_in(entry) for entry in run_on_each(server, jobs)]


def look_alone(server: HostServer, class_type: str, slot: int | None = None, **inputs: Any) -> Any:
    return seen_in(server.run(looking(class_type, key=new_key(), parties=1, **inputs), slot))


# The queue as nodes read it.


def test_a_node_sees_its_own_job_as_the_only_running_one(server: HostServer) -> None:
    key = new_key()
    workflow = looking("CPTQueueSeen", key=key, parties=NUM_SLOTS)
    ids = [server.submit(workflow, slot)["prompt_id"] for slot in range(NUM_SLOTS)]
    assert {job: seen_in(entry) for job, entry in server.wait(ids).items()} == {job: [job, job] for job in ids}


def test_a_job_that_a_job_queues_runs_on_the_same_slot(server: HostServer) -> None:
    times = 3
    workflow = {"again": node("CPTRequeue", times=times), "out": node("CPTOut", value=["again", 0])}
    first = {server.submit(workflow, slot)["prompt_id"]: slot for slot in range(NUM_SLOTS)}
    ran_on = {job_id + "+" * count: slot for job_id, slot in first.items() for count in range(times + 1)}
    assert {job_id: entry["gpu_id"] for job_id, entry in server.wait(ran_on).items()} == ran_on


def test_freeing_memory_reaches_every_slot(server: HostServer) -> None:
    look_at_once(server, "CPTKeeps", [{"keep": True}] * NUM_SLOTS)
    assert server.request("POST", "/free", {"unload_models": True})[0] == 200
    # A slot's worker handles the flag before this job or right after it.
    run_on_each(server, [quick(slot) for slot in range(NUM_SLOTS)])
    for seen in look_at_once(server, "CPTKeeps", [{"keep": False}] * NUM_SLOTS):
        assert seen == {"listed": False, "bytes": 0}


# Execution.


def test_a_node_that_interrupts_its_own_job_is_the_only_one_to_see_it(server: HostServer) -> None:
    roles = ["interrupter", *["other"] * (NUM_SLOTS - 1)]
    for role, seen in zip(
        roles, look_at_once(server, "CPTInterrupts", [{"role": role} for role in roles]), strict=True
    ):
        assert seen == {"during": [role == "interrupter"] * 2, "after": [False, False]}


def test_progress_and_context_are_those_of_the_own_job(server: HostServer) -> None:
    key = new_key()
    ids = []
    for slot in range(NUM_SLOTS):
        look, out = f"look{slot}", f"out{slot}"
        inputs = {"key": key, "parties": NUM_SLOTS}
        workflow = {look: node("CPTJobState", **inputs), out: node("CPTOut", value=[look, 0])}
        ids.append(server.submit(workflow, slot, client_id=f"client{slot}")["prompt_id"])
    entries = server.wait(ids)
    for slot, job_id in enumerate(ids):
        seen = json.loads(entries[job_id]["outputs"][f"out{slot}"]["value"][0])
        assert seen["registry"] == seen["main_registry"] == seen["last_prompt_id"] == job_id
        assert seen["client_id"] == f"client{slot}"
        assert seen["context"] == [job_id, f"look{slot}"]
        assert seen["node_id"] == seen["last_node_id"] == f"look{slot}"
        assert set(seen["registry_nodes"]) <= {f"look{slot}", f"out{slot}"}


@ABOUT_ONE_PROCESS
def test_each_slot_has_its_own_executor_node_objects_and_event_loop(server: HostServer) -> None:
    rounds = [look_at_once(server, "CPTJobState", [{}] * NUM_SLOTS) for _ in range(3)]
    for seen in rounds:
        assert len({look["loop"] for look in seen}) == NUM_SLOTS
        assert len({look["instance"] for look in seen}) == NUM_SLOTS
    for slot in range(NUM_SLOTS):  # the host keeps a node's object from one job of an executor to the next
        calls = [seen[slot]["calls"] for seen in rounds]
        assert calls == [calls[0], calls[0] + 1, calls[0] + 2]


@pytest.mark.parametrize("is_same_workflow", [False, True])
def test_expanding_nodes_get_their_own_prefix_and_values(server: HostServer, is_same_workflow: bool) -> None:
    ids: dict[str, tuple[str, int]] = {}
    for number in range(ROUNDS):
        for slot in range(NUM_SLOTS):
            name = "expand" if is_same_workflow else f"expand{slot}of{number}"
            base = 100 * (NUM_SLOTS * number + slot)
            workflow = {
                name: node("CPTExpand", base=base, count=3 + slot),
                "out": node("CPTOut", value=[name, 0]),
            }
            ids[server.submit(workflow, slot)["prompt_id"]] = (name, base + 3 + slot)
    for job_id, entry in server.wait(ids).items():
        name, expected = ids[job_id]
        assert shown(entry) == expected
        (prefix,) = entry["outputs"][name]["prefix"]
        assert prefix.startswith(f"{name}.")


def has(host_dir: Path, module: str, name: str) -> bool:
    """Whether this host's source defines a name; for state that only some versions have."""
    path = host_dir / f"{module}.py"
    if not path.is_file():
        return False
    tree = ast.parse(path.read_text())
    return any(getattr(child, "name", None) == name for child in ast.walk(tree))


def test_a_jobs_preview_method_is_its_own(server: HostServer, host_dir: Path) -> None:
    if not has(host_dir, "latent_preview", "set_preview_method"):
        pytest.skip("this host has one preview method for all jobs")
    methods = ["latent2rgb", "none", "taesd", None]
    key = new_key()
    ids = []
    for slot, method in enumerate(methods):
        extra = {} if method is None else {"extra_data": {"preview_method": method}}
        workflow = looking("CPTPreviewMethod", key=key, parties=len(methods))
        ids.append(server.submit(workflow, slot, **extra)["prompt_id"])
    entries = server.wait(ids)
    assert [seen_in(entries[job_id]) for job_id in ids] == ["latent2rgb", "none", "taesd", "none"]


def test_the_end_of_a_node_leaves_the_other_slots_state(server: HostServer, host_dir: Path) -> None:
    prefetches = has(host_dir, "comfy/model_prefetch", "cleanup_prefetch_queues")
    if not (prefetches and has(host_dir, "comfy/memory_management", "set_ram_cache_release_state")):
        pytest.skip("this host keeps no such state")
    keeper, other = look_at_once(server, "CPTNodeEnd", [{"role": "keeper"}, {"role": "other"}])
    assert keeper == {"cross_step_state": True, "prefetch_queue": True, "released": 7, "headroom": 10}
    assert other == {"cross_step_state": False, "prefetch_queue": False, "released": 0, "headroom": 0}


def test_a_resting_slot_restores_no_function_that_another_slots_job_uses(server: HostServer) -> None:
    key = new_key()
    hooking = server.submit(looking("CPTHooks", key=key, parties=2, hook=True), 0)["prompt_id"]
    # A worker does its housekeeping at once after POST /free, and a slot's jobs run in order: when the last
    # of these meets the first slot's job, the second slot has rested after the one before.
    server.wait([server.submit(looking("CPTIsHooked", key=f"{key} hooked", parties=2), 1)["prompt_id"]])
    server.request("POST", "/free", {"unload_models": True}, headers={"X-TARGET-GPU": "1"})
    server.run(looking("CPTIsHooked", key=new_key(), parties=1), 1)
    server.submit(looking("CPTIsHooked", key=f"{key} others have rested", parties=2), 1)
    assert seen_in(server.wait([hooking])[hooking]) is True


def test_functions_are_restored_when_all_slots_rest(server: HostServer) -> None:
    look_alone(server, "CPTHooks", 0, hook=True)
    server.request("POST", "/free", {"unload_models": True}, headers={"X-TARGET-GPU": "0"})
    look_alone(server, "CPTIsHooked", 0)
    assert look_alone(server, "CPTIsHooked", 0) is False


@ABOUT_ONE_PROCESS
def test_the_file_scan_rests_while_any_slot_works(server: HostServer, host_dir: Path) -> None:
    if not has(host_dir, "app/assets/seeder", "_AssetSeeder"):
        pytest.skip("this host scans no files while it runs")
    assert look_at_once(server, "CPTSeeder", [{"role": "keeper"}, {"role": "other"}]) == ["RUNNING", "PAUSED"]
    assert look_alone(server, "CPTSeeder", role="other") == "RUNNING"


@ABOUT_ONE_PROCESS
def test_slots_register_their_files_one_after_the_other(server: HostServer, host_dir: Path) -> None:
    if not has(host_dir, "app/assets/services/ingest", "register_output_files"):
        pytest.skip("this host registers no files")
    assert look_at_once(server, "CPTRegisters", [{}] * 2) == [False, False]


# Threads.


def test_threads_of_a_job_are_in_its_slot(server: HostServer) -> None:
    jobs = [{"look": node("CPTThreads"), "out": node("CPTOut", value=["look", 0])}] * NUM_SLOTS
    for slot, entry in enumerate(run_on_each(server, jobs)):
        assert {name: where["slot"] for name, where in seen_in(entry).items()} == dict.fromkeys(
            ("node", "thread", "pool", "run_in_executor", "to_thread", "task"), server.slot_there(slot)
        )


def test_threads_of_threads_and_shared_pools_are_in_the_jobs_slot(server: HostServer) -> None:
    for _ in range(3):  # the shared pool's thread is the same each time, whoever's job made it start
        for slot, seen in enumerate(look_at_once(server, "CPTMoreThreads", [{}] * NUM_SLOTS)):
            assert seen.pop("graph_prefix").startswith("look.")
            there = server.slot_there(slot)
            assert [where["slot"] for where in seen.pop("map")] == [there] * 4
            assert {name: where["slot"] for name, where in seen.items()} == dict.fromkeys(seen, there)


def test_intra_op_threads(make_server: MakeServer) -> None:
    """The cores are shared out among the slots."""
    server = make_server(slots="cpu,cpu", env={"OMP_NUM_THREADS": None})
    assert intra_op_threads(server, 2) == [max(1, CORES // 2)] * 2


def test_intra_op_threads_are_the_users_choice(server: HostServer) -> None:
    assert intra_op_threads(server, NUM_SLOTS) == [CORES] * NUM_SLOTS


def intra_op_threads(server: HostServer, num_slots: int) -> list[int]:
    jobs = [{"look": node("CPTWhere"), "out": node("CPTOut", value=["look", 0])}] * num_slots
    return [seen_in(entry)["torch_threads"] for entry in run_on_each(server, jobs)]


# Models.


def test_slots_that_load_at_once_keep_their_lists_apart(server: HostServer) -> None:
    rounds = 100
    for seen in look_at_once(server, "CPTLoads", [{"rounds": rounds}] * NUM_SLOTS):
        assert seen == {"loads": 5 * rounds, "missing": 0, "foreign": 0}


@ABOUT_ONE_PROCESS
def test_slots_that_load_different_checkpoints_at_once_hold_their_own(server: HostServer) -> None:
    key = new_key()
    jobs = []
    for slot in range(NUM_SLOTS):
        workflow = workflows.txt2img(slot, ckpt="ab"[slot % 2] + ".safetensors", steps=1)
        # After sampling, so that this job's models are loaded.
        workflow["meet"] = node("CPTRendezvous", key=key + "after", parties=NUM_SLOTS, timeout=240.0)
        workflow["look"] = node("CPTLoaded", key=key, parties=NUM_SLOTS, model=["ckpt", 0])
        workflow["out"] = node("CPTOut", value=["look", 0])
        jobs.append(workflow)
    seen = [seen_in(entry) for entry in run_on_each(server, jobs)]
    assert len({look["own"] for look in seen}) == NUM_SLOTS
    for attribute in ("loaded", "parameters"):
        objects = [own for look in seen for own in set(look[attribute])]
        assert len(objects) == len(set(objects))
    addresses = [set(look["addresses"]) for look in seen]
    assert addresses[0] == addresses[2], "slots with the same checkpoint share its bytes, in modules of their own"
    assert not addresses[0] & addresses[1]


@ABOUT_ONE_PROCESS
@pytest.mark.parametrize(("owner_slot", "on_loop"), [(0, False), (1, False), (0, True)])
def test_a_model_that_dies_on_another_slots_thread(server: HostServer, owner_slot: int, on_loop: bool) -> None:
    roles = ["owner", "collector"] if owner_slot == 0 else ["collector", "owner"]
    looks = look_at_once(server, "CPTCollects", [{"role": role, "on_loop": on_loop} for role in roles])
    for role, seen in zip(roles, looks, strict=True):
        assert seen["gone"]
        assert sorted(set(seen["before"])) == [f"kept by {role}"]
        assert seen["dead_before"] == (role == "owner")  # only its own slot shortens a list
        assert sorted(seen["after"]) == [f"kept by {role}", f"new of {role}"]
        assert seen["dead_after"] == 0


def test_unloading_everything_on_one_slot_leaves_the_others_models(server: HostServer) -> None:
    look_at_once(server, "CPTUnloads", [{"unload": True}] * NUM_SLOTS)  # whatever earlier jobs left
    unloads = [slot == 1 for slot in range(NUM_SLOTS)]
    for unload, seen in zip(
        unloads, look_at_once(server, "CPTUnloads", [{"unload": unload} for unload in unloads]), strict=True
    ):
        assert seen["before"] == 1
        assert seen["after"] == (0 if unload else 1)
        assert (seen["bytes"] == 0) == unload


def test_pinned_memory_is_accounted_per_slot(server: HostServer) -> None:
    rounds = 200
    for seen in look_at_once(server, "CPTPins", [{"rounds": rounds}] * NUM_SLOTS):
        assert seen["own"]
        assert seen["pinned"] == seen["entries"] == rounds
        assert seen["total"] == seen["sum"] == seen["expected"]
        assert seen["left"] == [0, 0]


def test_freeing_pinned_memory_asks_the_own_slots_models_only(server: HostServer, host_dir: Path) -> None:
    if not has(host_dir, "comfy/model_management", "free_pins"):
        pytest.skip("this host frees no pinned memory of other models")
    assert look_at_once(server, "CPTFreesPins", [{"role": "keeper"}, {"role": "other"}]) == [False, True]


def test_globals_that_are_one_per_slot(server: HostServer, host_dir: Path) -> None:
    expected = set(patched_globals(host_dir))
    assert "comfy_execution.progress:global_progress_registry" in expected
    for seen in look_at_once(server, "CPTGlobals", [{}] * NUM_SLOTS):
        assert expected - set(seen) == set()
        assert not [name for name, is_own in seen.items() if not is_own]


def patched_globals(host_dir: Path) -> Iterator[str]:
    """`module:name` of what this host's functions change and every slot is said to have its own of."""
    patched = [row for row, treatment in scan.TREATMENTS.items() if treatment == scan.PATCHED]
    paths = {path for path, _ in patched if (host_dir / path).is_file()}
    changed = {path: scan.changed_globals((host_dir / path).read_text()) for path in paths}
    for path, name in patched:
        module, _, name_there = name.rpartition(".")
        module = module or path.removesuffix(".py").replace("/", ".")
        is_global = (host_dir / f"{module.replace('.', '/')}.py").is_file()  # rather than an attribute of a class
        if name in changed.get(path, ()) and is_global and name not in SHOWN_BY_OTHER_TESTS:
            yield f"{module}:{name_there}"


# The last is kept per slot as what node packs keep: tests/unit/isolation/packs/test_loader.py.
SHOWN_BY_OTHER_TESTS = ("current_loaded_models", "interrupt_processing", "_eglGetPlatformDisplayEXT")


def test_every_global_that_the_host_changes_is_known(host_dir: Path) -> None:
    assert scan.unknown_globals(Checkout(host_dir)) == []


def test_modules_and_functions_by_two_names_are_one(server: HostServer) -> None:
    seen = look_alone(server, "CPTModules")
    assert seen == dict.fromkeys(seen, True)


# Random numbers.


def test_seeding_does_not_reach_for_the_devices_of_all_slots(server: HostServer, stock: HostServer) -> None:
    assert look_alone(stock, "CPTDefaultGenerators") == [False, []]
    assert look_alone(server, "CPTDefaultGenerators") == [True, []]


def test_100_jobs_at_once_draw_what_each_draws_alone_on_stock(server: HostServer, stock: HostServer) -> None:
    def drawn(host: HostServer) -> list[str]:
        workflows = [
            {"draw": node("CPTRandom", seed=seed % 50, rounds=8 + seed % 7), "out": node("CPTOut", value=["draw", 0])}
            for seed in range(100)
        ]
        ids = [host.submit(workflow)["prompt_id"] for workflow in workflows]
        entries = host.wait(ids)
        return [shown(entries[job_id]) for job_id in ids]

    alone = drawn(stock)
    assert len(set(alone)) == 100
    assert drawn(server) == alone


def test_every_way_to_draw_gives_what_it_gives_alone_on_stock(server: HostServer, stock: HostServer) -> None:
    seeds = range(NUM_SLOTS)
    alone = [look_alone(stock, "CPTMoreRandom", seed=seed, rounds=50) for seed in seeds]
    at_once = look_at_once(server, "CPTMoreRandom", [{"seed": seed, "rounds": 50} for seed in seeds])
    differing = {name for one, other in zip(alone, at_once, strict=True) for name in one if one[name] != other[name]}
    # Dropout takes no generator: torch draws it from the process's own, but only while training.
    assert differing <= {"dropout"}


# Files and flags.


def test_truncated_images_leave_pillows_flag_alone(server: HostServer) -> None:
    rounds = 100
    for seen in look_at_once(server, "CPTTruncated", [{"rounds": rounds}] * NUM_SLOTS):
        assert seen == {"opened": rounds, "flag": False}


def test_flags_of_torch_are_as_on_stock_after_many_jobs(server: HostServer, stock: HostServer) -> None:
    expected = look_alone(stock, "CPTFlags")
    server.run(workflows.txt2img(0, steps=1))
    for seen in look_at_once(server, "CPTFlags", [{}] * NUM_SLOTS):
        assert seen == expected


# The hazard table.

SHARED = "shared on purpose: see ARCHITECTURE.md"
SAFE = "safe as the host has it: used on its event loop only, or every writer writes the same value"
DOCUMENTED = "documented: cannot be kept apart from outside"
NOTES = {SHARED, SAFE, DOCUMENTED}

ROWS: dict[int, tuple[str, ...]] = {
    1: (
        "host/test_websockets::test_a_client_hears_of_its_own_jobs_only",
        "host/test_websockets::test_every_job_tells_its_whole_course_in_order",
    ),
    2: (
        "host/test_isolation::test_progress_and_context_are_those_of_the_own_job",
        "host/test_websockets::test_every_job_reports_its_own_progress",
    ),
    3: ("host/test_websockets::test_reconnecting_tells_a_client_where_its_own_job_is",),
    4: (
        "unit/slots/test_queues::test_a_thousand_jobs_on_four_slots_run_once_each",
        "unit/slots/test_queues::test_a_job_pinned_to_a_busy_slot_does_not_hold_up_an_idle_one",
        "unit/slots/test_queues::test_all_waiting_slots_wake_when_several_jobs_come",
    ),
    5: ("host/test_isolation::test_a_node_sees_its_own_job_as_the_only_running_one",),
    6: ("host/test_isolation::test_a_job_that_a_job_queues_runs_on_the_same_slot",),
    7: (
        "host/test_isolation::test_freeing_memory_reaches_every_slot",
        "unit/slots/test_queues::test_every_slot_gets_its_own_copy_of_a_flag",
    ),
    8: ("unit/slots/test_queues::test_slots_that_put_take_and_end_jobs_at_once_never_wait_for_each_other",),
    9: (
        "host/test_interrupts::test_ending_the_job_by_the_newer_hosts_route",
        "unit/slots/test_queues::test_interrupting_by_id_says_whether_the_job_runs",
    ),
    10: (
        "host/test_interrupts::test_an_id_ends_that_job_only",
        "host/test_interrupts::test_without_id_all_running_jobs_end_and_no_waiting_one",
    ),
    11: (SAFE,),
    12: (SAFE,),
    13: ("gpu/test_gpus::test_a_jobs_memory_is_on_its_own_gpu_only", "unit/http/test_status::test_the_whole_reply"),
    14: ("host/test_isolation::test_progress_and_context_are_those_of_the_own_job",),
    15: (
        "host/test_isolation::test_expanding_nodes_get_their_own_prefix_and_values",
        "unit/patches/test_wrappers::test_prefixes_are_counted_per_slot",
    ),
    16: (
        "host/test_interrupts::test_an_interrupt_survives_the_start_of_another_job",
        "host/test_interrupts::test_an_interrupt_between_taking_and_starting_a_job",
    ),
    17: ("host/test_isolation::test_each_slot_has_its_own_executor_node_objects_and_event_loop", SHARED),
    18: ("host/test_isolation::test_each_slot_has_its_own_executor_node_objects_and_event_loop",),
    19: (SAFE,),
    20: (
        "host/test_interrupts::test_an_id_ends_that_job_only",
        "host/test_isolation::test_a_node_that_interrupts_its_own_job_is_the_only_one_to_see_it",
    ),
    21: (
        "host/test_isolation::test_a_jobs_preview_method_is_its_own",
        "unit/patches/test_wrappers::test_the_preview_method_is_the_slots_own",
    ),
    22: (SHARED,),
    23: (
        "host/test_isolation::test_the_end_of_a_node_leaves_the_other_slots_state",
        "host/test_isolation::test_globals_that_are_one_per_slot",
    ),
    24: (
        "host/test_isolation::test_the_file_scan_rests_while_any_slot_works",
        "host/test_isolation::test_slots_register_their_files_one_after_the_other",
    ),
    25: (
        "host/test_isolation::test_a_resting_slot_restores_no_function_that_another_slots_job_uses",
        "host/test_isolation::test_functions_are_restored_when_all_slots_rest",
        SHARED,
    ),
    26: (
        "host/test_isolation::test_threads_of_threads_and_shared_pools_are_in_the_jobs_slot",
        "gpu/test_gpus::test_threads_of_a_node_compute_on_its_gpu",
    ),
    27: (SAFE,),
    28: ("host/test_isolation::test_progress_and_context_are_those_of_the_own_job",),
    29: ("host/test_isolation::test_slots_that_load_at_once_keep_their_lists_apart",),
    30: (
        "host/test_isolation::test_a_model_that_dies_on_another_slots_thread",
        "unit/isolation/test_loaded_models::test_models_that_no_longer_exist_are_dropped_from_the_own_list_only",
    ),
    31: (
        "host/test_isolation::test_unloading_everything_on_one_slot_leaves_the_others_models",
        "gpu/test_gpus::test_out_of_memory_on_one_gpu_leaves_the_others_alone",
    ),
    32: (
        "gpu/test_gpus::test_each_gpu_has_a_slot",
        "gpu/test_gpus::test_threads_of_a_node_compute_on_its_gpu",
        "unit/slots/test_device::test_binding_makes_the_device_current",
    ),
    33: ("unit/slots/test_device::test_unequal_devices_are_warned_of", SHARED),
    34: (
        "gpu/test_gpus::test_emptying_the_cache_leaves_the_other_gpus_alone",
        "unit/slots/test_device::test_in_a_slot_only_the_own_devices_cache_is_emptied",
    ),
    35: (
        "gpu/test_gpus::test_two_slots_on_one_gpu_give_the_same_images",
        "host/test_isolation::test_globals_that_are_one_per_slot",
    ),
    36: (
        "host/test_isolation::test_pinned_memory_is_accounted_per_slot",
        "unit/patches/test_wrappers::test_each_slot_may_pin_its_share",
        "unit/weights/test_patches::test_shared_memory_is_not_pinned",
    ),
    37: (
        "host/test_isolation::test_the_end_of_a_node_leaves_the_other_slots_state",
        "host/test_isolation::test_globals_that_are_one_per_slot",
    ),
    38: (
        "host/test_isolation::test_the_end_of_a_node_leaves_the_other_slots_state",
        "host/test_isolation::test_globals_that_are_one_per_slot",
    ),
    39: (
        "unit/slots/test_device::test_watermarks_are_reset_for_the_own_device_only",
        "unit/patches/test_wrappers::test_what_only_gpus_can_show_is_declared",
    ),
    40: ("host/test_isolation::test_freeing_pinned_memory_asks_the_own_slots_models_only",),
    41: ("host/test_isolation::test_globals_that_are_one_per_slot",),
    42: (SAFE,),
    43: ("host/test_isolation::test_modules_and_functions_by_two_names_are_one",),
    44: ("host/test_isolation::test_modules_and_functions_by_two_names_are_one",),
    45: (
        "host/test_isolation::test_100_jobs_at_once_draw_what_each_draws_alone_on_stock",
        "host/test_parity::test_four_slots_equal_stock",
    ),
    46: (
        "host/test_isolation::test_every_way_to_draw_gives_what_it_gives_alone_on_stock",
        "host/test_parity::test_four_slots_equal_stock",
    ),
    47: (
        "gpu/test_gpus::test_cuda_random_numbers_are_those_of_a_lonely_job",
        "host/test_isolation::test_seeding_does_not_reach_for_the_devices_of_all_slots",
        "unit/isolation/test_random_state::test_seeding_reaches_nobody_else",
        "unit/isolation/test_random_state::test_seeding_reaches_the_own_gpu_only",
    ),
    48: (
        "host/test_isolation::test_100_jobs_at_once_draw_what_each_draws_alone_on_stock",
        "host/test_isolation::test_every_way_to_draw_gives_what_it_gives_alone_on_stock",
    ),
    49: ("host/test_websockets::test_every_job_reports_its_own_progress",),
    50: (
        "host/test_saves::test_400_saves_with_one_prefix_make_400_files",
        "host/test_saves::test_batches_and_single_images_with_one_prefix",
    ),
    51: (
        "host/test_isolation::test_truncated_images_leave_pillows_flag_alone",
        "unit/patches/test_wrappers::test_retries_of_truncated_images_do_not_overlap",
    ),
    52: ("host/test_isolation::test_slots_that_load_different_checkpoints_at_once_hold_their_own",),
    53: (
        "host/test_weights::test_mixed_loras_on_four_slots_give_stocks_images",
        "host/test_weights::test_many_mixed_jobs_leave_the_shared_bytes_as_they_are",
    ),
    54: (SAFE,),
    55: ("unit/patches/test_wrappers::test_attention_that_sets_flags_runs_one_slot_at_a_time", SHARED),
    56: (
        "host/test_isolation::test_intra_op_threads",
        "host/test_isolation::test_intra_op_threads_are_the_users_choice",
        "host/test_isolation::test_flags_of_torch_are_as_on_stock_after_many_jobs",
        SHARED,
    ),
    57: (
        "host/test_isolation::test_threads_of_a_job_are_in_its_slot",
        "host/test_isolation::test_threads_of_threads_and_shared_pools_are_in_the_jobs_slot",
        "gpu/test_gpus::test_threads_of_a_node_compute_on_its_gpu",
    ),
    58: ("host/test_packs::test_what_a_node_keeps_on_its_class_is_the_own_job_s", SHARED),
    59: (SHARED,),
    60: (DOCUMENTED,),
}


def test_every_row_of_the_hazard_table_is_accounted_for() -> None:
    assert sorted(ROWS) == list(range(1, 61))
    assert all(ROWS.values())
    assert {name for names in ROWS.values() for name in names} - NOTES <= existing_tests()


def test_every_row_that_a_patch_answers_is_shown() -> None:
    answered = {row for patch in patches.ALL for row in patch.hazards}
    assert answered <= set(ROWS)
    assert {row for row in answered if set(ROWS[row]) <= NOTES} == set()


def existing_tests() -> set[str]:
    """`folder/file::test` of each test function in the repository."""
    found = set()
    for path in (REPO_DIR / "tests").rglob("test_*.py"):
        for child in ast.walk(ast.parse(path.read_text())):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and child.name.startswith("test_"):
                found.add(f"{path.relative_to(REPO_DIR / 'tests').with_suffix('')}::{child.name}")
    return found
