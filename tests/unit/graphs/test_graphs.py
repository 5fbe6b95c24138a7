"""Graph stepping without a GPU: what is recorded, when a recording is used, and when it no longer is."""

from __future__ import annotations

import gc
import uuid
import weakref
from collections.abc import Callable, Iterator
from math import nan
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import numpy
import pytest
import torch

from comfy_parallel.graphs import code, per_slot
from comfy_parallel.graphs import stepper as stepper_module
from comfy_parallel.graphs.model_state import ModelState
from comfy_parallel.graphs.recording import Recording
from comfy_parallel.graphs.refusal import Uncapturable, UncapturableNow
from comfy_parallel.graphs.signature import describe, have_same_bytes, substitute
from comfy_parallel.graphs.stepper import MOST_LOSSES, MOST_RECORDINGS, Stepper
from comfy_parallel.graphs.watch import _Watch, watching
from comfy_parallel.slots.slot import Slot, entered

CPU = torch.device("cpu")


class Model(torch.nn.Module):
    """Stands in for a host's model."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.sizes = [1, 2]

    def apply(self, x: Any, **_options: Any) -> Any:  # type: ignore[override]
        return self.linear(x) * 2


class FakeRecording:
    """Computes what was recorded with the weights as they were then: a stale one gives stale results."""

    def __init__(self, forward: Callable[[list[Any]], Any]) -> None:
        self.forward = forward

    def replay(self, inputs: list[Any]) -> Any:
        return self.forward(inputs)


class FakeRecorder:
    """Counts 10 bytes per recording, and how often it was told to wait."""

    make: Callable[..., Any] = FakeRecording

    def __init__(self) -> None:
        self.recordings: WeakSet[Any] = WeakSet()
        self.waits = 0
        self.is_recording = False

    @property
    def size_bytes(self) -> int:
        return 10 * len(self.recordings)

    def record(self, forward: Callable[[list[Any]], Any], buffers: list[Any]) -> Any:
        self.is_recording = True
        try:
            forward(buffers)
        finally:
            self.is_recording = False
        recording = self.make(forward)
        self.recordings.add(recording)
        return recording

    def wait(self) -> None:
        self.waits += 1


def forward(model: Model, **arguments: Any) -> Any:
    return model.apply(**arguments)


@pytest.fixture(autouse=True)
def own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes for ComfyUI's."""
    monkeypatch.setattr(code, "_KNOWN", code._KNOWN | {__name__.partition(".")[0]})


@pytest.fixture
def recorder() -> FakeRecorder:
    return FakeRecorder()


@pytest.fixture
def stepper(recorder: FakeRecorder) -> Stepper:
    return Stepper(CPU, recorder)


def step(stepper: Stepper, model: Model, x: Any = None, **options: Any) -> Any:
    with torch.inference_mode():
        return stepper.step(forward, model, {"x": torch.ones(2, 4) if x is None else x, **options})


def counts(stepper: Stepper) -> tuple[int, int, int]:
    return sum(stepper.stats.eager.values()), stepper.stats.captures, stepper.stats.replays


# The key.


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"x": torch.ones(2)}, {"x": torch.ones(3)}),
        ({"x": torch.ones(2)}, {"x": torch.ones(2).half()}),
        ({"x": torch.ones(2, 3)}, {"x": torch.ones(3, 2).T}),
        ({"x": 1}, {"x": 1.0}),
        ({"x": True}, {"x": 1}),
        ({"x": [1]}, {"x": (1,)}),
        ({"x": None}, {}),
        ({"x": 0.0}, {"x": -0.0}),
        ({"x": {1: 0}}, {"x": {True: 0}}),
        ({"o": {"cond_or_uncond": [0, 1]}}, {"o": {"cond_or_uncond": [1, 0]}}),
    ],
)
def test_calls_that_differ_in_more_than_numbers_have_different_keys(one: Any, other: Any) -> None:
    assert describe(one, CPU)[0] != describe(other, CPU)[0]


def test_calls_that_differ_in_numbers_and_ids_have_one_key() -> None:
    keys = [describe({"x": torch.rand(2), "o": {"uuids": [uuid.uuid4()]}}, CPU)[0] for _ in range(2)]
    assert keys[0] == keys[1]


def test_jobs_with_other_numbers_of_steps_have_one_key() -> None:
    keys = [describe({"transformer_options": {"sample_sigmas": torch.ones(n)}}, CPU) for n in (21, 26)]
    assert keys[0] == keys[1]
    assert keys[0][1] == []


