"""A real systemd as the first process of namespaces of its own, with the shipped unit and a ComfyUI at /opt/ComfyUI.

Nothing of the machine's own services is in it, and what it changes in /etc, /opt and /run is gone with it. Needs root.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

REPO_DIR = Path(__file__).resolve().parents[2]
UNIT = "comfy-parallel.service"
PROGRAM = Path("/lib/systemd/systemd")
UNSHARE = ["unshare", "--fork", "--pid", "--kill-child", "--mount", "--mount-proc", "--uts", "--ipc", "--cgroup"]
TIMEOUT_S = 60.0
# Targets that units depend on by default. The machine's own would start its services.
TARGETS = ("sysinit", "basic", "shutdown", "network-online", "multi-user", "umount", "final", "trial")
SETUP = r"""
set -eu
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs /run
over() {  # LOWER PLACE: a copy of a folder that may be written to
    mkdir -p "/run/over$2/up" "/run/over$2/work"
    mount -t overlay -o "lowerdir=$1,upperdir=/run/over$2/up,workdir=/run/over$2/work" overlay "$2"
}
# The service's user may enter this one's home, where Python may be.
mkdir -p /run/home; mount --bind "$HOME" /run/home; mount -t tmpfs -o mode=755 tmpfs "$HOME"
for entry in /run/home/.[!.]* /run/home/*; do
    [ -d "$entry" ] || continue
    mkdir "$HOME/${entry##*/}"; mount --bind "$entry" "$HOME/${entry##*/}"
done
for folder in host nodes repo units; do mkdir -p "/run/$folder"; done
mount --bind "$HOST" /run/host; mount --bind "$REPO" /run/repo
[ -z "$NODES" ] || mount --bind "$NODES" /run/nodes
mount -t tmpfs -o mode=755 tmpfs /opt
mkdir /opt/ComfyUI; over /run/host /opt/ComfyUI; over /etc /etc
cd /opt/ComfyUI
rm -rf custom_nodes/comfy_parallel; mkdir -p custom_nodes/comfy_parallel user output temp input models
mount --bind /run/repo custom_nodes/comfy_parallel
if [ -n "$NODES" ]; then mkdir -p custom_nodes/more_nodes; mount --bind /run/nodes custom_nodes/more_nodes; fi
grep -q ^comfyui: /etc/passwd || echo comfyui:x:12345:12345::/opt/ComfyUI:/bin/false >> /etc/passwd
grep -q ^comfyui: /etc/group || echo comfyui:x:12345: >> /etc/group
chown comfyui:comfyui . user output temp input models custom_nodes
cp custom_nodes/comfy_parallel/systemd/comfy-parallel.service /run/units/
printf '%s\n' "$SETTINGS" > /etc/comfy-parallel.env
mkdir "/run/units/$UNIT.d"; printf '[Service]\n%s\n' "$DIRECTIVES" > "/run/units/$UNIT.d/trial.conf"
for name in $TARGETS; do printf '[Unit]\nDefaultDependencies=no\n' > "/run/units/$name.target"; done
export SYSTEMD_UNIT_PATH=/run/units container=other
exec "$SYSTEMD" --system --unit=trial.target --log-target=console --log-level=info
"""


class SystemdError(RuntimeError):
    """systemd did not do what it was asked for; the message has its words."""


@dataclass
class Systemd:
    """A running systemd."""

    pid: int
    log_path: Path

    def run(self, *command: str, check: bool = True) -> str:
        """What a command in its namespaces prints."""
        enter = ["nsenter", "--target", str(self.pid), "--mount", "--pid", "--cgroup", "--ipc", "--uts"]
        done = subprocess.run([*enter, *command], capture_output=True, text=True, timeout=240)
        if check and done.returncode:
            raise SystemdError(f"{shlex.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}{self.log()}")
        return done.stdout

    def ctl(self, *arguments: str, check: bool = True) -> str:
        return self.run("systemctl", "--no-pager", *arguments, check=check)

    def properties(self, *names: str) -> dict[str, str]:
        """What systemd says of the unit: `ActiveState`, `NRestarts`, `MainPID`, …"""
        lines = self.ctl("show", UNIT, *(f"--property={name}" for name in names)).splitlines()
        return dict(line.split("=", 1) for line in lines)

    def await_state(self, *states: str, timeout_s: float = TIMEOUT_S) -> None:
        deadline = time.monotonic() + timeout_s
        while (state := self.properties("ActiveState")["ActiveState"]) not in states:
            if time.monotonic() > deadline:
                raise SystemdError(f"the unit is {state}, not {states}\n{self.output()[-4000:]}\n{self.log()[-4000:]}")
            time.sleep(0.1)

    def await_output(self, text: str, times: int = 1) -> None:
        """Return once the service has printed a text so often."""
        deadline = time.monotonic() + TIMEOUT_S
        while self.output().count(text) < times:
            if time.monotonic() > deadline:
                raise SystemdError(f"it did not print {text!r} {times} times:\n{self.output()}\n{self.log()[-4000:]}")
            time.sleep(0.1)

    def output(self) -> str:
        """What the service has printed."""
        return self.run("sh", "-c", "cat /run/output 2>/dev/null || true")

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")


@contextmanager
def running_systemd(
    folder: Path,
    comfyui: Path,
    settings: Mapping[str, str],
    *,
    nodes: Path | None = None,
    directives: Mapping[str, str] | None = None,
) -> Iterator[Systemd]:
    """systemd with the unit loaded and not started.

    Args:
        folder: for systemd's log.
        comfyui: what is seen at /opt/ComfyUI; what is written there is not kept.
        settings: the lines of /etc/comfy-parallel.env.
        nodes: a folder of custom nodes.
        directives: what is different from the shipped unit; without a journal its output goes to a file.
    """
    log_path = folder / "systemd.log"
    lines = {"StandardOutput": "append:/run/output", **(directives or {})}
    given = {
        **{"HOST": comfyui, "REPO": REPO_DIR, "NODES": nodes or "", "UNIT": UNIT, "SYSTEMD": PROGRAM},
        **{"TARGETS": " ".join(TARGETS), "HOME": Path.home()},
        "SETTINGS": "\n".join(f"{name}={value}" for name, value in settings.items()),
        "DIRECTIVES": "\n".join(f"{name}={value}" for name, value in lines.items()),
    }
    env = {**os.environ, **{name: str(value) for name, value in given.items()}}
    with log_path.open("wb") as log:
        outer = subprocess.Popen(
            [*UNSHARE, "sh", "-c", SETUP], env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        yield _started(outer, log_path)
    finally:
        outer.kill()
        outer.wait(60)


def _started(outer: subprocess.Popen[bytes], log_path: Path) -> Systemd:
    deadline = time.monotonic() + TIMEOUT_S
    while outer.poll() is None and time.monotonic() < deadline:
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
        if children and Path(f"/proc/{children[0]}/comm").read_text().strip() == "systemd":
            systemd = Systemd(int(children[0]), log_path)
            if re.search("running|degraded", systemd.ctl("is-system-running", check=False)):
                return systemd
        time.sleep(0.1)
    raise SystemdError(
        f"systemd did not start in namespaces of its own: {log_path.read_text(errors='replace')[-4000:]}"
    )
