"""Memory that the processes of a group hand each other: what one has copied or converted, the others map.

The parent of the group keeps the memories (`group_server.py`) for as long as any process uses them. A file descriptor
goes from process to process, and nothing has a name on disk: when all have ended, nothing is left. Each weight file of
a process has a link of its own to the parent, which takes back all that was claimed or used through it when the link
ends, however the process did.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import struct
import time
from dataclasses import dataclass
from typing import Any

VARIABLE = "COMFY_PARALLEL_GROUP"  # names the group that a process belongs to
_HEADER = struct.Struct("<Q")
_CREDENTIALS = struct.Struct("3i")  # Linux, <sys/socket.h>, struct ucred
_TICK_S = 0.05  # longer than the kernel's clock for files takes to go on

logger = logging.getLogger(__name__)


class GroupLost(Exception):
    """The parent of the group does not answer any more."""


@dataclass(frozen=True, slots=True)
class Found:
    """Memory that a process of the group has made; `fd` is the finder's own, `told` what the maker says of it."""

    number: int
    size: int
    used: int
    fd: int
    told: Any


@dataclass(frozen=True, slots=True)
class FileState:
    """The bytes of a file at one time, for all processes of the machine.

    Nobody can set the time of a file's last change of any kind (`ctime`), as one can that of its bytes.
    """

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, file: str | int) -> FileState:
        """Whatever is written to the file afterwards leads to another state. Raises OSError."""
        stat = os.stat(file)
        if abs(time.time() - stat.st_ctime) < _TICK_S:
            time.sleep(_TICK_S)
            stat = os.stat(file)
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


class Link:
    """A way to the parent of the group, for one thread at a time.

    Raises:
        GroupLost: from each method, when the parent is gone.
    """

    def __init__(self, name: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(address(name))
            check_peer(self._socket)
        except OSError as error:
            self._socket.close()
            raise GroupLost(f"the parent of the group does not answer: {error}") from error

    def close(self) -> None:
        """End it; what was used through it is used no more."""
        self._socket.close()

    def find(self, key: str) -> Found | None:
        """What was made under this key, by now or by who is at it; None: the caller is to make it and to `put` it."""
        reply, fd = self._ask("find", key)
        if reply is None:
            return None
        number, size, used, told = reply
        try:
            return Found(number, size, used, fd, pickle.loads(told))
        except BaseException:
            os.close(fd)
            raise

    def put(self, key: str, memory: int | None, fd: int, used: int, told: Any) -> int:
        """Hand over what was claimed; returns the memory's number.

        Args:
            memory: its number, when it was handed over before with something else in it.
            used: how many bytes of it count.
        """
        fds = [fd] if memory is None else []
        question = ("put", key, memory, os.fstat(fd).st_size, used, pickle.dumps(told))
        return int(self._ask(*question, fds=fds)[0])

    def give_up(self, key: str) -> None:
        """Let another process make what was claimed."""
        self._ask("give_up", key)

    def release(self, memory: int) -> None:
        """Say that nothing lies in it any more, in this process."""
        self._ask("release", memory)

    def used_bytes(self) -> int:
        """Of all memories of the group, each counted once."""
        return int(self._ask("used")[0])

    def _ask(self, *message: Any, fds: list[int] | None = None) -> tuple[Any, int]:
        try:
            send(self._socket, message, fds or [])
            return receive(self._socket)
        except (OSError, EOFError) as error:
            raise GroupLost(f"the parent of the group is gone: {error}") from error


class Group:
    """What this process knows of its group."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._is_lost = False

    def link(self) -> Link | None:
        """A new link; None when the group is lost."""
        try:
            return None if self._is_lost else Link(self.name)
        except GroupLost as error:
            self.lose(error)
            return None

    def lose(self, error: GroupLost) -> None:
        """Do without the group from now on; what is there stays."""
        if not self._is_lost:
            logger.warning("comfy_parallel: weights that are copied or converted are this process's own: %s", error)
        self._is_lost = True

    def used_bytes(self) -> int:
        """Of all memories of the group, each counted once; none when it is lost."""
        link = self.link()
        if link is None:
            return 0
        try:
            return link.used_bytes()
        except GroupLost as error:
            self.lose(error)
            return 0
        finally:
            link.close()


def address(name: str) -> str:
    """In Linux's abstract namespace, where a socket goes with its process."""
    return f"\0comfy_parallel-{name}"


def check_peer(connected: socket.socket) -> int:
    """The id of the process at the other end, if it belongs to our user.

    Raises:
        PermissionError: when it does not.
    """
    found = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(found)
    if uid != os.getuid():
        raise PermissionError(f"process {pid} belongs to user {uid}")
    return int(pid)


def send(to: socket.socket, message: object, fds: list[int]) -> None:
    """Raises OSError."""
    body = pickle.dumps(message)
    socket.send_fds(to, [_HEADER.pack(len(body))], fds)
    to.sendall(body)


def receive(source: socket.socket) -> tuple[Any, int]:
    """A message and the descriptor that came with it, else -1.

    Raises:
        EOFError: when the other end is closed.
        OSError: when it broke.
    """
    header, fds, _, _ = socket.recv_fds(source, _HEADER.size, 1, socket.MSG_WAITALL)
    fd = fds[0] if fds else -1
    try:
        if len(header) < _HEADER.size:
            raise EOFError("the connection was closed")
        message = pickle.loads(_exactly(source, _HEADER.unpack(header)[0]))
    except BaseException:
        if fd >= 0:
            os.close(fd)
        raise
    if fd >= 0:
        os.set_inheritable(fd, False)
    return message, fd


def _exactly(source: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = source.recv(min(size - len(parts), 1 << 20))
        if not part:
            raise EOFError("the connection was closed within a message")
        parts += part
    return bytes(parts)
