"""Jobs of one kind are those that take about as long."""

from __future__ import annotations

from comfy_parallel.core.job_kind import kind_of
from tests.host.workflows import txt2img


def test_seeds_and_texts_make_no_difference() -> None:
    assert kind_of(txt2img(1, text="a")) == kind_of(txt2img(2, text="b"))
    assert hash(kind_of(txt2img(1))) == hash(kind_of(txt2img(2)))


def test_sizes_steps_nodes_and_models_do() -> None:
    kinds = [kind_of(txt2img(1)), kind_of(txt2img(1, steps=9)), kind_of(txt2img(1, width=128)), kind_of({})]
    kinds.append(kind_of(txt2img(1), frozenset({"a"})))
    assert len(set(kinds)) == len(kinds)


def test_what_nodes_may_hold_is_no_error() -> None:
    assert kind_of("no workflow") is None
    assert kind_of({"1": 5, "2": {"class_type": 3, "inputs": [1]}, "3": {"inputs": {"steps": ["1", 0], "width": True}}})
