"""Nodes that run one at a time."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from comfy_parallel.isolation.packs import serial
from comfy_parallel.isolation.packs.serial import Serial, make_serial
from comfy_parallel.slots.slot import Slot, entered


class Busy:
    """Counts how many are inside at once."""

    inside = most = 0
    FUNCTION = "work"

    def work(self, times: int = 1) -> int:
        cls = type(self)
        cls.inside += 1
        cls.most = max(cls.most, cls.inside)
        time.sleep(0.02)
        cls.inside -= 1
        return self.work(times - 1) + 1 if times > 1 else 1


class OfClass(Busy):
    """As newer nodes are: a class method, which a schema goes with."""

    inside = most = 0
    FUNCTION = "EXECUTE_NORMALIZED"

    @classmethod
    def define_schema(cls) -> None: ...

    @classmethod
    def execute(cls) -> int:
        return Busy.work(cls())


class Static(Busy):
    """A node whose function is static."""

    inside = most = 0

    @staticmethod
    def work(times: int = 1) -> int:
        return Busy.work(Static(), 1)


class Waits:
    """An asynchronous node."""

    FUNCTION = "work"

    async def work(self) -> None: ...


def nothing() -> None: ...


def at_once(call: Callable[[], Any], count: int = 4) -> None:
    threads = [threading.Thread(target=call) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)


@pytest.mark.parametrize(("kind", "name"), [(Busy, "work"), (OfClass, "execute"), (Static, "work")])
def test_a_nodes_function_runs_one_at_a_time_until_that_is_taken_back(kind: Any, name: str) -> None:
    before = vars(kind)[name]
    asynchronous, take_back = make_serial({"Any_Busy": kind}, [Serial(("*_Busy",), "why")], nothing)
    assert asynchronous == []
    kind.most = 0
    at_once(lambda: getattr(kind(), name)())
    assert kind.most == 1
    take_back()
    assert vars(kind)[name] is before
    at_once(lambda: getattr(kind(), name)())
    assert kind.most > 1


def test_an_inherited_function_is_the_class_s_own_again_afterwards() -> None:
    child = type("Child", (Busy,), {})
    _, take_back = make_serial({"child": child}, [Serial(("child",), "why")], nothing)
    assert "work" in vars(child)
    take_back()
    assert "work" not in vars(child)


def test_a_node_may_call_itself() -> None:
    _, take_back = make_serial({"busy": Busy}, [Serial(("busy",), "why")], nothing)
    try:
        assert Busy().work(3) == 3
    finally:
        take_back()


def test_who_waits_can_be_interrupted() -> None:
    entered_first, go_on = threading.Event(), threading.Event()

    class Holds:
        FUNCTION = "work"

        def work(self) -> None:
            entered_first.set()
            go_on.wait(60)

    def interrupt() -> None:
        raise InterruptedError

    _, _take_back = make_serial({"holds": Holds}, [Serial(("holds",), "why")], interrupt)
    first = threading.Thread(target=Holds().work)
    first.start()
    assert entered_first.wait(60)
    with entered(Slot(0, "cpu")), pytest.raises(InterruptedError):
        Holds().work()
    go_on.set()
    first.join(60)


def test_asynchronous_nodes_are_told_apart() -> None:
    asynchronous, _take_back = make_serial({"waits": Waits}, [Serial(("waits",), "why")], nothing)
    assert asynchronous == ["waits"]


def test_a_name_that_is_no_nodes_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        make_serial({"busy": Busy}, [*serial.KNOWN, *serial.of_user(["No_Such_Node"])], nothing)
    assert "No_Such_Node" in caplog.text
    assert "VHS" not in caplog.text
