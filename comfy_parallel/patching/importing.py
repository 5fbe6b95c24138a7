"""Run a callback right after a module has been imported, before its importer can copy names out of it."""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


class PostImportHooks(importlib.abc.MetaPathFinder):
    """A finder that finds nothing itself and only wraps the loaders of the modules it was asked to watch."""

    def __init__(self) -> None:
        self._callbacks: dict[str, Callable[[ModuleType], None]] = {}
        self._executing: set[str] = set()  # Modules that are in `sys.modules` and lack what their code has yet to make.

    def watch(self, name: str, callback: Callable[[ModuleType], None]) -> None:
        """Call `callback(module)` after `name` is imported; at once if it already is."""
        module = sys.modules.get(name)
        if module is not None and name not in self._executing:
            callback(module)
            return
        self._callbacks[name] = callback
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def stop(self) -> None:
        """Forget all callbacks and leave the import system."""
        self._callbacks.clear()
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in self._callbacks:
            return None
        later = sys.meta_path[sys.meta_path.index(self) + 1 :]  # The earlier ones have found nothing.
        specs = (finder.find_spec(name, path, target) for finder in later if hasattr(finder, "find_spec"))
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _CallbackLoader(spec.loader, self._executing, functools.partial(self._imported, name))
        return spec

    def _imported(self, name: str, module: ModuleType) -> None:
        callback = self._callbacks.pop(name, None)  # Asking for a spec is not importing: it may happen often.
        if callback is not None:
            callback(module)


class _CallbackLoader(importlib.abc.Loader):
    """Loads as the wrapped loader does, takes itself out of the module, then calls back."""

    def __init__(
        self, loader: importlib.abc.Loader, executing: set[str], callback: Callable[[ModuleType], None]
    ) -> None:
        self._loader, self._executing = loader, executing
        self._callback = callback

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._executing.add(module.__name__)
        try:
            self._loader.exec_module(module)
        finally:
            self._executing.discard(module.__name__)
        self._callback(module)

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)
