"""Shared weights on their way to the GPUs and back."""

from __future__ import annotations

import gc
import hashlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from comfy_parallel.slots.slot import Slot, entered
from comfy_parallel.weights import loading
from comfy_parallel.weights.files.regions import is_shared
from comfy_parallel.weights.files.store import Store
from comfy_parallel.weights.gpu import blocks, copies, homes, pins
from comfy_parallel.weights.spans import Span
from tests.fakes import make_slots
from tests.gpu.conftest import MakeGpuServers
from tests.host.server import HostServer
from tests.host.test_parity import error_of, images_of
from tests.host.workflows import Workflow, node, txt2img, with_loras
from tests.unit.weights.samples import bits, model_of, numbers, read, torch_store, write

pytestmark = [pytest.mark.gpu, pytest.mark.host, pytest.mark.timeout(300)]

CHUNK = 64 << 10
MAP = {"COMFY_PARALLEL_WEIGHTS": "map"}
ROWS = 1 << 17  # of 4 numbers each: 2 MiB


@pytest.fixture(autouse=True)
def small_chunks(num_gpus: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(pins, "CHUNK", CHUNK)
    yield
    gc.collect()  # What is in such chunks goes.


@pytest.fixture
def two_slots() -> tuple[Slot, ...]:
    return make_slots("cuda:0", "cuda:1")


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    return torch_store(monkeypatch)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return write(tmp_path / "a.safetensors", weight=numbers(ROWS, 4), bias=numbers(ROWS))


@pytest.fixture
def without_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "is_fast", lambda source, target: False)


def moved(store: Store, path: str, slot: Slot, *, is_whole: bool = False) -> nn.Linear:
    """A module that a slot has loaded and moved to its GPU, as a whole or weight by weight."""
    with entered(slot), torch.device("meta"):
        module = nn.Linear(4, ROWS)
    module.to_empty(device="cpu")
    with entered(slot), torch.cuda.device(slot.device):
        module.load_state_dict(read(store, path))
        assert is_shared(module.weight)
        if is_whole:
            with copies.complete():
                loading.load_ahead(store, module, torch.device(slot.device), ())
        return module.to(slot.device)


def assert_right(module: nn.Linear, slot: Slot) -> None:
    assert (str(module.weight.device), str(module.bias.device)) == (slot.device, slot.device)
    assert bits(module.weight.cpu()) == bits(numbers(ROWS, 4))
    assert bits(module.bias.cpu()) == bits(numbers(ROWS))


SIZE = ROWS * 5 * 4


def test_pinned_memory_is_copied(store: Store, path: str, two_slots: tuple[Slot, ...], without_peers: None) -> None:
    for slot in two_slots:
        assert_right(moved(store, path, slot), slot)
        assert copies.bytes_from(slot) == {"pinned": SIZE, "staged": 0, "peer": 0}
    (file,) = store.files()
    assert file.pinned_bytes == file.identity.size == store.used_bytes


