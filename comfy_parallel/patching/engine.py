"""Apply a declared set of host patches, all or nothing, and take them off again exactly.

A patch says what it changes, why, and when it can go. It is checked twice: against the host's source
before anything is imported, and against the live object when its module has been imported.
"""

from __future__ import annotations

import ast
import inspect
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

from comfy_parallel.errors import HostMismatch
from comfy_parallel.patching.importing import PostImportHooks

logger = logging.getLogger(__name__)

_ABSENT = object()


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
        self.original = vars(owner).get(name, _ABSENT)

    def revert(self) -> None:
        if vars(self.owner).get(self.name) is not self.new:
            raise HostMismatch(f"{self.owner!r}.{self.name}: something else patched it after us; not reverted")
        if self.original is _ABSENT:
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
    that hosts without the target need no patch. `until` says what would let us delete it, `hazards` which
    rows of the hazard table it answers.
    """

    target: str
    wrap: Callable[[Any], Any]
    why: str
    until: str
    params: tuple[str, ...] = ()
    expects: type | None = None
    optional: bool = False
    hazards: tuple[int, ...] = ()

    @property
    def module(self) -> str:
        return self.target.partition(":")[0]

    @property
    def path(self) -> list[str]:
        return self.target.partition(":")[2].split(".")

    def check_source(self, source: ModuleSource) -> Fit:
        """Check against source code, importing nothing.

        Raises:
            HostMismatch: saying what was expected and what was found.
        """
        node = source.find(self.path)
        if node is None:
            return self._absent()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            self._check_params(tuple(arg.arg for arg in (*node.args.posonlyargs, *node.args.args)))
        elif self.params and not isinstance(node, ast.ClassDef):
            raise HostMismatch(f"{self.target}: expected a function, found {ast.unparse(node)[:60]}")
        return Fit.FITS

    def check_live(self, module: ModuleType) -> Fit:
        """The same against the imported module."""
        located = self._locate(module)
        if located is None:
            return self._absent()
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
        new = self.wrap(getattr(original, "__func__", original))
        yield replace(owner, name, kind(new) if kind else new)

    def _absent(self) -> Fit:
        if self.optional:
            return Fit.ABSENT
        raise HostMismatch(f"{self.target}: not found in this host")

    def _check_params(self, found: tuple[str, ...]) -> None:
        if found[: len(self.params)] != self.params:
            raise HostMismatch(f"{self.target}: expected parameters {self.params}, host has {found}")

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
            return self._absent()
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
        yield replace(owner, self.path[-1], self.wrap(None))


def _replace_copies(patched: ModuleType, undos: list[Undo]) -> Iterator[Undo]:
    """Modules imported before us may hold an original under a name of their own (`from x import f`)."""
    named = [undo for undo in undos if undo.is_name and undo.owner is patched and callable(undo.original)]
    new_of = {id(undo.original): undo.new for undo in named}
    package = patched.__name__.partition(".")[0]
    for module in _holders(new_of):
        if module.__name__.partition(".")[0] != package:
            for name, value in list(vars(module).items()):
                if id(value) in new_of:
                    yield replace(module, name, new_of[id(value)])


def _restore_copies(reverted: list[Undo]) -> None:
    """Modules imported after us may hold a replacement under a name of their own."""
    named = [undo for undo in reverted if undo.is_name and isinstance(undo.owner, ModuleType) and callable(undo.new)]
    undo_of = {id(undo.new): undo for undo in named if undo.original is not _ABSENT}
    for module in _holders(undo_of):
        for name, value in list(vars(module).items()):
            while (undo := undo_of.get(id(value))) is not None and value is not undo.original:
                value = undo.original
                setattr(module, name, value)


def _holders(ids: Iterable[int]) -> Iterator[ModuleType]:
    """The modules that have a name for one of these objects; quick, for a host imports thousands of modules."""
    wanted = set(ids)
    for module in list(sys.modules.values()) if wanted else ():
        if isinstance(module, ModuleType) and not wanted.isdisjoint(map(id, list(vars(module).values()))):
            yield module


class ModuleSource:
    """The definitions of one source file, found without importing it."""

    def __init__(self, path: Path) -> None:
        self.tree = ast.parse(path.read_text(encoding="utf-8"))

    def find(self, path: list[str]) -> ast.AST | None:
        """The node that defines a dotted path, or None."""
        body: Iterable[ast.stmt] = self.tree.body
        node: ast.AST | None = self.tree
        for name in path:
            node = _definition(body, name)
            body = getattr(node, "body", [])
        return node


def _definition(body: Iterable[ast.stmt], name: str) -> ast.AST | None:
    found: ast.AST | None = None
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found = statement if statement.name == name else found
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            leaves = [leaf for target in targets for leaf in ast.walk(target)]
            names = [leaf.id for leaf in leaves if isinstance(leaf, ast.Name) and isinstance(leaf.ctx, ast.Store)]
            found = statement if name in names else found
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            found = statement if name in [alias.asname or alias.name for alias in statement.names] else found
        elif isinstance(statement, ast.If | ast.Try | ast.With):
            blocks = [getattr(statement, block, []) for block in ("body", "orelse", "finalbody")]
            handlers = [handler.body for handler in getattr(statement, "handlers", [])]
            found = _definition([s for block in (*blocks, *handlers) for s in block], name) or found
    return found


def source_of(module: str, host_dir: Path) -> ModuleSource | None:
    """The source of a module of the host; None when it is not one of the host's."""
    base = host_dir.joinpath(*module.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return ModuleSource(path)
    return None


@dataclass
class PatchSet:
    """All patches of one process. `on_failure` is called with the reason after everything was taken back."""

    patches: tuple[Patch, ...]
    on_failure: Callable[[HostMismatch], None]
    _hooks: PostImportHooks = field(default_factory=PostImportHooks)
    _undo: list[Undo] = field(default_factory=list)
    _applied: set[str] = field(default_factory=set)
    _has_failed: bool = False

    def check(self, host_dir: Path) -> list[HostMismatch]:
        """Every reason why this host cannot be patched, from its source alone."""
        problems = []
        for _, result in survey(self.patches, host_dir):
            if isinstance(result, HostMismatch):
                problems.append(result)
        return problems

    def install(self) -> None:
        """Patch each module when it is imported; at once where it already is."""
        self._has_failed = False
        for module in dict.fromkeys(patch.module for patch in self.patches):
            if not self._has_failed:
                self._hooks.watch(module, self._apply_module)

    def missing(self) -> list[str]:
        """Modules with patches that cannot be done without and that have not been imported."""
        needed = dict.fromkeys(patch.module for patch in self.patches if not patch.optional)
        return [module for module in needed if module not in self._applied]

    def revert(self) -> None:
        """Take every change back, last first."""
        self._hooks.stop()
        self._applied.clear()
        reverted = []
        while self._undo:
            self._undo[-1].revert()
            reverted.append(self._undo.pop())
        _restore_copies(reverted)

    def _apply_module(self, module: ModuleType) -> None:
        patches = [patch for patch in self.patches if patch.module == module.__name__]
        try:
            for patch in patches:
                patch.check_live(module)
            first = len(self._undo)
            for patch in patches:
                self._undo.extend(patch.apply(module))
            self._undo.extend(_replace_copies(module, self._undo[first:]))
            self._applied.add(module.__name__)
        except HostMismatch as mismatch:
            self._has_failed = True
            self.revert()
            self.on_failure(mismatch)
        except BaseException:
            self.revert()
            raise


def survey(patches: Iterable[Patch], host_dir: Path) -> Iterator[tuple[Patch, Fit | HostMismatch]]:
    """Each patch with what the host's source says of it; parses each file once."""
    sources: dict[str, ModuleSource | None] = {}
    for patch in patches:
        if patch.module not in sources:
            sources[patch.module] = source_of(patch.module, host_dir)
        source = sources[patch.module]
        try:
            yield patch, _fit(patch, source)
        except HostMismatch as mismatch:
            yield patch, mismatch


def _fit(patch: Patch, source: ModuleSource | None) -> Fit:
    if source is not None:
        return patch.check_source(source)
    if patch.module.partition(".")[0] in _LIBRARIES:
        return Fit.LIVE
    return patch._absent()


_LIBRARIES = {"torch", "numpy", "random", "threading", "concurrent", "logging", "aiohttp", "comfy_aimdo"}
