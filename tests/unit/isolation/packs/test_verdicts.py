"""Which node classes run alone, and how what is done about a pack is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from comfy_parallel.config import PackModes
from comfy_parallel.isolation.packs.finding import (
    ALONE,
    HOST_WRITE,
    IN_TURN,
    MODULE_STATE,
    PER_SLOT,
    SHARED,
    Clash,
    Finding,
)
from comfy_parallel.isolation.packs.verdicts import (
    Verdict,
    by_classes,
    classes_alone,
    classes_in_turn,
    pack_of,
    turns_of,
    verdicts,
)

UNSAFE = Finding(HOST_WRITE, "torch.backends.flag", "a.py", 3, ALONE, classes=frozenset({"Flips"}))
SAFE = Finding(MODULE_STATE, "store", "b.py", 7, PER_SLOT, classes=frozenset({"Stores"}))
ASKED = Finding(MODULE_STATE, "waiting", "b.py", 9, SHARED, classes=frozenset({"Asks"}))
PACK = Path("custom_nodes/my_pack")
CLASH = Clash("it takes the route /prompt", "jobs may not reach the slots", "c.py", 4)


def node(class_name: str, module: str = "custom_nodes.my_pack") -> type:
    return type(class_name, (), {"RELATIVE_PYTHON_MODULE": module})


NODES = {"Flips it": node("Flips"), "Stores it": node("Stores"), "Other": node("Other", "custom_nodes.other")}


def alone(modes: PackModes, *found: Finding) -> dict[str, str]:
    return classes_alone(NODES, verdicts({PACK: found}, {}, modes), modes)


def test_only_classes_that_reach_what_is_unsafe_run_alone() -> None:
    assert alone(PackModes(), UNSAFE, SAFE, ASKED) == {"Flips it": "my_pack"}


def test_classes_that_one_job_at_a_time_may_have_are_told_with_their_packs() -> None:
    waits = Finding(MODULE_STATE, "answer", "b.py", 9, IN_TURN, classes=frozenset({"Stores", "Other"}))
    known = verdicts({PACK: [waits, UNSAFE]}, {}, PackModes())
    in_turn = classes_in_turn(NODES, known, PackModes())
    assert in_turn == {"Stores it": "my_pack"}
    workflow = {"1": {"class_type": "Stores it"}, "2": {"class_type": "Other"}, "3": {"class_type": []}, "4": None}
    assert turns_of(in_turn)(workflow) == {"my_pack"}
    assert turns_of(in_turn)({"2": workflow["2"]}) == turns_of(in_turn)([]) == frozenset()
    for mode in ("trust", "alone"):
        assert classes_in_turn(NODES, verdicts({PACK: [waits]}, {}, PackModes(mode)), PackModes(mode)) == {}


def test_all_of_a_pack_run_alone_when_it_cannot_be_told_which_reach_it() -> None:
    unknown = Finding(HOST_WRITE, "x", "a.py", 3, ALONE)
    assert alone(PackModes(), unknown) == {"Flips it": "my_pack", "Stores it": "my_pack"}


def test_a_trusted_pack_never_runs_alone() -> None:
    assert alone(PackModes("trust"), UNSAFE) == {}
    assert alone(PackModes("auto", (("my_pack", "trust"),)), UNSAFE) == {}


def test_a_pack_can_be_told_to_run_alone_whatever_was_found() -> None:
    assert alone(PackModes("auto", (("other", "alone"),)), SAFE) == {"Other": "other"}
    assert alone(PackModes("alone"), SAFE) == dict.fromkeys(("Flips it", "Stores it"), "my_pack") | {"Other": "other"}


def test_the_host_s_basic_nodes_are_of_no_pack() -> None:
    assert pack_of(node("KSampler", "nodes")) is None
    assert pack_of(object) is None
    assert pack_of(node("GLSL", "comfy_extras.nodes_glsl")) == "nodes_glsl"


def test_what_was_found_is_told_with_its_place_and_what_is_done() -> None:
    (verdict,) = verdicts({PACK: [UNSAFE, SAFE, ASKED, SAFE]}, {PACK: [CLASH]}, PackModes())
    assert list(verdict.lines()) == [
        "node pack my_pack: isolated, every slot has its own: store (b.py:7)",
        "node pack my_pack: one for all slots, as the server uses it too: waiting (b.py:9)",
        "node pack my_pack: jobs with such nodes run alone: torch.backends.flag (a.py:3)",
        "node pack my_pack: CLASH: it takes the route /prompt (c.py:4); jobs may not reach the slots",
    ]


def test_a_choice_of_the_user_is_told() -> None:
    assert "trusted" in next(Verdict("a", "trust", (UNSAFE,)).lines())
    assert "COMFY_PARALLEL_PACKS" in next(Verdict("a", "alone").lines())


@pytest.mark.parametrize(
    ("workflow", "expected"),
    [
        ({"1": {"class_type": "Flips it"}}, True),
        ({"1": {"class_type": "KSampler"}, "2": {"class_type": "Flips it"}}, True),
        ({"1": {"class_type": "KSampler"}, "2": {}, "3": None}, False),
        (None, False),
    ],
)
def test_a_job_runs_alone_for_one_of_its_nodes(workflow: object, expected: bool) -> None:
    assert by_classes({"Flips it"})(workflow) is expected
