"""Nodes that look, from inside a job, at state that the host keeps once per process.

Each takes `key` and `parties`: it goes on only when that many jobs with the same key are inside, so that
tests decide what happens at the same time. With one party it never waits.
"""

# ruff: noqa: N802, N805 - the host looks for INPUT_TYPES and IS_CHANGED

from __future__ import annotations

import asyncio
import gc
import hashlib
import io
import json
import random
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import latent_preview
import node_helpers
import numpy as np
import torch
from comfy_api.internal.async_to_sync import AsyncToSyncConverter
from comfy_execution.graph_utils import GraphBuilder
from comfy_execution.progress import get_progress_state
from comfy_execution.utils import get_executing_context
from PIL import Image, ImageFile
from server import PromptServer

from . import CPTRendezvous, as_bytes, current_slot_index, here, here_soon
from .caching import never_cached

CATEGORY = "comfy_parallel/test"
CPU = torch.device("cpu")


def meet(key: str, parties: int) -> None:
    CPTRendezvous().meet(key, parties, 60.0)


class Looks:
    """Base of the nodes here: `look` returns what it saw, as JSON."""

    CATEGORY = CATEGORY
    FUNCTION = "look"
    RETURN_TYPES = ("STRING",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"key": ("STRING", {"default": ""}), "parties": ("INT", {"default": 1}), **cls.inputs()}}

    @classmethod
    def IS_CHANGED(cls, **_inputs: Any) -> float:
        return never_cached()

    @classmethod
    def inputs(cls) -> dict[str, Any]:
        return {}


class CPTQueueSeen(Looks):
    """What video packs do with the queue: assert that exactly one job runs, and take it for their own."""

    def look(self, key: str, parties: int) -> tuple[str]:
        meet(key, parties)
        running = PromptServer.instance.prompt_queue.currently_running
        assert len(running) == 1
        seen = [next(iter(running.values()))[1], *(item[1] for item in running.values())]
        meet(key, parties)
        return (json.dumps(seen),)


class CPTJobState(Looks):
    """The job as each of the host's globals knows it, while others run; async, as newer nodes are."""

    def __init__(self) -> None:
        self.calls = 0

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {**super().INPUT_TYPES(), "hidden": {"node_id": "UNIQUE_ID"}}

    async def look(self, key: str, parties: int, node_id: str) -> tuple[str]:
        self.calls += 1
        meet(key, parties)
        await asyncio.sleep(0)
        registry, main_registry = get_progress_state(), sys.modules["__main__"].get_progress_state()
        context = get_executing_context()
        seen = {
            "node_id": node_id,
            "instance": id(self),
            "calls": self.calls,
            "loop": id(asyncio.get_running_loop()),
            "registry": registry.prompt_id,
            "main_registry": main_registry.prompt_id,
            "registry_nodes": sorted(registry.nodes),
            "context": [context.prompt_id, context.node_id],
            "last_prompt_id": PromptServer.instance.last_prompt_id,
            "last_node_id": PromptServer.instance.last_node_id,
            "client_id": PromptServer.instance.client_id,
        }
        meet(key, parties)
        return (json.dumps(seen),)


class CPTInterrupts(Looks):
    """`interrupter` interrupts its own job, as nodes may, and takes that back; each says what it saw of it."""

    @classmethod
    def inputs(cls) -> dict[str, Any]:
        return {"role": (["interrupter", "other"], {})}

    def look(self, key: str, parties: int, role: str) -> tuple[str]:
        meet(key, parties)
        if role == "interrupter":
            mm.interrupt_current_processing()
        meet(key, parties)
        during = [mm.interrupt_processing, mm.processing_interrupted()]
        meet(key, parties)
        if role == "interrupter":
            mm.interrupt_processing = False
        seen = {"during": during, "after": [mm.interrupt_processing, mm.processing_interrupted()]}
        return (json.dumps(seen),)


class Marked(torch.nn.Module):
    """A small model that knows whose it is."""

    def __init__(self, owner: str) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(32, 32)
        self.owner = owner


def load_marked(owner: str, device: torch.device = CPU) -> comfy.model_patcher.ModelPatcher:
    patcher = comfy.model_patcher.ModelPatcher(Marked(owner), load_device=device, offload_device=CPU)
    mm.load_models_gpu([patcher])
    return patcher


