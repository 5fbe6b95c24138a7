"""What a pack takes that we use too is found in its source."""

from __future__ import annotations

from pathlib import Path

import pytest

from comfy_parallel.isolation.packs import clashes as module
from comfy_parallel.isolation.packs.clashes import clashes


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("execution.PromptQueue.get = mine", "it replaces PromptQueue.get"),
        ("execution.PromptQueue = Mine", "it replaces execution.PromptQueue"),
        ("from execution import PromptExecutor\nPromptExecutor.execute = mine", "it replaces PromptExecutor.execute"),
        ("PromptServer.instance.prompt_queue.get = mine", "it replaces prompt_queue.get"),
        ("PromptServer.instance.prompt_queue = Mine()", "it replaces PromptServer.prompt_queue"),
        ("PromptServer.instance.send_sync = mine", "it replaces PromptServer.send_sync"),
        ("self.native_queue.get = self.get", "it replaces native_queue.get"),
        ("setattr(execution.PromptQueue, 'put', mine)", "it replaces PromptQueue.put"),
        ("@PromptServer.instance.routes.post('/prompt')\nasync def post(request): pass", "it takes the route /prompt"),
        ("app.router.add_route('POST', '/api/prompt', mine)", "it takes the route /api/prompt"),
    ],
)
def test_a_clash_is_found_with_its_line(tmp_path: Path, source: str, what: str) -> None:
    (tmp_path / "__init__.py").write_text(f"import execution\n{source}\n")
    (found,) = clashes(tmp_path)
    assert (found.what, found.file) == (what, "__init__.py")
    assert found.line in (2, 3)
    assert found.consequence


@pytest.mark.parametrize(
    "source",
    [
        "self.prompt_queue = 1",
        "queue.size = 1",
        "PromptServer.instance.my_pack = 1",
        "cache.get('/prompt')",
        "@PromptServer.instance.routes.get('/my_pack/prompt')\nasync def get(request): pass",
    ],
)
def test_what_is_a_pack_s_own_is_no_clash(tmp_path: Path, source: str) -> None:
    (tmp_path / "__init__.py").write_text(f"{source}\n")
    assert clashes(tmp_path) == []


def test_a_file_that_names_nothing_of_ours_is_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI brings eighty files of nodes; to parse them all took a third of a second of every start."""
    (tmp_path / "__init__.py").write_text("NODE_CLASS_MAPPINGS = {'A': isinstance}\n")
    (tmp_path / "takes.py").write_text("app.router.add_post('/\\x70rompt', mine)\n")
    parsed: list[str] = []
    parse = module.parsed
    monkeypatch.setattr(module, "parsed", lambda path: parsed.append(path.name) or parse(path))
    assert [clash.what for clash in clashes(tmp_path)] == ["it takes the route /prompt"]
    assert parsed == ["takes.py"]
