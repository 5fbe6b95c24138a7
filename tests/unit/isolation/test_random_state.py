"""Each slot draws from generators of its own, and each draws what it would draw alone."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import numpy
import pytest
import torch

from comfy_parallel.isolation import random_state
from comfy_parallel.isolation.slot_globals import add_properties
from comfy_parallel.slots.slot import Slot, entered
from tests.fakes import make_slots

CPU = torch.device("cpu")
ONES = torch.ones(5)

randn = random_state.factory(torch.randn)
randint = random_state.factory(torch.randint)
bernoulli = random_state.from_tensors(torch.bernoulli)
normal = random_state.from_tensors(torch.normal)
normal_ = random_state.from_tensors(torch.Tensor.normal_)


@pytest.fixture
def slots() -> tuple[Slot, ...]:
    return make_slots("cpu", "cpu")


@pytest.fixture
def default(monkeypatch: pytest.MonkeyPatch) -> random_state.DefaultGenerator:
    """torch's module-level functions over the slots' generators."""
    generator = random_state.DefaultGenerator(torch.default_generator)
    monkeypatch.setattr(torch.random, "default_generator", generator)
    return generator


@pytest.fixture(autouse=True)
def process_generators_are_left_alone() -> Any:
    before = torch.default_generator.get_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    yield
    assert torch.equal(torch.default_generator.get_state(), before[0])
    assert random.getstate() == before[1]
    assert numpy.random.get_state()[1].tolist() == before[2]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


DRAWS: dict[str, tuple[Callable[[], Any], Callable[[torch.Generator], Any]]] = {
    "randn": (lambda: randn(4), lambda g: torch.randn(4, generator=g)),
    "randn of a type": (
        lambda: randn((2, 3), dtype=torch.float64),
        lambda g: torch.randn((2, 3), dtype=torch.float64, generator=g),
    ),
    "randn on a device": (lambda: randn(4, device="cpu"), lambda g: torch.randn(4, generator=g)),
    "randn into a tensor": (lambda: randn(4, out=torch.empty(4)), lambda g: torch.randn(4, generator=g)),
    "randint": (lambda: randint(9, (4,)), lambda g: torch.randint(9, (4,), generator=g)),
    "bernoulli": (lambda: bernoulli(ONES / 2), lambda g: torch.bernoulli(ONES / 2, generator=g)),
    "normal of tensors": (lambda: normal(ONES, 2.0), lambda g: torch.normal(ONES, 2.0, generator=g)),
    "normal of numbers": (
        lambda: normal(0.0, 1.0, size=(4,)),
        lambda g: torch.normal(0.0, 1.0, size=(4,), generator=g),
    ),
    "in place": (lambda: normal_(torch.empty(4), 1.0, 2.0), lambda g: torch.empty(4).normal_(1.0, 2.0, generator=g)),
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_slot_draws_what_the_default_generator_would(
    slots: tuple[Slot, ...], default: random_state.DefaultGenerator, name: str
) -> None:
    in_slot, alone = DRAWS[name]
    generator = seeded(3)
    with entered(slots[0]):
        torch.manual_seed(3)
        for _ in range(3):
            assert torch.equal(in_slot(), alone(generator))


def test_slots_that_draw_in_turns_do_not_disturb_each_other(
    slots: tuple[Slot, ...], default: random_state.DefaultGenerator
) -> None:
    generators = [seeded(5), seeded(6)]
    for index, slot in enumerate(slots):
        with entered(slot):
            torch.manual_seed(5 + index)
    for _ in range(5):
        for slot, generator in zip(slots, generators, strict=True):
            with entered(slot):
                assert torch.equal(randn(2), torch.randn(2, generator=generator))


def test_unseeded_slots_draw_different_numbers(slots: tuple[Slot, ...]) -> None:
    drawn = []
    for slot in slots:
        with entered(slot):
            drawn.append(randn(4))
    assert not torch.equal(*drawn)


def test_a_generator_that_is_given_is_used(slots: tuple[Slot, ...]) -> None:
    with entered(slots[0]):
        before = random_state.slot_generator(CPU).get_state()
        assert torch.equal(randn(4, generator=seeded(8)), torch.randn(4, generator=seeded(8)))
        assert torch.equal(random_state.slot_generator(CPU).get_state(), before)


@contextmanager
def default_generator_restored() -> Any:
    state = torch.default_generator.get_state()
    yield
    torch.default_generator.set_state(state)


def test_outside_slots_the_default_generator_is_used(default: random_state.DefaultGenerator) -> None:
    with default_generator_restored():
        torch.manual_seed(4)
        assert torch.initial_seed() == 4
        assert torch.equal(randn(4), torch.randn(4, generator=seeded(4)))
        torch.manual_seed(4)
        like = random_state.like(lambda tensor: tensor.zero_())(torch.randn_like)
        assert torch.equal(like(ONES), torch.randn(5, generator=seeded(4)))


def test_the_functions_on_the_default_generator(
    slots: tuple[Slot, ...], default: random_state.DefaultGenerator
) -> None:
    with entered(slots[0]):
        torch.manual_seed(9)
        state = torch.get_rng_state()
        first = randn(4)
        torch.set_rng_state(state)
        assert torch.equal(randn(4), first)
        assert torch.initial_seed() == 9
        assert isinstance(torch.manual_seed(10), torch.Generator)
        assert torch.seed() != 10


def test_forking_restores_the_slots_state(slots: tuple[Slot, ...], default: random_state.DefaultGenerator) -> None:
    fork_rng = random_state.fork_own_device(torch.random.fork_rng)
    with entered(slots[0]):
        torch.manual_seed(2)
        with fork_rng():
            torch.manual_seed(7)
            assert torch.equal(randn(2), torch.randn(2, generator=seeded(7)))
        assert torch.equal(randn(2), torch.randn(2, generator=seeded(2)))


# What has no generator to draw with.


def test_meta_tensors_draw_from_nothing(slots: tuple[Slot, ...]) -> None:
    with entered(slots[0]):
        assert randn(4, device="meta").device.type == "meta"
        assert not slots[0].values


@pytest.mark.parametrize("name", ["randn", "rand", "randperm"])
def test_a_device_context_applies_to_wrapped_factories(
    slots: tuple[Slot, ...], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(torch, name, random_state.factory(getattr(torch, name)))
    for slot in (None, slots[0]):
        with entered(slot), torch.device("meta"):
            assert getattr(torch, name)(3).device.type == "meta"


def test_the_default_device_applies_to_wrapped_factories(
    slots: tuple[Slot, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "randn", random_state.factory(torch.randn))
    torch.set_default_device("meta")
    try:
        with entered(slots[0]):
            assert torch.randn(3).device.type == "meta"
            assert torch.randn(3, device="cpu").device.type == "cpu"
    finally:
        torch.set_default_device(None)


# `*_like`.


LIKE: dict[str, tuple[Any, Any, tuple[Any, ...], dict[str, Any]]] = {
    "randn": (torch.randn_like, lambda t: t.normal_(), (), {}),
    "rand": (torch.rand_like, lambda t: t.uniform_(), (), {"dtype": torch.float64}),
    "randint": (torch.randint_like, None, (9,), {}),
    "randint between": (torch.randint_like, None, (3, 9), {}),
    "randint by name": (torch.randint_like, None, (), {"low": 3, "high": 9, "dtype": torch.int64}),
    "randint to, by name": (torch.randint_like, None, (), {"high": 9}),
}


@pytest.mark.parametrize("name", LIKE)
def test_like_draws_what_torch_draws(
    slots: tuple[Slot, ...], default: random_state.DefaultGenerator, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from comfy_parallel.patches.libraries import _fill_integers

    original, fill, args, kwargs = LIKE[name]
    with default_generator_restored():
        torch.manual_seed(6)
        expected = original(ONES, *args, **kwargs)
    for method in ("normal_", "uniform_", "random_"):
        monkeypatch.setattr(torch.Tensor, method, random_state.from_tensors(getattr(torch.Tensor, method)))
    like = random_state.like(fill or _fill_integers)(original)
    with entered(slots[0]):
        torch.manual_seed(6)
        found = like(ONES, *args, **kwargs)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def test_like_may_require_a_gradient(slots: tuple[Slot, ...]) -> None:
    like = random_state.like(lambda tensor: tensor.zero_())(torch.randn_like)
    with entered(slots[0]):
        assert like(ONES, requires_grad=True).requires_grad
        assert not like(ONES).requires_grad


# GPUs. torch has a generator per device; only slots that share one need their own.


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The generators that were made for GPUs: device and slot."""
    calls: list[tuple[str, int]] = []

    def make(device: Any, slot_index: int) -> Any:
        calls.append((str(device), slot_index))
        return seeded(slot_index)

    monkeypatch.setattr(random_state, "_new_generator", make)
    return calls


