"""The service: systemd accepts it, and it leaves the GPUs visible."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import missing
from tests.deploy.conftest import Need
from tests.deploy.real_systemd import PROGRAM, Systemd, SystemdError, running_systemd
from tests.deploy.real_systemd import UNIT as NAME

pytestmark = pytest.mark.deploy

REPO_DIR = Path(__file__).resolve().parents[2]
UNIT = REPO_DIR / "systemd" / "comfy-parallel.service"
LOGROTATE = REPO_DIR / "systemd" / "comfy-parallel.logrotate"
ENVIRONMENT = REPO_DIR / "systemd" / "comfy-parallel.env"


# In ComfyUI's place: says how it was started, ends when told to or with what a setting says.
STAND_IN = """
import os, signal, subprocess, sys, time
def stop(*_):
    time.sleep(1)
    print("drained", flush=True)
    os._exit(0)
signal.signal(signal.SIGTERM, stop)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
print("started", os.getuid(), sys.argv[1:], os.environ["COMFY_MULTI_GPU_SCHED"], flush=True)
if "--end" in sys.argv:
    sys.exit(int(sys.argv[sys.argv.index("--end") + 1]))
child.wait()
time.sleep(1000)
"""


@pytest.fixture
def systemd(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Systemd]:
    """A real systemd with the unit, whose ComfyUI is the stand-in."""
    if os.geteuid() or not PROGRAM.exists():
        missing("a real systemd is tried as root, with the package systemd installed")
    comfyui = tmp_path / "ComfyUI"
    for folder in ("comfy", "custom_nodes"):
        (comfyui / folder).mkdir(parents=True)
    (comfyui / "main.py").write_text(STAND_IN)
    settings = {"COMFYUI_PYTHON": sys.executable, "COMFYUI_ARGS": getattr(request, "param", "--port 8190")}
    try:
        with running_systemd(tmp_path, comfyui, settings, directives={"RestartSec": "1"}) as started:
            yield started
    except SystemdError as error:
        if "did not start in namespaces" in str(error):
            missing(str(error))
        raise


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


def test_it_is_hardened_and_each_gap_has_its_reason(need: Need) -> None:
    command = [need("systemd-analyze"), "security", "--offline=true", "--no-pager", "--threshold=29", UNIT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={"LC_ALL": "C.UTF-8"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert float(re.findall(r"Overall exposure level for .*: ([\d.]+)", done.stdout)[0]) < 3.0
    gaps = set(re.findall(r"^✗ (\w+)=", done.stdout, re.MULTILINE))
    reasons = UNIT.read_text()
    reasons = reasons[reasons.index("# Hardening") : reasons.index("NoNewPrivileges=")]
    assert len(gaps) > 5
    assert [gap for gap in sorted(gaps) if gap not in reasons] == []
    named = set(re.findall(r"^#   (\w+(?:, \w+)*)  ", reasons, re.MULTILINE))
    assert {name for names in named for name in names.split(", ")} <= gaps


def test_stopping_gives_running_jobs_the_time_they_are_promised() -> None:
    unit = directives()
    drain_s = int(unit["Environment"].removeprefix("COMFY_PARALLEL_DRAIN_S="))
    assert unit["KillSignal"] == "SIGTERM"
    assert unit["KillMode"] == "mixed"
    assert int(unit["TimeoutStopSec"]) >= drain_s + 30
    assert f"#COMFY_PARALLEL_DRAIN_S={drain_s}\n" in ENVIRONMENT.read_text()
    lines = UNIT.read_text().splitlines()
    where = [number for number, line in enumerate(lines) if line.startswith("Environment")]
    assert [lines[number].partition("=")[0] for number in where] == ["Environment", "EnvironmentFile"]


def test_log_files_are_rotated_while_they_are_written(need: Need, tmp_path: Path) -> None:
    logs = tmp_path / "user" / "logs"
    logs.mkdir(parents=True)
    log = logs / "comfyui_20261129_090000.log"
    log.write_bytes(b"x" * (101 << 20))
    rules = tmp_path / "rules"
    rules.write_text(re.sub(r"(?m)^    su .*\n", "", LOGROTATE.read_text().replace("/opt/ComfyUI", str(tmp_path))))
    rules.chmod(0o644)
    command = [need("logrotate"), "--state", str(tmp_path / "state"), str(rules)]
    with log.open("ab") as writer:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        writer.write(b"more\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert log.read_bytes() == b"more\n"
    assert [path.name for path in logs.iterdir() if path != log] == [f"{log.name}.1"]


def test_every_setting_in_the_environment_file_exists() -> None:
    text = ENVIRONMENT.read_text()
    unset = [line for line in text.splitlines() if line and not re.match(r"#( |[A-Z_]+=)|[A-Z_]+=", line)]
    assert unset == []
    names = set(re.findall(r"^#?([A-Z_]+)=", text, re.MULTILINE)) - {"COMFYUI_ARGS", "CUDA_VISIBLE_DEVICES"}
    readers = (REPO_DIR / "comfy_parallel" / "config.py").read_text() + (REPO_DIR / "start_multi_gpu.sh").read_text()
    assert [name for name in sorted(names) if name not in readers] == []
    assert "$COMFYUI_ARGS" in directives()["ExecStart"]


@pytest.mark.timeout(180)
def test_a_real_systemd_starts_it_unprivileged_restarts_what_was_killed_and_lets_it_drain(systemd: Systemd) -> None:
    systemd.ctl("start", NAME)
    first = systemd.properties("MainPID")["MainPID"]
    systemd.await_output("started 12345 ['--port', '8190'] 1")
    systemd.ctl("kill", "--signal=SIGKILL", "--kill-who=main", NAME)
    systemd.await_output("started 12345", times=2)
    now = systemd.properties("MainPID", "NRestarts", "ActiveState")
    assert (now["NRestarts"], now["ActiveState"], now["MainPID"] != first) == ("1", "active", True)
    systemd.ctl("stop", NAME)
    assert systemd.output().splitlines()[-1] == "drained"
    assert systemd.properties("Result", "ActiveState") == {"Result": "success", "ActiveState": "inactive"}


@pytest.mark.timeout(180)
@pytest.mark.parametrize("systemd", ["--end 2"], indirect=True)
def test_a_wrong_setting_is_not_tried_again(systemd: Systemd) -> None:
    systemd.ctl("start", NAME, check=False)
    systemd.await_state("failed")
    assert systemd.properties("ExecMainStatus", "NRestarts") == {"ExecMainStatus": "2", "NRestarts": "0"}
