"""Apply a declared set of host patches, all or nothing, and take them off again exactly.

Patches of a feature that is not the core are left out where they do not fit, and the rest stays.
"""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from comfy_parallel.errors import HostMismatch
from comfy_parallel.patching.engine import ABSENT, CORE, Fit, OtherShape, Patch, Undo, replace
from comfy_parallel.patching.importing import PostImportHooks
from comfy_parallel.patching.sources import HostFiles, ModuleSource, file_of, source_of


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
    undo_of = {id(undo.new): undo for undo in named if undo.original is not ABSENT}
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


def _nobody_told(what: str, reason: HostMismatch) -> None:
    pass


@dataclass
class PatchSet:
    """All patches of one process.

    `on_failure(reason)` is called after everything was taken back, `on_left_out(what, reason)` when a feature,
    or a single patch that can be done without, is left out and the rest stays.
    """

    patches: tuple[Patch, ...]
    on_failure: Callable[[HostMismatch], None]
    on_left_out: Callable[[str, HostMismatch], None] = _nobody_told
    _hooks: PostImportHooks = field(default_factory=PostImportHooks)
    _undo: list[Undo] = field(default_factory=list)
    _applied: set[str] = field(default_factory=set)
    _has_failed: bool = False
    _is_in_use: bool = False

    def check(self, files: HostFiles) -> list[HostMismatch]:
        """Every reason why this host cannot be patched, from its source alone; leaves out what it can do without."""
        verdict = judge(survey(self.patches, files))
        for feature, reason in verdict.off.items():
            self._switch_off(feature, reason)
        for patch, reason in verdict.left_out:
            self._leave_out(patch, reason)
        return verdict.problems

    def install(self) -> None:
        """Patch each module when it is imported; at once where it already is."""
        self._has_failed = False
        self._watch()

    def in_use(self) -> None:
        """From now on jobs rely on the patches: a module that comes later and does not fit is left alone."""
        self._is_in_use = True

    def features(self) -> set[str]:
        """The features that are not left out."""
        return {patch.feature for patch in self.patches}

    def missing(self) -> list[str]:
        """Modules with patches that cannot be done without and that have not been imported."""
        needed = dict.fromkeys(patch.module for patch in self.patches if patch.is_required)
        return [module for module in needed if module not in self._applied]

    def revert(self) -> None:
        """Take every change back, last first."""
        self._hooks.stop()
        self._applied.clear()
        self._take_back(0)
        self._is_in_use = False

    def _take_back(self, first: int) -> None:
        reverted = []
        while len(self._undo) > first:
            self._undo[-1].revert()
            reverted.append(self._undo.pop())
        _restore_copies(reverted)

    def _watch(self) -> None:
        for module in dict.fromkeys(patch.module for patch in self.patches):
            if not self._has_failed and module not in self._applied:
                self._hooks.watch(module, self._apply_module)

    def _apply_module(self, module: ModuleType) -> None:
        patch = None
        first = len(self._undo)
        try:
            fitting = [patch for patch in self.patches if patch.module == module.__name__ and self._fits(patch, module)]
            for patch in fitting:
                self._undo.extend(patch.apply(module))
            patch = None
            self._undo.extend(_replace_copies(module, self._undo[first:]))
            self._applied.add(module.__name__)
        except Exception as error:  # noqa: BLE001 - whatever it is, the host starts as it is
            self._fail(module, first, patch, error)
        except BaseException:
            self.revert()
            raise

    def _fits(self, patch: Patch, module: ModuleType) -> bool:
        try:
            patch.check_live(module)
        except OtherShape as reason:
            self._leave_out(patch, reason)
            return False
        except Exception as error:
            raise _Broken(patch) from error
        return True

    def _fail(self, module: ModuleType, first: int, patch: Patch | None, error: BaseException) -> None:
        """Take everything back; try again without the patch's feature if that is not the core."""
        if isinstance(error, _Broken) and error.__cause__ is not None:
            patch, error = error.patch, error.__cause__
        reason = error if isinstance(error, HostMismatch) else _unexpected(patch, error)
        if self._is_in_use:
            self._take_back(first)
            self.on_left_out(module.__name__, reason)
            return
        self.revert()
        if patch is None or patch.feature == CORE:
            self._has_failed = True
            self.on_failure(reason)
        else:
            self._switch_off(patch.feature, reason)
            self._watch()

    def _switch_off(self, feature: str, reason: HostMismatch) -> None:
        self.patches = tuple(patch for patch in self.patches if patch.feature != feature)
        self.on_left_out(feature, reason)

    def _leave_out(self, left_out: Patch, reason: HostMismatch) -> None:
        self.patches = tuple(patch for patch in self.patches if patch is not left_out)
        self.on_left_out(left_out.target, reason)


