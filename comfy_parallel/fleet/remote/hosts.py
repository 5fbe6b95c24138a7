"""The ComfyUIs on other machines, and the slots whose jobs they run."""

from __future__ import annotations

import concurrent.futures
import logging
from collections.abc import Sequence
from typing import Any

from comfy_parallel.core.remotes import Remote
from comfy_parallel.errors import RemoteError
from comfy_parallel.fleet.remote.host import RemoteHost
from comfy_parallel.fleet.remote.slot import RemoteSlot
from comfy_parallel.slots import items
from comfy_parallel.slots.slot import Slot

logger = logging.getLogger(__name__)

_CONTACT_S = 10.0


class Hosts:
    """All of them. The number of slots is settled at the start, by what each tells of its GPUs then."""

    def __init__(self, remotes: Sequence[Remote]) -> None:
        self._hosts = [RemoteHost(remote, self._judge_again) for remote in remotes]
        self._slots: list[RemoteSlot] = []
        self._front: Any = None
        self._contact()

    @property
    def of_later(self) -> list[RemoteHost]:
        """Those that have no address yet."""
        return [host for host in self._hosts if not host.remote.url]

    @property
    def places(self) -> list[tuple[RemoteHost, int, str]]:
        """For each slot: its host, which of that one's slots it is, and what people see of it."""
        found = []
        for host in self._hosts:
            count = host.remote.slots or max(1, len(host.numbers))
            for place in range(count):
                found.append((host, place, host.remote.name if count == 1 else f"{host.remote.name}:{place}"))
        return found

    def serve(self, front: Any, slots: Sequence[Slot], *, requeues: bool, sends_keys: bool) -> None:
        """Have these slots, one for each place, run their jobs there."""
        self._front = front
        for slot, (host, place, _) in zip(slots, self.places, strict=True):
            made = RemoteSlot(slot, host, place, requeues=requeues, sends_keys=sends_keys)
            slot.process = made
            self._slots.append(made)
        items.when_to_bar(self._judge)

    def start(self) -> None:
        """Watch them; returns at once."""
        for host in self._hosts:
            host.watch()

    def stop(self) -> None:
        """Let go of them."""
        items.when_to_bar(None)
        for host in self._hosts:
            host.stop()

    def _contact(self) -> None:
        """Ask each, all at once, how many slots it has."""
        asked = {host.contact(): host for host in self._hosts if host.remote.url}
        concurrent.futures.wait(asked, _CONTACT_S)
        for future, host in asked.items():
            problem: object = future.exception() if future.done() else f"it did not answer within {_CONTACT_S:g} s"
            if problem is not None and not isinstance(problem, str | RemoteError):
                logger.error("%s: what it says is not understood: %r", host.remote.name, problem)
            if problem is not None:
                logger.warning(
                    "%s (%s) cannot be reached: %s. It has %d slots, which run jobs as soon as it can be",
                    host.remote.name,
                    host.remote.url,
                    problem,
                    host.remote.slots or 1,
                )

    def _judge(self, item: Any) -> dict[int, str]:
        reasons = {one.slot.index: one.why_not(item) for one in self._slots}
        return {index: reason for index, reason in reasons.items() if reason is not None}

    def _judge_again(self) -> None:
        for slot in self._slots:
            slot.forget_refusals()
        items.judge_again()
        if self._front is not None:
            with self._front.mutex:
                self._front._dispatcher.dispatch()
