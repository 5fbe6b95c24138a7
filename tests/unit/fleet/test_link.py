"""Messages between the front and a worker arrive whole, and what cannot be sent costs its own text only."""

from __future__ import annotations

import threading

import pytest

from comfy_parallel.fleet.link import Link, pack, pack_what_can_be, pair, unpack


@pytest.fixture
def ends() -> tuple[Link, Link]:
    ours, fd = pair()
    return ours, Link(fd)


def test_messages_arrive_in_order_and_whole(ends: tuple[Link, Link]) -> None:
    big = bytes(3 << 20)
    sender = threading.Thread(target=lambda: [ends[0].send("job", 1, big), ends[0].send("interrupt", 1)])
    sender.start()
    assert ends[1].receive(60) == ("job", 1, big)
    assert ends[1].receive(60) == ("interrupt", 1)
    sender.join()


def test_nothing_comes_in_time(ends: tuple[Link, Link]) -> None:
    assert ends[1].receive(0.01) is None


def test_the_other_end_is_gone(ends: tuple[Link, Link]) -> None:
    ends[0].close()
    with pytest.raises((EOFError, OSError)):
        ends[1].receive(60)
    with pytest.raises(OSError):
        ends[1].send("beat")


def test_many_threads_send_at_once(ends: tuple[Link, Link]) -> None:
    threads = [threading.Thread(target=lambda n=n: [ends[0].send(n, b"x" * 9000) for _ in range(20)]) for n in range(4)]  # type: ignore[misc]
    for thread in threads:
        thread.start()
    assert sorted(ends[1].receive(60)[0] for _ in range(80)) == sorted([*range(4)] * 20)  # type: ignore[index]


def test_a_part_that_cannot_be_sent_is_sent_as_text() -> None:
    value = {"outputs": {"1": [threading.Lock(), 5]}, "pair": (1, "two")}
    assert unpack(pack_what_can_be(value)) == {"outputs": {"1": ["<lock>", 5]}, "pair": (1, "two")}
    with pytest.raises(TypeError):
        pack(value)