@pytest.mark.parametrize(
    "value",
    [lambda: None, object(), {object(): 1}, torch.nn.Parameter(torch.ones(1)), torch.ones(2, 2).to_sparse()],
)
def test_what_a_key_cannot_hold_makes_a_call_uncapturable(value: Any) -> None:
    with pytest.raises(Uncapturable, match=r"patches"):
        describe({"transformer_options": {"patches": value}}, CPU)


def test_a_tensor_given_twice_stays_one() -> None:
    x = torch.ones(2)
    _, tensors = describe({"x": x, "y": [x]}, CPU)
    assert len(tensors) == 1
    other = torch.zeros(2)
    replaced = substitute({"x": x, "y": [x]}, [other])
    assert replaced["x"] is other
    assert replaced["y"][0] is other


def test_ids_that_are_read_make_a_call_uncapturable() -> None:
    replaced = substitute({"uuids": [uuid.uuid4()]}, [])
    with pytest.raises(Uncapturable, match="reads uuids"):
        replaced["uuids"][0]


# What a forward does.

OUTSIDE = torch.ones(3)


@pytest.mark.parametrize(
    ("work", "problem"),
    [
        (lambda x: x * 2 + 1, None),
        (lambda x: torch.nn.functional.dropout(x, 0.5, training=False) + 1, None),
        (lambda x: torch.zeros_like(x).add_(x), None),
        (lambda x: torch.zeros_like(x)[1:].add_(x[1:]), None),
        (lambda x: x * x.sum().item(), "waits for a result"),
        (lambda x: x[x > 0], "waits for a result"),
        (lambda x: x + torch.randn(3), "draws random numbers"),
        (lambda x: torch.nn.functional.dropout(x, 0.5, training=True), "draws random numbers"),
        (lambda x: x.add_(1), "writes to a tensor from outside"),
        (lambda x: x + OUTSIDE, "reads a tensor from outside"),
        (lambda x: torch.cat([x, OUTSIDE]), "reads a tensor from outside"),
        (lambda x: x.to("meta"), "on another device"),
        (lambda x: x + torch.ones(3, device="meta"), "on another device"),
    ],
)
def test_a_forward_is_watched(work: Callable[[Any], Any], problem: str | None) -> None:
    x = torch.ones(3)
    found = None
    try:
        with torch.inference_mode(), watching(CPU, [x]):
            work(x)
    except Uncapturable as refusal:
        found = str(refusal)
    assert (problem is None and found is None) or problem in (found or "")


def test_a_storage_that_is_freed_is_not_mistaken_for_a_later_one() -> None:
    memory = numpy.ones(3)
    watch = _Watch(CPU, [])
    made = torch.from_numpy(memory)
    watch.after(made)
    watch.before(torch.ops.aten.neg.default, (made,), {})
    del made
    later = torch.from_numpy(memory)
    with pytest.raises(Uncapturable, match="from outside"):
        watch.before(torch.ops.aten.neg.default, (later,), {})


def test_a_refusal_that_the_forward_catches_is_one_all_the_same() -> None:
    def careless(x: Any) -> None:
        try:
            x.sum().item()
        except Exception:  # noqa: BLE001 - as models do
            x.sum()

    x = torch.ones(3)
    with pytest.raises(Uncapturable, match="waits"), watching(CPU, [x]):
        careless(x)


def test_code_of_a_node_pack_is_refused() -> None:
    namespace: dict[str, Any] = {"__name__": "/comfy/custom_nodes/some_pack.nodes"}
    exec("def work(x): return x + 1", namespace)
    x = torch.ones(3)
    with pytest.raises(Uncapturable, match="runs code of some_pack"), watching(CPU, [x]):
        namespace["work"](x)


@pytest.mark.parametrize(
    ("name", "is_known", "is_host"),
    [
        ("comfy.ldm.modules.attention", True, True),
        ("/home/user/ComfyUI/comfy_extras/nodes_mask", True, True),
        ("C:\\ComfyUI\\comfy_extras\\nodes_mask", True, True),
        ("torch.nn.functional", True, False),
        ("contextlib", True, False),
        ("/home/user/ComfyUI/custom_nodes/comfy", False, False),
        ("/packs/comfy/pack", False, False),
        ("/home/user/ComfyUI/custom_nodes/pack_x_y.nodes", False, False),
        ("custom_nodes.pack", False, False),
        ("", False, False),
    ],
)
def test_whose_code_it_is(name: str, is_known: bool, is_host: bool) -> None:
    assert (code.is_known(name), code.is_host_code(name)) == (is_known, is_host)


