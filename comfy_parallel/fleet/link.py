"""Messages between the front and a worker process, over a pair of sockets that only these two have."""

from __future__ import annotations

import logging
import pickle
import socket
import threading
from multiprocessing.connection import Connection
from typing import Any

logger = logging.getLogger(__name__)

_PICKLED = 5  # the protocol
_DEEPEST = 100  # levels of a value that are looked through for what cannot be sent


class Link:
    """One end. A message is a tuple of plain values, the first of which says what it is; any thread may send."""

    def __init__(self, fd: int) -> None:
        self._connection = Connection(fd)
        self._sending = threading.Lock()

    def send(self, *message: Any) -> None:
        """Send a message.

        Raises:
            OSError: when the other end is gone.
        """
        packed = pickle.dumps(message, _PICKLED)
        with self._sending:
            self._connection.send_bytes(packed)

    def receive(self, timeout_s: float | None = None) -> tuple[Any, ...] | None:
        """The next message; None when there is none within `timeout_s`.

        Raises:
            EOFError, OSError: when the other end is gone.
        """
        if not self._connection.poll(timeout_s):
            return None
        message: tuple[Any, ...] = pickle.loads(self._connection.recv_bytes())
        return message

    def close(self) -> None:
        """Close this end."""
        self._connection.close()


def pair() -> tuple[Link, int]:
    """The front's end, and the file descriptor of the worker's, which is to be inherited."""
    ours, theirs = socket.socketpair()
    return Link(ours.detach()), theirs.detach()


def pack(value: Any) -> bytes:
    """A value of a job, as a part of a message: what the other process may fail to read costs that job only.

    Raises:
        Exception: whatever pickle raises for what cannot be sent.
    """
    return pickle.dumps(value, _PICKLED)


def pack_what_can_be(value: Any) -> bytes:
    """The same; what cannot be sent, such as an object of a node's own, is sent as its text."""
    try:
        return pack(value)
    except Exception as error:  # noqa: BLE001 - pickle calls the code of nodes' classes, which may raise anything
        logger.warning("comfy_parallel: part of a job's results is sent to the front as text: %s", error)
        return pack(_sendable(value, _DEEPEST))


def _sendable(value: Any, depth: int) -> Any:
    if depth and type(value) is dict:
        return {_sendable(key, depth - 1): _sendable(part, depth - 1) for key, part in value.items()}
    if depth and type(value) in (list, tuple):
        return type(value)(_sendable(part, depth - 1) for part in value)
    try:
        pack(value)
    except Exception:  # noqa: BLE001 - as above; the caller has logged it
        return f"<{type(value).__name__}>"
    return value


def unpack(packed: bytes) -> Any:
    """The value again."""
    return pickle.loads(packed)
