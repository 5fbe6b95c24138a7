"""Packs in a folder of their own, loaded as the host loads them, and two slots."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from comfy_parallel.isolation.packs import copies, loader
from comfy_parallel.slots import own_attributes, own_names
from comfy_parallel.slots.slot import Slot, entered
from tests.fakes import make_slots

Load = Callable[..., Any]
InSlot = Callable[..., Any]


@pytest.fixture
def slots() -> tuple[Slot, ...]:
    return make_slots("cuda:0", "cuda:1")


@pytest.fixture
def in_slot(slots: tuple[Slot, ...]) -> Callable[..., Any]:
    """Calls a function as code of a slot; of none where the slot is None."""

    def call(index: int | None, function: Callable[..., Any], *args: Any) -> Any:
        with entered(None if index is None else slots[index]):
            return function(*args)

    return call


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Writes a pack's files and imports it."""
    folder = tmp_path / "custom_nodes"
    paths = ModuleType("folder_paths")
    vars(paths).update(
        __file__=str(tmp_path / "folder_paths.py"),
        folder_names_and_paths={"custom_nodes": None},
        get_folder_paths=lambda name: [str(folder)],
    )
    monkeypatch.setitem(sys.modules, "folder_paths", paths)
    source_loader = importlib.machinery.SourceFileLoader
    monkeypatch.setattr(source_loader, "exec_module", loader.load_per_slot(source_loader.exec_module))

    def write_and_load(text: str = "", name: str = "pack", link_to: Path | None = None, **files: str) -> Any:
        folder.mkdir(exist_ok=True)
        if link_to is not None:
            link_to.mkdir()
            (folder / name).symlink_to(link_to)
        (folder / name).mkdir(exist_ok=True)
        for file, source in {"__init__": text, **files}.items():
            (folder / name / f"{file}.py").write_text(textwrap.dedent(source))
        return import_pack(name, folder / name / "__init__.py")

    yield write_and_load
    own_names.revert()
    own_attributes.revert()
    loader._plans.clear()
    copies._modules.clear()
    for module in [name for name in sys.modules if name.partition(".")[0] == "pack"]:
        del sys.modules[module]


def import_pack(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=[str(path.parent)])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Any]:
    """Writes a module of the host's and imports it."""

    def write_and_import(name: str, text: str) -> Any:
        path = tmp_path / f"{name}.py"
        path.write_text(textwrap.dedent(text))
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return write_and_import


def check_each_slot_has_its_own(pack: Any, in_slot: InSlot) -> None:
    """What `put` puts in a slot is what `get` gives there, and nowhere else."""
    in_slot(0, pack.put, 1)
    assert (in_slot(0, pack.get), in_slot(1, pack.get), in_slot(None, pack.get)) == (1, 0, 0)
    in_slot(1, pack.put, 2)
    assert (in_slot(0, pack.get), in_slot(1, pack.get), in_slot(None, pack.get)) == (1, 2, 0)
