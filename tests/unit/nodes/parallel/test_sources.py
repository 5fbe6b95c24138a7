"""Each participant gets its own seed, value and part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from comfy_parallel.core.fan_out import Classes
from comfy_parallel.errors import NodeInputError
from comfy_parallel.nodes.parallel import collectors, dividers, fan_out, registry, sources


def test_the_seed_counts_up() -> None:
    assert [sources.DistributedSeed().distribute(7, participant=one)[0] for one in range(3)] == [7, 8, 9]
    assert sources.MultiGPUDistributor().distribute(-5, batch_size=2, participant=1) == (-4, 2)


@pytest.mark.parametrize(
    ("participant", "expected"), [(0, 10), (1, 20), (2, 10), (3, 10)], ids=["first", "own", "empty", "none"]
)
def test_a_value_is_ones_own_where_there_is_one(participant: int, expected: int) -> None:
    values = '{"1": "20", "2": "", "_type": "INT"}'
    assert sources.DistributedValue().distribute("10", values, participant=participant) == (expected,)


@pytest.mark.parametrize(
    ("values", "problem"),
    [("{", "no JSON"), ("[1]", "write an object"), ('{"_type": "X"}', "_type is 'X'"), ('{"_type": "INT"}', "no INT")],
)
def test_values_that_mean_nothing_are_refused(values: str, problem: str) -> None:
    with pytest.raises(NodeInputError, match=problem):
        sources.DistributedValue().distribute("a", values)


def test_a_name_is_shown_and_passed_on() -> None:
    assert sources.DistributedModelName().show("a") == {"ui": {"text": ["a"]}, "result": ("a",)}
    assert sources.DistributedModelName().show(["a", 1])["result"] == (["a", "1"],)


def test_a_batch_is_divided_without_losing_one() -> None:
    node: Any = dividers.nodes()["ImageBatchDivider"]()
    parts = node.divide(divide_by=4, images=torch.arange(10.0).reshape(10, 1, 1, 1))
    assert [part.flatten().tolist() for part in parts[:4]] == [[0, 1, 2], [3, 4, 5], [6, 7], [8, 9]]
    assert [part.shape[0] for part in parts[4:]] == [0] * 6


def test_latents_and_sounds_are_divided_whole() -> None:
    latent = {"samples": torch.zeros(3, 4, 2, 2), "noise_mask": torch.ones(1, 16, 16), "batch_index": [0, 1, 2]}
    part = dividers.cut(latent, 1, 3)
    assert (part["samples"].shape[0], part["noise_mask"].shape[0], part["batch_index"]) == (2, 1, [1, 2])
    sound = dividers.cut({"waveform": torch.zeros(1, 2, 9), "sample_rate": 8}, 3, 9)
    assert (sound["waveform"].shape[-1], sound["sample_rate"]) == (6, 8)


@pytest.mark.parametrize("value", [[0, 1, 2, 3, 4], [torch.arange(5.0).reshape(5, 1, 1, 1)]], ids=["list", "batch"])
def test_participants_parts_make_the_whole(value: Any) -> None:
    node = dividers.ParallelDivider()
    parts = [node.divide(value, ["divider"], participant=[index], participants=[2])[0] for index in range(2)]
    assert [float(one) for part in parts for item in part for one in torch.as_tensor(item).flatten()] == [0, 1, 2, 3, 4]


def test_what_cannot_be_divided_is_refused() -> None:
    with pytest.raises(NodeInputError, match="a str cannot be divided"):
        dividers.ParallelDivider().divide(["text"], ["divider"], participants=[2])


def test_the_collector_of_a_share_is_never_cached() -> None:
    """The host compares tuples, in which the same object is equal to itself, even if it is no number."""
    for node in collectors.nodes(lambda: None).values():
        changed: Any = node.IS_CHANGED  # type: ignore[attr-defined]
        first, second = ((changed(participant=[1]),) for _ in range(2))
        assert first != second


def test_nodes_stay_out_beside_the_pack_that_they_are_known_from(tmp_path: Path) -> None:
    (tmp_path / "some name").mkdir()
    (tmp_path / "some name" / "distributed.py").write_text("class DistributedCollector: ...")
    assert registry.nodes({}, [tmp_path], lambda: None) == {}
    (tmp_path / "some name").rename(tmp_path / "some name.disabled")
    assert {"DistributedCollector", "DistributedSeed", "ParallelDivider"} <= registry.nodes(
        {}, [tmp_path], print
    ).keys()
    fan_out.use(Classes())
