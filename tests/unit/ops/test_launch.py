"""What `comfy-parallel launch` would start, and what keeps it from starting anything."""

from __future__ import annotations

import json
import socket
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from comfy_parallel.errors import ConfigError
from comfy_parallel.fleet import whole_host
from comfy_parallel.fleet.whole_host import Install, WholeHost
from comfy_parallel.ops import launch, link
from comfy_parallel.ops.cli import _parser, main
from tests.free_ports import free_ports

Plan = tuple[list[WholeHost], Install]


@pytest.fixture
def comfyui(tmp_path: Path) -> Path:
    home = tmp_path / "ComfyUI"
    for folder in ("comfy", "custom_nodes", "models/vae", "models/unet", "models/checkpoints"):
        (home / folder).mkdir(parents=True)
    (home / "main.py").touch()
    (home / "comfy" / "cli_args.py").write_text('parser.add_argument("--database-url")')
    link.link(home)
    return home


@pytest.fixture
def plan(comfyui: Path) -> Callable[..., Plan]:
    def plan(*arguments: str, **env: str) -> Plan:
        given = [
            "launch",
            "--comfyui",
            str(comfyui),
            "--python",
            sys.executable,
            "--base-port",
            str(free_ports(3)),
            *arguments,
        ]
        return launch.plan(_parser().parse_args(given), {"CUDA_VISIBLE_DEVICES": "4,5,7", **env})

    return plan


def model(path: Path) -> Path:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    return path


def argument(host: WholeHost, install: Install, name: str) -> str:
    argv = whole_host.command_of(host, install).argv
    return argv[argv.index(name) + 1]


def test_each_has_a_device_a_port_and_what_it_must_not_share(plan: Callable[..., Plan]) -> None:
    hosts, install = plan("--gpus", "0,2", "--listen", "0.0.0.0", "--", "--lowvram", "--reserve-vram", "2")
    first, second = hosts
    assert second.port == first.port + 1
    assert [argument(host, install, "--cuda-device") for host in hosts] == ["4", "7"]
    assert [host.url for host in hosts] == [f"http://127.0.0.1:{first.port}", f"http://127.0.0.1:{second.port}"]
    for name in ("--port", "--temp-directory", "--database-url"):
        assert argument(first, install, name) != argument(second, install, name)
    commands = [whole_host.command_of(host, install) for host in hosts]
    assert all(command.argv[1:5] == ("main.py", "--lowvram", "--reserve-vram", "2") for command in commands)
    assert {command.env["COMFY_PARALLEL_DEVICES"] for command in commands} == {"cuda:0"}
    assert len({command.env["COMFY_PARALLEL_STATE"] for command in commands}) == 2
    assert len({command.env["COMFY_PARALLEL_NUMBERS"] for command in commands}) == 1


def test_without_gpus_it_takes_what_the_variable_names_or_every_gpu(plan: Callable[..., Plan]) -> None:
    assert [host.device for host in plan()[0]] == ["cuda:0", "cuda:1", "cuda:2"]
    assert [host.device for host in plan(COMFY_PARALLEL_DEVICES="cuda:1")[0]] == ["cuda:1"]
    hosts, install = plan(COMFY_PARALLEL_DEVICES="cpu,cpu", COMFY_PARALLEL_SLOTS_PER_GPU="2", OTHER="kept")
    assert [host.device for host in hosts] == ["cpu", "cpu"]
    command = whole_host.command_of(hosts[1], install)
    assert "--cpu" in command.argv
    assert "--cuda-device" not in command.argv
    assert "COMFY_PARALLEL_SLOTS_PER_GPU" not in command.env
    assert command.env["OTHER"] == "kept"
    assert command.env["COMFY_PARALLEL_GPU_CONFIG"] == "off"


def test_weights_are_preloaded_by_the_names_that_nodes_know(
    plan: Callable[..., Plan], comfyui: Path, tmp_path: Path
) -> None:
    model(comfyui / "models" / "unet" / "flux.safetensors")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    clips = [model(elsewhere / name) for name in ("l.safetensors", "t5.safetensors")]
    (comfyui / "models" / "checkpoints" / "old.ckpt").write_bytes(b"PK\x03\x04rest")
    hosts, install = plan(
        *("--gpus", "cpu,cpu", "--unet", "flux.safetensors", "--weight-dtype", "fp8_e4m3fn"),
        *("--clip", str(clips[0]), "--clip", str(clips[1]), "--checkpoint", "old.ckpt"),
    )
    for host in hosts:
        command = whole_host.prepare(host, install)
        assert command.env["COMFY_PARALLEL_PRELOAD"].split(",") == [
            "diffusion_models/flux.safetensors=fp8_e4m3fn",
            "text_encoders/l.safetensors",
            "text_encoders/t5.safetensors",
            "checkpoints/old.ckpt",
        ]
    told = json.loads(Path(argument(hosts[0], install, "--extra-model-paths-config")).read_text())
    assert told == {"comfy_parallel": {"text_encoders": str(elsewhere)}}


