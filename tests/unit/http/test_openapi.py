"""docs/openapi.yaml names every route that we add, and no other; docs/http.md names them too."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from aiohttp import web

from comfy_parallel.http import routes
from comfy_parallel.slots.closing import Closing

DOCS = Path(__file__).resolve().parents[3] / "docs"
SPEC = yaml.safe_load((DOCS / "openapi.yaml").read_text(encoding="utf-8"))
METHODS = ("get", "post", "put", "delete", "patch")
OPERATIONS = {
    (method, path): operation
    for path, item in SPEC["paths"].items()
    for method, operation in item.items()
    if method in METHODS
}


def added(front: Any) -> set[tuple[str, str]]:
    """The method and the path of every route that we add."""
    assert isinstance(front.closing, Closing)
    server = SimpleNamespace(app=web.Application(), routes=web.RouteTableDef())
    routes.add_routes(server, front, lambda slot: [], not_submitted)
    return {(route.method.lower(), re.sub(r":[^}]*\}", "}", route.path)) for route in server.routes}  # type: ignore[attr-defined]


async def not_submitted(request: web.Request) -> web.StreamResponse:
    raise AssertionError("no request was made")


def test_every_route_is_described_and_every_description_has_its_route(front: Any) -> None:
    ours = {key for key, operation in OPERATIONS.items() if not operation.get("x-host")}
    assert ours == added(front)


def test_the_page_about_http_names_each_of_them(front: Any) -> None:
    page = (DOCS / "http.md").read_text(encoding="utf-8") + (DOCS / "dashboard.md").read_text(encoding="utf-8")
    described = {re.sub(r"\{[^}]*\}.*", "", path) for _, path in added(front)}
    assert [path for path in sorted(described) if path not in page] == []


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_an_operation_says_what_it_does_and_what_it_answers(method: str, path: str) -> None:
    operation = OPERATIONS[method, path]
    assert operation["summary"].endswith((".", "?"))
    assert operation["responses"]
    assert set(operation["tags"]) <= {tag["name"] for tag in SPEC["tags"]}
    named = set(re.findall(r"\{(\w+)\}", path))
    given = [
        SPEC["components"]["parameters"][one["$ref"].split("/")[-1]] if "$ref" in one else one
        for one in operation.get("parameters", [])
    ]
    assert {one["name"] for one in given if one["in"] == "path"} == named


def test_ids_are_unique_and_references_lead_somewhere() -> None:
    ids = [operation["operationId"] for operation in OPERATIONS.values()]
    assert len(set(ids)) == len(ids)
    for reference in set(re.findall(r'\$ref: "(#[^"]+)"', (DOCS / "openapi.yaml").read_text(encoding="utf-8"))):
        place = SPEC
        for part in reference.removeprefix("#/").split("/"):
            place = place[part]
