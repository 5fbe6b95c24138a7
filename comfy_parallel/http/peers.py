"""Who sent a request: a user, a client, an address."""

from __future__ import annotations

import ipaddress
from typing import Any

from aiohttp import web

from comfy_parallel.config import IN_ORDER
from comfy_parallel.core.scope import Scope

USER_HEADER = "comfy-user"  # the host's, where it was started with --multi-user
ORDER_HEADER = "X-Client-Order"
_CLIENT_QUERY = ("client_id", "clientId")
_OF_THE_SDK = tuple(("client_id", "prompt", *place) for place in ((), ("front",), ("number",)))

_trusted: tuple[str, ...] = ()
_fair_by = "client"


def use(trusted_proxies: tuple[str, ...], fair_by: str) -> None:
    """Believe these addresses, besides the machine's own, whom they forward; share fairly by this."""
    global _trusted, _fair_by
    _trusted, _fair_by = trusted_proxies, fair_by


def ask_as(scope: Scope, request: web.Request) -> Scope:
    """Note in a request's scope who asks."""
    scope.peer = peer_of(request)
    for name in _CLIENT_QUERY if request.query_string else ():
        scope.client_id = request.rel_url.query.get(name) or scope.client_id
    return scope


def peer_of(request: web.Request) -> str:
    """The user's name where the host knows users, else the address, behind proxies that are trusted."""
    user = request.headers.get(USER_HEADER)
    return f"user {user}" if user else address_of(request)


def address_of(request: web.Request) -> str:
    """Where a request comes from: the last address that no trusted proxy has."""
    address = request.remote or "local"
    if "X-Forwarded-For" not in request.headers:
        return address
    forwarded = [part.strip() for part in ",".join(request.headers.getall("X-Forwarded-For", [])).split(",")]
    for previous in reversed([part for part in forwarded if part]):
        if not _is_trusted(address):
            break
        address = previous
    return address


def _is_trusted(address: str) -> bool:
    if address in ("local", *_trusted):
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def party_of(request: web.Request) -> Any:
    """Whom a job counts for among those who share fairly; None where that is its client."""
    if _fair_by == "user":
        return peer_of(request)
    name = _fair_by.removeprefix("header:")
    return None if name == _fair_by else request.headers.get(name, "")


def client_order(request: web.Request, data: dict[str, Any]) -> str | None:
    """The order that a request asks for the jobs of its client, by header or by being of a kind of client that was
    written for one worker; None when it asks for none."""
    named = request.headers.get(ORDER_HEADER)
    if named is not None:
        return named.strip().lower()
    return IN_ORDER if _expects_one_worker(request, data) else None


def _expects_one_worker(request: web.Request, data: dict[str, Any]) -> bool:
    """Whether this was sent by a client whose loop follows one job at a time.

    krita-ai-diffusion marks all of its requests for a tunnel, and sends nothing but these three fields. The SDK
    @saintno/comfyui-sdk sends JSON as plain text, with the client's id before the workflow and a place in the queue at
    most behind it. Its users choose the id.
    """
    if "skip_zrok_interstitial" in request.headers and data.keys() == {"prompt", "client_id", "prompt_id"}:
        return True
    return request.content_type == "text/plain" and (*data,) in _OF_THE_SDK
