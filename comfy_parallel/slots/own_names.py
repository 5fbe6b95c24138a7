"""Names of modules, classes and settings objects that a slot has its own values of, while others see the shared ones.

The shared values stay where Python keeps them. What a slot writes lies beside them: attribute readers get it through
properties and descriptors, code in the module itself through `accessor`, which its functions are compiled to ask.
"""

from __future__ import annotations

import builtins
import itertools
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import CodeType, ModuleType
from typing import Any

from comfy_parallel.slots.slot import SlotLocal, current_slot

ACCESSOR = "__comfy_parallel_names__"  # where a module's functions find its accessor
_GONE: Any = object()  # a slot's value of a name that it has deleted
_MISSING: Any = object()

_is_shared: ContextVar[bool] = ContextVar("comfy_parallel_is_shared", default=False)


@contextmanager
def shared() -> Iterator[None]:
    """Let the body, an import, read and write what all slots share."""
    token = _is_shared.set(True)
    try:
        yield
    finally:
        _is_shared.reset(token)


def has_own() -> bool:
    """Whether what the caller writes is its slot's own."""
    return current_slot() is not None and not _is_shared.get()


@dataclass(frozen=True, slots=True)
class Written:
    """A slot's value of a name of the host. `node` is the node of the job that wrote it."""

    name: OwnName
    serial: int
    node: Any


@dataclass
class _Writes:
    """What a slot's jobs have written to the host, and a number for each state of that."""

    made: dict[OwnName, Written] = field(default_factory=dict)
    state: frozenset[int] = frozenset()
    prompt: Any = None

    def changed(self) -> None:
        self.state = frozenset(written.serial for written in self.made.values())


_writes: SlotLocal[_Writes] = SlotLocal(_Writes)
_serials = itertools.count()
_executing_node: list[Callable[[], Any]] = []


def tell_node_by(executing_node: Callable[[], Any]) -> None:
    """Ask this for the id of the node that a slot executes."""
    _executing_node[:] = [executing_node]


def _node() -> Any:
    return _executing_node[0]() if _executing_node else None


def state() -> Hashable:
    """Equal to an earlier value if the calling slot sees the same values of the host's names again."""
    return _writes.get().state


_codes: dict[int, tuple[CodeType, CodeType]] = {}


def note_code(new: CodeType, old: CodeType) -> None:
    """`new` does what `old` did where a slot has no values of its own."""
    _codes[id(new)] = new, as_written(old)


def as_written(code: CodeType) -> CodeType:
    """The code that a function had before it asked for the slot's values."""
    return _codes[id(code)][1] if id(code) in _codes else code


def begin_job(prompt: Any) -> None:
    """End what the slot's earlier jobs have written to the host.

    It stays as long as jobs have the node that wrote it with the same inputs: they get its result from the cache, and
    what it wrote belongs to that.
    """
    writes = _writes.get()
    before, writes.prompt = writes.prompt, prompt
    for name, written in list(writes.made.items()):
        if not _is_same_node(before, prompt, written.node):
            name.forget()


def _is_same_node(before: Any, prompt: Any, node: Any) -> bool:
    if node is None or not isinstance(before, dict) or not isinstance(prompt, dict):
        return False
    name = str(node).partition(".")[0]
    return name in prompt and prompt[name] == before.get(name)


class OwnName:
    """One name that slots may have their own value of.

    Args:
        shared: returns the shared value, or raises KeyError.
        start: makes a slot's first value from the shared one; without it the slot sees the shared one until it writes.
        is_host: whether what jobs write ends with them.
    """

    def __init__(
        self, shared: Callable[[], Any], *, start: Callable[[Any], Any] | None = None, is_host: bool = False
    ) -> None:
        self._shared, self._start, self.is_host = shared, start, is_host
        self._own: SlotLocal[list[Any]] = SlotLocal(lambda: [_MISSING])

    def get(self) -> Any:
        """What the caller sees.

        Raises:
            KeyError: there is no such name.
        """
        slot = current_slot()
        if slot is None or _is_shared.get():
            return self._shared()
        cell = slot.values.get(self._own)
        if cell is None or cell[0] is _MISSING:
            return self._shared() if self._start is None else self._begin()
        if cell[0] is _GONE:
            raise KeyError
        return cell[0]

    def set(self, value: Any) -> None:
        """Write the slot's own value; writing the shared one again gives it up."""
        if self._start is None and self._is_shared_value(value):
            self.forget()
            return
        self._own.get()[0] = value
        self._note()

    def delete(self) -> None:
        """Let the slot see no such name.

        Raises:
            KeyError: it sees none.
        """
        self.get()
        self._own.get()[0] = _GONE
        self._note()

    def forget(self) -> None:
        """Let the slot see the shared value again."""
        self._own.get()[0] = _MISSING
        if self.is_host:
            writes = _writes.get()
            writes.made.pop(self, None)
            writes.changed()

    def _begin(self) -> Any:
        assert self._start is not None
        value = self._own.get()[0] = self._start(self._shared())
        return value

    def _is_shared_value(self, value: Any) -> bool:
        try:
            return self._shared() is value
        except KeyError:
            return False

    def _note(self) -> None:
        if self.is_host:
            writes = _writes.get()
            writes.made[self] = Written(self, next(_serials), _node())
            writes.changed()