def owners() -> list[str]:
    """Whose the marked models are that this thread sees as loaded."""
    patchers = [loaded.model for loaded in mm.current_loaded_models]
    return [patcher.model.owner for patcher in patchers if isinstance(getattr(patcher, "model", None), Marked)]


class CPTLoads(Looks):
    """Loads many models on a device that is always full, so that every load unloads others."""

    @classmethod
    def inputs(cls) -> dict[str, Any]:
        return {"rounds": ("INT", {"default": 100, "max": 100000})}

    def look(self, key: str, parties: int, rounds: int) -> tuple[str]:
        always_full()
        slot = current_slot_index()
        device = torch.device("cpu", slot or 0)  # another one than "cpu", on which nothing is ever unloaded
        seen: Counter[str] = Counter()
        meet(key, parties)
        for _ in range(rounds):
            try:
                patchers = [load_marked(f"slot {slot}", device) for _ in range(3)]
                mm.load_models_gpu([patchers[0].clone()])
                mm.load_models_gpu([patchers[1]])
                is_there = any(loaded.model is patchers[1] for loaded in mm.current_loaded_models)
                seen["missing"] += not is_there
                seen["foreign"] += sum(owner != f"slot {slot}" for owner in owners())
                seen["loads"] += 5
            except Exception as error:
                seen[f"{type(error).__name__}: {error}"] += 1
        del patchers
        mm.unload_all_models()
        meet(key, parties)
        return (json.dumps(seen),)


def always_full() -> None:
    """Let the host believe that `cpu:N` has no memory left, and leave its other devices alone."""
    original = mm.get_free_memory
    if getattr(original, "is_always_full", False):
        return

    def get_free_memory(dev: Any = None, torch_free_too: bool = False) -> Any:
        if getattr(dev, "index", None) is None:
            return original(dev, torch_free_too)
        return (0, 0) if torch_free_too else 0

    get_free_memory.is_always_full = True
    mm.get_free_memory = get_free_memory


class CPTLoaded(Looks):
    """Which models this job's slot holds, while all parties hold theirs."""

    @classmethod
    def inputs(cls) -> dict[str, Any]:
        return {"model": ("MODEL", {})}

    def look(self, key: str, parties: int, model: Any) -> tuple[str]:
        meet(key, parties)
        seen = {
            "own": id(model.model),
            "loaded": [id(loaded.model.model) for loaded in mm.current_loaded_models],
            "parameters": [id(parameter) for parameter in model.model.parameters()],
            "addresses": [parameter.data_ptr() for parameter in model.model.parameters()],
        }
        meet(key, parties)
        return (json.dumps(seen),)


class CPTCollects(Looks):
    """`owner` loads a model and drops it as garbage that only the collector finds; `collector` collects it.

    The collector collects on its own thread or on the event loop's, which belongs to no slot.
    """

    dropped: dict[str, Any] = {}

    @classmethod
    def inputs(cls) -> dict[str, Any]:
        return {"role": (["owner", "collector"], {}), "on_loop": ("BOOLEAN", {"default": False})}

    def look(self, key: str, parties: int, role: str, on_loop: bool) -> tuple[str]:
        own = load_marked(f"kept by {role}")
        gc.disable()  # until the collector collects
        try:
            if role == "owner":
                self.drop(key)
            meet(key, parties)
            if role == "collector":
                self.collect(on_loop)
            meet(key, parties)
        finally:
            gc.enable()
        seen = {"gone": self.dropped[key]() is None, "before": owners(), "dead_before": dead_models()}
        new = load_marked(f"new of {role}")  # walks the list, whatever the collector left in it
        seen |= {"after": owners(), "dead_after": dead_models()}
        meet(key, parties)
        del own, new
        return (json.dumps(seen),)

    def collect(self, on_loop: bool) -> None:
        if not on_loop:
            gc.collect()
            return
        collected = threading.Event()
        PromptServer.instance.loop.call_soon_threadsafe(lambda: (gc.collect(), collected.set()), context=Context())
        assert collected.wait(60)

    def drop(self, key: str) -> None:
        patcher = load_marked("dropped")
        patcher.model.cycle = patcher.model
        self.dropped[key] = weakref.ref(patcher.model)


