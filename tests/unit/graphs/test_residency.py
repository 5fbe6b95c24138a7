"""Recordings under dynamic VRAM: used while all pages hold what they held, and never else."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from comfy_parallel.graphs import code, residency
from comfy_parallel.graphs.model_state import ModelState
from comfy_parallel.graphs.refusal import Uncapturable, UncapturableNow
from comfy_parallel.graphs.residency import NOWHERE, TOO_LARGE, Pages
from comfy_parallel.graphs.stepper import Stepper
from tests.unit.graphs.test_graphs import FakeRecorder
from tests.unit.graphs.vram import META, PAGE, PagedLinear, PagedModel, Range

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "_KNOWN", code._KNOWN | {__name__.partition(".")[0]})


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU whose memory is what the newest range says, with small pages."""
    monkeypatch.setattr(residency, "_PAGE", PAGE)
    monkeypatch.setattr(residency, "_SPARE", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (Range.newest.free_bytes, 0))


@pytest.fixture
def stepper() -> Stepper:
    return Stepper(CPU, FakeRecorder())


def forward(model: PagedModel, **arguments: Any) -> Any:
    return model.apply(**arguments)


def step(stepper: Stepper, model: PagedModel, **options: Any) -> Any:
    x = torch.arange(8.0).view(2, 4)
    with torch.inference_mode():
        result = stepper.step(forward, model, {"x": x, **options})
        assert torch.equal(result, model.apply(x, **options))
    assert model.pages.num_pins == 0
    return result


def counts(stepper: Stepper) -> tuple[int, int, dict[str, int]]:
    return stepper.stats.captures, stepper.stats.replays, dict(stepper.stats.eager)


FIRST = {"first of its kind": 1}


def test_steps_are_replayed_while_all_pages_are_there(stepper: Stepper) -> None:
    model = PagedModel()
    for _ in range(5):
        step(stepper, model)
    assert counts(stepper) == (1, 3, FIRST)


def test_one_look_at_all_pages_is_taken_per_replay(stepper: Stepper) -> None:
    model = PagedModel()
    for _ in range(2):
        step(stepper, model)
    before = model.pages.faults
    with torch.inference_mode():
        stepper.step(lambda *_args, **_kwargs: pytest.fail("eager"), model, {"x": torch.ones(2, 4)})
    assert stepper.stats.replays == 1
    looks = model.pages.faults - before - len(model.layers)  # the stand-in recording runs the layers
    assert looks == 1


@pytest.mark.parametrize("page", range(3))
def test_after_an_eviction_a_step_is_eager_and_recorded_again(stepper: Stepper, page: int) -> None:
    model = PagedModel()
    for _ in range(3):
        step(stepper, model)
    model.pages.evict(page)
    for _ in range(3):
        step(stepper, model)
    assert counts(stepper) == (2, 3, FIRST)


def test_pages_that_were_refilled_meanwhile_are_noticed(stepper: Stepper) -> None:
    model = PagedModel()
    for _ in range(2):
        step(stepper, model)
    model.pages.evict(0, 1, 2)
    with torch.inference_mode():
        model.apply(torch.ones(3, 4))  # another kind of call
    step(stepper, model)
    assert counts(stepper) == (2, 0, FIRST)


def test_an_eviction_while_the_model_is_not_used_is_noticed(stepper: Stepper) -> None:
    model = PagedModel()
    for _ in range(2):
        step(stepper, model)
    stepper.begin_sampling()
    model.pages.evict(1)
    step(stepper, model)
    step(stepper, model)
    assert counts(stepper) == (2, 1, FIRST)


def test_a_model_that_does_not_fit_steps_eagerly_and_says_so(stepper: Stepper) -> None:
    model = PagedModel(num_there=2)
    for _ in range(3):
        step(stepper, model)
    assert counts(stepper) == (0, 0, FIRST | {TOO_LARGE: 2})


def test_a_look_at_a_model_that_does_not_fit_takes_none_of_it_away(stepper: Stepper) -> None:
    model = PagedModel(num_there=2)
    for _ in range(3):
        step(stepper, model)
        stepper.begin_sampling()
    assert model.pages.there == {0, 1}
    assert [layer.fills for layer in model.layers] == [1, 1, 0]


def test_pages_that_were_taken_away_are_not_asked_for_where_memory_is_short(stepper: Stepper) -> None:
    model = PagedModel()
    for _ in range(2):
        step(stepper, model)
    model.pages.num_there = 2
    model.pages.evict(2, 3)
    with torch.inference_mode():
        stepper.step(forward, model, {"x": torch.ones(2, 4)})
    assert model.pages.there == {0, 1}


def test_a_model_that_fits_later_is_recorded_then(stepper: Stepper) -> None:
    model = PagedModel(num_there=2)
    for _ in range(3):
        step(stepper, model)
    model.pages.num_there = 100
    stepper.begin_sampling()
    for _ in range(2):
        step(stepper, model)
    assert counts(stepper) == (1, 1, FIRST | {TOO_LARGE: 2})


