"""Whatever a forward can reach by looking it up is noticed when somebody replaces it, and soon."""

from __future__ import annotations

import functools
import math
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from comfy_parallel.graphs.code_watch import CodeWatch
from comfy_parallel.graphs.surroundings import surroundings
from comfy_parallel.isolation.packs import writes
from comfy_parallel.slots import own_attributes, own_names
from comfy_parallel.slots.slot import entered
from tests.fakes import make_slots

LONGEST_S = 1e-3


def attention(q: Any, scale: float = 1.0, *, mask: Any = None) -> Any:
    return q * scale


def other(q: Any) -> Any:
    return -q


class Inner:
    def forward(self) -> int:
        return 1


@functools.lru_cache
def cached(q: Any) -> Any:
    return q


def wrapping(function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*args: Any) -> Any:
        return function(*args)

    return wrapper


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stands in for one of the host's that compute."""
    made = ModuleType("comfy.ldm.fake")
    inner = type("Linear", (Inner,), {"__module__": made.__name__})
    registry = type("Registry", (), {"__module__": made.__name__})()
    registry.backends = {"eager": {"scale": attention}}
    namespace = {
        "attention": attention,
        "LIMIT": 3,
        "EPSILON": 0.5,
        "Layer": type(
            "Layer", (), {"forward": lambda self: 1, "size": 2, "Linear": inner, "__module__": made.__name__}
        ),
        "cache": {},
        "TABLE": {"pytorch": attention, "split": other},
        "LIST": [attention],
        "registry": registry,
        "partly": functools.partial(attention, mask=1),
        "nn": torch.nn,
        "wrapped": wrapping(attention),
    }
    vars(made).update(namespace)
    monkeypatch.setitem(sys.modules, made.__name__, made)
    return made


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a function": lambda m: setattr(m, "attention", other),
    "a setting": lambda m: setattr(m, "LIMIT", 4),
    "a fraction": lambda m: setattr(m, "EPSILON", 0.25),
    "a name that is gone": lambda m: delattr(m, "attention"),
    "a module that is named": lambda m: setattr(m, "nn", ModuleType("nn")),
    "a method": lambda m: setattr(m.Layer, "forward", lambda self: 2),
    "a method that was inherited": lambda m: setattr(m.Layer.Linear, "forward", lambda self: 2),
    "a method of a class within a class": lambda m: setattr(m.Layer.Linear, "__call__", lambda self: 2),
    "a class within a class": lambda m: setattr(m.Layer, "Linear", Inner),
    "a setting of a class": lambda m: setattr(m.Layer, "size", 3),
    "an entry of a table": lambda m: m.TABLE.update(pytorch=other),
    "a new entry of a table": lambda m: m.TABLE.update(sage=other),
    "entries that change places": lambda m: m.TABLE.update(pytorch=other, split=attention),
    "an entry of a list": lambda m: m.LIST.__setitem__(0, other),
    "an entry of a registry": lambda m: m.registry.backends["eager"].update(scale=other),
    "what a partial adds": lambda m: m.partly.keywords.update(mask=2),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_replaced_in_the_host_is_noticed(module: Any, change: Callable[[Any], Any]) -> None:
    watch = CodeWatch()
    before = watch.version()
    assert watch.version() == before
    change(module)
    assert watch.version() == before + 1
    assert watch.version() == before + 1


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.cache.update(a=1),
        lambda m: setattr(m, "added", 1),
        lambda m: setattr(m.Layer, "seen", [1]),
        lambda m: setattr(m.Layer, "example", torch.ones(3)),
    ],
)
def test_what_is_no_code_may_change(module: Any, change: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    module.Layer.seen, module.Layer.example = [], torch.zeros(3)
    watch = CodeWatch()
    before = watch.version()
    change(module)
    monkeypatch.setitem(sys.modules, "comfy.ldm.other", ModuleType("comfy.ldm.other"))
    assert watch.version() == before
    module.attention = other
    assert watch.version() == before + 1


PLACES: list[tuple[Any, str]] = [
    (torch.nn.Linear, "forward"),
    (torch.nn.GroupNorm, "forward"),
    (torch.nn.modules.conv._ConvNd, "_conv_forward"),
    (torch.nn.Conv2d, "__call__"),  # inherited
    (torch.nn.Module, "__call__"),
    (torch.nn.Module, "_call_impl"),
    (torch.nn.Module, "__getattr__"),
    (torch.nn.functional, "group_norm"),
    (torch.nn.functional, "scaled_dot_product_attention"),
    (torch, "bmm"),
    (torch.Tensor, "__add__"),
    (torch.Tensor, "view"),  # inherited from C
    (torch.nn.attention, "sdpa_kernel"),
    (torch.fft, "fftn"),
    (torch.functional, "einsum"),
    (math, "sqrt"),
]


@pytest.mark.parametrize(("owner", "name"), PLACES, ids=str)
def test_what_is_replaced_in_a_library_is_noticed(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = CodeWatch()
    before = watch.version()
    with monkeypatch.context() as changed:
        changed.setattr(owner, name, functools.partial(getattr(owner, name)))
        assert watch.version() == before + 1
    assert watch.version() == before + 2


@pytest.mark.parametrize(
    "package", ["comfy_kitchen", "einops.layers", "xformers.ops", "flash_attn", "sageattention.core"]
)
def test_other_libraries_that_compute_are_watched(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library = ModuleType(package)
    library.rearrange = attention  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, package, library)
    watch = CodeWatch()
    before = watch.version()
    library.rearrange = other  # type: ignore[attr-defined]
    assert watch.version() == before + 1


INSIDE: dict[str, Callable[[], Any]] = {
    "defaults": lambda: setattr(attention, "__defaults__", (2.0,)),
    "defaults by name": lambda: setattr(attention, "__kwdefaults__", {"mask": 1}),
    "a default by name": lambda: attention.__kwdefaults__.update(mask=3),
    "code": lambda: setattr(attention, "__code__", (lambda q, scale=1.0, *, mask=None: q).__code__),
}


@pytest.mark.parametrize("change", INSIDE.values(), ids=INSIDE)
@pytest.mark.parametrize("is_wrapped", [False, True])
def test_what_a_function_that_has_run_is_made_of_is_watched(
    module: Any, change: Callable[[], Any], is_wrapped: bool
) -> None:
    if is_wrapped:
        for name in ("attention", "TABLE", "LIST", "registry", "partly"):
            delattr(module, name)
    watch = CodeWatch()
    before = watch.version()
    watch.include([], [attention.__code__])
    assert watch.version() == before
    parts = attention.__code__, attention.__defaults__, dict(attention.__kwdefaults__)
    try:
        change()
        assert watch.version() == before + 1
    finally:
        attention.__code__, attention.__defaults__, attention.__kwdefaults__ = parts


def test_a_look_takes_well_under_a_millisecond(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many modules, names and classes as a host has."""
    for number in range(430):
        made = ModuleType(f"comfy.many.m{number}")
        for index in range(20):
            setattr(made, f"f{index}", functools.partial(attention))
        for index in range(4):
            members = {f"m{i}": attention for i in range(6)}
            setattr(made, f"C{index}", type("C", (), {**members, "__module__": made.__name__}))
        monkeypatch.setitem(sys.modules, made.__name__, made)
    watch = CodeWatch()
    watch.version()
    taken = []
    for _ in range(200):
        started = time.thread_time()
        watch.version()
        taken.append(time.thread_time() - started)
    assert min(taken) < LONGEST_S


def test_what_a_slot_has_its_own_of_changes_nothing_for_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Its own value does not stand in the module or class, which only learn to ask for it."""
    path = tmp_path / "fake.py"
    path.write_text(
        "def scale(q):\n    return q\n\ndef forward(q):\n    return scale(q)\n\nclass Layer:\n    size = 1\n"
    )
    made = ModuleType("comfy.ldm.own")
    made.__file__ = str(path)
    exec(compile(path.read_text(), str(path), "exec"), vars(made))
    monkeypatch.setitem(sys.modules, made.__name__, made)
    layer, forward = vars(made)["Layer"], vars(made)["forward"]
    watch = CodeWatch()
    before = watch.version()
    watch.include([layer], [forward.__code__])
    first, second = make_slots("cpu", "cpu")
    try:
        with entered(first):
            state = surroundings()
            writes.owner(made).scale = other
            writes.owner(layer).forward = other
            assert (forward(2), layer.forward(2)) == (-2, -2)
            assert surroundings() != state
        with entered(second):
            assert forward(2) == 2
            assert surroundings()[1:] == state[1:]
        assert watch.version() == before
        forward.__code__ = other.__code__
        assert watch.version() != before
    finally:
        own_names.revert()
        own_attributes.revert()
