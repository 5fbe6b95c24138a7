"""ComfyUI nodes that observe, from inside a job, what the tests assert."""

# ruff: noqa: N802 - the host looks for INPUT_TYPES and IS_CHANGED

from __future__ import annotations

import asyncio
import copy
import functools
import hashlib
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import execution
import numpy as np
import torch
from comfy_execution.graph_utils import GraphBuilder
from PIL import Image
from server import PromptServer

from . import gpu, graphs, lost, meetings, overlap, vram  # noqa: F401 - some add routes
from .caching import never_cached

CATEGORY = "comfy_parallel/test"
ANY = type("AnyType", (str,), {"__ne__": lambda self, other: False})("*")
SEED = ("INT", {"default": 0, "min": 0, "max": 2**62})


def current_slot_index() -> int | None:
    """This thread's slot, or None outside a slot and on a host without comfy_parallel."""
    try:
        from comfy_parallel.slots.slot import current_slot
    except ImportError:
        return None
    slot = current_slot()
    return None if slot is None else slot.index


def seed_colour(seed: int) -> tuple[int, int, int]:
    return seed & 255, seed >> 8 & 255, seed >> 16 & 255


class CPTRendezvous:
    """Returns only when `parties` jobs are inside it at the same time."""

    CATEGORY = CATEGORY
    FUNCTION = "meet"
    RETURN_TYPES = ("INT", "STRING")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        timeout = ("FLOAT", {"default": 20.0, "max": 600.0})
        return {"required": {"key": ("STRING", {}), "parties": ("INT", {"default": 2}), "timeout": timeout}}

    @classmethod
    def IS_CHANGED(cls, **_inputs: Any) -> float:
        return never_cached()

    def meet(self, key: str, parties: int, timeout: float) -> tuple[int, str]:
        meetings.meet(key, parties, timeout)
        return parties, f"{parties} met in {key!r}"


class CPTProgress:
    """Reports progress with a preview each step; stops when interrupted."""

    CATEGORY = CATEGORY
    FUNCTION = "work"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        steps = ("INT", {"default": 20, "max": 100000})
        return {"required": {"steps": steps, "ms": ("INT", {"default": 20, "max": 60000}), "seed": SEED}}

    def work(self, steps: int, ms: int, seed: int) -> tuple[torch.Tensor]:
        colour = seed_colour(seed)
        progress = comfy.utils.ProgressBar(steps)
        for step in range(1, steps + 1):
            time.sleep(ms / 1000)
            comfy.model_management.throw_exception_if_processing_interrupted()
            progress.update_absolute(step, steps, ("JPEG", Image.new("RGB", (64, 64), colour), 64))
        return (torch.tensor(colour).div(255).expand(1, 16, 16, 3).clone(),)


class CPTThreadProgress:
    """Reports progress from a thread of its own, which knows of no job."""

    CATEGORY = CATEGORY
    FUNCTION = "work"
    RETURN_TYPES = ("INT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"steps": ("INT", {"default": 20, "max": 100000}), "seed": SEED}}

    def work(self, steps: int, seed: int) -> tuple[int]:
        thread = threading.Thread(target=self.report, args=(steps,))
        thread.start()
        thread.join()
        return (seed,)

    def report(self, steps: int) -> None:
        progress = comfy.utils.ProgressBar(steps)
        for step in range(1, steps + 1):
            progress.update_absolute(step, steps)
            time.sleep(0.001)


class CPTSleep:
    """Takes a while, in small steps so that an interrupt ends it."""

    CATEGORY = CATEGORY
    FUNCTION = "rest"
    RETURN_TYPES = ("INT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"seconds": ("FLOAT", {"default": 1.0, "max": 600.0}), "seed": SEED}}

    def rest(self, seconds: float, seed: int) -> tuple[int]:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            comfy.model_management.throw_exception_if_processing_interrupted()
            time.sleep(min(left, 0.01))
        return (seed,)


class CPTOut:
    """Shows any value in the job's history."""

    CATEGORY = CATEGORY
    FUNCTION = "show"
    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"value": (ANY, {})}}

    def show(self, value: Any) -> dict[str, Any]:
        if isinstance(value, torch.Tensor):
            value = value[0, 0, 0].mul(255).round().int().tolist()
        return {"ui": {"value": [value]}}


