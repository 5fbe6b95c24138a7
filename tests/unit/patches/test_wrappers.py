"""The small wrappers that live beside the patches that use them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest

from comfy_parallel import patches
from comfy_parallel.isolation import random_state, threads
from comfy_parallel.isolation.slot_globals import SlotGlobals
from comfy_parallel.patches import comfy_execution
from comfy_parallel.patches import server as server_patches
from comfy_parallel.slots import device, gates
from comfy_parallel.slots.slot import Run, Slot, entered
from tests.fakes import make_slots

pytestmark = pytest.mark.timeout(120)

SOON_S = 0.2  # how long one that should find nobody waits
LONG_S = 60.0


@pytest.fixture
def slots() -> tuple[Slot, ...]:
    return make_slots("cuda:0", "cuda:1")


def wrapper(target: str) -> Callable[..., Any]:
    """What the patch of this target puts around it."""
    (patch,) = [patch for patch in patches.ALL if patch.target == target]
    return patch.wrap


class Meeting:
    """A function that says whether another thread was inside it at the same time."""

    def __init__(self, timeout_s: float = SOON_S) -> None:
        self._barrier = threading.Barrier(2, timeout=timeout_s)

    def __call__(self) -> bool:
        try:
            self._barrier.wait()
        except threading.BrokenBarrierError:
            return False
        return True


def met(call: Callable[[], bool], callers: tuple[Slot | None, ...]) -> bool:
    """Whether calls of one function by each caller, all at once, overlap."""

    def run(slot: Slot | None) -> bool:
        with entered(slot):
            return call()

    with ThreadPoolExecutor(len(callers)) as pool:
        return any(pool.map(run, callers))


# Attention under process-wide flags.

ATTENTION = "comfy.ops:scaled_dot_product_attention"


def attention(timeout_s: float = SOON_S) -> Any:
    code = compile("def scaled_dot_product_attention():\n    return meet()", "ops.py", "exec").co_consts[0]
    return FunctionType(code, {"meet": Meeting(timeout_s)})


def test_attention_that_sets_flags_runs_one_slot_at_a_time(slots: tuple[Slot, ...]) -> None:
    assert not met(wrapper(ATTENTION)(attention(), "sdpa_kernel"), slots)


def test_outside_slots_attention_takes_no_lock() -> None:
    assert met(wrapper(ATTENTION)(attention(LONG_S), "sdpa_kernel"), (None, None))


def test_attention_that_sets_no_flags_is_not_wrapped() -> None:
    original = attention()
    assert wrapper(ATTENTION)(original, None) is original


# Housekeeping.


@pytest.mark.parametrize(
    ("caller", "running", "runs"),
    [(0, [], True), (0, [0], True), (0, [1], False), (0, [0, 1], False), (None, [0, 1], True)],
)
@pytest.mark.parametrize("target", ["hook_breaker_ac10a0:restore_functions", "app.assets.seeder:_AssetSeeder.resume"])
def test_housekeeping_waits_until_the_other_slots_rest(
    slots: tuple[Slot, ...], target: str, caller: int | None, running: list[int], runs: bool
) -> None:
    for index in running:
        slots[index].run = Run(f"job {index}")
    calls: list[Any] = []
    with entered(None if caller is None else slots[caller]):
        wrapper(target)(calls.append)("restore")
    assert calls == (["restore"] if runs else [])


def test_writers_of_the_asset_database_take_turns(slots: tuple[Slot, ...]) -> None:
    assert not met(wrapper("app.assets.services:register_output_files")(Meeting()), slots)


# PIL's process-wide setting.


class FakePil:
    """The host's helper, which turns a setting of PIL's on for its second try."""

    def __init__(self) -> None:
        self.is_lenient = False
        self.inside = threading.Semaphore(1)
        self.was_shared = False

    def pillow(self, fn: Callable[[Any], Any], arg: Any) -> Any:
        self.was_shared |= not self.inside.acquire(blocking=False)
        previous, self.is_lenient = self.is_lenient, True
        try:
            return fn(arg)
        finally:
            self.is_lenient = previous
            self.inside.release()

    def load(self, arg: Any) -> Any:
        if not self.is_lenient:
            raise OSError("truncated")
        return arg


def test_retries_of_truncated_images_do_not_overlap(slots: tuple[Slot, ...]) -> None:
    pil = FakePil()
    pillow = wrapper("node_helpers:pillow")(pil.pillow)

    def retry(slot: Slot) -> list[Any]:
        with entered(slot):
            return [pillow(pil.load, number) for number in range(200)]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(retry, slots)) == [list(range(200))] * 2
    assert not pil.was_shared
    assert not pil.is_lenient


def test_an_image_that_opens_takes_no_lock(slots: tuple[Slot, ...]) -> None:
    def refuse(fn: Any, arg: Any) -> Any:
        raise AssertionError("nothing was to be retried")

    with comfy_execution._pillow_lock:
        assert comfy_execution._pillow(refuse)(len, "abc") == 3


def test_other_errors_are_not_retried() -> None:
    with pytest.raises(KeyError):
        comfy_execution._pillow(lambda fn, arg: arg)(lambda arg: {}[arg], "x")


# Prefixes of expanded graphs.


class GraphBuilder:
    """The host's, as far as prefixes go."""

    @classmethod
    def alloc_prefix(cls, root: str, call_index: int, graph_index: int) -> str:
        return f"{root}.{call_index}.{graph_index}."


