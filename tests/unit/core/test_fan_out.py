"""How a workflow is made into shares."""

from __future__ import annotations

from typing import Any

import pytest

from comfy_parallel.core.fan_out import Classes, Plan, bounds, participants, plans, upstream

WORKFLOW: dict[str, Any] = {
    "model": {"class_type": "Load", "inputs": {"name": "a"}},
    "seed": {"class_type": "Seed", "inputs": {"seed": 5}},
    "latent": {"class_type": "Empty", "inputs": {"batch_size": 2}},
    "sampler": {
        "class_type": "Sample",
        "inputs": {"model": ["model", 0], "seed": ["seed", 0], "latent": ["latent", 0], "steps": [1, 2, 3]},
    },
    "look": {"class_type": "Show", "inputs": {"images": ["sampler", 0]}},
    "all": {"class_type": "Collect", "inputs": {"images": ["sampler", 0]}},
    "save": {"class_type": "Save", "inputs": {"images": ["all", 0]}},
}
OUTPUTS = ["look", "save"]


CLASSES = Classes(
    frozenset({"Collect", "Tiles"}),
    frozenset({"Seed"}),
    pulling={"Start": ("list",), "Split": ("list",), "Tiles": ("image",)},
    by_mode=frozenset({"Split"}),
)


def planned(workflow: dict[str, Any] = WORKFLOW, outputs: list[str] = OUTPUTS, count: int = 4) -> Plan | None:
    found = plans(workflow, outputs, CLASSES, count)
    assert len(found) < 2
    return found[0] if found else None


def made(workflow: dict[str, Any] = WORKFLOW) -> Plan:
    found = planned(workflow)
    assert found is not None
    return found


def test_a_share_is_what_the_collector_is_made_from() -> None:
    child = made().child_prompt(2)
    assert list(child) == ["model", "seed", "latent", "sampler", "all"]
    assert child["seed"]["inputs"] == {"seed": 5, "participant": 2, "participants": 4}
    assert child["all"]["inputs"]["collector_id"] == "all"
    assert child["sampler"] == WORKFLOW["sampler"]
    assert "participant" not in WORKFLOW["seed"]["inputs"]


def test_what_the_host_has_noted_of_a_node_is_not_handed_on() -> None:
    workflow = {**WORKFLOW, "all": {**WORKFLOW["all"], "is_changed": [4]}}
    assert "is_changed" not in made(workflow).child_prompt(1)["all"]
    assert "is_changed" not in made(workflow).share_graph("all", 1, "x:")["x:all"]


def test_what_differs_is_added_to_the_job_and_the_rest_is_its_own() -> None:
    graph = made().share_graph("all", 3, "all.3:")
    assert list(graph) == ["all.3:seed", "all.3:sampler", "all.3:all"]
    inputs = graph["all.3:sampler"]["inputs"]
    assert inputs == {"model": ["model", 0], "seed": ["all.3:seed", 0], "latent": ["latent", 0], "steps": [1, 2, 3]}
    assert graph["all.3:sampler"]["override_display_id"] == "sampler"
    assert graph["all.3:all"]["inputs"] == {
        "images": ["all.3:sampler", 0],
        "participant": 3,
        "participants": 4,
        "collector_id": "all",
    }


def test_a_collector_above_another_gives_the_share_alone() -> None:
    workflow = {
        **WORKFLOW,
        "upscale": {"class_type": "Upscale", "inputs": {"images": ["all", 0]}},
        "both": {"class_type": "Collect", "inputs": {"images": ["upscale", 0]}},
        "end": {"class_type": "Save", "inputs": {"images": ["both", 0]}},
    }
    found = next(iter(plans(workflow, ["end"], Classes(frozenset({"Collect"})), 2)))
    assert found.collectors == ("all", "both")
    graph = found.share_graph("both", 1, "x:")
    assert list(graph) == ["x:all", "x:upscale", "x:both"]
    assert graph["x:all"]["inputs"]["images"] == ["sampler", 0]
    assert found.is_worth_sharing
    assert not plans(WORKFLOW, ["save"], Classes(frozenset({"Collect"})), 2)[0].is_worth_sharing