def test_a_slot_with_a_gpu_of_its_own_uses_torchs_generator(made: list[Any]) -> None:
    first, second = make_slots("cuda:0", "cuda:1")
    for slot in (first, second):
        with entered(slot):
            assert random_state.slot_generator(torch.device("cuda", slot.index)) is None
    assert made == []


def test_slots_that_share_a_gpu_have_a_generator_each(made: list[Any]) -> None:
    first, second, third = make_slots("cuda:0", "cuda:0", "cuda:1")
    generators = []
    for slot in (first, second, first):
        with entered(slot):
            generators.append(random_state.slot_generator(torch.device("cuda:0")))
    assert made == [("cuda:0", 0), ("cuda:0", 1)]
    assert generators[0] is generators[2] is not generators[1]
    with entered(third):
        assert random_state.slot_generator(torch.device("cuda:1")) is None


def test_a_slot_draws_from_its_own_generator_on_the_gpu_of_another(made: list[Any]) -> None:
    first, _ = make_slots("cuda:0", "cuda:1")
    with entered(first):
        assert random_state.slot_generator(torch.device("cuda:1")) is not None
    assert made == [("cuda:1", 0)]


@pytest.fixture
def gpus(made: list[Any], monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Generator, ...]:
    """The default generators of two GPUs, as torch's own functions see them; the second GPU is the current one."""
    undo = add_properties(torch.cuda, {"default_generators": random_state.default_generators("cuda")})
    before = vars(torch.cuda)["default_generators"]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda.random, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda.random, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda.random, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda.random, "_lazy_call", lambda call, **_: call())
    torch.cuda.default_generators = (seeded(100), seeded(101))  # as torch does when it first uses the devices
    yield vars(torch.cuda)["default_generators"]
    torch.cuda.default_generators = before
    undo.revert()