def test_prefixes_are_counted_per_slot(slots: tuple[Slot, ...]) -> None:
    builder = "comfy_execution.graph_utils:GraphBuilder"
    set_default_prefix = wrapper(f"{builder}.set_default_prefix")(lambda *args: None)
    alloc_prefix = wrapper(f"{builder}.alloc_prefix")(GraphBuilder.alloc_prefix.__func__)
    for slot in slots:
        with entered(slot):
            set_default_prefix(GraphBuilder, f"node{slot.index}", 3 + slot.index)
    prefixes = []
    for _ in range(2):
        for slot in slots:
            with entered(slot):
                prefixes.append(alloc_prefix(GraphBuilder))
    assert prefixes == ["node0.3.0.", "node1.4.0.", "node0.3.1.", "node1.4.1."]
    with entered(slots[0]):
        assert alloc_prefix(GraphBuilder, "own", graph_index=9) == "own.3.9."
        assert alloc_prefix(GraphBuilder) == "node0.3.3."


# The preview method.


def test_the_preview_method_is_the_slots_own(slots: tuple[Slot, ...]) -> None:
    host_args = SimpleNamespace(preview_method="none", preview_size=512)
    args = wrapper("latent_preview:args")(host_args)
    with entered(slots[0]):
        args.preview_method = "taesd"
        args.preview_size = 256
    with entered(slots[1]):
        assert args.preview_method == "none"
        assert args.preview_size == 256
    with entered(slots[0]):
        assert args.preview_method == "taesd"
    args.preview_method = "auto"
    assert host_args == SimpleNamespace(preview_method="auto", preview_size=256)


# Pinned memory.


@pytest.mark.parametrize(("total", "expected"), [(100.0, 50.0), (-1, -1), (0, 0)])
def test_each_slot_may_pin_its_share(slots: tuple[Slot, ...], total: float, expected: float) -> None:
    (pins,) = [patch for patch in patches.ALL if patch.target == "comfy.model_management:PINNED_MEMORY"]
    assert isinstance(pins, SlotGlobals)
    assert pins.initial["MAX_PINNED_MEMORY"](total) == expected


# What wraps these is tested with its module; that it is what the host gets, only GPUs can show.


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("torch.cuda:empty_cache", device.empty_own_cache),
        ("comfy_aimdo.model_vbar:vbars_reset_watermark_limits", device.reset_own_watermarks),
        ("torch.cuda:synchronize", gates.wait_for_recording),
        ("torch.random:fork_rng", random_state.fork_own_device),
        ("threading:Thread.start", threads.start_in_slot),
        ("concurrent.futures:ThreadPoolExecutor.submit", threads.submit_in_slot),
    ],
)
def test_what_only_gpus_can_show_is_declared(target: str, expected: Callable[..., Any]) -> None:
    assert wrapper(target) is expected