def test_a_dry_run_prints_it_and_makes_nothing(
    comfyui: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    arguments = [
        "--comfyui",
        str(comfyui),
        "--gpus",
        "cpu,cpu",
        "--base-port",
        str(free_ports(3)),
        "--folder",
        str(folder),
    ]
    assert main(["launch", *arguments, "--dry-run", "--", "--lowvram"]) == 0
    out = capsys.readouterr().out
    assert out.count("main.py --lowvram --port") == 2
    assert out.count("COMFY_PARALLEL_DEVICES=cpu") == 2
    assert not folder.exists()


WRONG: dict[str, tuple[list[str], str]] = {
    "a gpu that is not there": (["--gpus", "0,3"], "--gpus names GPU 3, but the GPUs here are: 0, 1, 2"),
    "no gpu": (["--gpus", "zero"], "'zero' is no GPU"),
    "an empty one": (["--gpus", "0,"], "'' is no GPU"),
    "both": (["--gpus", "cpu,0"], "not both"),
    "no file": (["--gpus", "0", "--vae", "none.safetensors"], "--vae none.safetensors: no such file"),
    "a folder": (["--gpus", "0", "--vae", "."], "no such file"),
    "an unknown kind": (["--gpus", "0", "--unet", "x", "--weight-dtype", "fp4"], "--weight-dtype is 'fp4'"),
    "a kind for nothing": (["--gpus", "0", "--weight-dtype", "fp8_e5m2"], "--weight-dtype is for"),
    "our argument": (["--gpus", "0", "--", "--port=1"], "--port cannot be passed on"),
    "a port that is none": (["--gpus", "0,1", "--base-port", "65535"], "--base-port is 65535"),
    "another's address": (["--gpus", "0", "--listen", "192.0.2.1"], "nothing can listen"),
}


@pytest.mark.parametrize(("arguments", "told"), WRONG.values(), ids=WRONG.keys())
def test_what_cannot_be_is_said_before_anything_starts(
    plan: Callable[..., Plan], arguments: list[str], told: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        plan(*arguments)
    assert told in str(refusal.value)


CONTENTS: dict[str, tuple[str, bytes]] = {
    "empty": ("a.safetensors", b""),
    "text": ("a.safetensors", b"not a model at all, only text"),
    "cut": ("a.safetensors", struct.pack("<Q", 99) + b'{"w":'),
    "a list": ("a.safetensors", struct.pack("<Q", 2) + b"[]"),
    "no tensor": ("a.safetensors", struct.pack("<Q", 2) + b"{}"),
    "an endless header": ("a.safetensors", struct.pack("<Q", 2**63) + b"{}"),
    "a text for a checkpoint": ("a.ckpt", b"hello"),
    "an image": ("a.png", b"\x89PNG"),
}


@pytest.mark.parametrize(("name", "content"), CONTENTS.values(), ids=CONTENTS.keys())
def test_a_file_that_is_no_model_is_named(plan: Callable[..., Plan], tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"--vae .*{name} is no model: "):
        plan("--gpus", "cpu", "--vae", str(tmp_path / name))


def test_a_port_that_is_taken_is_named(plan: Callable[..., Plan]) -> None:
    first = free_ports(2)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first + 1))
        taken.listen()
        with pytest.raises(ConfigError, match=f"port {first + 1} is taken"):
            plan("--gpus", "cpu,cpu", "--base-port", str(first))


def test_a_comfyui_without_this_package_is_refused(plan: Callable[..., Plan], comfyui: Path) -> None:
    link.unlink(comfyui)
    with pytest.raises(ConfigError, match="run comfy-parallel link"):
        plan("--gpus", "cpu")


def test_an_older_comfyui_is_given_no_database(plan: Callable[..., Plan], comfyui: Path) -> None:
    (comfyui / "comfy" / "cli_args.py").write_text("")
    hosts, install = plan("--gpus", "cpu")
    assert "--database-url" not in whole_host.command_of(hosts[0], install).argv