class CPTThreads:
    """Says which slot and CUDA device code sees in the threads that a node may start."""

    CATEGORY = CATEGORY
    FUNCTION = "look"
    RETURN_TYPES = ("STRING",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    @classmethod
    def IS_CHANGED(cls) -> float:
        return never_cached()

    async def look(self) -> tuple[str]:
        seen = {
            "node": here(),
            "thread": in_new_thread(),
            "pool": in_thread_pool(),
            "run_in_executor": await asyncio.get_running_loop().run_in_executor(None, here),
            "to_thread": await asyncio.to_thread(here),
            "task": await asyncio.create_task(here_soon()),
        }
        return (json.dumps(seen),)


def here() -> dict[str, int | None]:
    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    return {"slot": current_slot_index(), "cuda_device": device}


async def here_soon() -> dict[str, int | None]:
    await asyncio.sleep(0)
    return here()


def in_new_thread() -> dict[str, int | None]:
    seen: list[dict[str, int | None]] = []
    thread = threading.Thread(target=lambda: seen.append(here()))
    thread.start()
    thread.join()
    return seen[0]


def in_thread_pool() -> dict[str, int | None]:
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(here).result()


class CPTRandom:
    """Seeds every global generator, draws from all of them in turns, returns a hash of the draws."""

    CATEGORY = CATEGORY
    FUNCTION = "draw"
    RETURN_TYPES = ("STRING",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"seed": SEED, "rounds": ("INT", {"default": 50, "max": 100000})}}

    @classmethod
    def IS_CHANGED(cls, **_inputs: Any) -> float:
        return never_cached()

    def draw(self, seed: int, rounds: int) -> tuple[str]:
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        digest = hashlib.sha256()
        for _ in range(rounds):
            for value in torch_draws() + numpy_draws() + python_draws():
                digest.update(as_bytes(value))
                time.sleep(0)  # hands the interpreter to the other slots' threads
        return (digest.hexdigest(),)


DRAWS = (
    lambda: torch.randn(4),
    lambda: torch.rand(4),
    lambda: torch.randint(0, 1000, (4,)),
    lambda: torch.randperm(9),
    lambda: torch.empty(4).normal_(),
    lambda: torch.empty(4).uniform_(),
    lambda: torch.bernoulli(torch.full((8,), 0.5)),
    lambda: torch.multinomial(torch.ones(8), 3),
    lambda: torch.randn_like(torch.empty(4)),
)


def torch_draws() -> list[torch.Tensor]:
    return [draw() for draw in DRAWS]


def numpy_draws() -> list[np.ndarray]:
    source = np.random
    return [source.rand(4), source.randn(4), source.randint(0, 1000, 4), source.permutation(9), source.normal(size=2)]


def python_draws() -> list[float]:
    numbers = list(range(9))
    random.shuffle(numbers)
    return [random.random(), random.gauss(0, 1), random.randint(0, 1000), *numbers]


def as_bytes(value: Any) -> bytes:
    if isinstance(value, torch.Tensor):
        value = value.numpy()
    return value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode()


