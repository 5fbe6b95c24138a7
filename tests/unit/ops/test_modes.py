"""What the commands of `launch_distributed.bat` start and update."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from comfy_parallel.errors import ConfigError
from comfy_parallel.fleet import whole_host
from comfy_parallel.fleet.whole_host import Install, WholeHost
from comfy_parallel.ops import link, modes
from comfy_parallel.ops.cli import _parser, main
from comfy_parallel.ops.plain_running import PlainRunning
from tests.free_ports import free_ports

REPO_DIR = Path(__file__).resolve().parents[3]
Plan = tuple[list[WholeHost], Install]


@pytest.fixture
def comfyui(tmp_path: Path) -> Path:
    home = tmp_path / "ComfyUI"
    for folder in ("comfy", "custom_nodes", "user/__comfy_parallel"):
        (home / folder).mkdir(parents=True)
    (home / "main.py").write_text("print('a ComfyUI')")
    (home / "comfy" / "cli_args.py").touch()
    link.link(home)
    return home


@pytest.fixture
def configure(comfyui: Path) -> Callable[[Any], Path]:
    def configure(document: Any) -> Path:
        path = comfyui / "user" / "__comfy_parallel" / "gpu_config.json"
        path.write_text(json.dumps(document))
        return path

    return configure


def plan(comfyui: Path, mode: str, *arguments: str, **env: str) -> Plan:
    given = [mode, "--comfyui", str(comfyui), "--python", sys.executable, *arguments]
    return modes.plan(_parser().parse_args(given), env)


FOUR: dict[str, Any] = {
    "master": {"port": 8080, "cuda_device": 0, "extra_args": "--listen"},
    "workers": [
        {"id": 1, "name": "GPU 1", "cuda_device": 1, "port": 8180, "enabled": True, "extra_args": "--reserve-vram 2"},
        {"id": 2, "name": "GPU 2", "cuda_device": 2, "port": 8280, "enabled": False},
        {"id": 3, "name": "Far", "host": "10.0.0.9", "port": 8190, "enabled": True},
    ],
}


def test_the_master_and_the_enabled_workers_here_are_started(comfyui: Path, configure: Callable[[Any], Path]) -> None:
    path = configure(FOUR)
    assert [host.port for host in plan(comfyui, "master")[0]] == [8080]
    hosts, install = plan(comfyui, "all-fast", "--", "--lowvram")
    assert [(host.port, host.device) for host in hosts] == [(8080, "cuda:0"), (8180, "cuda:1")]
    first, second = (whole_host.command_of(host, install) for host in hosts)
    assert first.argv[2:4] == ("--lowvram", "--listen")
    assert second.argv[2:5] == ("--lowvram", "--reserve-vram", "2")
    assert first.env["COMFY_PARALLEL_GPU_CONFIG"] == str(path)
    assert second.env["COMFY_PARALLEL_GPU_CONFIG"] == "off"


def test_a_master_without_a_gpu_of_its_own_has_all_slots(comfyui: Path, configure: Callable[[Any], Path]) -> None:
    configure({})
    (master,), install = plan(comfyui, "all-slow", COMFY_NUM_GPUS="2")
    command = whole_host.command_of(master, install)
    assert master.port == 8188
    assert "--cuda-device" not in command.argv
    assert command.env["COMFY_NUM_GPUS"] == "2"
    assert "COMFY_PARALLEL_DEVICES" not in command.env


@pytest.mark.parametrize(
    ("document", "told"),
    [
        ({"workers": [{"id": 1, "port": 8189, "enabled": True}]}, "worker 1 names no GPU"),
        ({"workers": [{"id": 1, "port": 8188, "enabled": True, "cuda_device": 1}]}, "the master's port"),
        ({"master": {"extra_args": "--port 1"}}, "--port cannot be passed on"),
        ({"workers": [{"id": 1}]}, "workers[0].port is missing"),
    ],
)
def test_what_cannot_be_started_is_said_before(
    comfyui: Path, configure: Callable[[Any], Path], document: Any, told: str
) -> None:
    configure(document)
    with pytest.raises(ConfigError) as refusal:
        plan(comfyui, "all-fast")
    assert told in str(refusal.value)


def test_without_a_file_it_says_which(comfyui: Path) -> None:
    with pytest.raises(ConfigError, match=r"gpu_config\.json is not there"):
        plan(comfyui, "master")
    with pytest.raises(ConfigError, match="other"):
        plan(comfyui, "master", COMFY_PARALLEL_GPU_CONFIG=str(comfyui / "other"))
    with pytest.raises(ConfigError, match="there is no master to start"):
        plan(comfyui, "master", COMFY_PARALLEL_GPU_CONFIG="off")


class _Queue(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


def test_what_runs_already_is_not_started_again(
    comfyui: Path, configure: Callable[[Any], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with HTTPServer(("127.0.0.1", 0), _Queue) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        configure({"master": {"port": server.server_port, "cuda_device": 0}})
        assert main(["master", "--comfyui", str(comfyui), "--python", sys.executable]) == 0
        server.shutdown()
    assert "runs already" in capsys.readouterr().out


def git(*arguments: str | Path) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", *identity, *map(str, arguments)], check=True, capture_output=True)


def test_custom_nodes_are_updated_and_those_that_cannot_be_are_named(
    comfyui: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    origin = tmp_path / "origin"
    git("init", "-q", origin)
    (origin / "a.py").write_text("1")
    git("-C", origin, "add", "-A")
    git("-C", origin, "commit", "-qm", "one")
    for name in ("good", "gone"):
        git("clone", "-q", origin, comfyui / "custom_nodes" / name)
    git("-C", comfyui / "custom_nodes" / "gone", "remote", "set-url", "origin", tmp_path / "nowhere")
    (origin / "a.py").write_text("2")
    git("-C", origin, "commit", "-qam", "two")
    (comfyui / "custom_nodes" / "comfy_parallel").unlink()  # It is a clone too.
    assert main(["update-nodes", "--comfyui", str(comfyui), "--python", sys.executable]) == 2
    assert (comfyui / "custom_nodes" / "good" / "a.py").read_text() == "2"
    assert "these were not updated: gone;" in capfd.readouterr().err
    assert main(["update", "--comfyui", str(comfyui), "--python", sys.executable]) == 2
    assert "was not made by git clone" in capfd.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="a shell of Windows asks for a console")
def test_a_shell_has_comfyuis_python(comfyui: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shell = tmp_path / "shell"
    shell.write_text('#!/bin/sh\necho "$PWD $PATH" > "$HOME/said"')
    shell.chmod(0o755)
    monkeypatch.setenv("SHELL", str(shell))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["venv", "--comfyui", str(comfyui), "--python", sys.executable]) == 0
    assert (tmp_path / "said").read_text().startswith(f"{comfyui} {Path(sys.executable).parent}:")


def test_where_nothing_can_be_supervised_they_run_with_logs(
    comfyui: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    install = Install(comfyui=comfyui, python=sys.executable, folder=tmp_path, has_database=False, env={}, visible=None)
    host = WholeHost(label="one", device="cpu", port=free_ports(1))
    assert PlainRunning([host], install).until_ended() == 0
    assert "one: ended with status 0" in capsys.readouterr().out
    assert whole_host.log_file(host, install).read_text().strip() == "a ComfyUI"


def test_the_command_runs_from_a_clone(tmp_path: Path) -> None:
    asked = subprocess.run(
        [sys.executable, "-I", REPO_DIR / "run_command.py", "all-fast", "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    assert "--config" in asked.stdout


def test_the_windows_script_has_each_of_the_commands() -> None:
    script = (REPO_DIR / "launch_distributed.bat").read_bytes()
    assert script.count(b"\r\n") == script.count(b"\n"), "cmd.exe reads labels of files with other line ends wrongly"
    listed = [line.split()[1] for line in script.decode().splitlines() if line.startswith("echo   ")]
    assert listed == ["master", "all-fast", "all-slow", "venv", "update", "update-nodes"]
    for name in listed:
        assert _parser().parse_args([name]).run is not None
