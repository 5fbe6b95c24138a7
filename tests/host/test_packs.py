"""Jobs of packs that keep state for the whole process: two at once give what each gives alone on stock ComfyUI.

The packs in tests/host/packs do what well-known packs do, a kind in each. Two jobs go through them step by step
together, unless the scheduler runs such jobs alone; a plain job beside them and one after them must be stock's too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.host.conftest import MakeServer
from tests.host.jobs import eventually, held, interrupt, message, new_key, outcome, quick, shown
from tests.host.server import JSON, NODES_DIR, HostServer
from tests.host.workflows import Workflow, node, txt2img, with_loras

pytestmark = pytest.mark.host

PACKS_DIR = Path(__file__).with_name("packs")
PACKS = sorted(path for path in PACKS_DIR.iterdir() if (path / "__init__.py").is_file())
SLOTS = "cpu,cpu,cpu"
Values = dict[str, Any]


@pytest.fixture(scope="module")
def server(make_module_server: MakeServer) -> HostServer:
    return make_module_server(slots=SLOTS, packs=PACKS)


@pytest.fixture(scope="module")
def stock(make_module_server: MakeServer) -> HostServer:
    """A host without this repository, with the packs and the test nodes."""
    return make_module_server(slots=None, link=False, packs=[*PACKS, NODES_DIR])


def told(class_type: str, **inputs: Any) -> Workflow:
    """Shows what a pack's node returns as text."""
    return {"pack": node(class_type, **inputs), "out": node("CPTOut", value=["pack", 0])}


def digest(workflow: Workflow, of: str) -> Workflow:
    """Shows a hash of what a node of this workflow makes, a latent or an image, instead of saving it."""
    kept = {name: made for name, made in workflow.items() if name not in ("save", "decode")}
    return {**kept, "hash": node("CPTDigest", value=[of, 0]), "out": node("CPTOut", value=["hash", 0])}


def plain(seed: int) -> Workflow:
    return digest(txt2img(seed, steps=2), "sampler")


def plain_beside(seed: int, key: str, parties: int) -> Workflow:
    """Samples while the other jobs are between their swap and their end."""
    workflow = plain(seed)
    latent, before, after = workflow["latent"], "first swapped,both swapped", "both done,first put back"
    gate = {"key": key, "parties": parties}
    workflow["empty"], workflow["latent"] = latent, node("CPTOverlap", value=["empty", 0], stages=before, **gate)
    workflow["after"] = node("CPTOverlap", value=["sampler", 0], stages=after, **gate)
    workflow["hash"]["inputs"]["value"] = ["after", 0]
    return workflow


def sampled(class_type: str, seed: int, gain: float, key: str, role: str, parties: int) -> Workflow:
    """A job whose KSampler is a pack's."""
    workflow = txt2img(seed, steps=2)
    inputs = workflow["sampler"]["inputs"]
    workflow["sampler"] = node(class_type, **inputs, gain=gain, key=key, role=role, parties=parties)
    return digest(workflow, "sampler")


def outcomes(server: HostServer, workflows: list[Workflow]) -> list[Any]:
    """Run workflow i on slot i, all at once; what each showed."""
    ids = [server.submit(workflow, slot)["prompt_id"] for slot, workflow in enumerate(workflows)]
    entries = server.wait(ids, timeout_s=240)
    return [result(entries[job_id]) for job_id in ids]


def result(entry: JSON) -> Any:
    """What a job showed; how it ended, if not well."""
    return shown(entry) if outcome(entry) == "success" else entry["status"]["messages"][-1]


def alone(stock: HostServer, workflow: Workflow) -> Any:
    return result(stock.run(workflow))


def check_pairs(server: HostServer, stock: HostServer, class_type: str, first: Values, second: Values) -> None:
    """Two jobs of a pack's node at once show what each shows alone."""
    key = new_key()
    both = [told(class_type, **inputs, key=key, parties=2) for inputs in (first, second)]
    expected = [alone(stock, told(class_type, **inputs, key="", parties=1)) for inputs in (first, second)]
    assert outcomes(server, both) == expected


def check_plain(server: HostServer, stock: HostServer, slots: tuple[int, ...] = (0, 1, 2)) -> None:
    """A plain job gives stock's bytes on each of these slots, whatever ran there before."""
    seed = hash(new_key()) & 0xFFFF
    ids = [server.submit(plain(seed), slot)["prompt_id"] for slot in slots]
    entries = server.wait(ids)
    assert {result(entries[job_id]) for job_id in ids} == {alone(stock, plain(seed))}


# A host function, a class attribute or a method is swapped for the length of a job.


