"""Weight files on disk, and what reads and overwrites them, for the tests of shared weights."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from comfy_parallel import patches as all_patches
from comfy_parallel.patches import weights as patches
from comfy_parallel.weights import loading
from comfy_parallel.weights.files.store import Store
from comfy_parallel.weights.gpu import homes

PATIENCE_S = 40  # far below the 45 s after which the kernel lets a writer go on by itself
GIB = 1 << 30


def numbers(*shape: int, dtype: Any = torch.float32, start: float = 0.5) -> Any:
    """A tensor in which all numbers differ, as far as its type allows."""
    return (torch.arange(torch.Size(shape).numel(), dtype=torch.float32) + start).reshape(shape).to(dtype)


def is_mapped(stat: os.stat_result) -> bool:
    """Whether this process has the file in its memory: no other file, on another device, has its number."""
    name = [f"{os.major(stat.st_dev):02x}:{os.minor(stat.st_dev):02x}", str(stat.st_ino)]
    return any(line.split()[3:5] == name for line in Path("/proc/self/maps").read_text().splitlines())


def slots_store(monkeypatch: pytest.MonkeyPatch, store: Store | None = None) -> Store:
    """What slots share through, until the test ends."""
    store = store or Store("map", GIB)
    monkeypatch.setattr(loading, "_store", store)
    return store


def wrapper(target: str) -> Callable[..., Any]:
    """What the patch of this target puts around it."""
    (patch,) = [patch for patch in all_patches.ALL if patch.target == target]
    return patch.wrap


def torch_store(monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store that torch's modules are loaded and moved through, until the test ends."""
    store = slots_store(monkeypatch)
    load = patches._load_from_state_dict(nn.Module._load_from_state_dict)
    monkeypatch.setattr(nn.Module, "_load_from_state_dict", load)
    monkeypatch.setattr(nn.Module, "to", patches._to(nn.Module.to))
    return store


def let_go(store: Store, module: nn.Module) -> None:
    """Of what the module shares, so that nothing of it is left."""
    for parameter in module.parameters():
        homes.forget(parameter)
        parameter.data = torch.empty(0)
    collect()
    store.drop_unused()


def write(path: Path, **tensors: Any) -> str:
    save_file(tensors, path)
    return str(path)


def read(store: Store, path: str) -> dict[str, Any]:
    """What a slot gets for a safetensors file: copy-on-write views."""
    weights: dict[str, Any] = loading.load_file(store, path, lambda: load_file(path))
    return weights


def model_of(store: Store, views: dict[str, Any], slot_index: int = 0) -> nn.Module:
    """A module with parameters p… of a slot, which are what all slots share, in the order of their names."""
    model = nn.Module()
    for name, view in sorted(views.items()):
        shared = store.shared(view, view.dtype, slot_index, must_align=False)
        model.register_parameter(f"p{name}", nn.Parameter(shared, requires_grad=False))
    return model


def bits(tensor: Any) -> bytes:
    """A tensor's numbers, bit for bit."""
    flat = tensor.detach().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy().tobytes()) if flat.numel() else b""


def collect() -> None:
    """Let go of what only cycles keep."""
    gc.collect()


def overwrite(script: str, path: str) -> None:
    """Let another process run `script` with the file as `$1`; it must not be kept waiting."""
    subprocess.run(["sh", "-c", script, "sh", path], check=True, timeout=PATIENCE_S)


def run_python(source: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Run in a process of its own, from this directory's repository."""
    root = Path(__file__).parents[3]
    return subprocess.run([sys.executable, "-c", source, *args], capture_output=True, text=True, cwd=root, check=False)
