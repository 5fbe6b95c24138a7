"""Everything asked of torch about devices. Sizes are bytes."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

from comfy_parallel.config import Config
from comfy_parallel.errors import ConfigError, DeviceError
from comfy_parallel.slots.gates import no_recording_on
from comfy_parallel.slots.slot import Slot, current_slot, slots

logger = logging.getLogger(__name__)

_THREADS_PER_GPU_SLOT = 4
_ROOM = 0.25  # of a device's memory
_is_after_node: ContextVar[bool] = ContextVar("comfy_parallel_after_node", default=False)


def choose_devices(config: Config, host_device: str, num_remote: int = 0) -> tuple[str, ...]:
    """One device name per slot. `host_device` is the type the host computes on: `cuda`, `cpu`, ….

    `num_remote`: how many slots on other machines there are besides.

    Raises:
        ConfigError, DeviceError: when what was asked for is not there.
    """
    if config.devices is not None:
        devices = _named_devices(config.devices, host_device)
    else:
        devices = _counted_devices(config.num_gpus, host_device)
    devices = tuple(device for device in devices for _ in range(config.slots_per_gpu))
    count = len(devices) + num_remote
    if config.default_slot is not None and config.default_slot >= count:
        raise ConfigError(
            f"COMFY_PARALLEL_DEFAULT_GPU={config.default_slot}: there are {count} slots; "
            f"set it to auto or to a number from 0 to {count - 1}"
        )
    return devices


def _named_devices(names: tuple[str, ...], host_device: str) -> tuple[str, ...]:
    kind = names[0].partition(":")[0]
    if kind != host_device:
        fix = "start ComfyUI with --cpu" if kind == "cpu" else "start ComfyUI without --cpu"
        raise ConfigError(
            f"COMFY_PARALLEL_DEVICES={','.join(names)}: ComfyUI computes on {host_device}; "
            f"{fix}, or name {host_device} devices"
        )
    count = device_count(kind)
    for name in names:
        if kind not in ("cpu", "mps") and int(name.partition(":")[2]) >= count:
            raise DeviceError(
                f"COMFY_PARALLEL_DEVICES={','.join(names)}: {name} does not exist, {count} visible device(s) "
                f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}); "
                "numbers count the visible ones"
            )
    return names


def _counted_devices(wanted: int | None, host_device: str) -> tuple[str, ...]:
    if host_device in ("cpu", "mps"):
        return (host_device,) * (wanted or 1)
    count = device_count(host_device)
    if wanted is not None and wanted > count:
        raise DeviceError(
            f"COMFY_NUM_GPUS={wanted}: {count} visible device(s) "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}); "
            f"set it to at most {count}, or leave it unset"
        )
    return tuple(f"{host_device}:{index}" for index in range(wanted or count))


def device_count(kind: str) -> int:
    """How many devices of a type torch sees."""
    return int(_module(kind).device_count())


def check(device: str) -> None:
    """Use the device once.

    Raises:
        DeviceError: when it cannot be initialised.
    """
    import torch

    try:
        torch.zeros(1, device=device).add_(1).cpu()
    except RuntimeError as error:
        raise DeviceError(
            f"{device} cannot be initialised: {str(error).splitlines()[0]}. "
            "Leave it out with COMFY_PARALLEL_DEVICES, or free or repair it"
        ) from error


def load_linear_algebra(devices: Sequence[str]) -> None:
    """Have torch load its linear algebra for CUDA: on first use it would, and fails to in two threads at once."""
    import torch

    if len(devices) > 1 and devices[0].startswith("cuda:"):
        torch.linalg.cholesky(torch.eye(1, device=devices[0]))


def bind(device: str, num_slots: int) -> None:
    """Make `device` the calling thread's current device and bound its intra-op threads."""
    import torch

    if ":" in device:
        _module(device).set_device(torch.device(device))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(intra_op_threads(device, num_slots, os.cpu_count() or 1))


