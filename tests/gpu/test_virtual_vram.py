"""Models whose weights live partly elsewhere give stock's bytes on a GPU, and its memory is really free."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

from tests.gpu.conftest import MakeGpuServer
from tests.gpu.test_graphs import difference
from tests.host.graph_cases import Case, flux, hooked, latents, lora, run_case, sd15, sdxl
from tests.host.jobs import outcome, run_on_each
from tests.host.server import HostServer
from tests.host.workflows import Workflow

pytestmark = [pytest.mark.gpu, pytest.mark.host, pytest.mark.timeout(300)]

MIB = 1 << 20
PAGE = 32 * MIB  # of dynamic VRAM, which gives memory back by whole pages
PLACEMENTS = {
    "cpu": "cpu,*",
    "ratio": "slot,25%;cpu,75%",
    "bytes": "cpu,40mb;slot,*",
    "fraction": "slot,0.0005;cpu,*",
}
KINDS: dict[str, Callable[[int], Workflow]] = {
    "plain": sd15,
    "LoRA": lambda seed: lora(seed, 0.7),
    "hook": hooked,
    "SDXL": sdxl,
    "Flux": flux,
}
LOADERS = {"CheckpointLoaderSimple": "ckpt", "UNETLoader": "unet"}


@dataclass
class Servers:
    stock: HostServer
    ours: HostServer  # one slot, with the host's defaults
    two: HostServer  # two slots on the one GPU
    is_dynamic: bool


@pytest.fixture(scope="module")
def servers(make_gpu_server: MakeGpuServer) -> Servers:
    """Without recordings, which keep memory of their own."""
    eager = {"COMFY_PARALLEL_GRAPHS": "off"}
    options: list[dict[str, Any]] = [
        {"slots": None},
        {"slots": "cuda:0", "env": eager},
        {"slots": "cuda:0", "env": {**eager, "COMFY_PARALLEL_SLOTS_PER_GPU": "2"}},
    ]
    with ThreadPoolExecutor(3) as pool:
        stock, ours, two = pool.map(lambda each: make_gpu_server(**each), options)
    return Servers(stock, ours, two, "DynamicVRAM support detected and enabled" in ours.log())


def placed(workflow: Workflow, allocation: str, **inputs: Any) -> Workflow:
    """The job with its model placed by the loader of virtual VRAM."""
    for loader, name in LOADERS.items():
        if name in workflow:
            node = workflow[name]
            node["class_type"] = f"{loader}DisTorch2MultiGPU"
            node["inputs"] |= {"expert_mode_allocations": allocation, "eject_models": False, **inputs}
    return workflow


@pytest.mark.parametrize("kind", KINDS)
def test_every_placement_gives_stocks_bytes(servers: Servers, kind: str) -> None:
    job = KINDS[kind]
    expected = run_case(servers.stock, Case("stock", (job(1), job(2))), 0)
    for name, allocation in PLACEMENTS.items():
        case = Case(name, (placed(job(1), allocation), placed(job(2), allocation)))
        assert difference(expected, run_case(servers.ours, case, 0)) == "", name
    assert difference(expected, run_case(servers.ours, Case("plain", (job(1), job(2))), 0)) == "", "plain, afterwards"


def test_a_placed_model_keeps_dynamic_vram(servers: Servers) -> None:
    """What the host says of a model that it loads tells how."""
    if not servers.is_dynamic:
        pytest.skip("this host has no dynamic VRAM, or it is off")
    before = len(servers.ours.log())
    run_case(servers.ours, Case("placed", (placed(sd15(11), "cpu,61%;slot,39%"),)), 0)
    said = servers.ours.log()[before:]
    assert "prepared for dynamic VRAM loading" in said
    assert "loaded partially" not in said


def test_two_slots_of_one_gpu_with_different_placements(servers: Servers) -> None:
    """At once; without dynamic VRAM, which slots that share a GPU do without."""
    eager = Case("one slot", (lora(21, 0.7), flux(22)))
    expected = run_case(servers.two, eager, 0)
    for first, second in (("cpu", "ratio"), ("bytes", "fraction"), ("ratio", "cpu")):
        jobs = [placed(lora(21, 0.7), PLACEMENTS[first]), placed(flux(22), PLACEMENTS[second])]
        entries = run_on_each(servers.two, jobs)
        found = [latents(servers.two, entry) for entry in entries]
        assert difference(expected, found) == "", (first, second)


def test_vram_is_freed_by_what_was_asked(servers: Servers) -> None:
    """Within 2%, and a page for each of two ends where the host gives memory back by pages."""
    run_case(servers.ours, Case("libraries are loaded", (flux(31),)), 0)
    all_of_it = used_by(servers.ours, flux(31))
    for percent in (50, 90):
        entry, used = used_with_entry(servers.ours, placed(flux(31), f"cpu,{percent}%;slot,{100 - percent}%"))
        planned, total = sizes_shown(entry)
        freed, asked = all_of_it - used, total * percent / 100
        print(f"{percent}%: asked {asked / MIB:.1f}, planned {planned / MIB:.1f}, freed {freed / MIB:.1f} MiB")
        assert abs(freed - planned) <= 0.02 * planned + (2 * PAGE if servers.is_dynamic else 0)


def test_eject_ejects(servers: Servers) -> None:
    """VRAM before and after: another model of the slot is there, and goes when the placed one is loaded."""
    used = {}
    for eject in (False, True):
        free(servers.ours)
        run_case(servers.ours, Case("the other", (flux(41),)), 0)
        before = used_bytes(servers.ours)
        job = placed(sd15(42), "cpu,50%;slot,50%", eject_models=eject)
        run_case(servers.ours, Case("placed", (job,)), 0)
        used[eject] = settled_bytes(servers.ours)
        print(f"eject {eject}: {before / MIB:.0f} MiB before, {used[eject] / MIB:.0f} MiB after")
    other = used_by(servers.ours, flux(41))
    assert used[False] - used[True] >= 0.9 * other


def test_weights_come_from_pinned_memory(servers: Servers) -> None:
    """All of what lives on the CPU, in every step, and none by way of a pageable copy."""
    before = copied(servers.ours)
    entry = servers.ours.run(placed(flux(51), "cpu,*"), 0)
    away, _ = sizes_shown(entry)
    steps = 4
    assert copied(servers.ours)["pinned"] - before["pinned"] >= steps * 0.98 * away
    assert copied(servers.ours)["staged"] == before["staged"]


def test_a_donor_gpu(servers: Servers, num_gpus: int, make_gpu_server: MakeGpuServer) -> None:
    """Needs two GPUs: the bytes of the plain loader, and a refusal that leaves the donor's slot alone."""
    both = make_gpu_server(slots="cuda:0,cuda:1")
    for kind, job in KINDS.items():
        expected = run_case(servers.stock, Case(kind, (job(61),)), 0)
        entries = both.wait([both.submit(placed(job(61), "cuda:0,60%;slot,40%"), 1)["prompt_id"]], 300)
        assert difference(expected, [latents(both, entry) for entry in entries.values()]) == "", kind
    entry = both.run(placed(flux(62), "cuda:0,90000gb;slot,*"), 1)
    assert outcome(entry) == "success", "all of it fits"
    entry = both.run(placed(flux(63), "cuda:7,1gb;slot,*"), 1)
    assert "no device 'cuda:7' here" in str(entry["status"]["messages"])