NAMES = [None, 1, "cuda", "cuda:1", torch.device("cuda"), torch.device("cuda", 1)]


@pytest.mark.parametrize("name", NAMES, ids=str)
def test_however_a_gpu_is_named_a_slot_has_one_generator_for_it(gpus: tuple[torch.Generator, ...], name: Any) -> None:
    first, second = make_slots("cuda:1", "cuda:1")
    seen = []
    for slot in (first, second):
        with entered(slot):
            own = random_state.slot_generator(torch.device("cuda:1"))
            assert own is random_state.slot_generator(torch.device("cuda"))
            torch.cuda.manual_seed(30 + slot.index)
            assert torch.cuda.default_generators[1] is own
            assert torch.cuda.initial_seed() == own.initial_seed() == 30 + slot.index
            where = () if name is None else (name,)
            state = torch.cuda.get_rng_state(*where)
            seen.append(torch.rand(3, generator=own))
            torch.cuda.set_rng_state(state, *where)
            assert torch.equal(torch.rand(3, generator=own), seen[-1])
    assert not torch.equal(*seen)
    assert [generator.initial_seed() for generator in gpus] == [100, 101]


SEEDING: dict[str, Callable[[], Any]] = {
    "manual_seed": lambda: torch.cuda.manual_seed(7),
    "manual_seed_all": lambda: torch.cuda.manual_seed_all(7),
    "seed": lambda: torch.cuda.seed(),
    "seed_all": lambda: torch.cuda.seed_all(),
    "set_rng_state": lambda: torch.cuda.set_rng_state(seeded(3).get_state()),
    "set_rng_state_all": lambda: torch.cuda.set_rng_state_all([seeded(index).get_state() for index in range(2)]),
    "a default generator": lambda: torch.cuda.default_generators[1].manual_seed(7),
    "each default generator": lambda: [generator.manual_seed(7) for generator in torch.cuda.default_generators],
    "fork_rng": lambda: forked(),
}


def forked() -> None:
    with random_state.fork_own_device(torch.random.fork_rng)():
        torch.cuda.manual_seed(7)


@pytest.mark.parametrize("call", SEEDING.values(), ids=SEEDING)
@pytest.mark.parametrize("devices", [("cuda:1", "cuda:1"), ("cuda:1", "cuda:0")])
def test_seeding_reaches_nobody_else(
    gpus: tuple[torch.Generator, ...], devices: tuple[str, ...], call: Callable[[], Any]
) -> None:
    first, second = make_slots(*devices)
    with entered(second):
        before = [generator.get_state() for generator in torch.cuda.default_generators]
    with entered(first):
        own = torch.cuda.default_generators[1]
        state = own.get_state()
        call()
        assert torch.equal(own.get_state(), state) == (call is SEEDING["fork_rng"])
    with entered(second):
        after = [generator.get_state() for generator in torch.cuda.default_generators]
    assert all(map(torch.equal, before, after))


def test_seeding_reaches_the_own_gpu_only(gpus: tuple[torch.Generator, ...]) -> None:
    first, second = make_slots("cuda:0", "cuda:1")
    with entered(second):
        torch.cuda.manual_seed_all(7)
    assert [generator.initial_seed() for generator in gpus] == [100, 7]
    torch.cuda.manual_seed_all(8)
    assert [generator.initial_seed() for generator in gpus] == [8, 8]


def test_outside_slots_the_default_generators_are_torchs(gpus: tuple[torch.Generator, ...]) -> None:
    assert torch.cuda.default_generators is gpus