# The model.


def test_a_replaced_weight_is_noticed_and_a_changed_number_is_not() -> None:
    model = Model()
    state = ModelState(model, CPU)
    with torch.no_grad():
        model.linear.weight.add_(1)
    assert state.has_same_weights()
    model.linear.weight = torch.nn.Parameter(torch.ones(4, 4))
    assert not state.has_same_weights()


@pytest.mark.parametrize(
    "change",
    [
        lambda linear: linear._parameters.update(weight=torch.nn.Parameter(torch.ones(4, 4))),
        lambda linear: setattr(linear.weight, "data", torch.ones(4, 4)),
        lambda linear: linear._parameters.pop("weight"),
        lambda linear: linear.register_parameter("weight", None),
        lambda linear: linear.register_parameter("bias", torch.nn.Parameter(torch.ones(4))),
        lambda linear: linear.register_parameter("late", torch.nn.Parameter(torch.ones(4))),
        lambda linear: linear.register_parameter("late", None),
    ],
)
def test_a_weight_that_is_elsewhere_gone_or_new_is_noticed(change: Callable[[Any], Any]) -> None:
    model = Model()
    model.linear = torch.nn.Linear(4, 4, bias=False)
    state = ModelState(model, CPU)
    assert state.has_same_weights()
    change(model.linear)
    assert not state.has_same_weights()


def test_the_same_weight_set_again_is_the_same() -> None:
    model = Model()
    state = ModelState(model, CPU)
    weight = model.linear._parameters.pop("weight")
    model.linear._parameters["weight"] = weight
    assert state.has_same_weights()


def test_a_replaced_weight_is_not_kept() -> None:
    model = Model()
    state = ModelState(model, CPU)
    replaced = weakref.ref(model.linear.weight)
    model.linear.weight = torch.nn.Parameter(torch.ones(4, 4))
    assert replaced() is None
    assert not state.has_same_weights()


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.add_module("more", torch.nn.Linear(1, 1)),
        lambda model: model.train(),
        lambda model: setattr(model.linear, "forward", lambda x: x),
        lambda model: setattr(model.linear, "weight_function", [lambda w: w]),
        lambda model: model.linear.register_forward_hook(lambda *args: None),
        lambda model: setattr(model.linear, "comfy_cast_weights", True),
        lambda model: model.sizes.append(3),
        lambda model: setattr(model, "another", lambda x: x),
        lambda model: setattr(model.linear.weight, "data", torch.ones(4, 4).half()),
        lambda model: model.register_buffer("late", torch.ones(1)),
        lambda model: setattr(model.linear, "__class__", type("Patched", (torch.nn.Linear,), {})),
        lambda model: setattr(model.linear, "_parameters", dict(torch.nn.Linear(4, 4)._parameters)),
    ],
)
def test_a_changed_set_up_is_noticed(change: Callable[[Model], Any]) -> None:
    model = Model().eval()
    state = ModelState(model, CPU)
    assert state.has_same_structure()
    change(model)
    assert not state.has_same_structure()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: model.linear.register_forward_hook(lambda *args: None), "hooks"),
        (lambda model: setattr(model.linear, "weight_function", [lambda w: w]), "patched while they are used"),
        (lambda model: setattr(model.linear, "forward", pack_function()), "a node has changed"),
    ],
)
def test_a_model_that_is_changed_while_it_is_used_is_refused(change: Callable[[Model], Any], reason: str) -> None:
    model = Model()
    change(model)
    with pytest.raises(UncapturableNow, match=reason):
        ModelState(model, CPU)


def pack_function() -> Any:
    namespace: dict[str, Any] = {"__name__": "custom_nodes.some_pack"}
    exec("def work(x): return x + 1", namespace)
    return namespace["work"]


def test_weights_elsewhere_make_a_model_uncapturable_for_now() -> None:
    with pytest.raises(UncapturableNow, match="not on the GPU"):
        ModelState(Model(), torch.device("cuda", 0))


def test_a_buffer_elsewhere_is_left_to_the_watch() -> None:
    model = Model()
    model.register_buffer("elsewhere", torch.empty(3, device="meta"))
    assert ModelState(model, CPU).has_same_weights()
    with pytest.raises(Uncapturable, match="reads from another device"), watching(CPU, list(model.buffers())):
        model.elsewhere + 1


# A recording's inputs and result.