@pytest.mark.parametrize(
    ("outputs", "count"),
    [(["look"], 4), (OUTPUTS, 1), ([], 4), (["gone"], 4)],
    ids=["not needed", "one slot", "no output", "no such node"],
)
def test_other_jobs_stay_whole(outputs: list[str], count: int) -> None:
    assert planned(outputs=outputs, count=count) is None
    assert plans({"model": WORKFLOW["model"]}, ["model"], CLASSES, 4) == ()


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({}, 4),
        ({"participants": 0}, 4),
        ({"participants": 7}, 7),
        ({"participants": True}, 4),
        ({"participants": 10**9}, 64),
        ({"participants": ["node", 0]}, 4),
        ({"load_balance": True}, 1),
        ({"load_balance": True, "participants": 3}, 3),
        ({"enabled_worker_ids": '["1", "2"]'}, 3),
        ({"enabled_worker_ids": "[]"}, 4),
        ({"enabled_worker_ids": "no list"}, 4),
        ({"enabled_worker_ids": '"12"'}, 4),
    ],
)
def test_how_many_take_part(inputs: dict[str, Any], expected: int) -> None:
    assert participants([inputs, {}], 4) == expected


def test_a_link_to_no_node_and_a_ring_end_the_walk() -> None:
    ring = {
        "a": {"class_type": "A", "inputs": {"x": ["b", 0], "y": ["gone", 0]}},
        "b": {"class_type": "B", "inputs": {"x": ["a", 0]}},
    }
    assert upstream(ring, ["a"]) == {"a", "b"}
    assert len(plans(ring, ["a"], Classes(frozenset({"A"}), frozenset({"B"})), 2)) == 1


@pytest.mark.parametrize("total", [0, 1, 3, 10, 11])
@pytest.mark.parametrize("parts", [1, 2, 4, 10])
def test_parts_follow_each_other_and_none_is_much_longer(total: int, parts: int) -> None:
    ends = [bounds(total, parts, index) for index in range(parts)]
    assert [index for start, end in ends for index in range(start, end)] == list(range(total))
    sizes = [end - start for start, end in ends]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


LIST: dict[str, Any] = {
    "list": {"class_type": "Load", "inputs": {}},
    "start": {"class_type": "Start", "inputs": {"list": ["list", 0]}},
    "seed": {"class_type": "Seed", "inputs": {"seed": 5}},
    "work": {"class_type": "Work", "inputs": {"image": ["start", 0], "seed": ["seed", 0]}},
    "end": {"class_type": "Collect", "inputs": {"images": ["work", 0]}},
}


def test_a_list_has_a_share_for_each_item_which_is_not_computed_again() -> None:
    (found,) = plans(LIST, ["end"], CLASSES, 4)
    assert (found.puller, found.participants, found.is_worth_sharing) == ("start", 4, True)
    opened = found.opened(9, "once")
    child = opened.child_prompt(8)
    assert list(child) == ["start", "seed", "work", "end"]
    told = {"participant": 8, "participants": 9, "opening": "once", "puller_id": "start"}
    assert child["start"]["inputs"] == told
    assert child["seed"]["inputs"]["participant"] == 8
    assert list(opened.share_graph("end", 3, "x:")) == ["x:start", "x:seed", "x:work", "x:end"]
    assert found.opened(0, "empty").participants == 1


def test_the_mode_of_some_nodes_says_whether_their_list_is_handed_out() -> None:
    for mode, puller in (("dynamic", "start"), ("static", None)):
        workflow = {**LIST, "start": {"class_type": "Split", "inputs": {"list": ["list", 0], "mode": mode}}}
        assert [one.puller for one in plans(workflow, ["end"], CLASSES, 4)] == [puller]


def test_a_job_may_have_shares_of_both_kinds() -> None:
    workflow = {
        **WORKFLOW,
        "list": {"class_type": "Load", "inputs": {"images": ["all", 0]}},
        "start": LIST["start"],
        "end": {"class_type": "Collect", "inputs": {"images": ["start", 0]}},
        "behind": {"class_type": "Collect", "inputs": {"images": ["end", 0]}},
    }
    static, pulled = plans(workflow, ["behind"], CLASSES, 4)
    assert (static.puller, static.collectors) == (None, ("all", "behind"))
    assert (pulled.puller, pulled.collectors) == ("start", ("end",))


def test_what_hands_out_and_gathers_at_once_has_the_same_seed_for_all() -> None:
    workflow = {
        "image": {"class_type": "Load", "inputs": {}},
        "seed": {"class_type": "Seed", "inputs": {"seed": 5}},
        "tiles": {"class_type": "Tiles", "inputs": {"image": ["image", 0], "seed": ["seed", 0], "participants": 3}},
    }
    (found,) = plans(workflow, ["tiles"], CLASSES, 4)
    assert (found.puller, found.collectors, found.participants) == ("tiles", ("tiles",), 3)
    child = found.opened(7, "once").child_prompt(2)
    assert list(child) == ["seed", "tiles"]
    assert child["seed"] == workflow["seed"]
    assert child["tiles"]["inputs"]["participants"] == 7
    workflow["tiles"]["inputs"]["participants"] = 1
    assert plans(workflow, ["tiles"], CLASSES, 4) == ()
