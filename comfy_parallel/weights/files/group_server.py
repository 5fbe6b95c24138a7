"""The parent's side of a group: it keeps the memories that processes hand each other, and who uses which."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from comfy_parallel.weights.files import group

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Memory:
    fd: int
    size: int
    used: int
    users: set[_Caller] = field(default_factory=set)


@dataclass(slots=True)
class _Made:
    memory: int
    told: bytes


class GroupServer:
    """Keeps what the processes of a group share, for as long as one of them uses it; `name` is for their environment.

    It runs on threads of its own and needs neither torch nor ComfyUI.
    """

    def __init__(self) -> None:
        self.name = secrets.token_hex(16)
        self._changed = threading.Condition()
        self._memories: dict[int, _Memory] = {}
        self._made: dict[str, _Made] = {}
        self._claimed: dict[str, _Caller] = {}
        self._callers: set[_Caller] = set()
        self._last = 0
        self._is_closed = False
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(group.address(self.name))
        self._listener.listen(128)
        threading.Thread(target=self._accept, daemon=True, name="comfy_parallel-group").start()

    @property
    def used_bytes(self) -> int:
        """Of all memories, each counted once."""
        with self._changed:
            return sum(memory.used for memory in self._memories.values())

    def close(self) -> None:
        """Let go of everything; the processes keep what they have."""
        with self._changed:
            self._is_closed = True
            callers = list(self._callers)
            self._changed.notify_all()
        _shut(self._listener)
        for caller in callers:
            _shut(caller.socket)

    def _accept(self) -> None:
        while True:
            try:
                connected, _ = self._listener.accept()
            except OSError:  # It was closed.
                return
            try:
                group.check_peer(connected)
            except OSError as error:
                logger.warning("comfy_parallel: a stranger asked for shared weights and got none: %s", error)
                connected.close()
                continue
            caller = _Caller(connected)
            with self._changed:
                self._callers.add(caller)
            threading.Thread(target=self._serve, args=(caller,), daemon=True, name="comfy_parallel-group").start()

    def _serve(self, caller: _Caller) -> None:
        try:
            while True:
                (what, *arguments), fd = group.receive(caller.socket)
                reply, sent = getattr(self, f"_on_{what}")(caller, *arguments, *([fd] if what == "put" else []))
                try:
                    group.send(caller.socket, reply, [] if sent is None else [sent])
                finally:
                    if sent is not None:
                        os.close(sent)
        except (OSError, EOFError):
            pass  # It has ended, or we have.
        finally:
            self._forget(caller)

    def _on_find(self, caller: _Caller, key: str) -> tuple[Any, int | None]:
        with self._changed:
            self._changed.wait_for(lambda: key not in self._claimed or self._is_closed)
            if self._is_closed:
                raise EOFError
            made = self._made.get(key)
            if made is None:
                self._claimed[key] = caller
                return None, None
            memory = self._memories[made.memory]
            memory.users.add(caller)
            return (made.memory, memory.size, memory.used, made.told), os.dup(memory.fd)

    def _on_put(
        self, caller: _Caller, key: str, number: int | None, size: int, used: int, told: bytes, fd: int
    ) -> tuple[Any, int | None]:
        with self._changed:
            if number is None:
                self._last += 1
                number = self._last
                self._memories[number] = _Memory(fd, size, used)
            memory = self._memories[number]
            memory.used = used
            memory.users.add(caller)
            self._made[key] = _Made(number, told)
            self._claimed.pop(key, None)
            self._changed.notify_all()
        return number, None

    def _on_give_up(self, caller: _Caller, key: str) -> tuple[Any, int | None]:
        with self._changed:
            self._claimed.pop(key, None)
            self._changed.notify_all()
        return None, None

    def _on_release(self, caller: _Caller, number: int) -> tuple[Any, int | None]:
        with self._changed:
            if number in self._memories:
                self._memories[number].users.discard(caller)
            self._drop_unused()
        return None, None

    def _on_used(self, caller: _Caller) -> tuple[Any, int | None]:
        return self.used_bytes, None

    def _forget(self, caller: _Caller) -> None:
        caller.socket.close()
        with self._changed:
            self._callers.discard(caller)
            self._claimed = {key: claimer for key, claimer in self._claimed.items() if claimer is not caller}
            for memory in self._memories.values():
                memory.users.discard(caller)
            self._drop_unused()
            self._changed.notify_all()

    def _drop_unused(self) -> None:
        for number in [number for number, memory in self._memories.items() if not memory.users]:
            os.close(self._memories.pop(number).fd)
        self._made = {key: made for key, made in self._made.items() if made.memory in self._memories}


@dataclass(eq=False, slots=True)
class _Caller:
    socket: socket.socket


def _shut(one: socket.socket) -> None:
    with suppress(OSError):  # The other end was first.
        one.shutdown(socket.SHUT_RDWR)
    one.close()
