"""start_multi_gpu.sh: what it finds, what it passes on, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.deploy

REPO_DIR = Path(__file__).resolve().parents[2]
NAME = "start_multi_gpu.sh"
SCRIPT = REPO_DIR / NAME
TIMEOUT_S = 120

# Stands in for ComfyUI where only the script's own behaviour matters.
FAKE_MAIN = """
import json, os, signal, sys

def stop(number, frame):
    print("last words", flush=True)
    sys.exit(40 + number)

signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
print(json.dumps({"args": sys.argv[1:], "cwd": os.getcwd(), "env": dict(os.environ)}), flush=True)
print("an error", file=sys.stderr, flush=True)
if "--wait" in sys.argv:
    signal.pause()
sys.exit(int(os.environ.get("FAKE_STATUS", "0")))
"""

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def comfyui(tmp_path: Path) -> Path:
    """A folder that looks like a ComfyUI, with this repository linked into it."""
    home = tmp_path / "my ComfyUI"
    for name in ("comfy", "custom_nodes", "user"):
        (home / name).mkdir(parents=True)
    (home / "main.py").write_text(FAKE_MAIN)
    (home / "custom_nodes" / "comfy_parallel").symlink_to(REPO_DIR)
    return home


@pytest.fixture
def linked_script(comfyui: Path) -> Path:
    return comfyui / "custom_nodes" / "comfy_parallel" / NAME


@pytest.fixture
def env(plain_env: dict[str, str]) -> dict[str, str]:
    return {**plain_env, "COMFYUI_PYTHON": sys.executable}


@pytest.fixture
def run(env: dict[str, str], tmp_path: Path) -> Run:
    def start(
        script: Path | str, *args: str, cwd: Path = tmp_path, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(script), *args],
            cwd=cwd,
            env={**env, **variables},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )

    return start


def seen_by_main(output: str) -> dict[str, Any]:
    line = next(line for line in output.splitlines() if line.startswith("{"))
    seen: dict[str, Any] = json.loads(line)
    return seen


def logs_of(comfyui: Path) -> list[Path]:
    return sorted((comfyui / "user").rglob("*.log"))


def await_text(path: Path, text: str) -> str:
    """The file's content, once it holds the text."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        content = path.read_text() if path.exists() else ""
        if text in content or time.monotonic() > deadline:
            assert text in content
            return content
        time.sleep(0.02)


def test_finds_comfyui_around_the_linked_repository_from_any_directory(
    run: Run, comfyui: Path, linked_script: Path
) -> None:
    for cwd, script in [(Path("/"), linked_script), (comfyui, linked_script.relative_to(comfyui))]:
        done = run(script, "--dry-run", cwd=cwd)
        assert done.returncode == 0, done.stderr
        assert f"cd {comfyui}".replace(" C", "\\ C") in done.stdout


def test_finds_comfyui_around_a_clone(run: Run, comfyui: Path) -> None:
    clone = comfyui / "custom_nodes" / "comfy_parallel"
    clone.unlink()
    clone.mkdir()
    for name in (NAME, "prestartup_script.py"):
        (clone / name).write_bytes((REPO_DIR / name).read_bytes())
    (clone / NAME).chmod(0o755)
    assert seen_by_main(run(clone / NAME).stdout)["cwd"] == str(comfyui)


@pytest.mark.parametrize("is_relative", [False, True])
def test_finds_comfyui_through_a_symlink_to_the_script(
    run: Run, tmp_path: Path, comfyui: Path, linked_script: Path, is_relative: bool
) -> None:
    (tmp_path / "bin").mkdir()
    link = tmp_path / "bin" / "start"
    link.symlink_to(Path(os.path.relpath(linked_script, link.parent)) if is_relative else linked_script)
    assert seen_by_main(run(link).stdout)["cwd"] == str(comfyui)


