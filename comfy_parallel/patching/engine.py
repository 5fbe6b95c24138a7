"""One declared change of the host: how to check whether it fits, make it and take it back.

A patch says what it changes, why, and when it can go. It is checked twice: against the host's source
before anything is imported, and against the live object when its module has been imported.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from types import ModuleType
from typing import Any

from comfy_parallel.errors import HostMismatch
from comfy_parallel.patching.sources import ModuleSource

logger = logging.getLogger(__name__)

ABSENT = object()
CORE = "core"  # The feature that all others need: jobs on slots that do not disturb each other.


class OtherShape(HostMismatch):
    """This host has another shape of what a patch changes that can be spared."""


class Fit(Enum):
    """What a check says of a patch and a host."""

    FITS = "fits"
    ABSENT = "not in this host"
    LIVE = "checked at start"


class Undo:
    """How one attribute was before, raw, and whether its owner had it itself."""

    is_name = True  # A name, of which other modules may hold a copy.

    def __init__(self, owner: Any, name: str, new: Any) -> None:
        self.owner, self.name, self.new = owner, name, new
        self.original = vars(owner).get(name, ABSENT)

    def revert(self) -> None:
        if vars(self.owner).get(self.name) is not self.new:
            raise HostMismatch(f"{self.owner!r}.{self.name}: something else patched it after us; not reverted")
        if self.original is ABSENT:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.original)


def replace(owner: Any, name: str, new: Any) -> Undo:
    """Set an attribute and return how to undo that."""
    undo = Undo(owner, name, new)
    setattr(owner, name, new)
    return undo


@dataclass(frozen=True, kw_only=True)
class Patch:
    """Replace `target` (written `module:attribute.path`) by `wrap(original)`.

    `params` are the leading parameters relied on; `expects` the type a value must have; `optional` says
    that hosts without the target need no patch; `spare` that hosts with another one, too, do without it.
    `until` says what would let us delete it, `hazards` which rows of the hazard table it answers.

    `needs` names what else of the host `wrap` reads: global names of the target's module, or `module:name`
    of others; a `?` at the end says that hosts may lack it. Their values follow the original:
    `wrap(original, *values)`, None for what is lacking.

    `feature` is what the patch serves. Without that feature it is not applied; where a patch of another
    feature than `CORE` does not fit, that feature is off and the rest works.
    """

    target: str
    wrap: Callable[..., Any]
    why: str
    until: str
    params: tuple[str, ...] = ()
    expects: type | None = None
    optional: bool = False
    spare: bool = False
    needs: tuple[str, ...] = ()
    feature: str = CORE
    hazards: tuple[int, ...] = ()

    @property
    def module(self) -> str:
        return self.target.partition(":")[0]

    @property
    def is_required(self) -> bool:
        """Whether a host without the target cannot do without the patch."""
        return not (self.optional or self.spare)

    @property
    def path(self) -> list[str]:
        return self.target.partition(":")[2].split(".")

    @property
    def modules(self) -> list[str]:
        """The modules that have to be there: the target's, and those of what `wrap` needs."""
        return [self.module, *(module for module, _, is_optional in self._needs() if not is_optional)]

    def check_source(self, source: ModuleSource) -> Fit:
        """Check against source code, importing nothing.

        Raises:
            HostMismatch: saying what was expected and what was found.
        """
        node = source.find(self.path)
        if node is None:
            return self.absent()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            self._check_params(tuple(arg.arg for arg in (*node.args.posonlyargs, *node.args.args)))
        elif self.params and not isinstance(node, ast.ClassDef):
            raise HostMismatch(f"{self.target}: expected a function, found {ast.unparse(node)[:60]}")
        return Fit.FITS

    def check_live(self, module: ModuleType) -> Fit:
        """The same against the imported module."""
        located = self._locate(module)
        if located is None:
            return self.absent()
        self.needed(module)
        original = located[2]
        if self.expects is not None and not isinstance(original, self.expects):
            raise HostMismatch(f"{self.target}: expected {self.expects.__name__}, found {type(original).__name__}")
        if self.params and not inspect.isclass(original):
            function = getattr(original, "__func__", original)
            self._check_params(tuple(inspect.signature(function).parameters))
        return Fit.FITS

    def apply(self, module: ModuleType) -> Iterator[Undo]:
        """Change the host, yielding each undo right after its change."""
        located = self._locate(module)
        if located is None:
            return
        owner, name, original = located
        kind = type(original) if isinstance(original, staticmethod | classmethod) else None
        new = self.wrap(getattr(original, "__func__", original), *self.needed(module))
        yield replace(owner, name, kind(new) if kind else new)

    def check_needs(self, source: Callable[[str], ModuleSource | None]) -> None:
        """Check what `wrap` reads of the host; `source(module)` finds a module's source.

        Raises:
            HostMismatch: naming what is lacking.
        """
        for module, path, is_optional in self._needs():
            found = source(module)
            if not is_optional and (found is None or found.find(path) is None):
                raise self._mismatch(f"needs {module}:{'.'.join(path)}, not found in this host")

    def needed(self, module: ModuleType) -> list[Any]:
        """The live values of what `wrap` reads of the host.

        Raises:
            HostMismatch: naming what is lacking.
        """
        values = []
        for name, path, is_optional in self._needs():
            try:
                value: Any = module if name == module.__name__ else importlib.import_module(name)
                for attribute in path:
                    value = getattr(value, attribute)
            except (ImportError, AttributeError) as error:
                if not is_optional:
                    raise self._mismatch(f"needs {name}:{'.'.join(path)}, not found in this host") from error
                value = None
            values.append(value)
        return values

    def _needs(self) -> Iterator[tuple[str, list[str], bool]]:
        for need in self.needs:
            module, _, path = need.removesuffix("?").rpartition(":")
            yield module or self.module, path.split("."), need.endswith("?")

    def absent(self) -> Fit:
        if not self.is_required:
            return Fit.ABSENT
        raise HostMismatch(f"{self.target}: not found in this host")

    def _check_params(self, found: tuple[str, ...]) -> None:
        if found[: len(self.params)] != self.params:
            raise self._mismatch(f"expected parameters {self.params}, host has {found}")

    def _mismatch(self, reason: str) -> HostMismatch:
        return (OtherShape if self.spare else HostMismatch)(f"{self.target}: {reason}")

    def _locate(self, module: ModuleType) -> tuple[Any, str, Any] | None:
        owner: Any = module
        *parents, name = self.path
        try:
            for parent in parents:
                owner = getattr(owner, parent)
            return owner, name, inspect.getattr_static(owner, name)
        except AttributeError:
            return None


@dataclass(frozen=True, kw_only=True)
class Addition(Patch):
    """Give a class an attribute that it must not have yet; `wrap(None)` makes it."""

    def check_source(self, source: ModuleSource) -> Fit:
        if source.find(self.path[:-1]) is None:
            return self.absent()
        if source.find(self.path) is not None:
            raise HostMismatch(f"{self.target}: expected no such class attribute, the host has one")
        return Fit.FITS

    def check_live(self, module: ModuleType) -> Fit:
        if self._locate(module) is not None:
            raise HostMismatch(f"{self.target}: expected no such class attribute, the host has one")
        return Fit.FITS

    def apply(self, module: ModuleType) -> Iterator[Undo]:
        owner: Any = module
        for parent in self.path[:-1]:
            owner = getattr(owner, parent)
        yield replace(owner, self.path[-1], self.wrap(None, *self.needed(module)))