@pytest.mark.parametrize("class_type", ["PackSwapsFunction", "PackSwapsMethod"])
def test_what_a_job_swaps_and_puts_back_is_its_own(server: HostServer, stock: HostServer, class_type: str) -> None:
    key = new_key()
    expected = [
        alone(stock, sampled(class_type, 1, 1.25, "", "first", 1)),
        alone(stock, sampled(class_type, 2, 0.75, "", "second", 1)),
        alone(stock, plain(3)),
    ]
    assert len(set(map(str, expected))) == 3
    jobs = [sampled(class_type, 1, 1.25, key, "first", 3), sampled(class_type, 2, 0.75, key, "second", 3)]
    assert outcomes(server, [*jobs, plain_beside(3, key, 3)]) == expected
    check_plain(server, stock)


def test_what_a_job_swaps_and_leaves_stays_on_its_slot(server: HostServer, stock: HostServer) -> None:
    """Stock ComfyUI keeps such a function for all later jobs: so may the slot, but no other."""
    key = new_key()
    beside, after = alone(stock, plain(3)), alone(stock, plain(4))
    leaving = [(1, 2.0, "first"), (2, 0.5, "second")]
    jobs = [sampled("PackLeavesNoise", seed, gain, key, role, 3) for seed, gain, role in leaving]
    shown_by = outcomes(server, [*jobs, plain_beside(3, key, 3)])
    assert shown_by[2] == beside
    assert result(server.run(plain(4), 2)) == after
    for slot, (seed, gain, _role) in enumerate(leaving):
        assert shown_by[slot] == alone(stock, sampled("PackLeavesNoise", seed, gain, "", "first", 1))
        assert result(server.run(plain(4), slot)) in (after, alone(stock, plain(4)))
    for host, slots in ((stock, [None]), (server, [0, 1, 2])):
        for number in slots:
            host.run(told("PackPutsNoiseBack"), number)
    check_plain(server, stock)


# Data of a job between two of its own steps.


@pytest.mark.parametrize("store", ["global", "module", "list", "object", "class"])
def test_a_store_of_images_holds_only_the_own_job_s(server: HostServer, stock: HostServer, store: str) -> None:
    def job(colour: int, key: str, parties: int) -> Workflow:
        image = node("EmptyImage", width=16, height=16, batch_size=1, color=colour)
        tiles = node("PackStoresTiles", image=["image", 0], store=store, key=key, parties=parties)
        return {"image": image, "tiles": tiles, "out": node("CPTOut", value=["tiles", 0])}

    key = new_key()
    colours = (0xFF0000, 0x00FF00, 0x0000FF)
    expected = [alone(stock, job(colour, "", 1)) for colour in colours]
    assert expected == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    assert outcomes(server, [job(colour, key, 3) for colour in colours]) == expected


def test_a_store_in_a_module_that_the_pack_hides_holds_only_the_own_job_s(
    server: HostServer, stock: HostServer
) -> None:
    """The packs of this host are links to where they lie, as many are."""

    def job(colour: int, key: str, parties: int) -> Workflow:
        image = node("EmptyImage", width=16, height=16, batch_size=1, color=colour)
        hidden = node("PackHidesModules", image=["image", 0], key=key, parties=parties)
        return {"image": image, "hidden": hidden, "out": node("CPTOut", value=["hidden", 0])}

    key = new_key()
    expected = [alone(stock, job(colour, "", 1)) for colour in (0xFF0000, 0x00FF00)]
    assert outcomes(server, [job(colour, key, 2) for colour in (0xFF0000, 0x00FF00)]) == expected


@pytest.mark.parametrize("kind", ["registry", "generator", "counter", "object"])
def test_what_a_job_s_next_node_looks_up_is_its_own(server: HostServer, stock: HostServer, kind: str) -> None:
    def job(start: int, key: str, parties: int) -> Workflow:
        keys = {"key": key, "parties": parties}
        begin = node("PackBegins", start=start, **keys)
        take = node("PackTakes", batch=["begin", 0], times=3, kind=kind, **keys)
        return {"begin": begin, "take": take, "out": node("CPTOut", value=["take", 0])}

    key = new_key()
    assert outcomes(server, [job(start, key, 2) for start in (100, 200)]) == [
        alone(stock, job(start, "", 1)) for start in (100, 200)
    ]


def test_the_current_context_is_the_own_job_s(server: HostServer, stock: HostServer) -> None:
    check_pairs(server, stock, "PackContext", {"text": "one"}, {"text": "two"})


def test_what_a_function_remembers_is_the_own_job_s(server: HostServer, stock: HostServer) -> None:
    check_pairs(server, stock, "PackMemoises", {"strength": 0.25}, {"strength": 0.75})


