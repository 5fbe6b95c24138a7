"""How a workflow is made into shares."""

from __future__ import annotations

from typing import Any

import pytest

from comfy_parallel.core.fan_out import Plan, bounds, participants, plan, upstream

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


def planned(workflow: dict[str, Any] = WORKFLOW, outputs: list[str] = OUTPUTS, count: int = 4) -> Plan | None:
    return plan(workflow, outputs, {"Collect"}, {"Seed"}, count)


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
    found = plan(workflow, ["end"], {"Collect"}, (), 2)
    assert found is not None
    assert found.collectors == ("all", "both")
    graph = found.share_graph("both", 1, "x:")
    assert list(graph) == ["x:all", "x:upscale", "x:both"]
    assert graph["x:all"]["inputs"]["images"] == ["sampler", 0]
    assert found.is_worth_sharing
    assert not plan(WORKFLOW, ["save"], {"Collect"}, (), 2).is_worth_sharing  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("outputs", "count"),
    [(["look"], 4), (OUTPUTS, 1), ([], 4), (["gone"], 4)],
    ids=["not needed", "one slot", "no output", "no such node"],
)
def test_other_jobs_stay_whole(outputs: list[str], count: int) -> None:
    assert planned(outputs=outputs, count=count) is None
    assert plan({"model": WORKFLOW["model"]}, ["model"], {"Collect"}, {"Seed"}, 4) is None


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
    assert plan(ring, ["a"], {"A"}, {"B"}, 2) is not None


@pytest.mark.parametrize("total", [0, 1, 3, 10, 11])
@pytest.mark.parametrize("parts", [1, 2, 4, 10])
def test_parts_follow_each_other_and_none_is_much_longer(total: int, parts: int) -> None:
    ends = [bounds(total, parts, index) for index in range(parts)]
    assert [index for start, end in ends for index in range(start, end)] == list(range(total))
    sizes = [end - start for start, end in ends]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1
