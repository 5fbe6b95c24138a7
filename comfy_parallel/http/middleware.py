"""Around the host's routes: which slot a request means, checks of what it carries, completed replies."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from comfy_parallel.config import CLIENT_ORDERS
from comfy_parallel.core.scope import HEADER, Scope, current_scope, is_of_request, scoped
from comfy_parallel.core.shown import shown
from comfy_parallel.errors import BadRequest
from comfy_parallel.http import (
    bodies,
    checks,
    guard,
    jobs,
    keys,
    log,
    participants,
    peers,
    replies,
    routes,
    status,
    templates,
    webhooks,
)
from comfy_parallel.http.targets import header_target, settle_target
from comfy_parallel.slots.slot import Run, slots

Middleware = Callable[[web.Request, bodies.Handler], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Rule:
    """What to do around one of the host's routes: check its body, make its scope, complete its reply, or
    give one in the place of an empty one."""

    check: Callable[[dict[str, Any]], None] | None = None
    may_be_empty: bool = False
    scope: Callable[[Scope, dict[str, Any]], None] | None = None
    complete: Callable[[Any, bytes], bytes] | None = None
    reply: Callable[[Scope], dict[str, Any]] | None = None


def setup(
    server: Any, front: Any, models_of: status.ModelsOf, *, allows_origins: bool, secret: str | None = None
) -> Callable[[], None]:
    """Add the middlewares and the routes to the host's server, before it builds its routing table.

    `allows_origins`: the host was started with --enable-cors-header. `secret`: what every request must bring along.
    Returns what takes all of it away again.
    """
    middlewares = server.app.middlewares
    before, routes_before = list(middlewares), list(server.routes)
    middlewares.insert(0, log.mark_request)
    middlewares.extend([bodies.refuse_unreadable, _scope_middleware(server, front)])
    if allows_origins:
        middlewares.insert(0, _cors_middleware)
    if secret is not None:
        middlewares.insert(0, guard.only_with(secret))
    routes.add_routes(server, front, models_of, functools.partial(_submit_to_host, server, front))
    added = [middleware for middleware in middlewares if middleware not in before]
    routes_added = [route for route in server.routes if route not in routes_before]

    def take_away() -> None:
        middlewares[:] = [middleware for middleware in middlewares if middleware not in added]
        server.routes._items[:] = [route for route in server.routes if route not in routes_added]

    return take_away


def _scope_middleware(
    server: Any, front: Any
) -> Callable[[web.Request, bodies.Handler], Awaitable[web.StreamResponse]]:
    @web.middleware
    async def scope_middleware(request: web.Request, handler: bodies.Handler) -> web.StreamResponse:
        path = request.path.removeprefix("/api")
        if path == "/prompt" and request.method == "POST":
            return await _submit(request, handler, front)
        if path == "/ws":
            with scoped(Scope(viewed_slots=_slots_of_client(request.rel_url.query.get("clientId")))):
                return await handler(request)
        rule = _rule(request.method, path)
        try:
            if rule is None and request.method == "GET":
                return await handler(request)
            if rule is None:  # A node pack's route may interrupt, or queue jobs.
                with scoped(peers.ask_as(Scope(), request)):
                    return await handler(request)
            scope = await _scope_of(request, rule)
            with scoped(scope):
                response = await handler(request)
        except BadRequest as error:
            return replies.refusal(error)
        if rule.reply is not None and response.status == 200:
            return web.json_response(rule.reply(scope))
        if rule.complete is not None:
            replies.complete(response, functools.partial(rule.complete, front))
        replies.complete(response, replies.shortened, status=400)
        return response

    return scope_middleware


@web.middleware
async def _cors_middleware(request: web.Request, handler: bodies.Handler) -> web.StreamResponse:
    """With --enable-cors-header the host allows only its own headers: allow ours as well."""
    response = await handler(request)
    allowed = response.headers.get("Access-Control-Allow-Headers")
    if allowed is not None:
        response.headers["Access-Control-Allow-Headers"] = f"{allowed}, {HEADER}, {keys.HEADER}"
    return response


async def _submit(request: web.Request, handler: bodies.Handler, front: Any) -> web.StreamResponse:
    """`POST /prompt`. The body is checked in the host's handler, by `check_prompt`, so that it is parsed once."""
    try:
        scope = peers.ask_as(Scope(target=header_target(request), party=peers.party_of(request)), request)
        scope.order_of = functools.partial(peers.client_order, request)
        scope.is_submission, scope.request_key = True, await keys.request_key(request)
        front.closing.check(scope.target)  # A node pack may keep jobs for a while before it queues them.
        with scoped(scope):
            response = await handler(request)
    except BadRequest as error:
        return replies.refusal(error)
    except (ValueError, LookupError, RecursionError):
        refusal = await _refusal_of_body(request)
        if refusal is None:
            raise
        return refusal
    if response.status == 200:
        await front.ledger.kept()
    if scope.repeated is not None:
        replies.complete(response, functools.partial(replies.as_repeated, scope.repeated))
    else:
        replies.complete(response, functools.partial(replies.with_gpu_id, scope.placed))
    replies.complete(response, replies.shortened, status=400)
    return response