def test_what_a_node_keeps_on_its_class_is_the_own_job_s(server: HostServer, stock: HostServer) -> None:
    check_pairs(server, stock, "PackKeepsOnClass", {"strength": 0.25}, {"strength": 0.75})


def test_what_a_pack_keeps_elsewhere_than_in_names_is_the_own_job_s(server: HostServer, stock: HostServer) -> None:
    check_pairs(server, stock, "PackKeepsElsewhere", {"value": 1}, {"value": 2})


@pytest.mark.parametrize("way", ["mock", "mock of an object", "partial", "of Python", "redirect", "stream"])
def test_what_a_job_patches_by_python_s_tools_is_its_own(server: HostServer, stock: HostServer, way: str) -> None:
    check_pairs(server, stock, "PackPatchesByTools", {"way": way, "text": "first"}, {"way": way, "text": "second"})
    ids = [server.submit(told("PackSees", way=way), slot)["prompt_id"] for slot in range(3)]
    assert {result(entry) for entry in server.wait(ids).values()} == {"the host's"}


# A model that a pack keeps and hands to every slot.


def cached_loader(class_type: str, strength: float, seed: int, key: str, parties: int) -> Workflow:
    loading = {"lora_name": "lora.safetensors", "strength": strength, "key": key, "parties": parties}
    workflow = {**txt2img(seed, steps=2), "ckpt": node(class_type, ckpt_name="a.safetensors", **loading)}
    gate = {"key": key, "parties": parties, "stages": "encoded"}
    workflow["latent"], workflow["empty"] = node("CPTOverlap", value=["empty", 0], **gate), workflow["latent"]
    return digest({**workflow, "image": workflow["decode"]}, "image")


@pytest.mark.parametrize("class_type", ["PackCachedLoader", "CPTHandsOut"])
def test_a_model_that_a_pack_hands_to_two_slots_gives_each_its_own_images(
    server: HostServer, stock: HostServer, class_type: str
) -> None:
    """The second is a trusted pack's: it really hands out one and the same model."""
    strengths = (0.2, 0.9)
    for round_number in range(3):  # at first it may be two models
        key = new_key()
        expected = [alone(stock, cached_loader(class_type, s, 7 + round_number, "", 1)) for s in strengths]
        assert expected[0] != expected[1]
        assert outcomes(server, [cached_loader(class_type, s, 7 + round_number, key, 2) for s in strengths]) == expected
    lora = digest(with_loras(txt2img(9, steps=2), 0.9), "sampler")
    assert outcomes(server, [lora, lora]) == [alone(stock, lora)] * 2
    check_plain(server, stock)


# Devices and settings.


@pytest.mark.parametrize("class_type", ["PackChoosesDevice"])
def test_the_device_that_a_job_chooses_is_for_its_own_slot(
    server: HostServer, stock: HostServer, class_type: str
) -> None:
    check_pairs(server, stock, class_type, {"device": "cpu:0"}, {"device": "meta"})


def test_the_device_that_a_pack_keeps_is_one_per_slot(server: HostServer) -> None:
    key = new_key()
    jobs = [told("PackFirstDevice", device=f"of slot {slot}", key=key, parties=3) for slot in range(3)]
    assert outcomes(server, jobs) == [f"of slot {slot}" for slot in range(3)]


@pytest.mark.parametrize("kind", ["args", "precision", "accumulation"])
def test_settings_that_a_job_flips_do_not_reach_other_slots(server: HostServer, stock: HostServer, kind: str) -> None:
    check_pairs(server, stock, "PackFlips", {"kind": kind, "on": True}, {"kind": kind, "on": False})


# What newer hosts have of the kind.


def test_a_cache_provider_knows_the_own_job(server: HostServer, stock: HostServer) -> None:
    if "PackTellsJob" not in server.request("GET", "/object_info")[1]:
        pytest.skip("this ComfyUI has no cache providers")
    check_pairs(server, stock, "PackTellsJob", {"number": 1}, {"number": 2})


def test_a_graphics_context_is_one_per_slot(server: HostServer) -> None:
    """The nodes that use it need a graphics library; what is done about them is told by their source."""
    if not (server.host_dir / "comfy_extras" / "nodes_glsl.py").exists():
        pytest.skip("this ComfyUI has no GLSL nodes")
    told_by = [line for line in server.log().splitlines() if "node pack nodes_glsl: isolated" in line]
    assert len(told_by) == 1
    assert {"GLContext._instance", "GLContext._initialized"} <= set(told_by[0].split())


# What a node shares with a route of the server must stay one.


