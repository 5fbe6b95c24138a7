"""What another ComfyUI can run."""

from __future__ import annotations

from typing import Any

import pytest

from comfy_parallel.core.ability import Ability

INFO = {
    "Loader": {"input": {"required": {"ckpt_name": [["a.safetensors", "sub/b.ckpt"], {"tooltip": "x"}]}}},
    "Newer": {"input": {"required": {"name": ["COMBO", {"options": ["one", "two", 3]}], "text": ["STRING", {}]}}},
    "Elsewhere": {"input": {"required": {"name": ["COMBO", {"remote": {"route": "/x"}}]}}},
    "Image": {"input": {"required": {"image": [["there.png"], {"image_upload": True}]}, "optional": {"how": [["x"]]}}},
    "Broken": {"input": None},
    "Nested": {"input": {"required": {"how": [[{"key": "a"}], {}]}}},
}


def why_not(kind: str, **inputs: Any) -> str | None:
    return Ability(INFO).why_not({"1": {"class_type": kind, "inputs": inputs}}, lambda kind, name, value: False)


@pytest.mark.parametrize(
    ("kind", "inputs", "reason"),
    [
        ("Loader", {"ckpt_name": "a.safetensors"}, None),
        ("Loader", {"ckpt_name": "sub/b.ckpt"}, None),
        ("Loader", {"ckpt_name": ["4", 0]}, None),
        ("Loader", {}, None),
        ("Loader", {"ckpt_name": "x.safetensors"}, "no model x.safetensors"),
        ("Newer", {"name": "two", "text": "whatever"}, None),
        ("Newer", {"name": "3"}, None),
        ("Newer", {"name": "four"}, "Newer does not offer 'four' as its name"),
        ("Elsewhere", {"name": "whatever"}, None),
        ("Image", {"image": "there.png", "how": "y"}, "Image does not offer 'y' as its how"),
        ("Broken", {"x": "y"}, None),
        ("Nested", {"how": "a"}, None),
        ("Missing", {}, "no node class Missing"),
    ],
)
def test_classes_and_choices_are_compared(kind: str, inputs: dict[str, Any], reason: str | None) -> None:
    assert why_not(kind, **inputs) == reason


def test_what_is_sent_or_checked_by_the_node_need_not_be_offered() -> None:
    prompt = {"1": {"class_type": "Image", "inputs": {"image": "here.png"}}}
    asked = []

    def is_excused(kind: str, name: str, value: str) -> bool:
        asked.append((kind, name, value))
        return True

    assert Ability(INFO).why_not(prompt, is_excused) is None
    assert asked == [("Image", "image", "here.png")]


@pytest.mark.parametrize("prompt", [None, [], {"1": None}, {"1": {"class_type": None}}, {"1": {}}])
def test_what_is_no_workflow_does_not_raise(prompt: Any) -> None:
    reason = Ability(INFO).why_not(prompt, lambda kind, name, value: False)
    assert reason is None or reason.startswith("no node class")


def test_those_that_offer_the_same_are_equal() -> None:
    assert Ability(INFO) == Ability(dict(INFO))
    assert Ability(INFO) != Ability({**INFO, "More": {}})
    assert Ability("no object").why_not({}, lambda kind, name, value: False) is None


def test_choices_are_known() -> None:
    ability = Ability(INFO)
    assert ability.is_choice("Image", "image")
    assert not ability.is_choice("Newer", "text")
    assert not ability.is_choice("Missing", "x")
