"""Slots that share a GPU do without dynamic VRAM, which the user may not ask for then."""

from __future__ import annotations

import argparse
import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest

from comfy_parallel.config import Config
from comfy_parallel.errors import ConfigError
from comfy_parallel.host import dynamic_vram


def host(monkeypatch: pytest.MonkeyPatch, *line: str, has_it: bool = True) -> argparse.Namespace:
    """The command line of a host that uses it by default, or of one that does not have it."""
    parser = argparse.ArgumentParser()
    for option in ("--enable-dynamic-vram", "--disable-dynamic-vram", "--cpu"):
        parser.add_argument(option, action="store_true")
    args = parser.parse_args(line)

    def enables_dynamic_vram() -> bool:
        return args.enable_dynamic_vram or not (args.disable_dynamic_vram or args.cpu)

    cli_args = SimpleNamespace(args=args, **({"enables_dynamic_vram": enables_dynamic_vram} if has_it else {}))
    comfy = ModuleType("comfy")
    comfy.cli_args = cli_args  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "comfy", comfy)
    monkeypatch.setitem(sys.modules, "comfy.cli_args", cli_args)
    return args


def test_it_is_turned_off_and_said_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    args = host(monkeypatch)
    with caplog.at_level(logging.INFO):
        put_back = dynamic_vram.turn_off()
    assert args.disable_dynamic_vram
    (told,) = caplog.records
    assert "dynamic VRAM is off, because slots share a GPU" in told.getMessage()
    put_back()
    assert not args.disable_dynamic_vram


@pytest.mark.parametrize("line", [["--disable-dynamic-vram"], ["--cpu"]])
def test_where_the_host_does_without_nothing_is_changed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, line: list[str]
) -> None:
    args = host(monkeypatch, *line)
    before = vars(args).copy()
    with caplog.at_level(logging.INFO):
        dynamic_vram.turn_off()()
    assert (vars(args), caplog.records) == (before, [])


def test_a_host_that_does_not_know_it_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    args = host(monkeypatch, has_it=False)
    dynamic_vram.turn_off()()
    assert not args.disable_dynamic_vram


def test_who_asks_for_it_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    args = host(monkeypatch, "--enable-dynamic-vram")
    with pytest.raises(ConfigError, match="leave out --enable-dynamic-vram.*or have one slot per GPU"):
        dynamic_vram.turn_off()
    assert not args.disable_dynamic_vram


@pytest.mark.parametrize(("is_on", "has_module"), [(True, True), (False, True), (False, False)])
def test_a_host_that_uses_it_all_the_same_does_not_start(
    monkeypatch: pytest.MonkeyPatch, is_on: bool, has_module: bool
) -> None:
    monkeypatch.delitem(sys.modules, "comfy.memory_management", raising=False)
    if has_module:
        monkeypatch.setitem(sys.modules, "comfy.memory_management", SimpleNamespace(aimdo_enabled=is_on))
    if not is_on:
        dynamic_vram.check_off()
        return
    with pytest.raises(ConfigError, match="--disable-dynamic-vram"):
        dynamic_vram.check_off()


@pytest.mark.parametrize(
    ("config", "shares"),
    [
        (Config(), False),
        (Config(slots_per_gpu=2), True),
        (Config(devices=("cuda:0", "cuda:1")), False),
        (Config(devices=("cuda:0", "cuda:0")), True),
        (Config(devices=("cpu", "cpu")), False),
    ],
)
def test_which_configurations_share_a_gpu(config: Config, shares: bool) -> None:
    assert config.shares_gpus == shares


PLACE = (SimpleNamespace(fault=lambda address, size: None, unpin=lambda address, size: None), 0, 0)


def aimdo(monkeypatch: pytest.MonkeyPatch, **functions: object) -> None:
    package = ModuleType("comfy_aimdo")
    package.model_vbar = SimpleNamespace(**functions)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "comfy_aimdo", package)
    monkeypatch.setitem(sys.modules, "comfy_aimdo.model_vbar", package.model_vbar)


def test_single_modules_can_do_without_pages_where_the_host_asks_their_own_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def vbar_fault(place: tuple[SimpleNamespace, int, int]) -> object:
        return place[0].fault(place[1], place[2])

    def vbar_unpin(place: tuple[SimpleNamespace, int, int]) -> None:
        place[0].unpin(place[1], place[2])

    known = {"vbar_fault": vbar_fault, "vbar_unpin": vbar_unpin, "vbar_signature_compare": lambda one, two: False}
    aimdo(monkeypatch, **known)
    assert dynamic_vram.can_do_without_pages(object(), PLACE)
    in_units = SimpleNamespace(get_dynamic_vram__units=lambda: ([], []))
    assert not dynamic_vram.can_do_without_pages(in_units, PLACE)
    for name in known:
        aimdo(monkeypatch, **{key: value for key, value in known.items() if key != name})
        assert not dynamic_vram.can_do_without_pages(object(), PLACE), name
    monkeypatch.setitem(sys.modules, "comfy_aimdo", None)
    assert not dynamic_vram.can_do_without_pages(object(), PLACE)
