"""Which code a forward runs: whose it is, and whether it is still the same."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Iterator
from operator import itemgetter
from types import FunctionType, MethodType, ModuleType
from typing import Any

from comfy_parallel.graphs.signature import PLAIN

_KNOWN = frozenset(
    {
        *("comfy", "comfy_aimdo", "comfy_extras", "comfy_kitchen", "comfy_parallel", "torch"),
        *("einops", "flash_attn", "numpy", "opt_einsum", "sageattention", "triton", "xformers"),
        *sys.stdlib_module_names,
    }
)
_COMPUTING = ("comfy.ldm.", "comfy.ops", "comfy.model_base", "comfy.model_sampling")  # no switch of theirs is per job


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


class CodeWatch:
    """Notices when somebody replaces a function or class of the host, or a setting in the modules that compute."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._modules: set[str] = set()
        self._num_modules = 0
        self._seen: list[_Names] = []
        self._version = 0

    def version(self) -> int:
        """A number that is another one after each change. It takes well under a millisecond."""
        with self._lock:
            if not all(names.are_unchanged() for names in self._seen):
                self._version += 1
                self._modules.clear()
                self._seen.clear()
                self._num_modules = 0
            if len(sys.modules) != self._num_modules:
                self._look_at_new_modules()
            return self._version

    def _look_at_new_modules(self) -> None:
        self._num_modules = len(sys.modules)
        for name, module in list(sys.modules.items()):
            if name not in self._modules and _is_watched(name) and isinstance(module, ModuleType):
                self._modules.add(name)
                self._seen += [_Names(namespace, names) for namespace, names in _watched_names(module) if names]


class _Names:
    """Names of a module or class, and what they stood for."""

    __slots__ = ("_names", "_namespace", "_read", "_values")

    def __init__(self, namespace: Any, names: tuple[str, ...]) -> None:
        self._namespace = namespace
        self._read: Any = itemgetter(*names, names[0])  # twice, for it to return a tuple
        self._values = self._read(namespace)

    def are_unchanged(self) -> bool:
        try:
            return bool(self._read(self._namespace) == self._values)
        except KeyError:
            return False


def _is_watched(name: str) -> bool:
    return name == "comfy" or name.startswith("comfy.") or name in ("torch", "torch.nn.functional")


def _watched_names(module: ModuleType) -> Iterator[tuple[Any, tuple[str, ...]]]:
    settings = PLAIN if module.__name__.startswith(_COMPUTING) else ()
    namespace = dict(vars(module))
    yield (
        vars(module),
        tuple(name for name, value in namespace.items() if callable(value) or type(value) in settings),
    )
    for value in namespace.values():
        if isinstance(value, type) and value.__module__ == module.__name__ and is_host_code(module.__name__):
            yield vars(value), tuple(name for name, member in vars(value).items() if _is_code(member))


def _is_code(member: Any) -> bool:
    return callable(member) or isinstance(member, staticmethod | classmethod | property)
