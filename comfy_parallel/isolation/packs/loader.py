"""Load the modules of node packs so that every slot has its own of what they keep."""

from __future__ import annotations

import functools
import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from comfy_parallel.config import PackModes
from comfy_parallel.isolation.packs import stores, writes
from comfy_parallel.isolation.packs.copies import note_module, own_copy
from comfy_parallel.isolation.packs.finding import Finding
from comfy_parallel.isolation.packs.keep import BOX, DEFAULT, OWN_DEFAULT
from comfy_parallel.isolation.packs.kept import kept_code, kept_plan
from comfy_parallel.isolation.packs.plans import PackPlan
from comfy_parallel.isolation.packs.redirect import set_and_return
from comfy_parallel.isolation.packs.rewrite import (
    CALLS,
    GLOBALS,
    NAMESPACE,
    OWNER,
    PER_SLOT_CACHE,
    SET,
    SET_RAW,
    Plan,
    rewrite,
)
from comfy_parallel.isolation.packs.sources import parsed
from comfy_parallel.slots import own_names
from comfy_parallel.slots.own_attributes import own_attribute
from comfy_parallel.slots.slot import SlotLocal, current_slot

logger = logging.getLogger(__name__)

_OURS = Path(__file__).resolve().parents[3]
_plans: dict[Path, PackPlan] = {}
_lock = threading.RLock()
_modes = [PackModes()]


def use(modes: PackModes) -> None:
    """Leave packs as they are whose mode is `trust`; before any of them is imported."""
    _modes[:] = [modes]


def found() -> dict[Path, list[Finding]]:
    """What was found in each pack that was loaded so far, by its folder or file."""
    with _lock:
        return {root: list(plan.findings) for root, plan in _plans.items()}


def load_per_slot(original: Callable[[Any, ModuleType], None]) -> Callable[[Any, ModuleType], None]:
    """Wrap `exec_module` of the loader of source files: modules of packs are rewritten on the way."""

    @functools.wraps(original)
    def exec_module(self: Any, module: ModuleType) -> None:
        found = _pack_of(self.path)
        if found is None:
            return original(self, module)
        root, place = found
        with own_names.shared():
            plan = _plan_of(root, place)
            code = _prepare(module, root, Path(self.path), plan)
            original(self if code is None else _Rewritten(self, code), module)
            _give_own_attributes(module, plan.attributes)
        return None

    return exec_module


class _Rewritten(SourceFileLoader):
    """The loader of a module that gives other code than the file has."""

    def __init__(self, loader: Any, code: CodeType) -> None:
        super().__init__(loader.name, loader.path)
        self._code = code

    def get_code(self, fullname: str) -> CodeType:
        return self._code


def _pack_of(path: str) -> tuple[Path, str] | None:
    """The pack's folder, or its file, that a source file belongs to; and where in it, if it is a folder."""
    path = os.path.normpath(path)
    for folder, is_host in _folders():
        if path.startswith(folder):
            inner = path[len(folder) :]
            top, _, place = inner.partition("/")
            root, place = (Path(path), inner) if is_host else (Path(folder, top), place or top)
            return None if _is_left(root) else (root, place)
    for folder, is_host in _folders():
        for real, root in () if is_host else _links(folder):
            if path.startswith(real):
                return None if _is_left(root) else (root, path[len(real) :])
    return None


def _is_left(root: Path) -> bool:
    return _modes[0].of(root.name.removesuffix(".py")) == "trust" or root.resolve() == _OURS


def _links(folder: str) -> list[tuple[str, Path]]:
    """Where packs really lie that are links, or whose folder is one: they may import their files from there."""
    try:
        return _links_since(folder, os.stat(folder).st_mtime_ns)
    except OSError:  # It is not there, or is being changed.
        return []


@functools.lru_cache(maxsize=8)
def _links_since(folder: str, _changed_ns: int) -> list[tuple[str, Path]]:
    packs = [Path(entry.path) for entry in os.scandir(folder) if entry.is_dir()]
    return [(f"{real}/", pack) for pack in packs if (real := os.path.realpath(pack)) != str(pack)]


def _folders() -> list[tuple[str, bool]]:
    """Where packs lie, and where the host's own nodes do; each of those files is looked at for itself."""
    module = sys.modules.get("folder_paths")
    if module is None or "custom_nodes" not in getattr(module, "folder_names_and_paths", ()):
        return []
    extras = str(Path(str(module.__file__)).parent / "comfy_extras") + "/"
    return [*((f"{path.rstrip('/')}/", False) for path in module.get_folder_paths("custom_nodes")), (extras, True)]


def _prepare(module: ModuleType, root: Path, path: Path, plan: Plan) -> CodeType | None:
    """Give the module what its functions will ask for; its code, or None where nothing is to be rewritten."""
    note_module(module, str(root))
    vars(module)[writes.SHARED] = plan.shared
    if current_slot() is not None:
        own_names.start_anew(module)  # A job loads it again.
    if not plan.is_needed:
        return None
    _provide(module, plan)
    return kept_code(path, plan, lambda: _rewritten(path, plan))


def _rewritten(path: Path, plan: Plan) -> CodeType | None:
    tree = parsed(path)
    if tree is None or not rewrite(tree, plan):
        return None
    code: CodeType = compile(tree, str(path), "exec", dont_inherit=True)
    return code


def _plan_of(root: Path, place: str) -> Plan:
    with _lock:
        if root not in _plans:
            _plans[root] = kept_plan(root)
        return _plans[root].files.get(place, Plan())


def _provide(module: ModuleType, plan: Plan) -> None:
    namespace = own_names.namespace_of(module, is_host=False)
    for name in plan.names:
        namespace.add(name, own_copy)
    vars(module).update(
        {
            own_names.ACCESSOR: namespace.accessor,
            OWNER: writes.owner,
            CALLS["setattr"]: writes.set_attribute,
            CALLS["delattr"]: writes.delete_attribute,
            NAMESPACE: writes.namespace,
            SET: set_and_return,
            GLOBALS: functools.partial(writes.namespace, module),
            SET_RAW: writes.set_raw,
            BOX: stores.box,
            DEFAULT: stores.remember_default,
            OWN_DEFAULT: stores.own_default,
            PER_SLOT_CACHE: _cached_per_slot,
            writes.PLAN: plan,
        }
    )


def _give_own_attributes(module: ModuleType, attributes: Mapping[str, set[str]]) -> None:
    for class_name, names in attributes.items():
        cls = vars(module).get(class_name)
        if not isinstance(cls, type) or type(cls).__setattr__ is not type.__setattr__:
            logger.warning("%s.%s: all slots share %s", module.__name__, class_name, ", ".join(sorted(names)))
            continue
        for name in names:
            own_attribute(cls, name, start=own_copy, is_host=False)


def _cached_per_slot(decorator: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`lru_cache` with a cache for each slot: what it holds may be a model."""

    def decorate(function: Any) -> Any:
        caches: list[Any] = []

        def make() -> Any:
            caches.append(decorator(function))
            return caches[-1]

        own = SlotLocal(make)

        @functools.wraps(function)
        def cached(*args: Any, **kwargs: Any) -> Any:
            return own.get()(*args, **kwargs)

        def clear() -> None:
            for cache in list(caches):
                cache.cache_clear()

        cached.cache_clear = clear  # type: ignore[attr-defined]
        cached.cache_info = lambda: own.get().cache_info()  # type: ignore[attr-defined]
        cached.cache_parameters = lambda: own.get().cache_parameters()  # type: ignore[attr-defined]
        return cached

    return decorate