def test_a_model_that_no_longer_fits_is_not_replayed(stepper: Stepper) -> None:
    model = PagedModel()
    for _ in range(3):
        step(stepper, model)
    model.pages.num_there = 1
    for _ in range(2):
        step(stepper, model)
    assert counts(stepper) == (1, 1, FIRST | {TOO_LARGE: 2})


def test_other_patches_in_pages_that_stay_are_noticed(stepper: Stepper) -> None:
    """The serial numbers are the same, the numbers in the pages are not."""
    model = PagedModel()
    for name, number in (("A", 2.0), ("B", 5.0), (None, 1.0), ("A", 2.0)):
        model.patch(name, number)
        stepper.begin_sampling()
        for _ in range(3):
            step(stepper, model)
    captures, replays, eager = counts(stepper)
    assert (captures, replays) == (4, 7)
    assert eager == FIRST


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: vars(layer).pop("_v"),
        lambda layer: setattr(layer, "_v", (layer._v[0], layer._v[1], 32)),
        lambda layer: layer.weight_function.append(len),
        lambda layer: setattr(layer, "weight_comfy_model_dtype", torch.half),
        lambda layer: setattr(layer, "_v_signature", None),
        lambda layer: setattr(layer, "_v_weight", layer._v_weight.clone()),
        lambda layer: setattr(layer, "_v_bias", torch.ones(4)),
        lambda layer: layer._v[0].alloc(64),
        lambda layer: setattr(layer, "_v", (Range(), *layer._v[1:])),
    ],
)
def test_what_serial_numbers_do_not_show_is_noticed(change: Callable[[Any], Any]) -> None:
    model = PagedModel()
    with torch.inference_mode():
        model.apply(torch.ones(2, 4))
    state = ModelState(model, CPU)
    assert state.has_same_structure()
    assert state.hold()
    state.release()
    change(model.layers[1])
    held = state.hold()
    if held:
        state.release()
    assert not (state.has_same_structure() and state.has_same_weights() and held)


@pytest.mark.parametrize("name", ["_prefetch", "_pins", "_pin_state", "weight_lowvram_function", "_v_block"])
def test_what_the_host_notes_from_use_to_use_is_no_change(name: str) -> None:
    model = PagedModel()
    with torch.inference_mode():
        model.apply(torch.ones(2, 4))
    state = ModelState(model, CPU)
    setattr(model.layers[0], name, object())
    assert state.has_same_structure()
    vars(model.layers[0])["other"] = 1
    assert not state.has_same_structure()


def test_a_weight_that_was_not_used_may_not_be_used_in_a_recording() -> None:
    model = PagedModel()
    with torch.inference_mode():
        model.apply(torch.ones(2, 4))
        state = ModelState(model, CPU)
        with pytest.raises(Uncapturable, match="did not use before"), state.recording():
            model.extra(torch.ones(2, 4))
        with state.recording():
            assert model.pages.num_pins > 0
            model.apply(torch.ones(2, 4))
    assert model.extra.fills == 0
    assert model.extra._v[0] is model.pages
    assert model.pages.num_pins == 0


def test_other_uses_of_a_model_do_not_touch_a_recording(stepper: Stepper) -> None:
    model = PagedModel()
    for _ in range(3):
        step(stepper, model)
    for _ in range(3):
        step(stepper, model, uses_extra=True)
    for _ in range(2):
        step(stepper, model)
    captures, replays, _ = counts(stepper)
    assert (captures, replays) == (2, 4)


def test_pins_are_given_back_when_a_replay_or_a_recording_fails(stepper: Stepper) -> None:
    model = PagedModel()
    for _ in range(2):
        step(stepper, model)
    known = next(iter(stepper._known[model].values()))
    assert known.recording is not None
    assert known.state is not None

    def fail(_inputs: Any) -> Any:
        raise ZeroDivisionError

    known.recording.forward = fail  # type: ignore[attr-defined]
    with pytest.raises(ZeroDivisionError):
        step(stepper, model)
    assert model.pages.num_pins == 0
    with pytest.raises(ZeroDivisionError), known.state.recording():
        raise ZeroDivisionError
    assert model.pages.num_pins == 0


def test_a_small_weight_elsewhere_and_two_ranges_are_refused() -> None:
    model = PagedModel()
    model.norm.to(META)
    with pytest.raises(UncapturableNow, match="not on the GPU"):
        ModelState(model, CPU)
    model = PagedModel()
    model.layers.append(PagedLinear(Range()))
    with pytest.raises(UncapturableNow, match="more than one range"):
        ModelState(model, CPU)


def test_a_host_whose_ranges_lack_something_steps_eagerly() -> None:
    model, unknown = PagedModel(), object()
    for layer in [*model.layers, model.extra]:
        layer._v = (unknown, *layer._v[1:])
    with pytest.raises(UncapturableNow, match="of a kind we do not know"):
        ModelState(model, CPU)


def test_the_profile_of_the_thread_is_as_before(stepper: Stepper) -> None:
    before = sys.getprofile()
    model = PagedModel()
    for _ in range(3):
        step(stepper, model)
    assert sys.getprofile() is before


def test_weights_that_live_elsewhere_are_no_pages() -> None:
    module = SimpleNamespace(_v=NOWHERE)
    with pytest.raises(UncapturableNow, match="other devices"):
        Pages([module])
