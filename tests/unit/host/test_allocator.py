"""Which allocator is chosen, on hosts that choose before us and after us; and that it is given back."""

from __future__ import annotations

import argparse
import sys
from types import ModuleType, SimpleNamespace

import pytest

from comfy_parallel.host import allocator

ASYNC = "backend:cudaMallocAsync"


class Host:
    """A host's command line and what its `cuda_malloc` made of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, line: list[str], env: dict[str, str], chooses_first: bool):
        parser = argparse.ArgumentParser()
        group = parser.add_mutually_exclusive_group()
        group.add_argument("--cuda-malloc", action="store_true")
        group.add_argument("--disable-cuda-malloc", action="store_true")
        self.args, self.env = parser.parse_args(line), dict(env)
        for name in ("torch", "cuda_malloc"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        if chooses_first:
            self.choose()
            monkeypatch.setitem(sys.modules, "cuda_malloc", ModuleType("cuda_malloc"))
        monkeypatch.setattr(sys, "argv", ["main.py", *line])
        modules = {
            "comfy": ModuleType("comfy"),
            "comfy.cli_args": SimpleNamespace(args=self.args, parser=parser),
            "comfy.options": SimpleNamespace(args_parsing=True),
        }
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
            if name != "comfy":
                monkeypatch.setattr(modules["comfy"], name.rpartition(".")[2], module, raising=False)

    def choose(self) -> None:
        """As hosts do: by default it is cudaMallocAsync."""
        if not self.args.cuda_malloc and not self.args.disable_cuda_malloc:
            self.args.cuda_malloc = True
        if self.args.disable_cuda_malloc:
            self.args.cuda_malloc = False
        if self.args.cuda_malloc:
            before = self.env.get(allocator.VARIABLE)
            self.env[allocator.VARIABLE] = ASYNC if before is None else f"{before},{ASYNC}"

    @property
    def state(self) -> tuple[object, ...]:
        return self.args.cuda_malloc, self.args.disable_cuda_malloc, dict(self.env)


@pytest.mark.parametrize("chooses_first", [True, False])
@pytest.mark.parametrize(
    ("line", "env", "allocates"),
    [
        ([], {}, None),
        ([], {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ([], {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, "backend:native"),
        (["--disable-cuda-malloc"], {}, None),
    ],
)
def test_torch_allocates_itself_when_nobody_asked_for_else(
    monkeypatch: pytest.MonkeyPatch, line: list[str], env: dict[str, str], allocates: str | None, chooses_first: bool
) -> None:
    host = Host(monkeypatch, line, env, chooses_first)
    before = host.state
    undo = allocator.prefer_native(host.env)
    if not chooses_first:
        assert host.args.disable_cuda_malloc
    assert host.env.get(allocator.VARIABLE) == allocates
    assert not host.args.cuda_malloc
    undo()
    assert host.state == before


@pytest.mark.parametrize("chooses_first", [True, False])
@pytest.mark.parametrize(
    ("line", "env"),
    [
        (["--cuda-malloc"], {}),
        ([], {"PYTORCH_CUDA_ALLOC_CONF": ASYNC}),
        ([], {"PYTORCH_CUDA_ALLOC_CONF": f"{ASYNC},max_split_size_mb:64"}),
        ([], {"PYTORCH_ALLOC_CONF": ASYNC}),
    ],
)
def test_what_the_user_chose_stays(
    monkeypatch: pytest.MonkeyPatch, line: list[str], env: dict[str, str], chooses_first: bool
) -> None:
    host = Host(monkeypatch, line, env, chooses_first)
    before = dict(host.env)
    allocator.prefer_native(host.env)
    assert host.env == before
    assert any(ASYNC in value for value in host.env.values()) or host.args.cuda_malloc


def test_it_is_too_late_once_torch_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch, [], {}, chooses_first=True)
    before = host.state
    monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))
    allocator.prefer_native(host.env)
    assert host.state == before