def dead_models() -> int:
    """How many of this thread's loaded models no longer exist."""
    return sum(loaded.real_model() is None for loaded in mm.current_loaded_models)


class CPTUnloads(Looks):
    """Loads a model; then, if it is to, unloads everything, as an out-of-memory error does."""

    @classmethod
    def inputs(cls) -> dict[str, Any]:
        return {"unload": ("BOOLEAN", {"default": False})}

    def look(self, key: str, parties: int, unload: bool) -> tuple[str]:
        own = load_marked("own")
        before = len(mm.current_loaded_models)
        meet(key, parties)
        if unload:
            mm.unload_all_models()
        meet(key, parties)
        seen = {"before": before, "after": len(mm.current_loaded_models), "bytes": own.loaded_size()}
        meet(key, parties)
        return (json.dumps(seen),)


class CPTKeeps(Looks):
    """Loads a model and keeps it after the job; or, to look, lets go of it and says how much of it is loaded."""

    kept: dict[int | None, comfy.model_patcher.ModelPatcher] = {}

    @classmethod
    def inputs(cls) -> dict[str, Any]:
        return {"keep": ("BOOLEAN", {"default": True})}

    def look(self, key: str, parties: int, keep: bool) -> tuple[str]:
        slot = current_slot_index()
        meet(key, parties)
        if keep:
            self.kept[slot] = load_marked("kept")
            return ("null",)
        own = self.kept.pop(slot)
        is_listed = any(loaded.model is own for loaded in mm.current_loaded_models)
        return (json.dumps({"listed": is_listed, "bytes": own.loaded_size()}),)


class DynamicPatcher:
    """A loaded model of the newer hosts' kind, as far as their search for pinned memory looks at it."""

    load_device = CPU

    def __init__(self) -> None:
        self.model = self
        self.dynamic_pins = {CPU: {"active": False, "current_prompt": False}}
        self.real_model = None
        self.asked = 0

    def is_dynamic(self) -> bool:
        return True

    def partially_unload_ram(self, size: int, *subsets: Any, **others: Any) -> int:
        """Before 0.28 hosts named no subsets."""
        self.asked += 1
        return 0


class CPTFreesPins(Looks):
    """Each has a model with pinned memory; `other` looks for pinned memory to free. Says how often it was asked."""

    @classmethod
    def inputs(cls) -> dict[str, Any]:
        return {"role": (["keeper", "other"], {})}

    def look(self, key: str, parties: int, role: str) -> tuple[str]:
        own: Any = DynamicPatcher()
        mm.current_loaded_models.append(own)
        meet(key, parties)
        if role == "other":
            mm.free_pins(1 << 40)
        meet(key, parties)
        mm.current_loaded_models.remove(own)
        return (json.dumps(own.asked > 0),)


class FakeCudart:
    """Registers any memory, at once."""

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:
        return 0

    def cudaHostUnregister(self, pointer: int) -> int:
        return 0


class CPTPins(Looks):
    """Pins and unpins memory by the host's functions; leaves some pinned and says what the accounts hold."""

    @classmethod
    def inputs(cls) -> dict[str, Any]:
        return {"rounds": ("INT", {"default": 100, "max": 100000})}

    def look(self, key: str, parties: int, rounds: int) -> tuple[str]:
        torch.cuda.cudart = FakeCudart
        limit, mm.MAX_PINNED_MEMORY = mm.MAX_PINNED_MEMORY, 1 << 40
        kept = [torch.nn.Parameter(torch.zeros(64 + current_slot_index())) for _ in range(rounds)]
        meet(key, parties)
        pinned = 0
        for parameter in kept:
            passing = torch.nn.Parameter(torch.zeros(32))
            pinned += mm.pin_memory(parameter) + mm.pin_memory(passing)
            time.sleep(0)
            pinned -= mm.unpin_memory(passing)
        meet(key, parties)
        seen = {
            "pinned": pinned,
            "entries": len(mm.PINNED_MEMORY),
            "own": sorted(mm.PINNED_MEMORY) == sorted(parameter.data_ptr() for parameter in kept),
            "total": mm.TOTAL_PINNED_MEMORY,
            "sum": sum(mm.PINNED_MEMORY.values()),
            "expected": sum(parameter.numel() * parameter.element_size() for parameter in kept),
        }
        for parameter in kept:
            mm.unpin_memory(parameter)
        seen["left"] = [len(mm.PINNED_MEMORY), mm.TOTAL_PINNED_MEMORY]
        mm.MAX_PINNED_MEMORY = limit
        meet(key, parties)
        return (json.dumps(seen),)