def test_the_default_generators_of_a_slot_can_be_listed(gpus: tuple[torch.Generator, ...]) -> None:
    slot = make_slots("cuda:1")[0]
    with entered(slot):
        generators = torch.cuda.default_generators
        assert len(generators) == 2
        assert list(generators) == [generators[0], generators[-1]] == list(generators[:])
        assert generators[1] is gpus[1]
        assert generators[0] is not gpus[0]
        with pytest.raises(IndexError):
            generators[2]


def test_a_device_that_is_the_number_0_is_not_left_out(made: list[Any]) -> None:
    slot = make_slots("cuda:0", "cuda:0")[0]
    drawn_like = random_state.like(lambda tensor: tensor)(lambda *args, **kwargs: None)
    drawn = random_state.from_tensors(lambda *args, **kwargs: None)
    with entered(slot):
        drawn(0.0, 1.0, size=(4,), device=0)
        assert made == [("cuda:0", 0)]
        made.clear()
        slot.values.clear()
        with pytest.raises((RuntimeError, AssertionError)):  # no GPU here to make the tensor on
            drawn_like(ONES, device=0)
        assert made == [("cuda:0", 0)]


@pytest.mark.parametrize(
    ("devices", "call", "expected"),
    [
        (("cuda:0", "cuda:1"), {}, [1]),
        (("cuda:0", "cuda:1"), {"devices": None}, [1]),
        (("cuda:0", "cuda:1"), {"devices": [0]}, [0]),
        (("cpu", "cpu"), {}, []),
    ],
)
def test_forking_covers_the_own_device_only(devices: tuple[str, ...], call: dict[str, Any], expected: Any) -> None:
    forked: list[Any] = []
    fork_rng = random_state.fork_own_device(lambda devices=None, enabled=True: forked.append(devices))
    with entered(make_slots(*devices)[1]):
        fork_rng(**call)
    assert forked == [expected]


def test_outside_slots_forking_covers_all_devices() -> None:
    forked: list[Any] = []
    random_state.fork_own_device(lambda devices=None: forked.append(devices))()
    assert forked == [None]


# Python's `random` and numpy's legacy functions.


def python_module() -> tuple[Any, dict[str, Callable[..., Any]], Any]:
    return random, random_state.python_functions(random), random.Random


def numpy_module() -> tuple[Any, dict[str, Callable[..., Any]], Any]:
    return numpy.random, random_state.numpy_functions(numpy.random), numpy.random.RandomState


@pytest.mark.parametrize("get", [python_module, numpy_module])
def test_slots_that_seed_and_draw_in_turns_draw_what_each_draws_alone(slots: tuple[Slot, ...], get: Any) -> None:
    _, functions, state = get()
    alone = [state(11), state(12)]
    for index, slot in enumerate(slots):
        with entered(slot):
            functions["seed"](11 + index)
    for _ in range(20):
        for slot, expected in zip(slots, alone, strict=True):
            with entered(slot):
                assert functions["uniform"](0, 1) == expected.uniform(0, 1)


def test_every_function_of_random_is_covered() -> None:
    drawing = {
        name
        for name in random.__all__
        if not inspect.isclass(getattr(random, name)) and inspect.ismethod(getattr(random, name))
    }
    drawing |= {name for name in random.__all__ if inspect.isbuiltin(getattr(random, name))}
    assert set(random_state.python_functions(random)) == drawing
    assert {"seed", "random", "shuffle", "getrandbits", "getstate", "setstate", "choice"} <= drawing


def test_every_legacy_function_of_numpy_is_covered() -> None:
    exported = {name for name in dir(numpy.random.RandomState) if not name.startswith("_")}
    legacy = {name for name in exported if hasattr(numpy.random, name)}
    assert legacy <= set(random_state.numpy_functions(numpy.random))
    assert {"seed", "rand", "randn", "ranf", "sample", "get_state", "set_state"} <= set(
        random_state.numpy_functions(numpy.random)
    )


@pytest.mark.parametrize(("name", "method"), [("ranf", "random_sample"), ("sample", "random_sample")])
def test_numpys_aliases(slots: tuple[Slot, ...], name: str, method: str) -> None:
    functions = random_state.numpy_functions(numpy.random)
    with entered(slots[0]):
        functions["seed"](1)
        assert functions[name](3).tolist() == getattr(numpy.random.RandomState(1), method)(3).tolist()


@pytest.mark.parametrize("get", [python_module, numpy_module])
def test_outside_slots_the_process_state_is_used(get: Any) -> None:
    module, functions, state = get()
    saved = functions["getstate" if module is random else "get_state"]()
    functions["seed"](13)
    assert functions["uniform"](0, 1) == state(13).uniform(0, 1)
    functions["setstate" if module is random else "set_state"](saved)