def test_what_lies_in_ram_is_copied_when_its_bytes_have_changed() -> None:
    buffer, output, copies = torch.zeros(3), torch.zeros(3), []
    graph = SimpleNamespace(replay=lambda: output.copy_(buffer * 2))
    recording = Recording(graph, [buffer], output)
    for numbers in ([1.0, 2.0, nan], [1.0, 2.0, nan], [0.0, 2.0, nan], [-0.0, 2.0, nan], [-0.0, 2.0, nan]):
        version = buffer._version
        result = recording.replay([torch.tensor(numbers)])
        assert have_same_bytes(result, torch.tensor(numbers) * 2)
        copies.append(buffer._version - version)
    assert copies == [1, 0, 1, 1, 0]


def test_a_caller_may_keep_and_change_what_it_is_given() -> None:
    buffer, output = torch.zeros(3), torch.zeros(3)
    recording = Recording(SimpleNamespace(replay=lambda: output.copy_(buffer * 2)), [buffer], output)
    x = torch.ones(3)
    first = recording.replay([x])
    x.add_(1)  # in place, in the caller's tensor
    assert recording.replay([x]).tolist() == [4.0] * 3
    assert first.tolist() == [2.0] * 3


# Stepping.


def test_a_shape_that_repeats_is_recorded_and_replayed(stepper: Stepper) -> None:
    model = Model()
    for _ in range(4):
        x = torch.rand(2, 4)
        assert torch.equal(step(stepper, model, x), forward(model, x=x))
    assert counts(stepper) == (1, 1, 2)
    assert stepper.size_bytes == 10


def test_a_weight_that_moved_is_never_replayed(stepper: Stepper, recorder: FakeRecorder) -> None:
    model = Model()
    for _ in range(3):
        step(stepper, model)
    model.linear.weight = torch.nn.Parameter(torch.ones(4, 4))
    x = torch.rand(2, 4)
    assert torch.equal(step(stepper, model, x), forward(model, x=x))
    assert counts(stepper) == (1, 2, 1)  # recorded anew
    assert recorder.waits == 1


