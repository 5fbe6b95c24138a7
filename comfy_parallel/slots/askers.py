"""Who asks: whose job it is that comes, and whose jobs an interrupt without an id means."""

from __future__ import annotations

from typing import Any

from comfy_parallel.core.scope import Scope
from comfy_parallel.slots.desk import Asker
from comfy_parallel.slots.items import client_of
from comfy_parallel.slots.slot import Run

_MOST_PEERS = 10_000  # that are remembered
_peers: dict[str, None] = {}  # who has submitted jobs, the newest last


def asker_of(scope: Scope, item: Any) -> Asker:
    """Who submits a job, which is noted: such a peer is no operator."""
    if scope.peer is not None:
        note_peer(scope.peer)
    client_id = client_of(item)
    party = scope.party if scope.party is not None else client_id if client_id is not None else scope.peer
    return Asker(scope.peer, party, scope.is_in_turn)


def note_peer(peer: str) -> None:
    """This peer has submitted a job."""
    _peers.pop(peer, None)
    _peers[peer] = None
    if len(_peers) > _MOST_PEERS:
        del _peers[next(iter(_peers))]


def meant_by(scope: Scope, runs: list[Run]) -> list[Run]:
    """The runs among these that belong to whoever asks.

    The jobs of the client that the request names; without one, those that the same peer has sent. Somebody who has
    never sent a job is an operator, and means all of them.
    """
    if scope.is_all or (scope.client_id is None and scope.peer is None):
        return runs
    if scope.client_id is not None:
        return [run for run in runs if run.client_id == scope.client_id]
    if scope.peer not in _peers:
        return runs
    return [run for run in runs if run.peer == scope.peer]
