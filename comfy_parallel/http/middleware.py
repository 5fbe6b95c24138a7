"""The HTTP side: which slot a request means, checks of what it carries, and the routes we add."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from comfy_parallel.core.scope import BODY_FIELD, HEADER, Scope, parse_target, scoped
from comfy_parallel.errors import BadRequest
from comfy_parallel.host import facts
from comfy_parallel.http import checks, preload, status
from comfy_parallel.slots.slot import slots
from comfy_parallel.weights import report

logger = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Rule:
    """What to do around one of the host's routes: check its body, make its scope, complete its reply."""

    check: Callable[[dict[str, Any]], None] | None = None
    may_be_empty: bool = False
    scope: Callable[[Scope, dict[str, Any]], None] | None = None
    complete: Callable[[bytes, Any], bytes] | None = None


def setup(server: Any, front: Any, models_of: status.ModelsOf, *, allows_origins: bool) -> None:
    """Add the middlewares and the routes to the host's server, before it builds its routing table.

    `allows_origins`: the host was started with --enable-cors-header.
    """
    server.app.middlewares.append(_scope_middleware(server, front))
    if allows_origins:
        server.app.middlewares.insert(0, _cors_middleware)
    _add_routes(server.routes, front, models_of)


def _add_routes(routes: web.RouteTableDef, front: Any, models_of: status.ModelsOf) -> None:
    @routes.get("/queue/all")
    async def queue_all(request: web.Request) -> web.Response:
        return web.Response(text=status.queue_all_json(front, models_of), content_type="application/json")

    @routes.get("/debug/queues")
    async def debug_queues(request: web.Request) -> web.Response:
        return web.json_response(status.debug_queues(front))

    @routes.get("/parallel/weights")
    async def weights(request: web.Request) -> web.Response:
        return web.json_response(report.weights_json(facts.weight_name))

    @routes.post("/parallel/preload")
    async def preload_files(request: web.Request) -> web.Response:
        try:
            data = checks.parse_object(await request.read(), charset=request.charset or "utf-8")
            files, gpu_ids = preload.check_request(data, _header_target(request))
            prompt = preload.make_prompt(files, facts.weight_files)
        except BadRequest as error:
            return _refusal(error)
        return web.json_response({"jobs": preload.submit(front.server, prompt, gpu_ids)})

    @routes.get("/metrics")
    async def prometheus(request: web.Request) -> web.Response:
        try:
            from comfy_parallel.http import metrics
        except ModuleNotFoundError as error:
            return web.Response(status=501, text=f"{error}; run: pip install prometheus-client\n")
        return web.Response(body=metrics.exposition(front), headers={"Content-Type": metrics.CONTENT_TYPE})


def _scope_middleware(server: Any, front: Any) -> Callable[[web.Request, Handler], Awaitable[web.StreamResponse]]:
    @web.middleware
    async def scope_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        path = request.path.removeprefix("/api")
        if path == "/prompt" and request.method == "POST":
            return await _submit(request, handler)
        if path == "/ws":
            with scoped(Scope(viewed_slot=_slot_of_client(request.rel_url.query.get("clientId")))):
                return await handler(request)
        rule = _rule(request.method, path)
        try:
            if rule is None:
                return await handler(request)
            scope = await _scope_of(request, rule)
            with scoped(scope):
                response = await handler(request)
        except BadRequest as error:
            return _refusal(error)
        if rule.complete is not None:
            _complete(response, rule, front)
        return response

    return scope_middleware


@web.middleware
async def _cors_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """With --enable-cors-header the host allows only its own headers: allow ours as well."""
    response = await handler(request)
    allowed = response.headers.get("Access-Control-Allow-Headers")
    if allowed is not None:
        response.headers["Access-Control-Allow-Headers"] = f"{allowed}, {HEADER}"
    return response


async def _submit(request: web.Request, handler: Handler) -> web.StreamResponse:
    """`POST /prompt`. The body is checked in the host's handler, by `check_prompt`, so that it is parsed once."""
    try:
        scope = Scope(target=_header_target(request))
        with scoped(scope):
            response = await handler(request)
    except BadRequest as error:
        return _refusal(error)
    except (ValueError, LookupError, RecursionError):
        refusal = await _refusal_of_body(request)
        if refusal is None:
            raise
        return refusal
    if response.status == 200 and isinstance(response, web.Response) and isinstance(response.body, bytes):
        response.body = _with_gpu_id(response.body, scope.placed)
    return response