def test_an_answer_by_http_reaches_the_job_that_waits_for_it(server: HostServer) -> None:
    questions = [new_key() for _ in range(3)]
    ids = [server.submit(told("PackAsks", question=text), slot)["prompt_id"] for slot, text in enumerate(questions)]
    for number in (2, 0, 1):
        answer(server, {"question": questions[number], "answer": f"answer {number}"})
    entries = server.wait(ids)
    assert [result(entries[job_id]) for job_id in ids] == [f"answer {number} answer {number}" for number in range(3)]


def answer(server: HostServer, body: JSON, route: str = "answer") -> None:
    """Answer as soon as the job asks."""
    asked = f"/test_packs/{route}"
    eventually(lambda: server.request("POST", asked, body)[0] == 200, f"no job asks for {body}")


def test_jobs_that_wait_for_answers_by_one_number_take_turns_and_hold_up_no_others(
    server: HostServer, stock: HostServer
) -> None:
    ids = [server.submit(told("PackAsksByNumber", number=number))["prompt_id"] for number in range(3)]
    assert result(server.run(plain(7))) == alone(stock, plain(7))
    for number, job_id in enumerate(ids):
        answer(server, {"number": "pack", "answer": f"answer {number}"}, "answer_by_number")
        assert result(server.wait([job_id])[job_id]) == f"answer {number}"


# What cannot be made safe runs alone.


def test_a_job_that_runs_alone_waits_for_the_others_says_so_and_goes_before_later_ones(server: HostServer) -> None:
    with held(server, 0):
        alone_id = server.submit(told("PackFlips", kind="precision", on=True, key="", parties=1))["prompt_id"]
        later_id = server.submit(quick(1))["prompt_id"]
        told_by = server.request("GET", "/queue/all")[1]
        assert told_by["waiting_to_run_alone"] == [alone_id]
        assert [item[1] for item in told_by["unassigned"]] == [alone_id, later_id]
        assert [queue["running_count"] for queue in told_by["queues"]] == [1, 0, 0]
    entries = server.wait([alone_id, later_id])
    assert [outcome(entry) for entry in entries.values()] == ["success", "success"]
    assert ended_at(entries[alone_id]) <= started_at(entries[later_id])


def test_a_node_that_another_one_made_runs_alone_as_well(server: HostServer) -> None:
    """Of two such jobs at once each rests before that node until all others have ended or rest."""
    key = new_key()
    with held(server, 2):
        ids = [server.submit(expanding(number, key), number)["prompt_id"] for number in (0, 1)]
        eventually(lambda: set(waiting_to_run_alone(server)) == set(ids), "both rest")
        later_id = server.submit(quick(2), 2)["prompt_id"]
    entries = server.wait([*ids, later_id])
    assert [result(entries[job_id]) for job_id in ids] == [True, True]
    assert all(ended_at(entries[job_id]) <= started_at(entries[later_id]) for job_id in ids)


def expanding(number: int, key: str) -> Workflow:
    """Makes its unsafe node when the other such job runs as well: else that one would not start."""
    gate = node("CPTOverlap", value=["number", 0], stages="both run", key=key, parties=2)
    workflow = told("PackExpands", number=["gate", 0], deep=bool(number))
    return {**workflow, "number": node("CPTConstInt", value=number), "gate": gate}


def test_a_job_that_rests_can_be_interrupted(server: HostServer) -> None:
    with held(server, 2):
        job_id = server.submit(told("PackExpands", number=3, deep=False), 0)["prompt_id"]
        eventually(lambda: waiting_to_run_alone(server) == [job_id], "it rests")
        interrupt(server, job_id)
        assert outcome(server.wait([job_id])[job_id]) == "interrupted"
        assert outcome(server.run(quick(4), 1)) == "success"


def waiting_to_run_alone(server: HostServer) -> list[str]:
    ids: list[str] = server.request("GET", "/queue/all")[1]["waiting_to_run_alone"]
    return ids


def started_at(entry: JSON) -> int:
    return int(message(entry, "execution_start")["timestamp"])


def ended_at(entry: JSON) -> int:
    return int(message(entry, "execution_success")["timestamp"])


def test_the_log_names_each_pack_what_was_found_and_what_is_done(server: HostServer) -> None:
    log = server.log()
    assert "node pack stores_tiles: isolated, every slot has its own: batch (__init__.py:" in log
    assert "node pack flips_settings: jobs with such nodes run alone: torch.set_float32_matmul_precision (__ini" in log
    assert "node pack asks_people: one for all slots, as the server uses it too: waiting (__init__.py:" in log
    assert "node pack asks_by_number: jobs with such nodes run one at a time, beside others: Answers.asking (__i" in log
    assert "node pack comfy_parallel_test_nodes: trusted" in log
