"""`comfy-parallel doctor`: what it says of a folder, also of one that holds only some files of a host."""

from __future__ import annotations

from pathlib import Path

import pytest

from comfy_parallel import patches
from comfy_parallel.ops.cli import main
from comfy_parallel.patching.engine import Patch

WORKER = "def prompt_worker(q, server_instance, asset_manager): pass\n"
SERVER = "class Server:\n    def send(self, event, data): pass\n"
ODD_SERVER = "class Server:\n    def send(self, data): pass\n"


def patch(target: str, **options: object) -> Patch:
    return Patch(target=target, wrap=lambda original: original, why="a reason", until="never", **options)  # type: ignore[arg-type]


PATCHES = (
    patch("server:Server.send", params=("self", "event")),
    patch("execution:Queue.get"),
    patch("comfy.ops:pick", optional=True),
    patch("server:Server", needs=("comfy.utils:get_attr",)),
    patch("server:Server.extra", feature="weights", needs=("execution:Queue",)),
    patch("torch:randn"),
)


@pytest.fixture(autouse=True)
def own_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "ALL", PATCHES)


def doctor(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    status = main(["doctor", str(folder)])
    said = capsys.readouterr()
    return status, (said.out + said.err).splitlines()


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def test_a_folder_with_some_files_is_checked_as_far_as_it_goes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, server=SERVER, prompts=WORKER)
    status, lines = doctor(tmp_path, capsys)
    assert status == 1, "nobody can say that all fits"
    (incomplete,) = [line for line in lines if line.startswith("incomplete")]
    assert incomplete.endswith("was not checked: execution.py, comfy/utils.py")
    assert [line.split()[2] for line in lines if line.startswith("fits  ")] == ["server:Server.send"]
    assert not [line for line in lines if line.startswith("NO ")]
    assert lines[-1] == "what is there fits: 0 patches do not fit, 0 unknown globals, 2 files are missing"


def test_what_does_not_fit_in_the_files_that_are_there_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, server=ODD_SERVER)
    status, lines = doctor(tmp_path, capsys)
    assert status == 1
    (wrong,) = [line for line in lines if line.startswith("NO ")]
    assert "expected parameters ('self', 'event'), host has ('self', 'data')" in wrong
    assert lines[-1] == "does not fit: 1 patches do not fit, 0 unknown globals, 2 files are missing"


def test_a_whole_host_that_lacks_a_feature_fits_without_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    queue = "SEEN = {}\nclass Queue:\n    def get(self): SEEN[1] = 1\n"
    write(tmp_path, server=SERVER, execution=queue, comfy__utils="def get_attr(): pass\n")
    status, lines = doctor(tmp_path, capsys)
    assert status == 0
    assert [line for line in lines if line.startswith("unknown global SEEN (execution.py:3)")]
    assert lines[-1] == "fits, without weights: 1 patches do not fit, 1 unknown globals"


def test_a_folder_without_any_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = doctor(tmp_path / "nowhere", capsys)
    assert status == 2
    assert lines[-1].endswith("nowhere holds no Python file; name the folder of a ComfyUI checkout")


def test_node_packs_are_named_with_what_was_found_and_what_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = "class Node:\n    def INPUT_TYPES(cls): pass\n    def run(self, v):\n        "
    write(tmp_path, server=SERVER)
    for name, text in {"keeps": "global last\n        last = v\n", "plain": "return v\n"}.items():
        (tmp_path / "custom_nodes" / name).mkdir(parents=True)
        (tmp_path / "custom_nodes" / name / "__init__.py").write_text(node + text)
    (tmp_path / "custom_nodes" / "taker.py").write_text("import execution\nexecution.PromptQueue.get = None\n")
    monkeypatch.setenv("COMFY_MULTI_GPU_SCHED", "1")
    monkeypatch.setenv("COMFY_PARALLEL_PACKS", "auto,plain=alone,misspelt=trust")
    lines = doctor(tmp_path, capsys)[1]
    said = [line for line in lines if line.startswith("node pack ")]
    assert said[:2] == [
        "node pack keeps: isolated, every slot has its own: last (__init__.py:5)",
        "node pack plain: its jobs run alone, as COMFY_PARALLEL_PACKS says",
    ]
    assert said[2].startswith("node pack taker: CLASH: it replaces PromptQueue.get (taker.py:2); ")
    assert "COMFY_PARALLEL_PACKS names 'misspelt', but no node pack's folder is called so" in lines