async def _submit_to_host(server: Any, front: Any, request: web.Request) -> web.StreamResponse:
    """What `POST /prompt` answers to the body of this request."""
    handler = next(route.handler for route in server.routes if (route.method, route.path) == ("POST", "/prompt"))
    return await _submit(request, handler, front)


async def _refusal_of_body(request: web.Request) -> web.Response | None:
    """What is wrong with a body that the host failed on; None when the body is not to blame."""
    try:
        checks.parse_object(await request.read(), charset=request.charset or "utf-8")
    except BadRequest as error:
        return replies.refusal(error)
    return None


async def _scope_of(request: web.Request, rule: Rule) -> Scope:
    scope = peers.ask_as(Scope(target=header_target(request)), request)
    data: dict[str, Any] = {}
    if rule.check is not None:
        charset = request.charset or "utf-8"
        data = checks.parse_object(await request.read(), charset=charset, may_be_empty=rule.may_be_empty)
        rule.check(data)
    elif request.method == "GET":
        checks.check_page(dict(request.query))
    if rule.scope is not None:
        rule.scope(scope, data)
    return scope


def _scope_to_slot(scope: Scope, data: dict[str, Any]) -> None:
    scope.slot = scope.target if isinstance(scope.target, int) else None


def check_prompt(data: Any) -> None:
    """Check what `POST /prompt` brought.

    Raises:
        BadRequest: when the host could not act on it, or when it names a slot that is not there.
    """
    checks.check_object(data)
    checks.check_prompt(data)
    _check_scheduling(data)
    settle_target(data)


def _check_scheduling(data: dict[str, Any]) -> None:
    """Check what a job's `extra_data` asks of the scheduler, and write there what its request asks."""
    scope, extra_data = current_scope(), data.get("extra_data", {})
    if "priority" in extra_data:
        jobs.check_priority(extra_data["priority"], "extra_data.priority")
    webhooks.check(extra_data)
    participants.check(extra_data)
    order = extra_data.get("client_order")
    if order is None and scope.order_of is not None and (order := scope.order_of(data)) is not None:
        data["extra_data"] = {**extra_data, "client_order": order}
    if order is not None and order not in CLIENT_ORDERS:
        raise BadRequest(
            "invalid_request", f"client_order is {shown(order)}", f"send {' or '.join(CLIENT_ORDERS)}, or leave it out"
        )
    if is_of_request():
        scope.is_in_turn = "number" not in data and not data.get("front")


def _scope_of_interrupt(scope: Scope, data: dict[str, Any]) -> None:
    scope.prompt_id = data.get("prompt_id") or None
    scope.client_id, scope.is_all = data.get("client_id") or scope.client_id, data.get("all") is True
    if scope.prompt_id is None:
        _scope_to_slot(scope, data)


def _slots_of_client(client_id: str | None) -> tuple[int, ...]:
    if not client_id:
        return ()
    return tuple(slot.index for slot in slots() if _runs_for(slot.run, client_id))


def _runs_for(run: Run | None, client_id: str) -> bool:
    return run is not None and run.client_id == client_id and run.share is None


def _rule(method: str, path: str) -> Rule | None:
    rule = _RULES.get((method, path))
    if rule is None and method == "GET" and path.startswith("/jobs/") and path.count("/") == 2:
        return _RULES["GET", "/jobs"]
    return rule


_RULES = {
    ("GET", "/queue"): Rule(scope=_scope_to_slot),
    ("POST", "/queue"): Rule(check=checks.check_queue_change, scope=_scope_to_slot),
    ("POST", "/interrupt"): Rule(
        check=checks.check_interrupt,
        may_be_empty=True,
        scope=_scope_of_interrupt,
        reply=lambda scope: {"interrupted": scope.interrupted},
    ),
    ("POST", "/free"): Rule(check=lambda data: None, scope=_scope_to_slot),
    ("GET", "/history"): Rule(),
    ("POST", "/history"): Rule(check=checks.check_queue_change),
    ("GET", "/jobs"): Rule(complete=replies.add_gpu_ids),
    ("GET", templates.LIST): Rule(complete=templates.add_names),
    ("POST", "/jobs/cancel"): Rule(),
}
