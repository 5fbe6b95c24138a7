"""Memory that a slot's device lends to another slot's model is counted, and comes back when its owner needs it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest

from comfy_parallel.errors import AllocationError
from comfy_parallel.nodes import donors

META = "meta"
GB = 1 << 30


@pytest.fixture(autouse=True)
def nothing_lent() -> Iterator[None]:
    gc.collect()
    yield
    donors._loans.clear()


class Memory:
    """As a tensor of 1 KiB; torch lets no parameter go to its meta device."""

    def __init__(self, number: int, device: str = "cpu") -> None:
        self.number = number
        self.device = device

    def to(self, device: str) -> Memory:
        return Memory(self.number, device)

    def is_inference(self) -> bool:
        return False


class Parameter:
    def __init__(self, number: int) -> None:
        self.data = Memory(number)

    @property
    def device(self) -> str:
        return self.data.device

    def data_ptr(self) -> int:
        return id(self.data)


def weights(count: int = 3) -> list[Parameter]:
    return list(map(Parameter, range(count)))


def free_memory_of(free: dict[str, int]) -> Any:
    def get_free_memory(dev: Any = None, torch_free_too: bool = False) -> Any:
        found = free[str(dev)]
        return (found, found // 2) if torch_free_too else found

    return donors.counting(get_free_memory, str)


def test_what_is_promised_is_not_free_until_it_is_taken() -> None:
    get_free_memory = free_memory_of({META: 4000, "cpu": 9000})
    assert get_free_memory(META) == 4000
    loan = donors.lend(META, 3072, lambda: get_free_memory(META))
    assert get_free_memory(META) == 928
    assert get_free_memory(META, True) == (928, 928)
    assert get_free_memory("cpu") == 9000
    loan.take(weights())
    assert get_free_memory(META) == 4000  # torch counts it from now on


def test_two_models_are_not_promised_the_same_memory() -> None:
    get_free_memory = free_memory_of({META: 4000})
    loan = donors.lend(META, 3000, lambda: get_free_memory(META))
    with pytest.raises(AllocationError, match="meta can lend 1000 bytes .* not the 2000"):
        donors.lend(META, 2000, lambda: get_free_memory(META))
    del loan
    gc.collect()
    donors.lend(META, 2000, lambda: get_free_memory(META))


def test_the_owner_gets_it_back_before_its_own_models_go() -> None:
    parameters = weights()
    before = [parameter.data_ptr() for parameter in parameters]
    loan = donors.lend(META, 3072, lambda: GB)
    loan.take(parameters)
    assert {str(parameter.device) for parameter in parameters} == {META}
    order: list[str] = []

    def free_memory(memory_required: float, device: Any, keep: Any = ()) -> str:
        order.append(f"host, {loan.taken} lent")
        return "unloaded"

    yielding = donors.yielding(free_memory, lambda device: 500, str)
    assert yielding(400.0, META) == "unloaded"
    assert yielding(1e30, "cpu") == "unloaded"
    assert loan.taken == 3072, "there was enough"
    yielding(501.0, META)
    assert order == ["host, 3072 lent", "host, 3072 lent", "host, 0 lent"]
    assert [parameter.data_ptr() for parameter in parameters] == before
    assert [parameter.data.number for parameter in parameters] == [0, 1, 2]


def test_the_largest_loans_go_first_and_no_more_than_is_needed() -> None:
    small, large = donors.lend(META, 1024, lambda: GB), donors.lend(META, 2048, lambda: GB)
    small.take(weights(1))
    large.take(weights(2))
    assert donors.take_back(META, 2000) == 2048
    assert (small.taken, large.taken) == (1024, 0)


def test_a_model_that_is_loaded_again_takes_it_again_only_if_there_is_room() -> None:
    room, parameters = [GB], weights()
    loan = donors.lend(META, 3072, lambda: room[0])
    loan.take(parameters)
    loan.give_back()
    room[0] = 3071
    loan.take(parameters)
    assert {str(parameter.device) for parameter in parameters} == {"cpu"}
    room[0] = 3072
    loan.take(parameters)
    assert {str(parameter.device) for parameter in parameters} == {META}
    room[0] = 0
    loan.take(parameters)  # They are there already.
    assert loan.give_back() == 3072


def test_a_weight_that_was_replaced_meanwhile_is_left_as_it_is() -> None:
    parameters = weights(1)
    loan = donors.lend(META, 1024, lambda: GB)
    loan.take(parameters)
    parameters[0].data = Memory(7)
    loan.give_back()
    assert parameters[0].data.number == 7


def test_a_model_that_is_gone_holds_nothing() -> None:
    loan = donors.lend(META, 1024, lambda: GB)
    assert donors.promised_bytes(META) == 1024
    del loan
    gc.collect()
    assert donors.promised_bytes(META) == 0
