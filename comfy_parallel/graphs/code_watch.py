"""Whether the code that a forward can reach is still the same: it is asked before recordings are replayed."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Iterable, Iterator
from itertools import chain
from operator import itemgetter
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from comfy_parallel.graphs.signature import PLAIN
from comfy_parallel.slots.own_attributes import SlotAttribute
from comfy_parallel.slots.own_names import as_written

_PACKAGES = frozenset({"comfy", "comfy_kitchen", "einops", "flash_attn", "sageattention", "torch", "xformers"})
_MODULES = frozenset(
    {
        *("torch", "torch._tensor", "torch.fft", "torch.functional", "torch.linalg", "torch.nn", "torch.special"),
        *("builtins", "math"),
    }
)
_UNUSED = ("torch.nn.intrinsic", "torch.nn.parallel", "torch.nn.qat", "torch.nn.quantiz")
_COMPUTING = ("comfy.ldm.", "comfy.ops", "comfy.model_base", "comfy.model_sampling")  # no switch of theirs is per job
_SETTINGS = (*PLAIN, float)
_DEEPEST = 3  # tables in tables


class CodeWatch:
    """Notices when somebody replaces what forwards run, in the host or in the libraries that it computes with.

    That is: functions, classes, members of classes, entries of tables of functions; settings in the modules that
    compute; and the code and defaults of functions that have run in a recording.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._version = 0
        self._forget()

    def version(self) -> int:
        """A number that is another one after each change. It takes well under a millisecond."""
        with self._lock:
            if not self._is_unchanged():
                self._version += 1
                self._forget()
            if len(sys.modules) != self._num_modules:
                self._look_at_new_modules()
            return self._version

    def include(self, classes: Iterable[type], codes: Iterable[CodeType]) -> None:
        """Watch these classes as well, with what they inherit from; and the functions with these codes more closely."""
        with self._lock:
            for one in {parent for each in classes for parent in each.__mro__ if parent is not object}:
                self._add_class(one)
            self._settle()
            wanted = set(codes)
            found = {id(function): function for function in self._functions() if function.__code__ in wanted}
            self._functions_run |= {key: _Parts(function) for key, function in found.items()}

    def _forget(self) -> None:
        self._num_modules = 0
        self._modules: set[str] = set()
        self._names: list[_Names] = []
        self._spaces: dict[int, _Space] = {}
        self._views: list[Iterable[Any]] = []
        self._values: list[Any] = []
        self._functions_run: dict[int, _Parts] = {}

    def _is_unchanged(self) -> bool:
        return (
            all(names.are_unchanged() for names in self._names)
            and self._spaces_are_unchanged()
            and all(parts.are_unchanged() for parts in self._functions_run.values())
        )

    def _spaces_are_unchanged(self) -> bool:
        """All values are compared at once; which of them matter only when that finds a difference."""
        before = self._values
        self._settle()
        if _are_equal(self._values, before):
            return True
        return all(space.is_unchanged() for space in self._spaces.values())

    def _settle(self) -> None:
        self._values = list(chain.from_iterable(self._views))

    def _look_at_new_modules(self) -> None:
        self._num_modules = len(sys.modules)
        for name, module in list(sys.modules.items()):
            if name not in self._modules and _is_watched(name) and isinstance(module, ModuleType):
                self._modules.add(name)
                self._look_at(module)
        self._settle()

    def _look_at(self, module: ModuleType) -> None:
        kinds = (ModuleType, *_settings_of(module.__name__))
        namespace = dict(vars(module))
        names = tuple(name for name, value in namespace.items() if _is_code(value) or type(value) in kinds)
        if names:
            self._names.append(_Names(vars(module), names))
        for value in namespace.values():
            if isinstance(value, type):
                self._add_class(value)
            elif module.__name__ not in _MODULES:
                self._add_tables(value, 0)

    def _add_class(self, one: type) -> None:
        if _is_watched_class(one) and self._add(vars(one), one, _settings_of(one.__module__)):
            for member in list(vars(one).values()):
                if isinstance(member, type):
                    self._add_class(member)

    def _add_tables(self, value: Any, depth: int) -> None:
        if isinstance(value, functools.partial):
            self._add(value.keywords, value.keywords, _SETTINGS)
        content = _content(value)
        if content is None or depth == _DEEPEST:
            return
        items = list(content.values() if isinstance(content, dict) else content)
        if any(map(_is_code, items)):
            self._add(content, content, ())
        for item in items:
            self._add_tables(item, depth + 1)

    def _add(self, content: Any, owner: Any, settings: tuple[type, ...]) -> bool:
        """Whether it is new."""
        is_new = id(owner) not in self._spaces
        if is_new:
            self._spaces[id(owner)] = space = _Space(content, owner, settings)
            self._views.append(space.view)
        return is_new

    def _functions(self) -> Iterator[FunctionType]:
        values = chain(self._values, chain.from_iterable(names.values for names in self._names))
        for value in values:
            yield from _functions_in(value, 0)