def sizes_shown(entry: Any) -> tuple[int, int]:
    """Of `X of N bytes leave the device`, which the loader's node shows."""
    words = entry["outputs"]["unet"]["text"][-2].split()
    return int(words[0]), int(words[2])


def copied(server: HostServer) -> dict[str, int]:
    told: dict[str, int] = server.request("GET", "/parallel/weights")[1]["slots"][0]["copied_bytes"]
    return told


def used_by(server: HostServer, workflow: Workflow) -> int:
    """What a job leaves in the GPU's memory, with nothing there before."""
    return used_with_entry(server, workflow)[1]


def used_with_entry(server: HostServer, workflow: Workflow) -> tuple[Any, int]:
    free(server)
    before = settled_bytes(server)
    entry = server.run(workflow, 0)
    assert outcome(entry) == "success", entry["status"]
    return entry, settled_bytes(server) - before


def free(server: HostServer) -> None:
    server.request("POST", "/free", {"unload_models": True, "free_memory": True})
    settled_bytes(server)


def settled_bytes(server: HostServer) -> int:
    """What is used, once it stays the same for a while."""
    seen = [used_bytes(server)]
    deadline = time.monotonic() + 60
    while len(seen) < 4 or len(set(seen[-4:])) > 1:
        assert time.monotonic() < deadline, seen[-10:]
        time.sleep(0.2)
        seen.append(used_bytes(server))
    return seen[-1]


def used_bytes(server: HostServer) -> int:
    """Without what torch keeps for later, as the host counts it."""
    (device, *_) = server.request("GET", "/system_stats")[1]["devices"]
    return int(device["vram_total"] - device["vram_free"])
