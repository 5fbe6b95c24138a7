"""Device-choosing nodes are made of the classes that the host has, of either kind."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from comfy_parallel.errors import AllocationError
from comfy_parallel.nodes import loaders, registry
from comfy_parallel.nodes.table import CORE, PACKS, Loader
from comfy_parallel.slots import choice

DEVICES = ["cpu", "cuda:0", "cuda:1"]


class OldLoader:
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load_it"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the host's name
        return {"required": {"name": (["a"],)}, "optional": {"device": (["default", "cpu"],)}}

    def load_it(self, name: str, device: str = "default") -> tuple[Any, ...]:
        return (name, device, choice.instead_of(lambda: "the slot's")())


class NewLoader:
    """As the host's second kind of node."""

    RETURN_TYPES = ["MODEL"]

    @classmethod
    def define_schema(cls) -> None: ...

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the host's name
        return {"required": {"name": (["a"],)}}

    @classmethod
    def execute(cls, name: str) -> Any:
        return SimpleNamespace(result=(name, str(choice.instead_of(lambda: "the slot's")())))


def made(original: type, row: Loader | None = None) -> Any:
    return loaders.with_device(row or Loader("Some"), original, lambda: DEVICES)


def test_the_device_is_chosen_for_the_call_alone() -> None:
    node = made(OldLoader)()
    assert [str(value) for value in node.load(name="a", device="cuda:1")] == ["a", "default", "cuda:1"]
    assert node.load(name="a", device="slot") == node.load(name="a") == ("a", "default", "the slot's")


def test_nodes_of_the_new_kind_work_too() -> None:
    assert made(NewLoader)().load(name="a", device="cpu").result == ("a", "cpu")


def test_the_inputs_are_the_loaders_and_the_device() -> None:
    inputs = made(OldLoader).INPUT_TYPES()
    assert inputs["required"] == OldLoader.INPUT_TYPES()["required"]
    assert inputs["optional"]["device"][0] == ["slot", *DEVICES]
    assert OldLoader.INPUT_TYPES()["optional"]["device"] == (["default", "cpu"],)


def test_every_input_of_virtual_vram_has_a_tooltip() -> None:
    assert all(options["tooltip"] for _, options in loaders.virtual_inputs(DEVICES, True).values())


def test_a_device_that_is_not_here_is_told() -> None:
    with pytest.raises(AllocationError, match="no device 'cuda:7' here; choose slot, or one of cpu, cuda:0"):
        made(OldLoader)().load(name="a", device="cuda:7")


def test_what_virtual_vram_gets_is_what_the_widgets_say() -> None:
    asked: dict[str, Any] = {}

    def spread(result: tuple[Any, ...], **inputs: Any) -> tuple[Any, list[str]]:
        asked.update(inputs)
        return result, ["the plan"]

    node: Any = loaders.with_virtual_vram(Loader("Some"), NewLoader, lambda: DEVICES, spread)
    shown = node().load(name="a", compute_device="cuda:0", virtual_vram_gb=1.5, donor_device="cuda:1")
    assert shown == {"ui": {"text": ["the plan"]}, "result": ("a", "cuda:0")}
    assert (asked["gigabytes"], asked["donors"], asked["expert"], asked["eject"]) == (1.5, "cuda:1", "", True)


def test_nodes_are_made_of_what_the_host_has(tmp_path: Path) -> None:
    found = registry.nodes({"UNETLoader": OldLoader, "GLIGENLoader": OldLoader}, "cpu", [tmp_path])
    expected = {"DeviceSelectorMultiGPU", "UNETLoaderMultiGPU", "UNETLoaderDisTorch2MultiGPU", "GLIGENLoaderMultiGPU"}
    assert found.keys() == expected


@pytest.mark.parametrize("row", PACKS, ids=lambda row: row.name)
def test_a_pack_that_is_there_gets_its_nodes(row: Loader, tmp_path: Path) -> None:
    pack = {row.name: OldLoader}
    assert f"{row.name}MultiGPU" in registry.nodes(pack, "cpu", [tmp_path])
    assert f"{row.name}MultiGPU" not in registry.nodes({}, "cpu", [tmp_path])


def test_the_old_node_takes_other_gpus_first() -> None:
    asked: dict[str, Any] = {}

    def spread(result: tuple[Any, ...], **inputs: Any) -> tuple[Any, list[str]]:
        asked.update(inputs)
        return result, []

    node: Any = loaders.with_legacy_vram(Loader("Some"), OldLoader, lambda: DEVICES, spread)
    node().load(name="a", device="cuda:0", use_other_vram=True)
    assert asked["donors"] == "cuda:1,cpu"
    node().load(name="a", device="cuda:0")
    assert asked["donors"] == "cpu"


def test_a_node_that_is_there_is_not_replaced(tmp_path: Path) -> None:
    known = {"UNETLoader": OldLoader, "UNETLoaderMultiGPU": NewLoader}
    assert "UNETLoaderMultiGPU" not in registry.nodes(known, "cpu", [tmp_path])


def test_nothing_is_added_beside_the_pack_of_these_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for folder in ("off.disabled", "multi"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "distorch_2.py").touch()
    caplog.set_level("INFO")
    assert registry.nodes({"UNETLoader": OldLoader}, "cpu", [tmp_path]) == {}
    assert "because ComfyUI-MultiGPU is installed" in caplog.text
    (tmp_path / "multi").rename(tmp_path / "multi.disabled")
    assert registry.nodes({"UNETLoader": OldLoader}, "cpu", [tmp_path])


def test_no_loader_is_declared_twice() -> None:
    names = [row.name for row in (*CORE, *PACKS)]
    assert len(names) == len(set(names))
