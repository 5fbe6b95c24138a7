"""What is told of a module's size is what the host tells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from comfy_parallel.slots.slot import entered
from comfy_parallel.weights.gpu import leaves
from tests.fakes import make_slots
from tests.unit.weights.samples import slots_store, wrapper

SLOT = make_slots("cpu")[0]


class Extra(nn.Linear):
    def get_extra_state(self) -> Any:
        return torch.zeros(7)

    def set_extra_state(self, state: Any) -> None:
        raise NotImplementedError


class Saved(nn.Linear):
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "packed"] = torch.zeros(3)


class Marked(torch.Tensor):
    """A tensor of a kind of its own."""


def tied() -> nn.Module:
    module = nn.Linear(3, 3, bias=False)
    module.again = module.weight
    module.register_parameter("nothing", None)
    return module


def buffered() -> nn.Module:
    module = nn.BatchNorm1d(3)
    module.register_buffer("hidden", torch.zeros(9), persistent=False)
    module.register_buffer("nothing", None)
    return module


def hooked() -> nn.Module:
    module = nn.Linear(3, 3)

    def hook(module: nn.Module, found: Any, prefix: str, local: Any) -> None:
        del found["bias"]

    module._register_state_dict_hook(hook)
    return module


def marked() -> nn.Module:
    module = nn.Linear(3, 3)
    module.register_buffer("kind", torch.zeros(2).as_subclass(Marked))
    return module


MODULES: list[Callable[[], nn.Module]] = [
    lambda: nn.Linear(3, 4, dtype=torch.float16),
    lambda: nn.Conv2d(3, 4, 3, bias=False, device="meta"),
    nn.ReLU,
    tied,
    buffered,
    hooked,
    marked,
    lambda: Extra(2, 2),
    lambda: Saved(2, 2),
    lambda: nn.Sequential(nn.Linear(2, 2), tied()),
    lambda: nn.MultiheadAttention(4, 2),
]


@pytest.fixture(params=MODULES)
def module(request: pytest.FixtureRequest) -> nn.Module:
    made: nn.Module = request.param()
    return made


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> None:
    slots_store(monkeypatch)


def test_a_module_is_as_large_as_the_host_says(module: nn.Module) -> None:
    asked = []

    def module_size(module: nn.Module) -> int:
        """ComfyUI's."""
        asked.append(module)
        return sum(tensor.nelement() * tensor.element_size() for tensor in module.state_dict().values())

    expected = module_size(module)
    with entered(SLOT):
        assert wrapper("comfy.model_management:module_size")(module_size)(module) == expected
    wrapper("comfy.model_management:module_size")(module_size)(module)
    assert asked in ([module] * 2, [module] * 3)


def test_torch_is_asked_only_where_it_must_be() -> None:
    sizes = [leaves.size_of(make()) for make in MODULES]
    assert [size is None for size in sizes] == [False] * 5 + [True] * 6