class CPTGlobals(Looks):
    """Writes a mark of its own into every global that is to be one per slot, and reads all of them back."""

    def look(self, key: str, parties: int) -> tuple[str]:
        names = slot_globals()
        mark = f"of slot {current_slot_index()}"
        before = {name: getattr(module, name.split(":")[1]) for name, module in names.items()}
        for name, module in names.items():
            setattr(module, name.split(":")[1], mark)
        meet(key, parties)
        seen = {name: getattr(module, name.split(":")[1]) == mark for name, module in names.items()}
        for name, module in names.items():
            setattr(module, name.split(":")[1], before[name])
        meet(key, parties)
        return (json.dumps(seen),)


def slot_globals() -> dict[str, Any]:
    """`module:name` of each such global that this host has."""
    from comfy_parallel import patches
    from comfy_parallel.isolation.slot_globals import SlotGlobals

    wanted = [(p.module, name) for p in patches.ALL if isinstance(p, SlotGlobals) for name in p.names]
    modules = {name: sys.modules[name] for name, _ in wanted if name in sys.modules}
    return {f"{m}:{n}": modules[m] for m, n in wanted if m in modules and hasattr(modules[m], n)}


class CPTNodeEnd(Looks):
    """`keeper` has state that the newer hosts' end of a node throws away; `other` ends a node meanwhile."""

    @classmethod
    def inputs(cls) -> dict[str, Any]:
        return {"role": (["keeper", "other"], {})}

    def look(self, key: str, parties: int, role: str) -> tuple[str]:
        import comfy.memory_management as memory
        import comfy.model_prefetch as prefetch

        module, queue = torch.nn.Module(), [None]
        has_cross_step = hasattr(mm, "_register_cross_step")  # since 0.33
        if role == "keeper":
            if has_cross_step:
                module._comfy_cross_step_state = {}
                mm._register_cross_step(module)
            prefetch.PREFETCH_QUEUES.append(queue)
            memory.set_ram_cache_release_state(lambda target, **others: 7, 10)
        meet(key, parties)
        if role == "other":
            mm.reset_cast_buffers()
            prefetch.cleanup_prefetch_queues()
            memory.set_ram_cache_release_state(None, 0)
        meet(key, parties)
        seen = {
            "cross_step_state": hasattr(module, "_comfy_cross_step_state") if has_cross_step else role == "keeper",
            "prefetch_queue": any(known is queue for known in prefetch.PREFETCH_QUEUES),
            "released": memory.extra_ram_release(1),
            "headroom": memory.RAM_CACHE_HEADROOM,
        }
        mm.reset_cast_buffers()
        prefetch.cleanup_prefetch_queues()
        memory.set_ram_cache_release_state(None, 0)
        return (json.dumps(seen),)


def is_hooked() -> bool:
    return getattr(mm.cast_to, "is_hook", False)


class CPTHooks(Looks):
    """Replaces a function that the host protects from custom nodes, and says whether it is still replaced."""

    @classmethod
    def inputs(cls) -> dict[str, Any]:
        return {"hook": ("BOOLEAN", {"default": True})}

    def look(self, key: str, parties: int, hook: bool) -> tuple[str]:
        if hook:
            original = mm.cast_to

            def cast_to(*args: Any, **kwargs: Any) -> Any:
                return original(*args, **kwargs)

            cast_to.is_hook = True
            mm.cast_to = cast_to
        meet(key + " hooked", parties)
        meet(key + " others have rested", parties)
        return (json.dumps(is_hooked()),)


class CPTIsHooked(Looks):
    def look(self, key: str, parties: int) -> tuple[str]:
        meet(key, parties)
        return (json.dumps(is_hooked()),)