@pytest.fixture
def watches(recorder: FakeRecorder, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One for each recording that was watched."""
    seen: list[Any] = []

    def noting(*args: Any) -> Any:
        if recorder.is_recording:  # A stand-in's replay runs the forward again.
            seen.append(args)
        return watching(*args)

    monkeypatch.setattr(stepper_module, "watching", noting)
    return seen


def move(model: Model) -> None:
    model.linear.weight.data = model.linear.weight.data.clone()


def test_what_only_moved_is_recorded_anew_at_once_and_not_watched_again(stepper: Stepper, watches: list[Any]) -> None:
    model = Model()
    for number in range(9):
        if number in (3, 6):
            stepper.begin_sampling()
            stepper.forget(model)
            move(model)
        x = torch.rand(2, 4)
        assert torch.equal(step(stepper, model, x), forward(model, x=x))
    assert counts(stepper) == (1, 3, 5)
    assert len(watches) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.sizes.append(3),
        lambda model: setattr(model.linear, "weight_comfy_model_dtype", torch.half),
        lambda model: setattr(model, "linear", torch.nn.Linear(4, 4)),
        lambda model: setattr(model.linear, "forward", lambda x: x),
        lambda _: torch.set_default_dtype(torch.float64),
    ],
)
def test_a_forward_is_watched_again_once_it_may_do_something_else(
    stepper: Stepper, watches: list[Any], change: Callable[[Any], Any]
) -> None:
    model = Model()
    try:
        for number in range(4):
            if number == 2:
                stepper.begin_sampling()
                stepper.forget(model)
                change(model)
            x = torch.rand(2, 4, dtype=torch.float32)
            assert torch.equal(step(stepper, model, x), forward(model, x=x))
    finally:
        torch.set_default_dtype(torch.float32)
    assert counts(stepper) == (1, 2, 1)
    assert len(watches) == 2


def test_the_set_up_is_looked_at_when_it_is_suspect(stepper: Stepper) -> None:
    model = Model()
    for _ in range(3):
        step(stepper, model)
    model.linear.weight_function = [lambda weight: weight]  # type: ignore[assignment]
    stepper.suspect()
    step(stepper, model)
    assert counts(stepper) == (2, 1, 1)
    model.linear.weight_function = []  # type: ignore[assignment]
    step(stepper, model)
    assert counts(stepper) == (3, 1, 1)  # not tried again before the next suspicion
    stepper.suspect()
    step(stepper, model)
    assert counts(stepper) == (3, 2, 1)


def test_a_model_that_keeps_changing_is_not_recorded_for_ever(stepper: Stepper) -> None:
    model = Model()
    for size in range(10):
        model.size = size  # type: ignore[assignment]
        stepper.suspect()
        x = torch.rand(2, 4)
        assert torch.equal(step(stepper, model, x), forward(model, x=x))
    assert stepper.stats.captures == MOST_LOSSES
    assert stepper.stats.eager["a model that keeps changing"] == 10 - 1 - MOST_LOSSES
    stepper.begin_sampling()
    for _ in range(3):
        step(stepper, model)
    assert stepper.stats.replays == 2


def test_a_model_that_is_changed_in_some_steps_only_is_replayed_in_the_others(stepper: Stepper) -> None:
    """A recording that is lost and cannot be made anew in the same step is one loss, not two."""
    model, changed = Model(), (2, 4)
    for number in range(MOST_LOSSES * 2):
        vars(model.linear).pop("forward", None)
        if number in changed:
            vars(model.linear)["forward"] = _of_a_pack()
        stepper.suspect()
        step(stepper, model)
    assert "a model that keeps changing" not in stepper.stats.eager
    assert stepper.stats.eager["a model whose modules a node has changed"] == len(changed)


def _of_a_pack() -> Any:
    namespace: dict[str, Any] = {"__name__": "/comfy/custom_nodes/some_pack.nodes"}
    exec("def forward(x): return x * 2", namespace)
    return namespace["forward"]


def test_replaced_code_is_noticed_when_it_is_suspect(stepper: Stepper, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    for _ in range(3):
        step(stepper, model)
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, weight, bias: x)
    stepper.suspect()
    x = torch.rand(2, 4)
    assert torch.equal(step(stepper, model, x), x * 2)
    assert counts(stepper) == (1, 2, 1)


class Incomparable:
    def __eq__(self, other: object) -> bool:
        raise AttributeError("one of a pack's objects")

    __hash__ = None  # type: ignore[assignment]


def test_what_cannot_be_compared_has_changed(stepper: Stepper) -> None:
    model = Model()
    for number in range(4):
        model.attribute = Incomparable()  # type: ignore[assignment]
        stepper.suspect()
        x = torch.rand(2, 4)
        assert torch.equal(step(stepper, model, x), forward(model, x=x)), number
    assert counts(stepper) == (1, 3, 0)


class Local(torch.nn.Linear):
    """A class that no module of the host names."""

    def forward(self, x: Any, by: float = 2) -> Any:
        return self.scaled(super().forward(x), by)

    @staticmethod
    def scaled(x: Any, by: float, *, plus: float = 0) -> Any:
        return x * by + plus


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (Local, "forward", lambda self, x: x * 7),
        (Local, "scaled", staticmethod(lambda x, by: x * by)),
        (Local, "__call__", lambda self, x: self.forward(x - 1)),
        (Local.forward, "__defaults__", (3,)),
        (Local.scaled, "__kwdefaults__", {"plus": 1}),
        (Local.scaled, "__code__", (lambda x, by, *, plus=0: x).__code__),
        (torch.nn.Linear, "forward", lambda self, x: x),
        (torch.nn.Module, "__call__", lambda self, x: self.forward(x + 1)),
    ],
)
def test_code_that_only_the_model_leads_to_is_watched_too(
    stepper: Stepper, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, value: Any
) -> None:
    monkeypatch.setattr(Local, "__module__", "comfy.ops")
    model = Model()
    model.linear = Local(4, 4)
    for _ in range(3):
        step(stepper, model)
        stepper.suspect()
    assert counts(stepper) == (1, 1, 1)
    monkeypatch.setattr(owner, name, value)
    x = torch.rand(2, 4)
    assert torch.equal(step(stepper, model, x), forward(model, x=x))
    assert counts(stepper) == (1, 2, 1)


@pytest.mark.parametrize("register", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_a_hook_on_all_modules_is_noticed(stepper: Stepper, register: str) -> None:
    model, called = Model(), []
    for _ in range(3):
        step(stepper, model)
    hook = getattr(torch.nn.modules.module, register)(lambda *args: called.append(args))
    try:
        stepper.suspect()
        step(stepper, model)
        assert counts(stepper) == (1, 2, 1)
    finally:
        hook.remove()
    assert called


@pytest.mark.parametrize(("switch", "reason"), [("is_grad_enabled", "gradients"), ("is_autocast_enabled", "autocast")])
def test_other_modes_run_eagerly(stepper: Stepper, monkeypatch: pytest.MonkeyPatch, switch: str, reason: str) -> None:
    monkeypatch.setattr(torch, switch, lambda *_: True)
    model = Model()
    for _ in range(3):
        step(stepper, model)
    assert counts(stepper) == (3, 0, 0)
    assert reason in next(iter(stepper.stats.eager))


def test_a_replay_that_differs_is_never_used() -> None:
    class Wrong(FakeRecording):
        def replay(self, inputs: list[Any]) -> Any:
            return super().replay(inputs) + 1

    class WrongRecorder(FakeRecorder):
        make = Wrong

    stepper, model = Stepper(CPU, WrongRecorder()), Model()
    for _ in range(4):
        x = torch.rand(2, 4)
        assert torch.equal(step(stepper, model, x), forward(model, x=x))
    assert counts(stepper) == (4, 0, 0)
    assert stepper.size_bytes == 0


def test_a_recorder_that_refuses_leaves_the_steps_eager(recorder: FakeRecorder) -> None:
    def refuse(forward: Any, inputs: Any) -> Any:
        raise Uncapturable("no graphs today")

    recorder.record = refuse  # type: ignore[method-assign]
    stepper, model = Stepper(CPU, recorder), Model()
    for _ in range(3):
        step(stepper, model)
        stepper.suspect()
    assert stepper.stats.eager == {"first of its kind": 1, "no graphs today": 2}


class Interrupt(BaseException):
    """As newer hosts' interrupts are."""


ERRORS: list[type[BaseException]] = [RuntimeError, ValueError, torch.OutOfMemoryError, Interrupt, KeyboardInterrupt]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("where", ["the recorder", "the forward", "the state", "the code", "the first replay"])
def test_an_error_while_a_step_is_recorded_leaves_what_it_gave(
    recorder: FakeRecorder, monkeypatch: pytest.MonkeyPatch, where: str, error: type[BaseException]
) -> None:
    def fail(*_args: Any, **_kwargs: Any) -> Any:
        raise error("while it is recorded")

    class Model2(Model):
        is_recorded = False

        def apply(self, x: Any) -> Any:  # type: ignore[override]
            if where == "the forward" and self.is_recorded:
                fail()
            return super().apply(x)

    class Failing(FakeRecorder):
        def record(self, forward: Any, buffers: Any) -> Any:
            Model2.is_recorded = True
            try:
                if where == "the recorder":
                    fail()
                recording = super().record(forward, buffers)
                if where == "the first replay":
                    recording.replay = fail
                return recording
            finally:
                Model2.is_recorded = False

    if where == "the state":
        monkeypatch.setattr(stepper_module, "ModelState", fail)
    if where == "the code":
        monkeypatch.setattr(stepper_module, "surroundings", fail)
    stepper, model = Stepper(CPU, Failing()), Model2()
    for _ in range(8):
        x = torch.rand(2, 4)
        assert torch.equal(step(stepper, model, x), model.apply(x))
        stepper.suspect()
    assert counts(stepper) == (8, 0, 0)
    assert stepper.size_bytes == 0
    expected = "too little memory to record it" if error is torch.OutOfMemoryError else f"{error.__name__} while it"
    assert sum(count for reason, count in stepper.stats.eager.items() if expected in reason) == 7


def test_an_error_that_passes_does_not_keep_a_step_from_being_recorded_later(stepper: Stepper) -> None:
    record, errors = stepper._recorder.record, [Interrupt()]

    def fail_once(*args: Any) -> Any:
        if errors:
            raise errors.pop()
        return record(*args)

    stepper._recorder.record = fail_once  # type: ignore[method-assign]
    model = Model()
    for _ in range(4):
        step(stepper, model)
        stepper.suspect()
    assert counts(stepper) == (2, 1, 1)


def test_what_is_never_recorded_for_the_moment_costs_no_more_tries_than_a_model_that_keeps_changing(
    stepper: Stepper,
) -> None:
    tries: list[Any] = []

    def fail(*args: Any) -> Any:
        tries.append(args)
        raise torch.OutOfMemoryError("no memory")

    stepper._recorder.record = fail  # type: ignore[method-assign]
    model = Model()
    for _ in range(20):
        step(stepper, model)
        stepper.suspect()
    assert len(tries) == MOST_LOSSES
    assert stepper.stats.eager == {"first of its kind": 1, "too little memory to record it": 19}


def test_a_replay_with_too_little_memory_gives_recordings_back_and_steps_eagerly(
    recorder: FakeRecorder,
) -> None:
    shortages: list[BaseException] = []

    class Hungry(FakeRecording):
        def replay(self, inputs: list[Any]) -> Any:
            if shortages:
                raise shortages.pop()
            return super().replay(inputs)

    recorder.make = Hungry
    stepper, model = Stepper(CPU, recorder), Model()
    for number in range(6):
        if number == 3:
            shortages.append(torch.OutOfMemoryError("no memory"))
        x = torch.rand(2, 4)
        assert torch.equal(step(stepper, model, x), forward(model, x=x))
        gc.collect()
        assert stepper.size_bytes == (0 if number in (0, 3) else 10)
    assert counts(stepper) == (2, 2, 2)


def test_a_step_that_could_not_be_recorded_is_tried_again_once_the_model_has_changed(stepper: Stepper) -> None:
    class Scheduled(Model):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("sigmas", torch.ones(3))

        def apply(self, x: Any) -> Any:  # type: ignore[override]
            return super().apply(x) * (1 if self.sigmas.is_meta else self.sigmas.sum().item())

    model = Scheduled()
    for _ in range(4):
        step(stepper, model)
        stepper.suspect()
    assert stepper.stats.eager == {"first of its kind": 1, "aten.item.default waits for a result": 3}
    model.sigmas = model.sigmas.to("meta")
    for _ in range(3):
        step(stepper, model)
        stepper.suspect()
    assert counts(stepper) == (4, 1, 2)


class Schedule(torch.nn.Module):
    """Looks time steps up in a table, which may be elsewhere."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.register_buffer("sigmas", torch.ones(3, device=device))
        self.asked: list[Any] = []

    def timestep(self, sigma: Any) -> Any:
        self.asked.append(sigma)
        return (self.sigmas + 1 if self.sigmas.is_meta else self.sigmas * 2).new_ones(1, device="cpu") * sigma * 3


class Scheduled(Model):
    def __init__(self, device: str) -> None:
        super().__init__()
        self.model_sampling = Schedule(device)

    def apply(self, x: Any, t: Any) -> Any:  # type: ignore[override]
        return super().apply(x) * self.model_sampling.timestep(t) + self.model_sampling.timestep(t + 1)


def test_time_steps_of_a_schedule_that_lies_elsewhere_are_looked_up_before(stepper: Stepper) -> None:
    model = Scheduled("meta")
    model.apply = lambda x, t: model.linear(x) * model.model_sampling.timestep(t)  # type: ignore[method-assign]
    for number in range(5):
        x, t = torch.rand(2, 4), torch.tensor([float(number)])
        model.model_sampling.asked.clear()
        result = step(stepper, model, x, t=t)
        assert all(sigma is t for sigma in model.model_sampling.asked)
        assert torch.equal(result, model.linear(x) * (t * 3))
    assert counts(stepper) == (1, 1, 3)
    assert "timestep" not in vars(model.model_sampling)


def test_other_time_steps_of_such_a_schedule_are_not_made_up(stepper: Stepper) -> None:
    model = Scheduled("meta")
    for _ in range(3):
        step(stepper, model, t=torch.ones(1))
    assert counts(stepper) == (3, 0, 0)
    assert stepper.stats.eager["aten.add.Tensor reads from another device"] == 2


@pytest.mark.parametrize("is_own", [False, True])
def test_a_schedule_is_as_before_after_a_recording(stepper: Stepper, is_own: bool) -> None:
    model = Scheduled("meta")
    if is_own:
        model.model_sampling.timestep = Schedule.timestep.__get__(model.model_sampling)
    before = dict(vars(model.model_sampling))
    for _ in range(3):
        step(stepper, model, t=torch.ones(1))
    assert vars(model.model_sampling) == before


def test_a_schedule_on_the_device_is_left_to_the_recording(stepper: Stepper) -> None:
    model = Scheduled("cpu")
    x, t = torch.rand(2, 4), torch.ones(1)
    for _ in range(3):
        assert torch.equal(step(stepper, model, x, t=t), model.apply(x, t))
    assert counts(stepper) == (1, 1, 1)


def test_a_model_that_changes_in_each_step_is_not_tried_for_ever(stepper: Stepper) -> None:
    tries = []

    class Refusing(Model):
        def apply(self, x: Any) -> Any:  # type: ignore[override]
            tries.append(x)
            return super().apply(x) * x.sum().item()

    model = Refusing()
    for _ in range(20):
        step(stepper, model)
        model.sizes.append(3)
        stepper.suspect()
    assert len(tries) == 20 + MOST_LOSSES
    assert stepper.stats.eager["a model that keeps changing"] == 20 - 1 - MOST_LOSSES
    stepper.begin_sampling()
    step(stepper, model)
    assert len(tries) == 20 + MOST_LOSSES + 2


def test_control_that_the_forward_takes_out_is_still_there_for_the_recording(stepper: Stepper) -> None:
    class Controlled(Model):
        def apply(self, x: Any, control: Any) -> Any:  # type: ignore[override]
            return super().apply(x) + control["output"].pop()

    model = Controlled()
    for _ in range(3):
        x, hint = torch.rand(2, 4), torch.rand(2, 4)
        expected = forward(model, x=x, control={"output": [hint]})
        assert torch.equal(step(stepper, model, x, control={"output": [hint]}), expected)
    assert counts(stepper) == (1, 1, 1)


def test_two_threads_at_once_do_not_share_a_recording(stepper: Stepper) -> None:
    class Nested(Model):
        def apply(self, x: Any, depth: int = 0) -> Any:  # type: ignore[override]
            return step(stepper, self, x, depth=depth - 1) if depth else self.linear(x)

    model = Nested()
    for _ in range(2):
        step(stepper, model, depth=1)
    assert (
        stepper.stats.eager["two at once"] == 3
    )  # in the second eager step, in its recording and in the fake's replay


def test_recordings_are_bounded_and_given_back(stepper: Stepper) -> None:
    model = Model()
    for size in range(1, MOST_RECORDINGS + 3):
        for _ in range(2):
            step(stepper, model, torch.ones(size, 4))
    assert stepper.size_bytes == 10 * MOST_RECORDINGS
    stepper.forget(Model())
    assert stepper.size_bytes == 10 * MOST_RECORDINGS
    stepper.forget(model)
    gc.collect()
    assert stepper.size_bytes == 0


def test_recordings_are_given_back_when_an_eager_step_has_too_little_memory(stepper: Stepper) -> None:
    class Hungry(Model):
        def apply(self, x: Any, control: Any) -> Any:  # type: ignore[override]
            control["output"].pop()
            if len(x) == 3 and shortages:
                raise shortages.pop()
            return super().apply(x)

    shortages = [torch.OutOfMemoryError("no memory")]
    model = Hungry()
    for _ in range(2):
        step(stepper, model, control={"output": [1]})
    assert stepper.size_bytes == 10
    for _ in range(3):
        x = torch.rand(3, 4)
        assert torch.equal(step(stepper, model, x, control={"output": [1]}), model.linear(x) * 2)
    assert counts(stepper) == (3, 2, 0)  # known anew


def test_a_model_that_dies_takes_its_recordings_along(recorder: FakeRecorder) -> None:
    class Result(FakeRecording):
        """Keeps what the forward returned, as a graph does, and not the forward."""

        def __init__(self, forward: Callable[[list[Any]], Any]) -> None:
            self.result = forward([torch.ones(2, 4)])

        def replay(self, inputs: list[Any]) -> Any:
            return self.result

    recorder.make = Result
    stepper, model = Stepper(CPU, recorder), Model()
    for _ in range(2):
        step(stepper, model)
    assert stepper.size_bytes == 10
    del model
    gc.collect()
    assert stepper.size_bytes == 0


# Which steps are suspect.


def host_function(module: str = "comfy.k_diffusion.sampling") -> Any:
    namespace: dict[str, Any] = {"__name__": module}
    exec("def function(*args): pass", namespace)
    return namespace["function"]


@pytest.fixture
def of_slot(stepper: Stepper, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(per_slot, "_off", None)
    slot = Slot(0, "cuda:0")
    slot.values[per_slot._steppers] = stepper
    with entered(slot):
        yield


@pytest.mark.parametrize(
    ("code_between", "is_suspect"),
    [
        ([host_function(), {"seed": 1, "model_options": {"transformer_options": {}}}, torch.ones(1)], False),
        ([host_function("/somewhere/custom_nodes/pack")], True),
        ([host_function(), {"model_options": {"sampler_cfg_function": host_function("custom_nodes.pack")}}], True),
        ([host_function(), {"positive": [{"control": Model()}]}], True),
    ],
)
@pytest.mark.usefixtures("of_slot")
def test_steps_are_suspect_unless_only_the_host_runs_between_them(
    stepper: Stepper, code_between: list[Any], is_suspect: bool
) -> None:
    def epochs() -> int:
        before = stepper._epoch
        assert per_slot.of_step() is stepper
        return stepper._epoch - before

    assert epochs() == 1  # outside of a sampler of the host
    with per_slot.sampling(*code_between):
        assert [epochs(), epochs()] == [int(is_suspect)] * 2
    assert epochs() == 1
