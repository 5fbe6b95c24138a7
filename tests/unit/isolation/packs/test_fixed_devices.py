"""Where a pack names a GPU itself is found, and said with what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from comfy_parallel.isolation.packs.clashes import clashes


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("def run(x):\n    return x.to('cuda:0')", "it names the device cuda:0 itself"),
        ("DEVICE = 'cuda:1'", "it names the device cuda:1 itself"),
        ("def run(x):\n    return x.cuda(0)", "it names the device cuda:0 itself"),
        ("def run():\n    return torch.device('cuda', 1)", "it names the device cuda:1 itself"),
        ("def run():\n    torch.cuda.set_device(0)", "it names the device cuda:0 itself"),
        ("def run(device='cuda:0'):\n    pass", "it names the device cuda:0 itself"),
        ("class Node:\n    model = build().cuda()", "it calls .cuda() when it is imported"),
        ("os.environ['CUDA_VISIBLE_DEVICES'] = '0'", "it sets CUDA_VISIBLE_DEVICES"),
        (
            "def run(x):\n    x.to('cuda:0')\n    x.to('cuda:0')",
            "it names the device cuda:0 itself, and in 1 more places",
        ),
    ],
)
def test_it_is_found_once_with_what_to_do(tmp_path: Path, source: str, what: str) -> None:
    (tmp_path / "__init__.py").write_text(f"import torch, os\n{source}\n")
    (found,) = clashes(tmp_path)
    assert (found.what, found.file) == (what, "__init__.py")
    assert found.line in (2, 3)
    assert "get_torch_device()" in found.consequence or "where ComfyUI is started" in found.consequence
    if "names" in what:
        assert f"COMFY_PARALLEL_PACKS={tmp_path.name}=alone" in found.consequence


@pytest.mark.parametrize(
    "source",
    [
        '"""Use cuda:0."""',
        "def run(x):\n    'cuda:0'\n    return x.cuda()",
        "def run(x):\n    return x.to('cuda')",
        "class Node:\n    def INPUT_TYPES(cls):\n        return {'required': {'device': (['cuda:0', 'cpu'],)}}",
        "def run(x):\n    return x.to(comfy.model_management.get_torch_device())",
        "print('runs on cuda:0 only')",
        "visible = os.environ['CUDA_VISIBLE_DEVICES']",
    ],
)
def test_what_follows_the_slot_or_the_user_is_not(tmp_path: Path, source: str) -> None:
    (tmp_path / "__init__.py").write_text(f"import os\n{source}\n")
    assert clashes(tmp_path) == []