def intra_op_threads(device: str, num_slots: int, cores: int) -> int:
    """Threads for one slot's CPU kernels: wide OpenMP teams of several slots wait for each other."""
    share = max(1, cores // num_slots)
    return share if device == "cpu" else min(_THREADS_PER_GPU_SLOT, share)


def warn_if_unequal(devices: tuple[str, ...]) -> None:
    """The host computes its memory limits and kernel choices once, from the first device."""
    names = {name(device) for device in devices}
    if len(names) > 1:
        logger.warning("The devices differ (%s): ComfyUI takes its limits from the first", ", ".join(sorted(names)))


def current(device: str) -> AbstractContextManager[Any]:
    """A context in which `device` is the calling thread's current device."""
    return _module(device).device(device) if ":" in device else nullcontext()


def name(device: str) -> str:
    """What the vendor calls it."""
    return str(_module(device).get_device_name(device)) if ":" in device else device


def memory(device: str) -> dict[str, int]:
    """Total and free memory of the device, and what torch holds of it; of the machine's RAM for `cpu`."""
    if ":" not in device:
        import psutil

        ram = psutil.virtual_memory()
        return {"total_bytes": ram.total, "free_bytes": ram.available}
    module = _module(device)
    free, total = module.mem_get_info(device)
    return {
        "total_bytes": total,
        "free_bytes": free,
        "torch_reserved_bytes": module.memory_reserved(device),
        "torch_allocated_bytes": module.memory_allocated(device),
    }


def utilisation(device: str) -> float | None:
    """The share of the last moments in which a GPU computed, 0 to 1, by NVML; None for what is no GPU.

    Raises:
        ModuleNotFoundError: without nvidia-ml-py; anything else that NVML says.
    """
    if not device.startswith("cuda:"):
        return None
    return float(_module(device).utilization(device)) / 100


def empty_own_cache(original: Callable[[], None]) -> Callable[[], None]:
    """Wrap `torch.cuda.empty_cache`, which empties the caches of all devices: in a slot, only of its own.

    With the cudaMallocAsync allocator the slot's own pool is trimmed. torch's native allocator has no call
    for one device; it gives its own device's cache back by itself when an allocation fails, so there the
    call is left out while other slots compute. Under dynamic VRAM weights would have to go before the cache
    does: there it is left out as long as there is room, and after a node also while no other slot computes.
    """

    @functools.wraps(original)
    def empty_cache() -> None:
        slot = current_slot()
        if slot is None or not _is_left_out(slot):
            with no_recording_on(range(device_count("cuda"))):
                return original()
        if _allocator_backend() == "cudaMallocAsync":
            _trim_pool(int(slot.device.partition(":")[2]))
        return None

    return empty_cache


@contextmanager
def after_node() -> Iterator[None]:
    """The body is what the host does after every node: to fill the cache again would take longer than it has effect."""
    token = _is_after_node.set(True)
    try:
        yield
    finally:
        _is_after_node.reset(token)


def _is_left_out(slot: Slot) -> bool:
    others = _others_running(slot)
    if _allocator_backend() == "cudaMallocAsync" or not _has_dynamic_vram():
        return others
    return (others or _is_after_node.get()) and _has_room(slot.device)


def _has_dynamic_vram() -> bool:
    return bool(getattr(sys.modules.get("comfy.memory_management"), "aimdo_enabled", False))


def _has_room(device: str) -> bool:
    import torch

    free, total = torch.cuda.mem_get_info(torch.device(device))
    return free >= total * _ROOM


def reset_own_watermarks(
    original: Callable[[], None], lib: Any, get_context: Callable[[int], Any]
) -> Callable[[], None]:
    """Wrap comfy_aimdo's `vbars_reset_watermark_limits`, which walks all devices: in a slot, only its own."""

    @functools.wraps(original)
    def vbars_reset_watermark_limits() -> None:
        slot = current_slot()
        if slot is None or ":" not in slot.device:
            return original()
        index = int(slot.device.partition(":")[2])
        lib.vbars_reset_watermark_limits(get_context(index))
        return None

    return vbars_reset_watermark_limits


class MemoryStats(Mapping[str, Any]):
    """The numbers of `torch.cuda.memory_stats`, from the nested form: `a.b.c` is looked up when it is asked for."""

    def __init__(self, nested: dict[str, Any]) -> None:
        self._nested = nested

    def __getitem__(self, name: str) -> Any:
        value: Any = self._nested
        for part in name.split("."):
            if not isinstance(value, dict) or part not in value:
                raise KeyError(name)
            value = value[part]
        if isinstance(value, dict):
            raise KeyError(name)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(_flat_names(self._nested, "")))

    def __len__(self) -> int:
        return sum(1 for _ in _flat_names(self._nested, ""))


def _flat_names(nested: dict[str, Any], prefix: str) -> Iterator[str]:
    for name, value in nested.items():
        if isinstance(value, dict):
            yield from _flat_names(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def stats_reader(cuda: Any) -> Callable[..., Any]:
    """Stand in for `torch.cuda.memory_stats`, which flattens and sorts 80 numbers, where two of them are read.

    What somebody puts in its place later is called instead.
    """
    original = cuda.memory_stats

    def memory_stats(device: Any = None) -> Any:
        if cuda.memory_stats is not original:
            return cuda.memory_stats(device)
        return MemoryStats(cuda.memory_stats_as_nested_dict(device))

    return memory_stats


def _others_running(slot: Any) -> bool:
    others = [other for other in slots() if other.device != slot.device and other.process is None]
    return any(other.run is not None for other in others)


def _allocator_backend() -> str:
    import torch

    return torch.cuda.get_allocator_backend()


def _trim_pool(index: int) -> None:
    """cuMemPoolTrimTo(default pool of the device, 0): the driver API, because torch does not wrap it."""
    import torch

    torch.cuda.synchronize(index)
    driver = ctypes.CDLL("libcuda.so.1")
    pool = ctypes.c_void_p()
    codes = [driver.cuDeviceGetDefaultMemPool(ctypes.byref(pool), ctypes.c_int(index))]
    codes.append(driver.cuMemPoolTrimTo(pool, ctypes.c_size_t(0)))
    if any(codes):
        logger.warning("cuda:%d: the memory pool could not be trimmed (driver codes %s)", index, codes)


def _module(device: str) -> Any:
    import torch

    return getattr(torch, device.partition(":")[0])