class _Names:
    """Names of a module, and what they stood for."""

    __slots__ = ("_namespace", "_read", "values")

    def __init__(self, namespace: dict[str, Any], names: tuple[str, ...]) -> None:
        self._namespace = namespace
        self._read: Any = itemgetter(*names, names[0])  # twice, for it to return a tuple
        self.values = self._read(namespace)

    def are_unchanged(self) -> bool:
        try:
            return _are_equal(self._read(self._namespace), self.values)
        except KeyError:
            return False


class _Space:
    """A class's members or a table's entries, of which code matters, and settings of these types."""

    __slots__ = ("_content", "_important", "_owner", "_settings", "view")

    def __init__(self, content: Any, owner: Any, settings: tuple[type, ...]) -> None:
        self.view = content if isinstance(content, list | tuple) else content.values()
        self._content = content
        self._owner = owner  # as long as it is here, no other has its id
        self._settings = settings
        self._important = self._read()

    def is_unchanged(self) -> bool:
        return _are_equal(self._read(), self._important)

    def _read(self) -> list[tuple[Any, Any]]:
        items = enumerate(self._content) if isinstance(self._content, list | tuple) else self._content.items()
        return [(name, value) for name, value in items if _is_code(value) or type(value) in self._settings]


class _Parts:
    """What a function is made of, which can be replaced within it."""

    __slots__ = ("_code", "_function", "_parts")

    def __init__(self, function: FunctionType) -> None:
        self._function, self._code = function, function.__code__
        self._parts = self._read()

    def are_unchanged(self) -> bool:
        if self._function.__code__ is not self._code and as_written(self._function.__code__) != as_written(self._code):
            return False
        return _are_equal(self._read(), self._parts)

    def _read(self) -> list[Any]:
        function = self._function
        return [function.__defaults__, *(function.__kwdefaults__ or {}).items()]


def _are_equal(some: Any, others: Any) -> bool:
    try:
        return bool(some == others)
    except Exception:  # noqa: BLE001 - two that cannot be compared, such as arrays
        return False


def _is_watched(name: str) -> bool:
    package = name.partition(".")[0]
    if package == "torch":
        return name in _MODULES or (name.startswith("torch.nn.") and not name.startswith(_UNUSED))
    return package in _PACKAGES or name in _MODULES


def _is_watched_class(one: type) -> bool:
    """Of torch only what models are made of: it has thousands of others."""
    package = one.__module__.partition(".")[0]
    if package == "torch":
        return one.__module__.startswith("torch.nn") or one.__qualname__ == "Tensor"
    return package in _PACKAGES


def _settings_of(module_name: str) -> tuple[type, ...]:
    return _SETTINGS if module_name.startswith(_COMPUTING) else ()


def _is_code(value: Any) -> bool:
    if type(value) is SlotAttribute:  # It can be called, whatever it stands for.
        value = value.shared
    return callable(value) or isinstance(value, staticmethod | classmethod | property)


def _content(value: Any) -> Any:
    """What a table holds: a dictionary, a list, or what an object of the host or a library has as attributes."""
    if isinstance(value, dict | list | tuple):
        return value
    package = type(value).__module__.partition(".")[0]
    return getattr(value, "__dict__", None) if package in _PACKAGES - {"torch"} and not callable(value) else None


def _functions_in(value: Any, depth: int) -> Iterator[FunctionType]:
    """A function, and those that it wraps."""
    if isinstance(value, FunctionType):
        yield value
        inner = [value.__dict__.get("__wrapped__"), *_cells(value)]
    elif isinstance(value, property):
        inner = [value.fget]
    elif isinstance(value, functools.partial):
        inner = [value.func]
    else:
        inner = [value.__func__] if isinstance(value, staticmethod | classmethod | MethodType) else []
    for one in inner if depth < _DEEPEST else ():
        yield from _functions_in(one, depth + 1)


def _cells(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # nothing in it yet
            continue