def test_finds_comfyui_through_a_symlink_to_the_folder_and_through_path(
    run: Run, tmp_path: Path, env: dict[str, str], comfyui: Path, linked_script: Path
) -> None:
    by_path = f"{linked_script.parent}:{env['PATH']}"
    assert seen_by_main(run(NAME, PATH=by_path).stdout)["cwd"] == str(comfyui)
    (tmp_path / "elsewhere").symlink_to(comfyui)
    script = tmp_path / "elsewhere" / "custom_nodes" / "comfy_parallel" / NAME
    assert Path(seen_by_main(run(script).stdout)["cwd"]).samefile(comfyui)


def test_the_option_beats_the_variable_beats_the_surroundings(
    run: Run, tmp_path: Path, comfyui: Path, linked_script: Path
) -> None:
    others = [tmp_path / "other", tmp_path / "third"]
    for other in others:
        (other / "comfy").mkdir(parents=True)
        (other / "main.py").write_text(FAKE_MAIN)
        (other / "custom_nodes").mkdir()
        (other / "custom_nodes" / "comfy_parallel").symlink_to(REPO_DIR)
    by_variable = run(linked_script, COMFYUI_PATH=str(others[0]))
    assert seen_by_main(by_variable.stdout)["cwd"] == str(others[0])
    by_option = run(linked_script, "--comfyui", "third", COMFYUI_PATH=str(others[0]))
    assert seen_by_main(by_option.stdout)["cwd"] == str(others[1])


@pytest.mark.parametrize(
    ("args", "variables", "complaint"),
    [
        ([], {}, "cannot find ComfyUI"),
        (["--comfyui", "nowhere"], {}, "nowhere is not a ComfyUI folder"),
        ([], {"COMFYUI_PATH": "/"}, "/ is not a ComfyUI folder"),
    ],
)
def test_says_how_to_name_comfyui_when_there_is_none(
    run: Run, tmp_path: Path, args: list[str], variables: dict[str, str], complaint: str
) -> None:
    (tmp_path / "alone").mkdir()
    script = tmp_path / "alone" / NAME
    script.write_bytes(SCRIPT.read_bytes())
    script.chmod(0o755)
    done = run(script, *args, **variables)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert "--comfyui DIR" in done.stderr


def test_stops_when_the_package_is_not_linked_into_this_comfyui(run: Run, comfyui: Path) -> None:
    (comfyui / "custom_nodes" / "comfy_parallel").unlink()
    done = run(SCRIPT, "--comfyui", str(comfyui))
    assert done.returncode == 2
    assert f"comfy-parallel link {str(comfyui).replace(' ', chr(92) + ' ')}" in done.stderr
    assert done.stdout == ""


def test_a_disabled_copy_does_not_count(run: Run, comfyui: Path) -> None:
    link = comfyui / "custom_nodes" / "comfy_parallel"
    link.rename(link.with_suffix(".disabled"))
    assert run(SCRIPT, "--comfyui", str(comfyui)).returncode == 2


def test_looks_for_custom_nodes_in_the_base_directory(run: Run, tmp_path: Path, comfyui: Path) -> None:
    base = tmp_path / "base"
    (base / "custom_nodes").mkdir(parents=True)
    refused = run(SCRIPT, "--comfyui", str(comfyui), "--base-directory", str(base))
    assert refused.returncode == 2
    assert f"{base}/custom_nodes/comfy_parallel" in refused.stderr
    (base / "custom_nodes" / "comfy_parallel").symlink_to(REPO_DIR)
    (comfyui / "custom_nodes" / "comfy_parallel").unlink()
    done = run(SCRIPT, "--comfyui", str(comfyui), f"--base-directory={base}")
    assert done.returncode == 0, done.stderr
    assert [path.parent for path in (base / "user").rglob("*.log")] == [base / "user" / "logs"]


def test_a_fork_that_calls_install_itself_needs_no_custom_node(run: Run, comfyui: Path) -> None:
    (comfyui / "custom_nodes" / "comfy_parallel").unlink()
    main = comfyui / "main.py"
    main.write_text("# import comfy_parallel\n" + main.read_text())
    assert run(SCRIPT, "--comfyui", str(comfyui)).returncode == 0


