"""What processes of a group copy or convert is made once, and is there for as long as one of them uses it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from comfy_parallel.weights.files.group import FileState, Found, Group, GroupLost, Link
from comfy_parallel.weights.files.group_server import GroupServer

REPO_DIR = Path(__file__).resolve().parents[4]
PATIENCE_S = 60
CLAIM_AND_WAIT = (
    "import sys, time\n"
    "from comfy_parallel.weights.files.group import Link\n"
    "link = Link(sys.argv[1])\n"
    "assert link.find('weights') is None\n"
    "print('claimed', flush=True)\n"
    "time.sleep(600)\n"
)


@pytest.fixture
def server() -> Iterator[GroupServer]:
    server = GroupServer()
    yield server
    server.close()


@pytest.fixture
def claimer(server: GroupServer) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has claimed `weights` and will never make them."""
    with subprocess.Popen(
        [sys.executable, "-c", CLAIM_AND_WAIT, server.name], stdout=subprocess.PIPE, cwd=REPO_DIR
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"claimed\n"
        yield process
        process.kill()


def put(link: Link, key: str, content: bytes) -> int:
    fd = os.memfd_create("test")
    os.write(fd, content)
    number = link.put(key, None, fd, len(content), "told")
    os.close(fd)
    return number


def content_of(found: Found | None) -> bytes:
    assert found is not None
    content = os.pread(found.fd, found.size, 0)
    os.close(found.fd)
    return content


def find_later(link: Link, key: str) -> tuple[threading.Thread, list[Found | None]]:
    found: list[Found | None] = []
    thread = threading.Thread(target=lambda: found.append(link.find(key)))
    thread.start()
    return thread, found


def test_one_makes_and_the_others_wait_for_it(server: GroupServer) -> None:
    maker, other = Link(server.name), Link(server.name)
    assert maker.find("weights") is None
    thread, found = find_later(other, "weights")
    put(maker, "weights", b"numbers")
    thread.join(PATIENCE_S)
    assert found[0] is not None
    assert found[0].told == "told"
    assert content_of(found[0]) == b"numbers"


def test_who_gives_up_lets_the_next_make_it(server: GroupServer) -> None:
    maker, other = Link(server.name), Link(server.name)
    assert maker.find("weights") is None
    thread, found = find_later(other, "weights")
    maker.give_up("weights")
    thread.join(PATIENCE_S)
    assert found == [None]


def test_what_a_killed_process_was_making_is_made_by_another(
    server: GroupServer, claimer: subprocess.Popen[bytes]
) -> None:
    thread, found = find_later(Link(server.name), "weights")
    claimer.send_signal(signal.SIGKILL)
    thread.join(PATIENCE_S)
    assert found == [None]


def test_memory_outlives_its_maker_and_is_counted_once(server: GroupServer) -> None:
    maker, other = Link(server.name), Link(server.name)
    assert maker.find("weights") is None
    put(maker, "weights", b"numbers")
    found = other.find("weights")
    assert server.used_bytes == 7
    maker.close()
    assert content_of(found) == b"numbers"
    assert content_of(other.find("weights")) == b"numbers"
    assert other.used_bytes() == 7


def test_memory_goes_with_its_last_user(server: GroupServer) -> None:
    maker, other = Link(server.name), Link(server.name)
    assert maker.find("weights") is None
    number = put(maker, "weights", b"numbers")
    os.close(found.fd) if (found := other.find("weights")) else None
    maker.release(number)
    assert other.used_bytes() == 7
    other.release(number)
    assert other.used_bytes() == 0
    assert other.find("weights") is None


def test_what_is_gone_may_be_released_again(server: GroupServer) -> None:
    link = Link(server.name)
    assert link.find("weights") is None
    number = put(link, "weights", b"numbers")
    link.release(number)
    link.release(number)
    assert link.find("weights") is None


def test_more_in_the_same_memory_is_handed_over_under_its_number(server: GroupServer) -> None:
    maker = Link(server.name)
    fd = os.memfd_create("test")
    os.ftruncate(fd, 4096)
    assert maker.find("a") is None
    number = maker.put("a", None, fd, 10, b"")
    assert maker.find("b") is None
    assert maker.put("b", number, fd, 30, b"") == number
    os.close(fd)
    assert maker.used_bytes() == 30


def test_without_its_parent_a_process_goes_on_alone_and_says_so_once(
    server: GroupServer, caplog: pytest.LogCaptureFixture
) -> None:
    group = Group(server.name)
    link = group.link()
    assert link is not None
    server.close()
    with pytest.raises(GroupLost):
        link.find("weights")
    assert (group.used_bytes(), group.used_bytes(), group.link()) == (0, 0, None)
    assert caplog.text.count("this process's own") == 1


def test_strangers_get_nothing(server: GroupServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(GroupLost, match="belongs to user"):
        Link(server.name)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger:
        stranger.connect(f"\0comfy_parallel-{server.name}")
        assert stranger.recv(1) == b""


def test_a_file_is_another_after_any_write(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"old")
    before = FileState.of(str(path))
    stat = path.stat()
    path.write_bytes(b"new")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = FileState.of(str(path))
    assert (before.size, before.mtime_ns, before.inode) == (after.size, after.mtime_ns, after.inode)
    assert before != after