def _unexpected(patch: Patch | None, error: BaseException) -> HostMismatch:
    """What a patch that fails in a way of its own says of the host."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    target = patch.target if patch else "the patches"
    mismatch = HostMismatch(f"{target}: {error!r} while it was applied ({Path(where.filename).name}:{where.lineno})")
    mismatch.__cause__ = error
    return mismatch


Surveyed = tuple[Patch, Fit | HostMismatch]


class Verdict(NamedTuple):
    """What the checks of all patches come to: whether the host can be patched, and what it does without."""

    problems: list[HostMismatch]
    off: dict[str, HostMismatch]  # By feature.
    left_out: list[tuple[Patch, HostMismatch]]  # Single patches of other features.


def judge(surveyed: Iterable[Surveyed]) -> Verdict:
    """Sum up a survey."""
    bad = [(patch, result) for patch, result in surveyed if isinstance(result, HostMismatch)]
    required = [(patch, result) for patch, result in bad if not isinstance(result, OtherShape)]
    features = dict.fromkeys(patch.feature for patch, _ in required if patch.feature != CORE)
    off = {
        feature: HostMismatch("; ".join(str(result) for patch, result in required if patch.feature == feature))
        for feature in features
    }
    left_out: list[tuple[Patch, HostMismatch]] = [
        (patch, result) for patch, result in bad if isinstance(result, OtherShape) and patch.feature not in off
    ]
    problems: list[HostMismatch] = [result for patch, result in required if patch.feature == CORE]
    return Verdict(problems, off, left_out)


def survey(patches: Iterable[Patch], files: HostFiles) -> Iterator[Surveyed]:
    """Each patch with what the host's source says of it; parses each file once."""

    @functools.cache
    def source(module: str) -> ModuleSource | None:
        return source_of(module, files)

    for patch in patches:
        try:
            yield patch, _fit(patch, source)
        except HostMismatch as mismatch:
            yield patch, mismatch


def missing_files(patches: Iterable[Patch], files: HostFiles) -> list[str]:
    """The files of the host that patches need and that are not there."""
    needed = dict.fromkeys(module for patch in patches if patch.is_required for module in patch.modules)
    return [file_of(module) for module in needed if not _is_library(module) and source_of(module, files) is None]


def _is_library(module: str) -> bool:
    return module.partition(".")[0] in _LIBRARIES


def _fit(patch: Patch, source: Callable[[str], ModuleSource | None]) -> Fit:
    found = source(patch.module)
    if found is not None:
        fit = patch.check_source(found)
    elif _is_library(patch.module):
        fit = Fit.LIVE
    else:
        fit = patch.absent()
    if fit is Fit.FITS:
        patch.check_needs(source)
    return fit


_LIBRARIES = {
    "aiohttp",
    "comfy_aimdo",
    "concurrent",
    "contextlib",
    "importlib",
    "logging",
    "numpy",
    "random",
    "safetensors",
    "threading",
    "torch",
    "unittest",
}


class _Broken(Exception):
    """A check of a patch ended with the cause of this."""

    def __init__(self, patch: Patch) -> None:
        super().__init__(patch.target)
        self.patch = patch
