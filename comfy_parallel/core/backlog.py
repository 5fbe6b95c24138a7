"""What waits to be sent to one client that reads slowly, and what gives way when that is too much. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

MOST_MESSAGES = 10_000
MOST_BYTES = 32 << 20


class Waiting(NamedTuple):
    """One message. `may_go`: a later one makes up for it, as for a preview."""

    message: Any
    size: int
    may_go: bool


@dataclass(frozen=True, slots=True)
class Limits:
    """How much may wait for one client."""

    messages: int = MOST_MESSAGES
    size_bytes: int = MOST_BYTES


class Backlog:
    """Messages in their order. Too many: the oldest that may go are dropped; then it is `is_over`."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._waiting: deque[Waiting] = deque()
        self._num_may_go = 0
        self.size_bytes = 0
        self.num_dropped = 0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def is_over(self) -> bool:
        """Whether more waits than may. The oldest has its turn however large it is: no client could read it sooner."""
        behind = self.size_bytes - (self._waiting[0].size if self._waiting else 0)
        return len(self._waiting) > self._limits.messages or behind > self._limits.size_bytes

    def put(self, one: Waiting) -> None:
        """Let it wait behind the others."""
        self._waiting.append(one)
        self._num_may_go += one.may_go
        self.size_bytes += one.size
        if self.is_over:
            self._drop()

    def take(self) -> Any:
        """The oldest message.

        Raises:
            IndexError: when none waits.
        """
        one = self._waiting.popleft()
        self._num_may_go -= one.may_go
        self.size_bytes -= one.size
        return one.message

    def clear(self) -> None:
        """Nothing waits any more."""
        self._waiting.clear()
        self._num_may_go = self.size_bytes = 0

    def _drop(self) -> None:
        """Drop half of what may go, the oldest first: one by one would look at all messages for each."""
        to_drop = (self._num_may_go + 1) // 2
        self.num_dropped += to_drop
        self._num_may_go -= to_drop
        kept: deque[Waiting] = deque()
        for one in self._waiting:
            if one.may_go and to_drop:
                to_drop -= 1
                self.size_bytes -= one.size
            else:
                kept.append(one)
        self._waiting = kept