class CPTSeeder(Looks):
    """`other` pauses the newer hosts' file scan and resumes it, as a worker that rests; says what that gave."""

    @classmethod
    def inputs(cls) -> dict[str, Any]:
        return {"role": (["keeper", "other"], {})}

    def look(self, key: str, parties: int, role: str) -> tuple[str]:
        from app.assets.seeder import State, _AssetSeeder

        seeder = _AssetSeeder()
        seeder._state = State.RUNNING
        meet(key, parties)
        if role == "other":
            seeder.pause()
            seeder.resume()
        meet(key, parties)
        return (json.dumps(seeder.get_status().state.value),)


class CPTRegisters(Looks):
    """Registers output files by the name that the host's worker uses; says whether two did so at once."""

    def look(self, key: str, parties: int) -> tuple[str]:
        meet(key, parties)
        files = MeetingFiles(key)
        sys.modules["__main__"].register_output_files(files)
        meet(key, parties)
        return (json.dumps(files.met),)


class MeetingFiles:
    """No files; says whether another such list was read at the same time."""

    def __init__(self, key: str) -> None:
        self.key = f"{key} reading"
        self.met: bool | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            CPTRendezvous().meet(self.key, 2, 0.3)
            self.met = True
        except TimeoutError:
            self.met = False
        return iter(())


def truncated_png() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, "PNG")
    return file.getvalue()[:-900]


class CPTTruncated(Looks):
    """Opens truncated images by the host's helper, many times."""

    @classmethod
    def inputs(cls) -> dict[str, Any]:
        return {"rounds": ("INT", {"default": 100, "max": 100000})}

    def look(self, key: str, parties: int, rounds: int) -> tuple[str]:
        data = truncated_png()
        opened = 0
        meet(key, parties)
        for _ in range(rounds):
            opened += node_helpers.pillow(decoded, data).size == (64, 64)
        meet(key, parties)
        return (json.dumps({"opened": opened, "flag": ImageFile.LOAD_TRUNCATED_IMAGES}),)


def decoded(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    try:
        image.load()
    finally:
        time.sleep(random.uniform(0, 0.001))  # as a large image: the others' tries begin and end meanwhile
    return image


class CPTFlags(Looks):
    """torch's process-wide flags, after a few calls of the host's attention."""

    def look(self, key: str, parties: int) -> tuple[str]:
        meet(key, parties)
        query = torch.zeros(1, 2, 16, 8)
        for _ in range(50):
            comfy.ops.scaled_dot_product_attention(query, query, query)
        meet(key, parties)
        backends = torch.backends
        seen = {
            "sdp": [
                backends.cuda.flash_sdp_enabled(),
                backends.cuda.mem_efficient_sdp_enabled(),
                backends.cuda.math_sdp_enabled(),
                backends.cuda.cudnn_sdp_enabled(),
            ],
            "sdp_order": [int(backend) for backend in torch._C._get_sdp_priority_order()],
            "dtype": str(torch.get_default_dtype()),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "matmul": torch.get_float32_matmul_precision(),
            "cudnn": [backends.cudnn.enabled, backends.cudnn.benchmark],
            "truncated": ImageFile.LOAD_TRUNCATED_IMAGES,
        }
        return (json.dumps(seen),)


class CPTModules(Looks):
    """Whether modules and functions that go by two names are one."""

    def look(self, key: str, parties: int) -> tuple[str]:
        import model_management
        import model_patcher

        seen = {
            "model_management": model_management is mm,
            "model_patcher": model_patcher is comfy.model_patcher,
            "cast_to": comfy.ops.cast_to is mm.cast_to,
        }
        if "comfy.ldm.hunyuan_video.upsampler" in sys.modules:
            upsampler = sys.modules["comfy.ldm.hunyuan_video.upsampler"]
            seen["upsampler"] = getattr(upsampler, "model_management", mm) is mm
        return (json.dumps(seen),)


class CPTDefaultGenerators(Looks):
    """Whether torch looks its default CUDA generators up per slot; where they were before it has used a GPU."""

    def look(self, key: str, parties: int) -> tuple[str]:
        is_looked_up = isinstance(vars(type(torch.cuda)).get("default_generators"), property)
        torch.manual_seed(1)
        return (json.dumps([is_looked_up, list(torch.cuda.default_generators)]),)


class CPTMoreRandom(Looks):
    """Draws in the ways that CPTRandom does not; returns a hash per way."""

    @classmethod
    def inputs(cls) -> dict[str, Any]:
        return {"seed": ("INT", {"default": 0, "max": 2**62}), "rounds": ("INT", {"default": 3, "max": 100000})}

    def look(self, key: str, parties: int, seed: int, rounds: int) -> tuple[str]:
        meet(key, parties)
        return (json.dumps({name: self.digest(draw, seed, rounds) for name, draw in WAYS.items()}),)

    def digest(self, draw: Any, seed: int, rounds: int) -> str:
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        digest = hashlib.sha256()
        for _ in range(rounds):
            time.sleep(0)  # hands the interpreter to the other slots' threads
            digest.update(as_bytes(draw()))
        return digest.hexdigest()


def forked() -> torch.Tensor:
    before = torch.randn(2)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        inside = torch.randn(2)
    return torch.cat([before, inside, torch.randn(2)])


def restored() -> torch.Tensor:
    state = torch.get_rng_state()
    first = torch.rand(3)
    time.sleep(0)
    torch.set_rng_state(state)
    return torch.cat([first, torch.rand(3)])


def numpy_restored() -> np.ndarray:
    state = np.random.get_state()
    first = np.random.rand(3)
    time.sleep(0)
    np.random.set_state(state)
    return np.concatenate([first, np.random.rand(3)])


def python_restored() -> list[float]:
    state = random.getstate()
    first = random.random()
    time.sleep(0)
    random.setstate(state)
    return [first, random.random()]


def in_a_thread() -> torch.Tensor:
    drawn: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: drawn.append(torch.randn(3)))
    thread.start()
    thread.join()
    return drawn[0]


