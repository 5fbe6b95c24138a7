"""`comfy-parallel plan` says which weights would live where."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from comfy_parallel.ops.cli import main


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({f"w{number}": torch.zeros(256, dtype=torch.float32) for number in range(4)}, path)
    return path


def test_a_plan_is_printed(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(model), "--expert", "cuda:0,1kb;cuda:1,*", "--weights"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[0] for line in out[:4]) == ["cuda:0", "cuda:1", "cuda:1", "cuda:1"]
    assert "3072 of 4096 bytes leave cuda:0" in out
    assert out[-1] == "cuda:0,1kb;cuda:1,*#cuda:0;0;cpu"


def test_the_size_of_a_device_that_is_not_here_can_be_said(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(model), "--virtual-vram", "8", "--donor", "cuda:1", "--memory", "cuda:1=24"]) == 0
    assert "4096 of 4096 bytes leave cuda:0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--virtual-vram=-1"], "write gigabytes"),
        (["--expert", "cpu,1tb"], "units are"),
        (["--donor", "g?"], "no device name"),
    ],
)
def test_a_bad_argument_is_told(
    model: Path, arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(model), *arguments]) == 2
    assert problem in capsys.readouterr().err


def test_what_is_no_model_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x").write_text("no")
    assert main(["plan", str(tmp_path / "x")]) == 2
    assert "cannot be read as a safetensors file" in capsys.readouterr().err