@pytest.mark.parametrize("venv", ["venv", ".venv"])
def test_uses_the_python_of_comfyuis_own_venv(run: Run, comfyui: Path, linked_script: Path, venv: str) -> None:
    (comfyui / venv / "bin").mkdir(parents=True)
    (comfyui / venv / "bin" / "python").symlink_to(sys.executable)
    done = run(linked_script, "--dry-run", COMFYUI_PYTHON="")
    assert f"{venv}/bin/python main.py" in done.stdout


def test_says_what_to_do_when_no_python_has_torch(run: Run, tmp_path: Path, linked_script: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin" / "python3").chmod(0o755)
    done = run(linked_script, COMFYUI_PYTHON="", PATH=f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert done.returncode == 2
    assert "set COMFYUI_PYTHON" in done.stderr


def test_says_that_the_named_python_cannot_be_run(run: Run, linked_script: Path) -> None:
    done = run(linked_script, COMFYUI_PYTHON="/nowhere/python")
    assert done.returncode == 2
    assert "COMFYUI_PYTHON=/nowhere/python" in done.stderr


def test_dry_run_prints_environment_and_command_and_starts_nothing(
    run: Run, comfyui: Path, linked_script: Path
) -> None:
    done = run(linked_script, "--dry-run", "--devices", "cuda:0,cuda:1", "--port", "8190")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert "COMFY_MULTI_GPU_SCHED=1" in lines
    assert any(re.fullmatch(r"COMFY_PARALLEL_DEVICES=cuda:0\\?,cuda:1", line) for line in lines)
    assert lines[-1] == f"{sys.executable} main.py --port 8190"
    assert not logs_of(comfyui)
    again = subprocess.run(["bash", "-c", "\n".join(lines[-2:])], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert seen_by_main(again.stdout)["args"] == ["--port", "8190"]


def test_passes_on_what_it_does_not_know_and_everything_after_a_double_dash(run: Run, linked_script: Path) -> None:
    args = ["--port", "8190", "--num-gpus", "2", "--listen", "a b", "--", "--num-gpus", "3", "--help"]
    seen = seen_by_main(run(linked_script, *args).stdout)
    assert seen["args"] == ["--port", "8190", "--listen", "a b", "--num-gpus", "3", "--help"]
    assert seen["env"]["COMFY_NUM_GPUS"] == "2"


def test_scheduler_is_on_unless_the_user_switched_it_off(run: Run, linked_script: Path) -> None:
    assert seen_by_main(run(linked_script).stdout)["env"]["COMFY_MULTI_GPU_SCHED"] == "1"
    off = run(linked_script, COMFY_MULTI_GPU_SCHED="0")
    assert seen_by_main(off.stdout)["env"]["COMFY_MULTI_GPU_SCHED"] == "0"


def test_options_win_over_variables(run: Run, linked_script: Path) -> None:
    variables = {"COMFY_PARALLEL_DEVICES": "cuda:5", "COMFY_NUM_GPUS": "7"}
    seen = seen_by_main(run(linked_script, "--num-gpus=2", **variables).stdout)["env"]
    assert seen["COMFY_NUM_GPUS"] == "2"
    assert "COMFY_PARALLEL_DEVICES" not in seen
    seen = seen_by_main(run(linked_script, "--devices=cuda:1", **variables).stdout)["env"]
    assert seen["COMFY_PARALLEL_DEVICES"] == "cuda:1"


@pytest.mark.parametrize(
    ("devices", "args", "expected"),
    [
        ("cpu,cpu", [], ["--cpu"]),
        ("cpu, cpu", ["--port", "1"], ["--port", "1", "--cpu"]),
        ("cpu", ["--cpu"], ["--cpu"]),
        ("cuda:0", [], []),
    ],
)
def test_slots_on_the_cpu_come_with_comfyuis_own_switch(
    run: Run, linked_script: Path, devices: str, args: list[str], expected: list[str]
) -> None:
    assert seen_by_main(run(linked_script, "--devices", devices, *args).stdout)["args"] == expected


@pytest.mark.parametrize(
    "args",
    [["--devices"], ["--num-gpus", "none"], ["--num-gpus", "0"], ["--devices", "cpu", "--num-gpus", "1"]],
    ids=" ".join,
)
def test_refuses_options_without_sense(run: Run, linked_script: Path, args: list[str]) -> None:
    done = run(linked_script, *args)
    assert done.returncode == 2
    assert args[0] in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("cores", "args", "variables", "expected"),
    [
        (64, ["--num-gpus", "4"], {}, "4"),
        (8, ["--num-gpus", "4"], {}, "2"),
        (8, ["--devices", "cuda:0,cuda:1,cuda:2"], {}, "2"),
        (8, ["--devices", "cuda:0,cuda:1"], {"COMFY_PARALLEL_SLOTS_PER_GPU": "4"}, "1"),
        (8, [], {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, "2"),
        (2, ["--num-gpus", "8"], {}, "1"),
        (8, ["--num-gpus", "4"], {"OMP_NUM_THREADS": "7"}, "7"),
    ],
)
def test_threads_are_shared_out_between_the_slots(
    run: Run,
    tmp_path: Path,
    env: dict[str, str],
    linked_script: Path,
    cores: int,
    args: list[str],
    variables: dict[str, str],
    expected: str,
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nproc").write_text(f"#!/bin/sh\necho {cores}\n")
    (tmp_path / "bin" / "nproc").chmod(0o755)
    done = run(linked_script, *args, PATH=f"{tmp_path / 'bin'}:{env['PATH']}", **variables)
    seen = seen_by_main(done.stdout)["env"]
    assert [seen[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")] == [expected] * 3


def test_everything_printed_is_also_in_the_log(run: Run, comfyui: Path, linked_script: Path) -> None:
    done = run(linked_script)
    assert "an error" in done.stdout
    (log,) = logs_of(comfyui)
    assert log.parent == comfyui / "user" / "logs"
    content = await_text(log, "an error")
    assert seen_by_main(content)["cwd"] == str(comfyui)


def test_the_log_file_can_be_chosen_and_is_appended_to(run: Run, tmp_path: Path, linked_script: Path) -> None:
    log = tmp_path / "some where" / "it.log"
    log.parent.mkdir()
    log.write_text("earlier\n")
    run(linked_script, "--log-file", "some where/it.log")
    assert await_text(log, "an error").startswith("earlier\n")


def test_without_a_log_file_both_streams_stay_apart(run: Run, comfyui: Path, linked_script: Path) -> None:
    done = run(linked_script, "--no-log-file")
    assert done.stderr == "an error\n"
    assert len(done.stdout.splitlines()) == 1
    assert not logs_of(comfyui)


def test_says_that_the_log_cannot_be_written(run: Run, linked_script: Path) -> None:
    done = run(linked_script, "--log-file", "/dev/null/it.log")
    assert done.returncode == 2
    assert "/dev/null/it.log" in done.stderr
    assert "--no-log-file" in done.stderr


@pytest.mark.parametrize("args", [[], ["--no-log-file"]], ids=["logged", "not logged"])
def test_exit_status_is_comfyuis(run: Run, linked_script: Path, args: list[str]) -> None:
    assert run(linked_script, *args, FAKE_STATUS="7").returncode == 7


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("to_group", [False, True], ids=["process", "group"])
def test_signals_reach_comfyui_and_its_last_words_the_log(
    env: dict[str, str], tmp_path: Path, linked_script: Path, number: signal.Signals, to_group: bool
) -> None:
    """To the whole group is what Ctrl+C in a terminal and a stop by systemd do."""
    log = tmp_path / "it.log"
    command = [str(linked_script), "--log-file", str(log), "--wait"]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        await_text(log, "an error")
        (os.killpg if to_group else os.kill)(process.pid, number)
        output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 40 + number
    assert "last words" in output
    assert "last words" in log.read_text()
