"""What a job writes to the host is its slot's own, and ends with the job."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

from comfy_parallel.slots import own_names, switches
from comfy_parallel.slots.slot import Slot, entered

Load = Callable[..., Any]
InSlot = Callable[..., Any]

HOST = """
    LIMIT = 1
    class Base:
        def run(self):
            return 'base'
    class Model(Base):
        size = 1
        @staticmethod
        def made():
            return 'made'
        @classmethod
        def name(cls):
            return cls.__name__
        @property
        def kind(self):
            return 'kind'
        def forward(self):
            return 'forward'
        def limit(self):
            return LIMIT
    def noise():
        return 'noise'
    def sample():
        return noise()
    def several():
        return [noise() for _ in (1,)] + [(lambda: noise())()]
    def limit():
        return LIMIT
    def deferred():
        def inner():
            return noise()
        return inner
    inner = deferred()
    def make():
        return Model()
"""


@pytest.fixture
def samplers(host: Callable[[str, str], Any]) -> Any:
    return host("samplers", HOST)


def swapping(target: str, value: str) -> str:
    """A pack that swaps something of the host's for a job and puts it back."""
    return f"""
        import samplers
        saved = []
        def swap():
            saved.append({target})
            {target} = {value}
        def put_back():
            {target} = saved.pop()
    """


