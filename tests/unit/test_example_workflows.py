"""The example workflows, which ComfyUI's page offers among its templates: whole, ours, and each with its picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from comfy_parallel.nodes.parallel import collectors, dividers, sources
from comfy_parallel.nodes.table import CORE

FOLDER = Path(__file__).resolve().parents[2] / "comfy_parallel" / "ui" / "example_workflows"
WORKFLOWS = sorted(FOLDER.glob("*.json"))
OURS = {
    *(f"{loader.name}{suffix}" for loader in CORE for suffix in ("MultiGPU", "DisTorch2MultiGPU")),
    *("CheckpointLoaderAdvancedMultiGPU", "CheckpointLoaderAdvancedDisTorch2MultiGPU", "DeviceSelectorMultiGPU"),
    *(*collectors.nodes(lambda: None), *sources.nodes(), *sources.others(), *dividers.nodes(), *dividers.shares()),
}
PLAIN = {
    *("CheckpointLoaderSimple", "CLIPTextEncode", "EmptyLatentImage", "KSampler", "VAEDecode", "SaveImage"),
}


def test_there_are_some_and_nothing_else() -> None:
    names = {path.stem for path in WORKFLOWS}
    assert len(names) >= 3
    assert {path.name for path in FOLDER.iterdir()} == {f"{name}.{end}" for name in names for end in ("json", "jpg")}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_an_example_is_whole_and_has_a_node_of_ours(path: Path) -> None:
    saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    nodes = {one["id"]: one for one in saved["nodes"]}
    types = {one["type"] for one in nodes.values()}
    assert types & OURS
    assert types <= OURS | PLAIN
    for link, origin, output, target, entry, kind in saved["links"]:
        assert link in nodes[origin]["outputs"][output]["links"]
        assert (nodes[target]["inputs"][entry]["link"], nodes[target]["inputs"][entry]["type"]) == (link, kind)
    picture = path.with_suffix(".jpg").read_bytes()
    assert picture[:3] == b"\xff\xd8\xff"
    assert len(picture) < 150_000
