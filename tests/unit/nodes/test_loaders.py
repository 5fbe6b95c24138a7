"""Device-choosing nodes are made of the classes that the host has, of either kind."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from comfy_parallel.errors import AllocationError
from comfy_parallel.nodes import loaders, registry
from comfy_parallel.nodes.table import CORE, PACKS, Loader
from comfy_parallel.slots import choice

DEVICES = ["cpu", "cuda:0", "cuda:1"]


device = torch.device("cpu")  # what a pack has chosen when it was imported
offload_device = torch.device("cpu")


class PackNode:
    """As those of a pack with a device input of its own, and devices in its module."""

    RETURN_TYPES = ("THING",)
    RETURN_NAMES = ("thing",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the host's name
        return {"required": {"name": (["a"],)}, "optional": {"load_device": (["main_device", "offload_device"],)}}

    def run(self, **inputs: Any) -> tuple[Any, ...]:
        asked = choice.instead_of(lambda: "the slot's")(), choice.instead_of_offload(lambda: "the slot's")()
        return ({**inputs, "device": str(device), "offload": str(offload_device), "asked": list(map(str, asked))},)


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
    expected |= {"UNetLoaderLP"}
    assert found.keys() == expected


@pytest.mark.parametrize("row", PACKS, ids=lambda row: row.name)
def test_a_pack_that_is_there_gets_its_nodes(row: Loader, tmp_path: Path) -> None:
    pack = {row.name: OldLoader}
    assert f"{row.name}MultiGPU" in registry.nodes(pack, "cpu", [tmp_path])
    assert f"{row.name}MultiGPU" not in registry.nodes({}, "cpu", [tmp_path])


OWN = ("load_device", "main_device", "offload_device")
NONE = {"device": "cpu", "offload": "cpu", "asked": ["the slot's", "the slot's"]}


def test_a_device_from_another_node_is_taken_and_given_on() -> None:
    node = made(PackNode, Loader("Some", device="where", is_link=True, gives=True))
    assert node.INPUT_TYPES()["optional"]["where"][0] == "MULTIGPUDEVICE"
    assert node.RETURN_TYPES == ("THING", "MULTIGPUDEVICE")
    assert node.RETURN_NAMES == ("thing", "where")
    thing, where = node().load(name="a", where="cuda:1")
    assert (thing["device"], thing["asked"], where) == ("cuda:1", ["cuda:1", "the slot's"], "cuda:1")
    assert node().load(name="a") == ({"name": "a", **NONE}, "slot")
    assert str(device) == "cpu", "for the call alone"


def test_the_packs_own_input_says_the_same() -> None:
    node = made(PackNode, Loader("Some", own=OWN))
    assert "load_device" not in node.INPUT_TYPES()["optional"]
    assert node().load(name="a", device="cuda:1")[0]["load_device"] == "main_device"
    assert node().load(name="a", device="cpu")[0]["load_device"] == "offload_device"
    assert made(OldLoader, Loader("Some", own=OWN))().load(name="a")[0] == "a", "an older pack without that input"


class WideNode(PackNode):
    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the host's name
        text = ("STRING", {})
        return {"required": {"name": text}, "optional": {"one": text, "load_device": text, "two": text}}


@pytest.mark.parametrize(
    ("row", "order"),
    [
        (Loader("Some"), ["name", "one", "load_device", "two", "device"]),
        (Loader("Some", early=True), ["name", "device", "one", "load_device", "two"]),
        (Loader("Some", own=OWN), ["name", "one", "device", "two"]),
        (Loader("Some", device="load_device"), ["name", "one", "two", "load_device"]),
        (Loader("Some", offload="wait"), ["name", "one", "load_device", "two", "device", "wait"]),
    ],
)
def test_widgets_are_in_the_order_of_the_workflows_that_keep_their_values(row: Loader, order: list[str]) -> None:
    inputs = made(WideNode, row).INPUT_TYPES()
    assert [*inputs["required"], *inputs["optional"]] == order


def test_where_weights_wait_is_chosen_for_the_call_alone() -> None:
    node = made(PackNode, Loader("Some", offload="offload_device"))
    assert node.INPUT_TYPES()["optional"]["offload_device"][0] == DEVICES
    (thing,) = node().load(name="a", device="cuda:0", offload_device="cuda:1")
    assert (thing["device"], thing["offload"], thing["asked"]) == ("cuda:0", "cuda:1", ["cuda:0", "cuda:1"])
    assert node().load(name="a") == ({"name": "a", **NONE},)


def test_a_noted_device_is_where_the_blocks_of_that_model_wait() -> None:
    swap = made(PackNode, Loader("Swap", device="", noted="swap_device"))
    assert "device" not in swap.INPUT_TYPES()["optional"]
    (noted,) = swap().load(name="a", swap_device="cuda:1")
    assert noted == {"name": "a", "swap_device": "cuda:1", **NONE}
    model = SimpleNamespace(model_options={"transformer_options": {"block_swap_args": noted}})
    sampler = made(PackNode, Loader("Sampler", is_link=True, swaps=True))
    assert sampler().load(name="a", model=model, device="cuda:0")[0]["offload"] == "cuda:1"
    for without in ({}, {"model": SimpleNamespace(model_options={})}):
        assert sampler().load(name="a", **without)[0]["offload"] == "cpu"


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