KINDS: dict[str, tuple[str, str, Callable[[Any], Any], Any, Any]] = {
    "function": ("samplers.noise", "lambda: 'mine'", lambda s: s.sample(), "noise", "mine"),
    "function, as an attribute": ("samplers.noise", "lambda: 'mine'", lambda s: s.noise(), "noise", "mine"),
    "function, in inner ones": ("samplers.noise", "lambda: 'm'", lambda s: s.several(), ["noise"] * 2, ["m"] * 2),
    "function, in one made before": ("samplers.noise", "lambda: 'mine'", lambda s: s.inner(), "noise", "mine"),
    "number": ("samplers.LIMIT", "7", lambda s: (s.limit(), s.LIMIT, s.Model().limit()), (1, 1, 1), (7, 7, 7)),
    "class": ("samplers.Model", "type('Mine', (), {})", lambda s: type(s.make()).__name__, "Model", "Mine"),
    "method": ("samplers.Model.forward", "lambda self: 'mine'", lambda s: s.Model().forward(), "forward", "mine"),
    "inherited method": ("samplers.Model.run", "lambda self: 'mine'", lambda s: s.Model().run(), "base", "mine"),
    "static method": ("samplers.Model.made", "staticmethod(lambda: 'm')", lambda s: s.Model.made(), "made", "m"),
    "class method": ("samplers.Model.name", "classmethod(lambda cls: 'm')", lambda s: s.Model.name(), "Model", "m"),
    "property": ("samplers.Model.kind", "property(lambda self: 'm')", lambda s: s.Model().kind, "kind", "m"),
    "class attribute": ("samplers.Model.size", "2", lambda s: (s.Model.size, s.Model().size), (1, 1), (2, 2)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_slots_go_on_seeing_what_they_had(load: Load, in_slot: InSlot, samplers: Any, kind: str) -> None:
    target, value, look, stock, swapped = KINDS[kind]
    pack = load(swapping(target, value))
    in_slot(0, pack.swap)
    assert [in_slot(slot, look, samplers) for slot in (0, 1, None)] == [swapped, stock, stock]
    in_slot(1, pack.swap)
    in_slot(0, pack.put_back)
    assert [in_slot(slot, look, samplers) for slot in (0, 1, None)] == [stock, swapped, stock]
    in_slot(1, pack.put_back)
    assert [in_slot(slot, look, samplers) for slot in (0, 1, None)] == [stock, stock, stock]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_put_back_ends_with_the_job(load: Load, in_slot: InSlot, samplers: Any, kind: str) -> None:
    target, value, look, stock, swapped = KINDS[kind]
    pack = load(swapping(target, value))
    in_slot(0, own_names.begin_job, {"1": {"class_type": "Swap"}})
    in_slot(0, pack.swap)
    assert in_slot(0, look, samplers) == swapped
    in_slot(0, own_names.begin_job, {"2": {"class_type": "Other"}})
    assert in_slot(0, look, samplers) == stock


def test_it_stays_for_jobs_that_get_the_nodes_result_from_the_cache(
    load: Load, in_slot: InSlot, samplers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_names, "_executing_node", [lambda: "4.0.1"])
    pack = load(swapping("samplers.noise", "lambda: 'mine'"))
    prompt = {"4": {"class_type": "Swap", "inputs": {"a": 1}}, "5": {"class_type": "Save"}}
    in_slot(0, own_names.begin_job, prompt)
    in_slot(0, pack.swap)
    in_slot(0, own_names.begin_job, {**prompt, "5": {"class_type": "Preview"}})
    assert in_slot(0, samplers.sample) == "mine"
    in_slot(0, own_names.begin_job, {"4": {"class_type": "Swap", "inputs": {"a": 2}}})
    assert in_slot(0, samplers.sample) == "noise"


def test_wrappers_of_two_packs_nest(load: Load, in_slot: InSlot, samplers: Any) -> None:
    text = """
        import samplers
        def wrap():
            original = samplers.noise
            samplers.noise = lambda: 'WORD(' + original() + ')'
            return original
        def put_back(original):
            samplers.noise = original
    """
    first, second = (load(text.replace("WORD", word), name=f"pack.{word}") for word in ("a", "b"))
    below = in_slot(0, first.wrap)
    other = in_slot(1, second.wrap)
    middle = in_slot(0, second.wrap)
    assert [in_slot(slot, samplers.sample) for slot in (0, 1)] == ["b(a(noise))", "b(noise)"]
    in_slot(0, second.put_back, middle)
    in_slot(1, second.put_back, other)
    assert [in_slot(slot, samplers.sample) for slot in (0, 1)] == ["a(noise)", "noise"]
    in_slot(0, first.put_back, below)
    assert in_slot(0, samplers.sample) == "noise"
    assert below is other is vars(samplers)["noise"]


def test_who_holds_the_function_itself_sees_no_write(load: Load, in_slot: InSlot, samplers: Any) -> None:
    pack = load("import samplers\nfrom samplers import noise\ndef swap():\n    samplers.noise = lambda: 'mine'")
    held = samplers.noise
    in_slot(0, pack.swap)
    assert (in_slot(0, held), in_slot(0, lambda: pack.noise())) == ("noise", "noise")


@pytest.mark.parametrize(
    "write",
    [
        "setattr(samplers, 'noise', mine)",
        "vars(samplers)['noise'] = mine",
        "samplers.__dict__['noise'] = mine",
        "vars(samplers).update(noise=mine)",
        "for samplers.noise in [mine]: pass",
        "samplers.noise, other = mine, 1",
        "target = samplers; target.noise = mine",
        "sys.modules['samplers'].noise = mine",
    ],
)
def test_every_way_to_write(load: Load, in_slot: InSlot, samplers: Any, write: str) -> None:
    pack = load(f"import sys, samplers\ndef mine(): return 'mine'\ndef swap():\n    {write}")
    in_slot(0, pack.swap)
    assert [in_slot(slot, samplers.sample) for slot in (0, 1, None)] == ["mine", "noise", "noise"]


def test_a_name_that_the_host_does_not_have(load: Load, in_slot: InSlot, samplers: Any) -> None:
    pack = load("import samplers\ndef swap():\n    samplers.extra = 1\ndef drop():\n    del samplers.extra")
    in_slot(0, pack.swap)
    assert [in_slot(slot, hasattr, samplers, "extra") for slot in (0, 1, None)] == [True, False, False]
    with pytest.raises(AttributeError, match="extra"):
        in_slot(1, pack.drop)
    in_slot(0, pack.drop)
    assert in_slot(0, hasattr, samplers, "extra") is False


def test_a_deleted_name(load: Load, in_slot: InSlot, samplers: Any) -> None:
    pack = load("import samplers\ndef drop():\n    del samplers.noise\n    del samplers.Model.forward")
    in_slot(0, pack.drop)
    assert [in_slot(slot, hasattr, samplers, "noise") for slot in (0, 1)] == [False, True]
    assert [in_slot(slot, hasattr, samplers.Model, "forward") for slot in (0, 1)] == [False, True]
    with pytest.raises(NameError, match="noise"):
        in_slot(0, samplers.sample)


def test_adding_to_a_number(load: Load, in_slot: InSlot, samplers: Any) -> None:
    pack = load("import samplers\ndef more():\n    samplers.LIMIT += 1\n    samplers.Model.size += 1")
    for slot in (0, 0, 1):
        in_slot(slot, pack.more)
    assert [in_slot(slot, samplers.limit) for slot in (0, 1, None)] == [3, 2, 1]
    assert [in_slot(slot, lambda: samplers.Model.size) for slot in (0, 1, None)] == [3, 2, 1]


def test_what_is_written_at_import_is_everybodys(load: Load, in_slot: InSlot, samplers: Any) -> None:
    load("import samplers\ndef patch():\n    samplers.noise = lambda: 'patched'\npatch()")
    assert [in_slot(slot, samplers.sample) for slot in (0, 1, None)] == ["patched"] * 3


def test_settings(load: Load, in_slot: InSlot, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("comfy.cli_args")
    args = vars(module)["args"] = argparse.Namespace(fast=set(), preview="none")
    monkeypatch.setitem(sys.modules, "comfy.cli_args", module)
    monkeypatch.setitem(sys.modules, "comfy", ModuleType("comfy"))
    pack = load("from comfy.cli_args import args\ndef flip():\n    args.fast = {'x'}\n    args.preview = 'auto'")
    in_slot(0, pack.flip)
    assert [in_slot(slot, lambda: (args.fast, args.preview)) for slot in (0, 1)] == [({"x"}, "auto"), (set(), "none")]
    in_slot(0, own_names.begin_job, {})
    assert in_slot(0, lambda: args.preview) == "none"


def test_a_switch_that_a_pack_flips_around_a_forward_is_the_slots_own(
    load: Load, in_slot: InSlot, make_module: Any
) -> None:
    """As packs do with the newest hosts' compiler; the host reads the switch for each forward."""
    args = argparse.Namespace(disable_comfy_compiler=False)
    make_module("comfy", "", cli_args=make_module("comfy.cli_args", "", args=args))
    host = make_module(
        "comfy.model_prefetch",
        "from comfy.cli_args import args\ndef compiles():\n    return not args.disable_comfy_compiler",
    )
    pack = load(
        """
        import comfy.cli_args
        def forward(core):
            previous = comfy.cli_args.args.disable_comfy_compiler
            comfy.cli_args.args.disable_comfy_compiler = True
            try:
                return core()
            finally:
                comfy.cli_args.args.disable_comfy_compiler = previous
        """
    )

    def others_meanwhile() -> list[bool]:
        return [host.compiles(), in_slot(1, host.compiles), in_slot(None, host.compiles)]

    assert in_slot(0, pack.forward, others_meanwhile) == [False, True, True]
    assert [in_slot(slot, host.compiles) for slot in (0, 1, None)] == [True, True, True]


def test_what_a_job_makes_itself_is_written_to_as_ever(load: Load, in_slot: InSlot) -> None:
    pack = load(
        """
        class Thing:
            pass
        def make():
            class Own:
                size = 1
            Own.size = 2
            thing = Thing()
            thing.size = 3
            thing.__dict__['name'] = 4
            return Own, thing
        """
    )
    made, thing = in_slot(0, pack.make)
    assert (vars(made)["size"], vars(thing)) == (2, {"size": 3, "name": 4})


def test_a_module_without_source_is_written_for_all_and_said(
    load: Load, in_slot: InSlot, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = ModuleType("made_up")
    exec("def value(): return LIMIT\nLIMIT = 1", vars(module))
    monkeypatch.setitem(sys.modules, "made_up", module)
    pack = load("import made_up\ndef swap():\n    made_up.LIMIT = 2")
    in_slot(0, pack.swap)
    assert [in_slot(slot, module.value) for slot in (0, 1)] == [2, 2]
    assert "made_up.LIMIT" in caplog.text


def test_the_state_is_equal_again_after_it_was_put_back(load: Load, in_slot: InSlot, samplers: Any) -> None:
    pack = load(swapping("samplers.noise", "lambda: 'mine'"))
    before = in_slot(0, own_names.state)
    in_slot(0, pack.swap)
    swapped = in_slot(0, own_names.state)
    assert swapped != before
    assert in_slot(1, own_names.state) == before
    in_slot(0, pack.put_back)
    assert in_slot(0, own_names.state) == before
    in_slot(0, pack.swap)
    assert in_slot(0, own_names.state) not in (before, swapped)


def test_reverting_leaves_the_host_as_it_was(load: Load, in_slot: InSlot, samplers: Any) -> None:
    from comfy_parallel.slots import own_attributes

    in_slot(0, samplers.sample)
    before, model = dict(vars(samplers)), dict(vars(samplers.Model))
    pack = load(
        "import samplers\ndef swap():\n    samplers.noise = 1\n    samplers.Model.forward = samplers.Model.x = 2"
    )
    in_slot(0, pack.swap)
    own_names.revert()
    own_attributes.revert()
    assert type(samplers) is ModuleType
    assert {name: vars(samplers)[name] for name in before} == before
    assert dict(vars(samplers.Model)) == model
    assert (samplers.sample(), in_slot(1, samplers.sample)) == ("noise", "noise")


@pytest.fixture
def switch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A setting as torch keeps some: outside Python, behind a property of the module's class."""
    kept = [False]

    class Switches(ModuleType):
        fast = property(lambda self: kept[0], lambda self, value: kept.__setitem__(0, value))

    module = Switches("torch.switches")
    monkeypatch.setitem(sys.modules, "torch.switches", module)
    return module


def test_a_switch_that_a_job_leaves_is_put_back(load: Load, slots: tuple[Slot, ...], switch: Any) -> None:
    pack = load("import sys\nthese = sys.modules['torch.switches']\ndef flip():\n    these.fast = True")
    with entered(slots[0]):
        pack.flip()
        assert switch.fast is True
        switches.end_job()
        assert switch.fast is False
