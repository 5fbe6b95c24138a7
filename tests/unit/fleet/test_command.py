"""A worker is started as the front was, for its one device, and leaves the front's port, database and files alone."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from comfy_parallel.config import SWITCH, known_variables
from comfy_parallel.errors import ConfigError
from comfy_parallel.fleet.command import OF_FRONT, PASSED_ON, can_be, worker_command
from comfy_parallel.fleet.supervisor import Command


def command(
    device: str = "cpu", *arguments: str, env: Mapping[str, str] | None = None, visible: str | None = None
) -> Command:
    return worker_command(
        device,
        7,
        started_as=["python", "-s", "main.py", *arguments],
        env=env or {},
        visible=visible,
        temp="/host/temp",
        has_argument=lambda name: name == "database_url",
        num_slots=2,
    )


def test_each_variable_is_passed_on_or_the_fronts() -> None:
    """Whoever adds a variable decides: put its name into PASSED_ON or OF_FRONT of fleet/command.py."""
    assert known_variables() == PASSED_ON | OF_FRONT
    assert set() == PASSED_ON & OF_FRONT


def test_what_is_passed_on_reaches_the_workers_and_nothing_else_does() -> None:
    started = command(env=dict.fromkeys(known_variables(), "given"))
    assert {name for name, value in started.env.items() if value == "given"} == PASSED_ON


def test_it_is_started_as_the_front_was() -> None:
    argv = command("cpu", "--cpu", "--auto-launch", "--listen", "0.0.0.0", "--enable-assets").argv
    assert argv[1:6] == ("-s", "main.py", "--cpu", "--listen", "0.0.0.0")
    assert argv[6:] == (
        "--disable-auto-launch", "--temp-directory", "/host/temp/none", "--database-url", "sqlite:///:memory:",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("device", "visible", "name"),
    [("cuda:1", None, "1"), ("cuda:1", "", "1"), ("cuda:1", "4,6", "6"), ("cuda:0", "GPU-5f, GPU-7a", "GPU-5f")],
)
def test_it_sees_its_own_device_only(device: str, visible: str | None, name: str) -> None:
    started = command(device, "--cuda-device", "4,6", visible=visible)
    assert started.argv[-2:] == ("--cuda-device", name)
    assert started.env["COMFY_PARALLEL_DEVICES"] == "cuda:0"


def test_its_environment_is_the_fronts_without_what_concerns_the_front() -> None:
    env = {"PATH": "/bin", "COMFY_PARALLEL_WEIGHTS": "copy", "COMFY_PARALLEL_PRELOAD": "a", "COMFY_NUM_GPUS": "2"}
    started = command(env={**env, "OMP_NUM_THREADS": "3"})
    assert started.env == {
        "PATH": "/bin",
        "COMFY_PARALLEL_WEIGHTS": "copy",
        "OMP_NUM_THREADS": "3",
        SWITCH: "1",
        "COMFY_PARALLEL_STATE": "off",
        "COMFY_PARALLEL_DEVICES": "cpu",
        "COMFY_PARALLEL_WORKER": "7:2:/host/temp",
    }
    assert started.pass_fds == (7,)


def test_only_some_devices_can_have_a_process() -> None:
    can_be("cpu")
    can_be("cuda:3")
    with pytest.raises(ConfigError, match="mps=process: only cuda and cpu"):
        can_be("mps")