def with_default_device() -> torch.Tensor:
    with torch.device("cpu"):
        return torch.cat([torch.randn(3), torch.rand(3)])


def layer() -> torch.Tensor:
    return torch.nn.Linear(3, 3).weight.detach()


ONES = torch.ones(6)
WAYS = {
    "initial_seed": lambda: [torch.initial_seed(), torch.random.initial_seed()],
    "normal": lambda: torch.cat([torch.normal(ONES, 2 * ONES), torch.normal(0.0, 1.0, (3,)), torch.normal(ONES, 2.0)]),
    "rand_like": lambda: torch.rand_like(ONES),
    "randn_like": lambda: torch.randn_like(ONES, dtype=torch.float64),
    "randint": lambda: torch.cat([torch.randint(9, (3,)), torch.randint(low=3, high=9, size=(3,))]),
    "randint_like": lambda: torch.cat([torch.randint_like(ONES, 9), torch.randint_like(ONES, 5, 50)]),
    "randint_like_named": lambda: torch.randint_like(ONES, low=2, high=9, dtype=torch.int64),
    "out": lambda: torch.randn(3, out=torch.empty(3)),
    "half": lambda: torch.randn(3, dtype=torch.float16),
    "in_place": lambda: torch.stack(
        [
            torch.empty(6).random_(),
            torch.empty(6).random_(3, 99),
            torch.empty(6).exponential_(),
            torch.empty(6).cauchy_(),
            torch.empty(6).log_normal_(),
            torch.empty(6).geometric_(0.5),
            torch.empty(6).bernoulli_(0.5),
            torch.empty(6).bernoulli_(ONES / 2),
        ]
    ),
    "methods": lambda: torch.cat([(ONES / 2).bernoulli(), (ONES / 2).bernoulli(0.3), ONES.multinomial(3).float()]),
    "poisson": lambda: torch.poisson(3 * ONES),
    "binomial": lambda: torch.binomial(9 * ONES, ONES / 2),
    "dropout": lambda: torch.nn.functional.dropout(ONES, 0.5, training=True),
    "gamma": lambda: torch.distributions.Gamma(ONES, ONES).sample(),
    "normal_distribution": lambda: torch.distributions.Normal(ONES, ONES).sample(),
    "categorical": lambda: torch.distributions.Categorical(ONES).sample((3,)),
    "gumbel": lambda: torch.nn.functional.gumbel_softmax(ONES),
    "layer": layer,
    "truncated_normal": lambda: torch.nn.init.trunc_normal_(torch.empty(6)),
    "generator": lambda: torch.randn(3, generator=torch.Generator().manual_seed(4)),
    "fork": forked,
    "restore": restored,
    "thread": in_a_thread,
    "default_device": with_default_device,
    "numpy": lambda: np.concatenate(
        [
            np.random.normal(size=2),
            np.random.uniform(size=2),
            np.random.choice(9, 3),
            np.random.random(2),
            np.random.sample(2),
            np.random.ranf(2),
            np.random.standard_normal(3),
            np.random.poisson(3, 3),
        ]
    ),
    "numpy_restore": numpy_restored,
    "python": lambda: [
        random.choice(range(99)),
        *random.sample(range(99), 3),
        random.uniform(0, 1),
        random.randrange(9),
    ],
    "python_restore": python_restored,
    "python_bits": lambda: [random.getrandbits(60), random.randbytes(4), random.normalvariate(), random.gauss(0, 1)],
}


