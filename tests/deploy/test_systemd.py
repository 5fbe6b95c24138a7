"""The service: systemd accepts it, and it leaves the GPUs visible."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.deploy.conftest import Need

pytestmark = pytest.mark.deploy

REPO_DIR = Path(__file__).resolve().parents[2]
UNIT = REPO_DIR / "systemd" / "comfy-parallel.service"
ENVIRONMENT = REPO_DIR / "systemd" / "comfy-parallel.env"


def directives() -> dict[str, str]:
    lines = [line for line in UNIT.read_text().splitlines() if "=" in line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def test_systemd_accepts_the_unit(tmp_path: Path, need: Need) -> None:
    program = need("systemd-analyze")
    comfyui = tmp_path / "ComfyUI"
    (comfyui / "custom_nodes").mkdir(parents=True)
    (comfyui / "custom_nodes" / "comfy_parallel").symlink_to(REPO_DIR)
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/ComfyUI", str(comfyui)))
    done = subprocess.run([program, "verify", unit], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_no_directive_hides_the_gpus_or_stops_compiled_kernels() -> None:
    forbidden = {"PrivateDevices", "DeviceAllow", "DevicePolicy", "ProtectClock", "MemoryDenyWriteExecute"}
    assert not forbidden & set(directives())
    assert directives()["Restart"] == "on-failure"


def test_every_setting_in_the_environment_file_exists() -> None:
    text = ENVIRONMENT.read_text()
    unset = [line for line in text.splitlines() if line and not re.match(r"#( |[A-Z_]+=)|[A-Z_]+=", line)]
    assert unset == []
    names = set(re.findall(r"^#?([A-Z_]+)=", text, re.MULTILINE)) - {"COMFYUI_ARGS", "CUDA_VISIBLE_DEVICES"}
    readers = (REPO_DIR / "comfy_parallel" / "config.py").read_text() + (REPO_DIR / "start_multi_gpu.sh").read_text()
    assert [name for name in sorted(names) if name not in readers] == []
    assert "$COMFYUI_ARGS" in directives()["ExecStart"]