async def _refusal_of_body(request: web.Request) -> web.Response | None:
    """What is wrong with a body that the host failed on; None when the body is not to blame."""
    try:
        checks.parse_object(await request.read(), charset=request.charset or "utf-8")
    except BadRequest as error:
        return _refusal(error)
    return None


async def _scope_of(request: web.Request, rule: Rule) -> Scope:
    scope = Scope(target=_header_target(request))
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


def _header_target(request: web.Request) -> int | str | None:
    if HEADER not in request.headers:
        return None
    values = set(request.headers.getall(HEADER))
    if len(values) > 1:
        raise BadRequest("invalid_target_gpu", f"{HEADER} is given {len(values)} times", f"send {HEADER} once")
    return parse_target(values.pop(), len(slots()), HEADER)


def _scope_to_slot(scope: Scope, data: dict[str, Any]) -> None:
    scope.slot = scope.target if isinstance(scope.target, int) else None


def check_prompt(data: Any) -> None:
    """Check what `POST /prompt` brought.

    Raises:
        BadRequest: when the host could not act on it, or when it names a slot that is not there.
    """
    checks.check_object(data)
    checks.check_prompt(data)
    target = data.get("extra_data", {}).get(BODY_FIELD)
    if target is not None:
        parse_target(target, len(slots()), f"extra_data.{BODY_FIELD}")


def _scope_of_interrupt(scope: Scope, data: dict[str, Any]) -> None:
    scope.prompt_id = data.get("prompt_id") or None
    if scope.prompt_id is None:
        _scope_to_slot(scope, data)


def _slot_of_client(client_id: str | None) -> int | None:
    runs = [slot.index for slot in slots() if slot.run is not None and client_id and slot.run.client_id == client_id]
    return runs[0] if runs else None


def _with_gpu_id(reply: bytes, gpu_id: int | None) -> bytes:
    """Adds to the JSON object as text: this is on the way of every job."""
    if b'"prompt_id"' not in reply:
        return reply
    return b'%b, "gpu_id": %b}' % (reply.rstrip()[:-1], b"null" if gpu_id is None else b"%d" % gpu_id)


def _add_gpu_ids(reply: bytes, front: Any) -> bytes:
    """The newer hosts' job list: say of each job which slot runs or ran it."""
    data = json.loads(reply)
    for job in data.get("jobs", [data]):
        if isinstance(job, dict) and "id" in job:
            job["gpu_id"] = front.gpu_id_of(job["id"])
    return json.dumps(data).encode()


def _complete(response: web.StreamResponse, rule: Rule, front: Any) -> None:
    if response.status != 200 or not isinstance(response, web.Response) or not isinstance(response.body, bytes):
        return
    assert rule.complete is not None
    response.body = rule.complete(response.body, front)


def _refusal(error: BadRequest) -> web.Response:
    logger.warning("request refused: %s; %s", error.message, error.details)
    details = {"type": error.type, "message": error.message, "details": error.details, "extra_info": {}}
    return web.json_response({"error": details, "node_errors": {}}, status=400)


def _rule(method: str, path: str) -> Rule | None:
    rule = _RULES.get((method, path))
    if rule is None and method == "GET" and path.startswith("/jobs/") and path.count("/") == 2:
        return _RULES["GET", "/jobs"]
    return rule


_RULES = {
    ("GET", "/queue"): Rule(scope=_scope_to_slot),
    ("POST", "/queue"): Rule(check=checks.check_queue_change, scope=_scope_to_slot),
    ("POST", "/interrupt"): Rule(check=checks.check_interrupt, may_be_empty=True, scope=_scope_of_interrupt),
    ("POST", "/free"): Rule(check=lambda data: None, scope=_scope_to_slot),
    ("GET", "/history"): Rule(),
    ("POST", "/history"): Rule(check=checks.check_queue_change),
    ("GET", "/jobs"): Rule(complete=_add_gpu_ids),
}