def test_torch_copies_what_lies_in_several_chunks(
    store: Store, path: str, two_slots: tuple[Slot, ...], without_peers: None
) -> None:
    """As ComfyUI does when it patches a weight."""
    module = moved(store, path, two_slots[0])
    home = homes.home_of(module.weight)
    assert home is not None
    assert store.files()[0].pinned_bytes > 10 * CHUNK
    for start in (0, ROWS // 2, ROWS - 1):
        assert torch.equal(home.tensor[start:].to("cuda:0", non_blocking=True), module.weight[start:])


def test_without_a_budget_buffers_carry(store: Store, path: str, two_slots: tuple[Slot, ...]) -> None:
    store.budget_bytes = 0
    assert_right(moved(store, path, two_slots[0]), two_slots[0])
    assert copies.bytes_from(two_slots[0]) == {"pinned": 0, "staged": SIZE, "peer": 0}
    assert store.used_bytes == 0


def test_where_the_driver_refuses_buffers_carry(
    store: Store, path: str, two_slots: tuple[Slot, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its error is not left for the next call to find."""
    monkeypatch.setattr(pins, "_READ_ONLY", 0)  # It cannot register a read-only mapping for writing.
    assert_right(moved(store, path, two_slots[0]), two_slots[0])
    assert copies.bytes_from(two_slots[0])["pinned"] == 0
    assert torch.ones(3, device="cuda:0").sum().item() == 3


def test_memory_that_is_not_pinned_any_more_is_not_used(
    store: Store, path: str, two_slots: tuple[Slot, ...], without_peers: None
) -> None:
    module = moved(store, path, two_slots[0])
    (file,) = store.files()
    store.let_go(path)  # as when somebody overwrites it
    assert file.pinned_bytes == 0
    with entered(two_slots[0]):
        assert_right(module.to("cpu").to(two_slots[0].device), two_slots[0])  # from the old bytes
    assert copies.bytes_from(two_slots[0]) == {"pinned": SIZE, "staged": SIZE, "peer": 0}
    module = moved(store, path, two_slots[0])
    assert_right(module, two_slots[0])


def test_what_goes_is_not_pinned(store: Store, path: str, two_slots: tuple[Slot, ...]) -> None:
    module = moved(store, path, two_slots[0])
    home = homes.home_of(module.weight)
    assert home is not None
    region = home.place[0]
    first = region.pins.tensor(Span.contiguous(0, torch.uint8, (CHUNK,)))
    assert first.is_pinned()
    del module, home, region
    store.drop_unused()
    assert not first.is_pinned()
    assert store.used_bytes == 0
    assert not store.files()


@pytest.fixture
def peers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.can_device_access_peer(0, 1):
        pytest.skip("these GPUs do not reach each other's memory")
    monkeypatch.setattr(copies, "is_fast", lambda source, target: True)


def test_another_gpu_is_copied_from(store: Store, path: str, two_slots: tuple[Slot, ...], peers_only: None) -> None:
    first = moved(store, path, two_slots[0], is_whole=True)
    second = moved(store, path, two_slots[1], is_whole=True)
    assert copies.bytes_from(two_slots[1]) == {"pinned": 0, "staged": 0, "peer": SIZE}
    for module, slot in zip((first, second), two_slots, strict=True):
        assert_right(module, slot)
        assert homes.home_of(module.weight) is not None


def test_a_gpu_whose_copy_was_written_to_is_not_copied_from(
    store: Store, path: str, two_slots: tuple[Slot, ...], peers_only: None
) -> None:
    first = moved(store, path, two_slots[0], is_whole=True)
    with torch.no_grad():
        first.weight.mul_(2)
    second = moved(store, path, two_slots[1], is_whole=True)
    assert_right(second, two_slots[1])
    assert copies.bytes_from(two_slots[1]) == {"pinned": SIZE, "staged": 0, "peer": 0}
    for module, slot, factor in ((first, two_slots[0], 2), (second, two_slots[1], 1)):
        with entered(slot):
            module.to("cpu")
        assert bits(module.weight) == bits(numbers(ROWS, 4) * factor)
        assert is_shared(module.weight) == (factor == 1)
        assert is_shared(module.bias)


@pytest.mark.parametrize("reader", ["cuda:1", "cuda:0"])
def test_who_copies_while_others_write_gets_the_files_numbers(
    store: Store, path: str, peers_only: None, reader: str
) -> None:
    """Writers and readers race for a while."""
    two_slots = make_slots("cuda:0", reader)
    expected = numbers(ROWS, 4).to(reader)
    wrong = []
    has_ended = threading.Event()

    def write_again_and_again() -> None:
        while not has_ended.is_set():
            module = moved(store, path, two_slots[0], is_whole=True)
            time.sleep(0.01)
            with torch.no_grad():
                module.weight.fill_(-1)

    writer = threading.Thread(target=write_again_and_again)
    writer.start()
    try:
        for _ in range(150):
            if not torch.equal(moved(store, path, two_slots[1], is_whole=True).weight, expected):
                wrong.append(1)
    finally:
        has_ended.set()
        writer.join()
    counted = copies.bytes_from(two_slots[1])
    assert counted["peer"] > 0, "some were written to in time, some were not"
    assert not wrong


def test_many_slots_load_at_once(store: Store, path: str, num_gpus: int) -> None:
    many = make_slots(*(f"cuda:{index % num_gpus}" for index in range(4)))

    def load(slot: Slot) -> None:
        for _ in range(20):
            assert_right(moved(store, path, slot), slot)

    with ThreadPoolExecutor(len(many)) as pool:
        list(pool.map(load, many))
    assert all(sum(copies.bytes_from(slot).values()) == 20 * SIZE for slot in many)


def test_slots_that_load_at_once_copy_from_each_other(
    store: Store, tmp_path: Path, num_gpus: int, peers_only: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is still on its way to another GPU, or to another slot of the same GPU, too."""
    for limit in ((blocks, "_LARGEST"), (pins, "CHUNK")):
        monkeypatch.setattr(*limit, 16 << 20)
    many = make_slots(*(f"cuda:{index % num_gpus}" for index in range(4)))
    expected = {f"{number}": numbers(1 << 20, 4, start=float(number)) for number in range(24)}
    views = read(store, write(tmp_path / "many.safetensors", **expected))
    together = threading.Barrier(len(many))
    rounds = 5

    def load(slot: Slot) -> None:
        device = torch.device(slot.device)
        model = model_of(store, views, slot.index)
        for _ in range(rounds):
            model.to("cpu")
            together.wait(60)
            with copies.complete():
                loading.load_ahead(store, model, device, ())
            together.wait(60)
            for name, parameter in model.named_parameters():
                assert torch.equal(parameter, expected[name[1:]].to(device)), name

    def load_in(slot: Slot) -> None:
        with entered(slot), torch.cuda.device(slot.device):
            load(slot)

    with ThreadPoolExecutor(len(many)) as pool:
        list(pool.map(load_in, many))
    counted = [copies.bytes_from(slot) for slot in many]
    size = rounds * sum(tensor.nbytes for tensor in expected.values())
    assert [sum(one.values()) for one in counted] == [size] * len(many)
    assert size <= sum(one["pinned"] for one in counted) < 2 * size, "one slot reads what all of them need"


def test_weights_in_blocks_are_right_and_give_their_memory_back_one_by_one(
    store: Store, tmp_path: Path, two_slots: tuple[Slot, ...]
) -> None:
    sizes = [(1 << 20, 2), (3,), (320,), (1 << 19, 4), (5, 7), (1 << 20, 1), (1,)]
    expected = {f"{number}": numbers(*size, start=float(number)) for number, size in enumerate(sizes)}
    views = read(store, write(tmp_path / "blocks.safetensors", **expected))
    models = []
    for slot in two_slots:  # the first from RAM, the second from the first's GPU
        device = torch.device(slot.device)
        with entered(slot):
            model = model_of(store, views, slot.index)
            for _ in range(2):
                model.to("cpu")
                with copies.complete():
                    loading.load_ahead(store, model, device, ())
        models.append(model)
        assert all(map(blocks.is_in_one, model.parameters()))
        assert {parameter.data_ptr() % 256 for parameter in model.parameters()} == {0}
        assert [bits(parameter.cpu()) for parameter in model.parameters()] == list(map(bits, expected.values()))
    size = sum(tensor.nbytes for tensor in expected.values())
    assert copies.bytes_from(two_slots[1]) == {"pinned": 0, "staged": 0, "peer": 2 * size}
    del models[0]
    with entered(two_slots[1]):
        model.p1.data.zero_()
        loading.take_apart(store, model)
    assert not any(map(blocks.is_in_one, model.parameters()))
    expected["1"].zero_()
    assert [bits(parameter.cpu()) for parameter in model.parameters()] == list(map(bits, expected.values()))
    before = torch.cuda.memory_allocated(device)
    model.p0.data = torch.empty(0)
    assert torch.cuda.memory_allocated(device) == before - expected["0"].nbytes


def copied_bytes(server: Any) -> list[dict[str, int]]:
    return [slot["copied_bytes"] for slot in server.request("GET", "/parallel/weights")[1]["slots"]]


def image_on(server: HostServer, workflow: Workflow, slot: int | None = None) -> list[str]:
    """Its hash."""
    entry = server.run(workflow, slot)
    assert entry["status"]["completed"], error_of(entry)
    return [hashlib.sha256(image).hexdigest() for image in images_of(server, entry)]


def small_job(seed: int) -> Workflow:
    """Its schedule is computed on the CPU, wherever the model lies."""
    return txt2img(seed, width=256, height=256, steps=3, scheduler="karras")


def test_images_are_the_same_whichever_way_the_weights_came(make_gpu_servers: MakeGpuServers, num_gpus: int) -> None:
    workflow = small_job(7)
    stock, pinned, staged, off = make_gpu_servers(
        [
            {"slots": None},
            {"slots": "", "env": MAP},
            {"slots": "", "env": {**MAP, "COMFY_PARALLEL_RAM_GB": "0.01"}},
            {"slots": "", "env": {"COMFY_PARALLEL_WEIGHTS": "off"}},
        ]
    )
    expected = image_on(stock, workflow)
    for server in (pinned, staged, off):
        for slot in range(num_gpus):
            assert image_on(server, workflow, slot) == expected
    assert copied_bytes(pinned)[0]["pinned"] > 100 << 20
    assert sum(copied_bytes(pinned)[1].values()) == copied_bytes(pinned)[0]["pinned"]
    assert copied_bytes(staged)[0] == {"pinned": 0, "staged": copied_bytes(pinned)[0]["pinned"], "peer": 0}
    assert [slot["pinned"] for slot in copied_bytes(staged)] == [0] * num_gpus
    assert copied_bytes(off) == []
    before = sum(copied_bytes(pinned)[0].values())
    pinned.request("POST", "/free", {"unload_models": True})
    again = small_job(8)
    assert image_on(pinned, again, 0) == image_on(stock, again)
    assert sum(copied_bytes(pinned)[0].values()) > before + (50 << 20)  # the diffusion model's, at least


def test_a_part_of_a_model_gives_its_memory_back(make_gpu_servers: MakeGpuServers, num_gpus: int) -> None:
    """While memory is short; and later it is loaded again."""
    workflow = small_job(7)
    workflow["part"] = node("CPTUnloadPart", model=workflow["sampler"]["inputs"]["model"])
    workflow["sampler"]["inputs"]["model"] = ["part", 0]
    stock, ours = make_gpu_servers([{"slots": None}, {"slots": "", "env": MAP}])
    expected = image_on(stock, workflow)
    for slot in (*range(num_gpus), 0):
        entry = ours.run(workflow, slot)
        assert [hashlib.sha256(image).hexdigest() for image in images_of(ours, entry)] == expected
        (told,) = entry["outputs"]["part"]["value"]
        assert told["is_unchanged"]
        assert told["loaded"] <= 0.6 * told["size"]
        assert told["given_back"] >= 0.9 * (told["size"] - told["loaded"])


@pytest.mark.parametrize("option", ["--novram", "--highvram"])
def test_images_are_the_same_wherever_weights_are_kept(make_gpu_servers: MakeGpuServers, option: str) -> None:
    """In RAM all the time, or on the GPU all the time; with a LoRA that is changed and removed."""
    stock, ours = make_gpu_servers([{"slots": None, "args": [option]}, {"slots": "cuda:1", "args": [option]}])
    for strengths in ((), (1.0,), (0.5, -0.5), ()):
        workflow = with_loras(small_job(7), *strengths)
        assert image_on(ours, workflow) == image_on(stock, workflow)