class Namespace:
    """The names of one module, or of one object, that slots have their own of."""

    def __init__(self, owner: Any, is_host: bool) -> None:
        self.owner, self.is_host = owner, is_host
        self.names: dict[str, OwnName] = {}
        self.accessor: Any = type("Accessor", (), {"__slots__": ()})()
        self._was = type(owner)

    def add(self, name: str, start: Callable[[Any], Any] | None = None) -> OwnName:
        """Let slots have their own of `name`; readers of the attribute get the calling slot's."""
        if type(self.owner) is self._was:
            self.owner.__class__ = type(self._was.__name__, (self._was,), {"__module__": self._was.__module__})
        if name not in self.names:
            self.names[name] = OwnName(lambda: vars(self.owner)[name], start=start, is_host=self.is_host)
            setattr(type(self.owner), name, _attribute(self, name))
            setattr(type(self.accessor), name, _global(name, self.names[name], self))
        return self.names[name]

    def remove(self, name: str) -> None:
        """Let all see the shared one again."""
        delattr(type(self.owner), name)
        delattr(type(self.accessor), name)
        del self.names[name]

    def write(self, name: str, value: Any) -> None:
        """As code of the module writes a global."""
        if has_own():
            self.names[name].set(value)
        else:
            vars(self.owner)[name] = value

    def delete(self, name: str) -> None:
        """As `del` of a global.

        Raises:
            KeyError: there is no such name.
        """
        if has_own():
            self.names[name].delete()
        else:
            del vars(self.owner)[name]

    def revert(self) -> None:
        """Take the properties away; what the module's functions ask gives the shared values."""
        self.owner.__class__ = self._was
        self.names.clear()


def _global(name: str, own: OwnName, namespace: Namespace) -> property:
    """A name as code of the module reads and writes it."""

    def missing() -> NameError:
        return NameError(f"name {name!r} is not defined", name=name)

    def get(_accessor: Any) -> Any:
        try:
            return own.get()
        except KeyError:
            value = getattr(builtins, name, _MISSING)
            if value is _MISSING:
                raise missing() from None
            return value

    def set(_accessor: Any, value: Any) -> None:
        namespace.write(name, value)

    def delete(_accessor: Any) -> None:
        try:
            namespace.delete(name)
        except KeyError:
            raise missing() from None

    return property(get, set, delete)


def _attribute(namespace: Namespace, name: str) -> property:
    def missing() -> AttributeError:
        kind = "module" if isinstance(namespace.owner, ModuleType) else "object"
        return AttributeError(f"{kind} {getattr(namespace.owner, '__name__', '')!r} has no attribute {name!r}")

    def get(owner: Any) -> Any:
        try:
            return namespace.names[name].get()
        except KeyError:
            fallback = vars(owner).get("__getattr__") if isinstance(owner, ModuleType) else None
            if fallback is None:
                raise missing() from None
            return fallback(name)

    def set(_owner: Any, value: Any) -> None:
        namespace.write(name, value)

    def delete(_owner: Any) -> None:
        try:
            namespace.delete(name)
        except KeyError:
            raise missing() from None

    return property(get, set, delete)


_namespaces: dict[int, Namespace] = {}


def namespace_of(owner: Any, *, is_host: bool) -> Namespace:
    """The namespace of a module or object that lives as long as the process."""
    found = _namespaces.get(id(owner))
    if found is None or found.owner is not owner:
        found = _namespaces[id(owner)] = Namespace(owner, is_host)
    return found


def start_anew(owner: Any) -> None:
    """Have the calling slot begin again with the shared values of a module's names."""
    found = _namespaces.get(id(owner))
    for name in found.names.values() if found is not None and found.owner is owner else ():
        name.forget()


def revert() -> None:
    """Take everything away from modules and objects. Only sensible while no job runs."""
    for namespace in _namespaces.values():
        namespace.revert()
