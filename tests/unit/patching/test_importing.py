"""Callbacks right after an import, which leave no trace in the module or the import system."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from comfy_parallel.patching.importing import PostImportHooks


@pytest.fixture
def hooks() -> Iterator[PostImportHooks]:
    made = PostImportHooks()
    yield made
    made.stop()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the import path with `watched_mod`, `watched_pkg.part` and `copying_mod`."""
    (tmp_path / "watched_mod.py").write_text("value = 'original'\n")
    (tmp_path / "watched_pkg").mkdir()
    (tmp_path / "watched_pkg" / "__init__.py").write_text("")
    (tmp_path / "watched_pkg" / "part.py").write_text("value = 'part'\n")
    (tmp_path / "copying_mod.py").write_text("from watched_mod import value\n")
    (tmp_path / "broken_mod.py").write_text("value = 1\nraise ImportError('broken')\n")
    monkeypatch.syspath_prepend(tmp_path)
    names = ("watched_mod", "watched_pkg", "watched_pkg.part", "copying_mod", "broken_mod")
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))  # so that the end of the test removes it
        del sys.modules[name]
    return tmp_path


@pytest.mark.usefixtures("folder")
def test_the_callback_runs_once_before_the_importer_can_copy_names(hooks: PostImportHooks) -> None:
    called: list[ModuleType] = []

    def change(module: ModuleType) -> None:
        called.append(module)
        module.value = "changed"  # type: ignore[attr-defined]

    hooks.watch("watched_mod", change)
    assert called == []
    copying = importlib.import_module("copying_mod")
    assert copying.value == "changed"
    importlib.import_module("watched_mod")
    assert called == [sys.modules["watched_mod"]]


@pytest.mark.usefixtures("folder")
def test_a_module_already_imported_is_called_back_at_once(hooks: PostImportHooks) -> None:
    module = importlib.import_module("watched_mod")
    called: list[ModuleType] = []
    hooks.watch("watched_mod", called.append)
    assert called == [module]
    assert hooks not in sys.meta_path


@pytest.mark.usefixtures("folder")
def test_asking_for_a_spec_does_not_use_the_callback_up(hooks: PostImportHooks) -> None:
    called: list[ModuleType] = []
    hooks.watch("watched_mod", called.append)
    for _ in range(3):
        assert importlib.util.find_spec("watched_mod") is not None
    assert called == []
    module = importlib.import_module("watched_mod")
    assert called == [module]


@pytest.mark.usefixtures("folder")
def test_a_part_of_a_package(hooks: PostImportHooks) -> None:
    called: list[str] = []
    hooks.watch("watched_pkg.part", lambda module: called.append(module.__name__))
    importlib.import_module("watched_pkg")
    assert called == []
    assert importlib.import_module("watched_pkg.part").value == "part"
    assert called == ["watched_pkg.part"]


def test_the_module_looks_as_if_nobody_had_watched(hooks: PostImportHooks, folder: Path) -> None:
    hooks.watch("watched_mod", lambda module: None)
    watched = importlib.import_module("watched_mod")
    plain = importlib.import_module("copying_mod")
    assert watched.__spec__ is not None
    assert type(watched.__loader__) is type(watched.__spec__.loader) is type(plain.__loader__)
    assert watched.__file__ == str(folder / "watched_mod.py")
    assert importlib.reload(watched) is watched


def test_the_spec_still_gives_the_source(hooks: PostImportHooks, folder: Path) -> None:
    hooks.watch("watched_mod", lambda module: None)
    spec = importlib.util.find_spec("watched_mod")
    assert spec is not None
    assert spec.origin == str(folder / "watched_mod.py")
    assert spec.loader.get_source("watched_mod") == "value = 'original'\n"  # type: ignore[union-attr]


def test_a_failing_import_is_called_back_when_it_succeeds_later(hooks: PostImportHooks, folder: Path) -> None:
    called: list[str] = []
    hooks.watch("broken_mod", lambda module: called.append(module.__name__))
    with pytest.raises(ImportError, match="broken"):
        importlib.import_module("broken_mod")
    assert called == []
    (folder / "broken_mod.py").write_text("value = 'mended and of another length'\n")
    importlib.invalidate_caches()
    importlib.import_module("broken_mod")
    assert called == ["broken_mod"]


@pytest.mark.usefixtures("folder")
def test_an_error_of_the_callback_reaches_the_importer(hooks: PostImportHooks) -> None:
    def fail(module: ModuleType) -> None:
        raise RuntimeError("callback")

    hooks.watch("watched_mod", fail)
    with pytest.raises(RuntimeError, match="callback"):
        importlib.import_module("watched_mod")


@pytest.mark.usefixtures("folder")
def test_after_stop_nothing_is_called_and_the_import_system_is_as_before(hooks: PostImportHooks) -> None:
    before = list(sys.meta_path)
    hooks.watch("watched_mod", lambda module: pytest.fail("called after stop"))
    assert sys.meta_path[0] is hooks
    hooks.stop()
    assert sys.meta_path == before
    importlib.import_module("watched_mod")


@pytest.mark.usefixtures("folder")
def test_two_watchers_of_one_module_are_both_called(hooks: PostImportHooks) -> None:
    others, called = PostImportHooks(), []
    hooks.watch("watched_mod", lambda module: called.append("first"))
    others.watch("watched_mod", lambda module: called.append("second"))
    try:
        importlib.import_module("watched_mod")
    finally:
        others.stop()
    assert sorted(called) == ["first", "second"]


def test_a_module_that_does_not_exist_is_not_found(hooks: PostImportHooks) -> None:
    hooks.watch("no_such_module_anywhere", lambda module: None)
    assert importlib.util.find_spec("no_such_module_anywhere") is None
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("no_such_module_anywhere")


@pytest.mark.parametrize("is_stopped_between", [False, True])
def test_a_module_that_is_being_imported_is_called_back_when_it_is_complete(
    hooks: PostImportHooks, folder: Path, is_stopped_between: bool
) -> None:
    """What one module's callback watches anew may be another that has imported it and is not complete yet."""
    (folder / "copying_mod.py").write_text("from watched_mod import value\nown = 'complete'\n")
    seen: list[str] = []

    def watch_again(module: ModuleType) -> None:
        if is_stopped_between:
            hooks.stop()
        hooks.watch("copying_mod", lambda module: seen.append(module.own))
        assert seen == []

    hooks.watch("copying_mod", lambda module: seen.append("first"))
    hooks.watch("watched_mod", watch_again)
    importlib.import_module("copying_mod")
    assert seen == ["complete"]


def test_a_callback_may_watch_its_own_module_again(hooks: PostImportHooks, folder: Path) -> None:
    seen: list[str] = []
    hooks.watch("watched_mod", lambda module: hooks.watch("watched_mod", lambda module: seen.append(module.value)))
    importlib.import_module("watched_mod")
    assert seen == ["original"]


def test_a_module_whose_import_fails_may_be_watched_again(hooks: PostImportHooks, folder: Path) -> None:
    seen: list[str] = []
    hooks.watch("broken_mod", lambda module: seen.append("broken"))
    with pytest.raises(ImportError, match="broken"):
        importlib.import_module("broken_mod")
    (folder / "broken_mod.py").write_text("value = 'mended, now'\n")
    importlib.invalidate_caches()
    hooks.watch("broken_mod", lambda module: seen.append(module.value))
    importlib.import_module("broken_mod")
    assert seen == ["mended, now"]
