"""Whose the code is that a forward runs."""

from __future__ import annotations

import functools
import sys
from types import FunctionType, MethodType
from typing import Any

_KNOWN = frozenset(
    {
        *("comfy", "comfy_aimdo", "comfy_extras", "comfy_kitchen", "comfy_parallel", "torch"),
        *("einops", "flash_attn", "numpy", "opt_einsum", "sageattention", "triton", "xformers"),
        *sys.stdlib_module_names,
    }
)


def is_known(module_name: str) -> bool:
    """Whether a module is ComfyUI's or a library's."""
    return _package(module_name) in _KNOWN or module_name.startswith("namedtuple_")


def is_host_code(module_name: str) -> bool:
    """Whether a module is ComfyUI's own."""
    return _package(module_name) in ("comfy", "comfy_extras")


@functools.cache
def _package(module_name: str) -> str:
    """The host names the files it loads as nodes after their path: `/comfyui/comfy_extras/nodes_mask`."""
    path = module_name.replace("\\", "/").split("/")
    if len(path) == 1:
        return module_name.partition(".")[0]
    return "comfy_extras" if path[-2] == "comfy_extras" else "a node pack"


def module_of(value: Any) -> str:
    """The name of the module that a function, a class or an object's class is written in, whatever it says itself."""
    if isinstance(value, MethodType):
        value = value.__func__
    if isinstance(value, FunctionType):
        return str(value.__globals__.get("__name__", ""))
    return str((value if isinstance(value, type) else type(value)).__module__)
