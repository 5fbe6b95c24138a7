"""What is said, and what is refused, when a host fits in part."""

from __future__ import annotations

import importlib
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from comfy_parallel.config import Config
from comfy_parallel.errors import HostMismatch
from comfy_parallel.graphs import per_slot
from comfy_parallel.patching.unknown import Search
from comfy_parallel.slots.slot import Slot

install: Any = importlib.import_module("comfy_parallel.install")


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`configured(strict=True, …)` sets the configuration."""
    return lambda **options: monkeypatch.setattr(install, "_config", Config(enabled=True, **options))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


# Unknown globals.


def told_unknown(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings, once the search that nobody waits for has ended."""
    install._tell_unknown_globals()
    for thread in threading.enumerate():
        if thread.name == install._SEARCH_THREAD:
            thread.join(60)
    return warnings(caplog)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "nodes.py").write_text("SEEN = {}\ndef see(name):\n    SEEN[name] = 1\n")
    monkeypatch.setattr(install, "_search", Search(tmp_path))
    return tmp_path


UNKNOWN = "unknown global SEEN (nodes.py:3): the host changes it at run time; slots may race on it"


def test_unknown_globals_are_in_the_log_once(host: Path, configured: Any, caplog: pytest.LogCaptureFixture) -> None:
    configured()
    told_unknown(caplog)
    assert told_unknown(caplog) == [f"comfy_parallel: {UNKNOWN}"]


def test_unknown_globals_are_refused_when_strict(host: Path, configured: Any) -> None:
    configured(strict=True)
    with pytest.raises(HostMismatch) as refusal:
        install._tell_unknown_globals()
    assert str(refusal.value) == UNKNOWN


@pytest.mark.parametrize("strict", [False, True])
def test_a_search_that_fails_is_told_and_refused_when_strict(
    tmp_path: Path, configured: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, strict: bool
) -> None:
    (tmp_path / "nodes.py").write_text("def see(:")
    monkeypatch.setattr(install, "_search", Search(tmp_path))
    configured(strict=strict)
    reason = "unknown globals of the host were not looked for: .*nodes.py: cannot be read"
    if strict:
        with pytest.raises(HostMismatch, match=f"(?s){reason}"):
            install._tell_unknown_globals()
        return
    (said,) = told_unknown(caplog)
    assert "nodes.py: cannot be read" in said


@pytest.mark.parametrize("python", ["no python", None])
def test_a_python_that_cannot_be_started_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, python: str | None
) -> None:
    monkeypatch.setattr(sys, "executable", None if python is None else str(tmp_path / python))
    search = Search(tmp_path)
    with pytest.raises(HostMismatch, match="unknown globals of the host were not looked for: "):
        search.found()
    search.stop()


@pytest.mark.parametrize("is_awaited", [False, True])
def test_a_search_finds_the_same_whether_or_not_somebody_waits(host: Path, is_awaited: bool) -> None:
    assert Search(host, is_awaited=is_awaited).found() == [UNKNOWN]


# Features that do not fit.


@pytest.mark.parametrize(("feature", "variable"), [("weights", "WEIGHTS"), ("graphs", "GRAPHS")])
def test_a_feature_that_does_not_fit_is_named_with_reason_and_remedy(
    configured: Any, caplog: pytest.LogCaptureFixture, feature: str, variable: str
) -> None:
    configured()
    install._leave_out(feature, HostMismatch("the reason"))
    (said,) = warnings(caplog)
    assert said.startswith(f"comfy_parallel: {feature} does not fit this ComfyUI, so every ")
    assert f"COMFY_PARALLEL_{variable}=off" in said
    assert said.endswith("the reason")


def test_steps_are_eager_where_graphs_do_not_fit(configured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    configured()
    per_slot.switch(True)
    install._leave_out("weights", HostMismatch("the reason"))
    assert per_slot._off is None
    install._leave_out("graphs", HostMismatch("the reason"))
    off = per_slot.why_off(Slot(0, "cuda:0"))
    per_slot.switch(False)
    assert off == "they do not fit this ComfyUI: the reason"


def test_a_feature_that_was_asked_for_is_refused_when_strict(configured: Any, caplog: pytest.LogCaptureFixture) -> None:
    configured(strict=True)
    with pytest.raises(SystemExit) as end:
        install._leave_out("weights", HostMismatch("the reason"))
    assert end.value.code == 2
    assert "start with COMFY_PARALLEL_WEIGHTS=off to do without: the reason" in caplog.text
    install._leave_out("comfy.utils:single_patch", HostMismatch("what can be done without"))


@pytest.mark.parametrize(
    ("options", "off"),
    [
        ({}, set()),
        ({"weights": "off"}, {"weights"}),
        ({"graphs": False}, {"graphs"}),
        ({"weights": "off", "graphs": False}, {"weights", "graphs"}),
        ({"weights": "copy"}, set()),
    ],
)
def test_what_is_switched_off_needs_no_patch(
    configured: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], off: set[str]
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    configured(**options)
    assert install._switched_off() == off
    monkeypatch.setattr(sys, "platform", "win32")
    assert install._switched_off() == off | {"weights"}


# Misspelt variables.


def test_a_misspelt_variable_is_in_the_log_even_where_it_leaves_the_scheduler_off(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "_config", Config())
    assert install.install({"COMFY_MULTIGPU_SCHED": "1"}) is False
    (said,) = warnings(caplog)
    assert said.endswith("did you mean COMFY_MULTI_GPU_SCHED?")


# The allocator.


def test_a_host_that_cannot_be_patched_gets_its_allocator_back(monkeypatch: pytest.MonkeyPatch) -> None:
    put_back: list[bool] = []
    monkeypatch.setattr(install, "_put_back", [lambda: put_back.append(True)])
    monkeypatch.setattr("comfy_parallel.host.facts.directory", lambda: Path("host"))
    for _ in range(2):
        install._give_up(HostMismatch("a function that is not there"))
    assert put_back == [True]


# ComfyUI's page.


def test_the_page_loads_one_script_of_ours_and_none_while_we_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert install.web_directory() is None
    monkeypatch.setattr(install, "_patches", object())
    found = [path.name for path in Path(install.web_directory()).rglob("*") if path.is_file()]
    assert found == ["comfy_parallel.js"]
