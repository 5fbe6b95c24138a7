"""What jobs write to objects of a library lets them run alone, once it is known that these are objects."""

from __future__ import annotations

import argparse
import sys
from types import ModuleType, SimpleNamespace

import pytest

from comfy_parallel.isolation.packs.finding import ALONE, CLASS_STATE, HOST_WRITE, PER_SLOT, SHARED, Finding
from comfy_parallel.isolation.packs.host_objects import with_objects


def treatment(name: str, kind: str = HOST_WRITE, classes: frozenset[str] = frozenset({"Node"})) -> str:
    (found,) = with_objects([Finding(kind, name, "__init__.py", 1, PER_SLOT, "ends with the job", classes)])
    return found.treatment


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    module, settings = ModuleType("library.part"), ModuleType("comfy.cli_args")
    vars(module).update(options=SimpleNamespace(), function=lambda: None, Model=type("Model", (), {}))
    vars(settings)["args"] = argparse.Namespace()
    monkeypatch.setitem(sys.modules, "library.part", module)
    monkeypatch.setitem(sys.modules, "comfy.cli_args", settings)


@pytest.mark.parametrize("name", ["library.part.options.size", "library.part.function.size"])
def test_an_attribute_of_an_object_lets_jobs_run_alone(name: str) -> None:
    assert treatment(name) == ALONE
    assert treatment(name, classes=frozenset()) == SHARED
    assert treatment(name, kind=CLASS_STATE) == PER_SLOT


@pytest.mark.parametrize(
    "name",
    ["library.part.size", "library.part.Model.size", "comfy.cli_args.args.fast", "nowhere.at.all", "library.x.y"],
)
def test_names_of_modules_classes_and_settings_are_per_slot(name: str) -> None:
    assert treatment(name) == PER_SLOT