class Subclass(threading.Thread):
    """A thread that overrides `run`, as many packs do."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seen: Any = None

    def run(self) -> None:
        self.seen = here()


SHARED_POOL = ThreadPoolExecutor(1)  # one thread for the jobs of all slots, as packs keep it in a global


class CPTMoreThreads(Looks):
    """The slot seen in the threads that CPTThreads does not start."""

    def look(self, key: str, parties: int) -> tuple[str]:
        meet(key, parties)
        seen = {
            "subclass": self.run_thread(),
            "timer": self.run_timer(),
            "nested": self.run_nested(),
            "nested_pool": self.run_nested_pool(),
            "shared_pool": SHARED_POOL.submit(here).result(),
            "map": list(ThreadPoolExecutor(2).map(lambda _: here(), range(4))),
            "sync_of_async": AsyncToSyncConverter.run_async_in_thread(here_soon),
            "asyncio_run": asyncio_run_in_thread(),
            "graph_prefix": self.prefix_in_thread(),
        }
        return (json.dumps(seen),)

    def run_thread(self) -> Any:
        thread = Subclass()
        thread.start()
        thread.join()
        return thread.seen

    def run_timer(self) -> Any:
        seen: list[Any] = []
        timer = threading.Timer(0, lambda: seen.append(here()))
        timer.start()
        timer.join()
        return seen[0]

    def run_nested(self) -> Any:
        seen: list[Any] = []
        thread = threading.Thread(target=lambda: seen.append(self.run_thread()))
        thread.start()
        thread.join()
        return seen[0]

    def run_nested_pool(self) -> Any:
        with ThreadPoolExecutor(1) as outer, ThreadPoolExecutor(1) as inner:
            return outer.submit(lambda: inner.submit(here).result()).result()

    def prefix_in_thread(self) -> str:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(lambda: GraphBuilder().prefix).result()


def asyncio_run_in_thread() -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, asyncio_to_thread()).result()


async def asyncio_to_thread() -> Any:
    return await asyncio.to_thread(here)


class CPTPreviewMethod(Looks):
    """The preview method that this job's sampler would use."""

    def look(self, key: str, parties: int) -> tuple[str]:
        meet(key, parties)
        seen = latent_preview.args.preview_method.value
        meet(key, parties)
        return (json.dumps(seen),)


NODES = {
    node.__name__: node
    for node in (
        CPTQueueSeen,
        CPTJobState,
        CPTInterrupts,
        CPTLoads,
        CPTLoaded,
        CPTCollects,
        CPTUnloads,
        CPTKeeps,
        CPTFreesPins,
        CPTPins,
        CPTGlobals,
        CPTNodeEnd,
        CPTHooks,
        CPTIsHooked,
        CPTSeeder,
        CPTRegisters,
        CPTTruncated,
        CPTFlags,
        CPTModules,
        CPTDefaultGenerators,
        CPTMoreRandom,
        CPTMoreThreads,
        CPTPreviewMethod,
    )
}