class CPTKill:
    """Ends the thread that runs it, as no well-behaved node does."""

    CATEGORY = CATEGORY
    FUNCTION = "kill"
    RETURN_TYPES = ("INT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    @classmethod
    def IS_CHANGED(cls) -> float:
        return never_cached()

    def kill(self) -> tuple[int]:
        raise SystemExit("killed by test")


class CPTSpin:
    """Computes in Python alone, so it holds the interpreter."""

    CATEGORY = CATEGORY
    FUNCTION = "spin"
    RETURN_TYPES = ("INT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"rounds": ("INT", {"default": 1000, "max": 10**9}), "seed": ("INT", {"default": 0})}}

    def spin(self, rounds: int, seed: int) -> tuple[int]:
        number = seed
        for _ in range(rounds):
            number = number * 31 + 7 & 0xFFFF
        return (number,)


class CPTEndProcess:
    """Ends the process that runs it, as a fault in a driver does."""

    CATEGORY = CATEGORY
    FUNCTION = "end"
    RETURN_TYPES = ("INT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    def end(self) -> tuple[int]:
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
        return (0,)


class CPTFail:
    """Fails as an ordinary node does."""

    CATEGORY = CATEGORY
    FUNCTION = "fail"
    RETURN_TYPES = ("INT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"message": ("STRING", {"default": "failed by test"})}}

    @classmethod
    def IS_CHANGED(cls, **_inputs: Any) -> float:
        return never_cached()

    def fail(self, message: str) -> tuple[int]:
        raise RuntimeError(message)


class CPTWhere:
    """Says where a job runs and what it sees of the server."""

    CATEGORY = CATEGORY
    FUNCTION = "look"
    RETURN_TYPES = ("STRING",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    @classmethod
    def IS_CHANGED(cls) -> float:
        return never_cached()

    def look(self) -> tuple[str]:
        server = PromptServer.instance
        seen = {
            "slot": current_slot_index(),
            "thread": threading.current_thread().name,
            "torch_threads": torch.get_num_threads(),
            "device": str(comfy.model_management.get_torch_device()),
            "currently_running": len(server.prompt_queue.currently_running),
            "client_id": server.client_id,
            "last_prompt_id": server.last_prompt_id,
            "last_node_id": server.last_node_id,
        }
        return (json.dumps(seen),)


class CPTConstInt:
    """One integer."""

    CATEGORY = CATEGORY
    FUNCTION = "give"
    RETURN_TYPES = ("INT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"value": SEED}}

    def give(self, value: int) -> tuple[int]:
        return (value,)


class CPTAddInt:
    """The sum of two integers."""

    CATEGORY = CATEGORY
    FUNCTION = "add"
    RETURN_TYPES = ("INT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"a": ("INT", {"forceInput": True}), "b": ("INT", {"forceInput": True})}}

    def add(self, a: int, b: int) -> tuple[int]:
        time.sleep(0.002)  # long enough for another slot to get in between two nodes
        return (a + b,)


class CPTRequeue:
    """Queues its own job again, `times` times in all, the way batch nodes of well-known packs do."""

    CATEGORY = CATEGORY
    FUNCTION = "requeue"
    RETURN_TYPES = ("INT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"times": ("INT", {"default": 1, "max": 1000})}, "hidden": {"node_id": "UNIQUE_ID"}}

    @classmethod
    def IS_CHANGED(cls, **_inputs: Any) -> float:
        return never_cached()

    def requeue(self, times: int, node_id: str) -> tuple[int]:
        if times > 0:
            queue = PromptServer.instance.prompt_queue
            (running,) = queue.currently_running.values()
            _number, prompt_id, prompt, *rest = copy.deepcopy(tuple(running))
            prompt[node_id]["inputs"]["times"] = times - 1
            queue.put((-1, f"{prompt_id}+", prompt, *rest))
        return (times,)


class CPTExpand:
    """Expands into `base + count` ones; shows the prefix of the nodes it made."""

    CATEGORY = CATEGORY
    FUNCTION = "expand"
    RETURN_TYPES = ("INT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"base": SEED, "count": ("INT", {"default": 3, "max": 1000})}}

    def expand(self, base: int, count: int) -> dict[str, Any]:
        time.sleep(0.002)  # between the host's set_default_prefix and our use of it
        graph = GraphBuilder()
        total = graph.node("CPTConstInt", value=base)
        for _ in range(count):
            one = graph.node("CPTConstInt", value=1)
            total = graph.node("CPTAddInt", a=total.out(0), b=one.out(0))
        return {"result": (total.out(0),), "expand": graph.finalize(), "ui": {"prefix": [graph.prefix]}}


def start_after_file(execute: Callable[..., None]) -> Callable[..., None]:
    """Lets a test act after a job was taken and before it starts: `extra_data.start_after` is a file to wait for."""

    @functools.wraps(execute)
    def execute_after_file(self: Any, prompt: Any, prompt_id: str, extra_data: Any, *args: Any, **kwargs: Any) -> None:
        end = time.monotonic() + 20
        while extra_data.get("start_after") and not Path(extra_data["start_after"]).exists():
            if time.monotonic() > end:
                raise TimeoutError(f"no file {extra_data['start_after']}")
            time.sleep(0.005)
        execute(self, prompt, prompt_id, extra_data, *args, **kwargs)

    return execute_after_file


execution.PromptExecutor.execute = start_after_file(execution.PromptExecutor.execute)


from . import ending, isolation, leftovers, saves, shares, unprintable, weights  # noqa: E402 - they use what is above
from . import events, faults, locks, memory  # noqa: E402 - as above

NODE_CLASS_MAPPINGS = {
    node.__name__: node
    for node in (
        CPTRendezvous,
        CPTProgress,
        CPTThreadProgress,
        CPTSleep,
        CPTOut,
        CPTThreads,
        CPTRandom,
        CPTKill,
        CPTEndProcess,
        CPTSpin,
        CPTFail,
        CPTWhere,
        CPTConstInt,
        CPTAddInt,
        CPTRequeue,
        CPTExpand,
    )
}
for more in (ending, gpu, graphs, isolation, leftovers, overlap, saves, shares, unprintable, weights):
    NODE_CLASS_MAPPINGS |= more.NODES
for more in (events, faults, locks, lost, memory, vram):
    NODE_CLASS_MAPPINGS |= more.NODES