def test_status_events_go_out_only_when_somebody_listens(slots: tuple[Slot, ...]) -> None:
    sent: list[tuple[Any, ...]] = []
    send_sync = wrapper("server:PromptServer.send_sync")(lambda self, *args: sent.append(args))
    server = SimpleNamespace(sockets={})
    send_sync(server, "status", {"status": {}})
    assert sent == []
    send_sync(server, "executed", {"node": "1"})
    server.sockets["client"] = object()
    send_sync(server, "status", {"status": {}})
    assert [event for event, *_ in sent] == ["executed", "status"]


class Sender:
    def __init__(self) -> None:
        self.sockets: dict[str, object] = {}

    def send(self) -> None: ...
    def send_json(self) -> None: ...


def test_what_nobody_can_hear_is_not_sent_unless_a_node_pack_may_listen(
    slots: tuple[Slot, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    send_sync = wrapper("server:PromptServer.send_sync")(lambda self, event, *args: sent.append(event))
    monkeypatch.setattr(server_patches, "_senders", server_patches._senders_of(Sender))
    server = Sender()
    with entered(slots[0]):
        send_sync(server, "to nobody", {})
        send_sync(server, "to one who is not there", {}, "client")
        server.sockets["client"] = object()
        send_sync(server, "to all", {})
        send_sync(server, "to the client", {}, "client")
        send_sync(server, "to another", {}, "another")
        server.send = lambda: None  # type: ignore[method-assign]
        send_sync(server, "past the object's own", {}, "another")
        del server.send
        monkeypatch.setattr(Sender, "send_json", lambda self: None)
        send_sync(server, "past the class's own", {}, "another")
    assert sent == ["to all", "to the client", "past the object's own", "past the class's own"]


def test_who_starts_a_job_lets_the_event_loop_tell_the_client(
    slots: tuple[Slot, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    send_sync = wrapper("server:PromptServer.send_sync")(lambda self, event, *args: told.append(event))
    monkeypatch.setattr("comfy_parallel.patches.server.time.sleep", told.append)
    server = SimpleNamespace(sockets={})
    send_sync(server, "execution_start", {"prompt_id": "a"}, "client")
    with entered(slots[1]):
        send_sync(server, "execution_start", {"prompt_id": "a"}, "client")
        send_sync(server, "executing", {"prompt_id": "a"}, "client")
    assert told == ["execution_start", "execution_start", 50e-6, "executing"]


def test_a_jobs_events_say_which_slot_they_come_from(slots: tuple[Slot, ...]) -> None:
    sent: list[tuple[Any, ...]] = []
    send_sync = wrapper("server:PromptServer.send_sync")(lambda self, *args: sent.append(args))
    data = {"prompt_id": "a"}
    with entered(slots[1]):
        send_sync(SimpleNamespace(sockets={}), "executing", data, "client")
    assert sent == [("executing", {"prompt_id": "a", "gpu_id": 1}, "client")]
    assert data == {"prompt_id": "a"}


class PreviewServer:
    """Encodes and sends as the host's."""

    def __init__(self, *clients: str) -> None:
        self.sockets = dict.fromkeys(clients)
        self.encoded: list[Any] = []

    async def send_image(self, image_data: Any, sid: Any = None) -> None:
        self.encoded.append((image_data, sid))

    async def send_image_with_metadata(self, image_data: Any, metadata: Any = None, sid: Any = None) -> None:
        self.encoded.append((image_data, metadata, sid))


@pytest.mark.parametrize(
    ("clients", "sid", "is_encoded"),
    [(["a"], "a", True), (["a"], "b", False), ([], "a", False), (["a"], None, True), ([], None, False)],
)
def test_previews_are_encoded_for_connected_clients_only(clients: list[str], sid: Any, is_encoded: bool) -> None:
    server = PreviewServer(*clients)
    plain = wrapper("server:PromptServer.send_image")(PreviewServer.send_image)
    named = wrapper("server:PromptServer.send_image_with_metadata")(PreviewServer.send_image_with_metadata)
    asyncio.run(plain(server, 1, sid))
    asyncio.run(plain(server, 2, sid=sid))
    asyncio.run(named(server, 3, {"node": 4}, sid))
    asyncio.run(named(server, 5, sid=sid))
    assert server.encoded == ([(1, sid), (2, sid), (3, {"node": 4}, sid), (5, None, sid)] if is_encoded else [])
