"""The documents: links lead somewhere, both READMEs have the same commands, and every command is run by a test."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from comfy_parallel.config import known_variables
from comfy_parallel.ops import cli
from tests.deploy.conftest import Need
from tests.deploy.pages import SHELLS, commands, languages
from tests.deploy.test_nginx import job
from tests.host.server import HostServer

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(180)]

REPO_DIR = Path(__file__).resolve().parents[2]
READMES = ("README.md", "README.zh.md")
NO_PAGES = {REPO_DIR / "CHANGELOG.md"}  # It tells what was, not what to type.
PAGES = sorted(path for path in {*REPO_DIR.rglob("*.md")} - NO_PAGES if "/." not in f"/{path.relative_to(REPO_DIR)}")
DATA = {"", "json", "yaml", "js", "python", "ini", "nginx"}  # what a block holds that no shell is to run
ADDRESS = "http://127.0.0.1:8188"

# Commands that this file does not run: by which test they are run, or why by none.
ELSEWHERE = {
    r"COMFY_MULTI_GPU_SCHED=1 python main\.py": "tests/host/server.py",
    r"COMFY_MULTI_GPU_SCHED=1 COMFY_PARALLEL_REMOTE=.* python main\.py": "tests/unit/fleet/remote/test_slot.py",
    r"COMFY_MULTI_GPU_SCHED=1 COMFY_PARALLEL_RAY=.* python main\.py": "tests/host/test_ray.py",
    r"bash tests/quick_start\.sh": "tests/quick_start.py",
    r"bash tests/run\.sh( --fast)?": "tests/run.sh",
    r"comfy-parallel (link|unlink) PATH_TO_COMFYUI": "tests/deploy/test_link.py",
    r"comfy-parallel doctor PATH_TO_COMFYUI": "tests/unit/ops/test_doctor.py",
    r"comfy-parallel nginx --gpus .*": "tests/deploy/test_nginx_command.py",
    r"comfy-parallel caddy --gpus 4": "tests/deploy/test_caddy.py",
    r"comfy-parallel plan MODEL .*": "tests/unit/ops/test_plan.py",
    r"comfy-parallel launch --gpus 0,1( .*)?": "tests/unit/ops/test_launch.py",
    r"comfy-parallel (master|all-fast|all-slow|update|update-nodes|venv)": "tests/unit/ops/test_modes.py",
    r"COMFY_MULTI_GPU_SCHED=1 COMFY_PARALLEL_DEVICES=cpu,cpu python main\.py --cpu": "tests/host/server.py",
    r"python run_command\.py( doctor PATH_TO_COMFYUI)?": "tests/unit/ops/test_modes.py",
    r"\./start_multi_gpu\.sh --dry-run": "tests/deploy/test_start_script.py",
    r"\./start_multi_gpu\.sh --devices .*": "tests/deploy/test_real_start.py",
    r"\./quick_test\.sh": "tests/deploy/test_quick_test.py",
    r"pip install \.": "tests/deploy/test_link.py",
    r"nginx -t": "tests/deploy/test_nginx_command.py",
    r"git apply (--reverse )?\S*patches/main\.diff": "tests/deploy/test_fork_diff.py",
    r"ruff check \.|ruff format --check \.|source tests/setup\.sh": "tests/run.sh",
}
NOT_HERE = {
    r"(COMFYUI_PATH=\S+ )?ray start .*": "Ray's own; tests/host/test_ray.py starts a cluster by its module for tests",
    r"pip install 'comfy-parallel\[ray\]'": "tests/setup.sh installs it",
    r"git clone URL_OF_THIS_REPOSITORY .*": "the address differs",
    r"systemctl (reload nginx|edit comfy-parallel)": "no service manager",
    r"journalctl -u .*": "no service manager",
    r"comfy-parallel( [\w-]+)?": "a name, no command line",
    r"echo 'comfy-parallel @ git\+URL_OF_THIS_REPOSITORY' >> requirements\.txt": "the address differs",
    r"kill -9|git pull --ff-only": "what is done to the server, or by it",
    r"pip install (prometheus-client )?nvidia-ml-py": "the tests' own requirements have what they need",
    r"pip install -r requirements\.txt": "the tests' own requirements have what they need",
    r"py-spy record --gil": "how a figure was made",
}
# Figures take hours or GPUs; that each of these takes its arguments is tested here.
MEASURED = re.compile(r"(python|pytest) (benchmarks|tests/gpu)/.*")
OURS = re.compile(r"comfy-parallel \S+ .*")
PARSE_ONLY = """
import argparse, runpy, shlex, sys
def parsed(self, args=None, namespace=None):
    real(self, args, namespace)
    raise SystemExit(0)
real, argparse.ArgumentParser.parse_args = argparse.ArgumentParser.parse_args, parsed
sys.path.insert(0, "benchmarks")
for line in sys.stdin.read().splitlines():
    sys.argv = shlex.split(line)[1:]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        print("" if end.code in (0, None) else f"{line}: {end.code}")
    else:
        print(f"{line}: it parsed no arguments")
"""


def told(page: Path) -> list[str]:
    return commands(page.read_text(encoding="utf-8"))


def is_known(command: str) -> bool:
    return bool(MEASURED.fullmatch(command)) or any(re.fullmatch(each, command) for each in (ELSEWHERE | NOT_HERE))


ALL = sorted({command for page in PAGES for command in told(page)})
SECRETS = [command for command in ALL if command.endswith(" > FILE")]
RUN_HERE = [command for command in ALL if command.startswith("curl")]


def test_both_readmes_have_the_same_commands() -> None:
    english, chinese = (told(REPO_DIR / name) for name in READMES)
    assert len(english) > 8
    assert english == chinese
    pictures = [len(re.findall(r"^```$", (REPO_DIR / name).read_text("utf-8"), re.MULTILINE)) for name in READMES]
    assert pictures[0] == pictures[1]


def test_both_readmes_name_the_same_files_variables_and_figures() -> None:
    def named(name: str) -> list[list[str]]:
        text = (REPO_DIR / name).read_text(encoding="utf-8")
        links = sorted(set(re.findall(r"\]\((?!README)([^)]+)\)", text)))
        return [links, sorted(set(re.findall(r"COMFY_\w+", text))), sorted(re.findall(r"\b\d+\.\d\d\b", text))]

    assert named(READMES[0]) == named(READMES[1])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith("http"):
            continue
        name, _, heading = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if heading:
            lines = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines}, link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_run_by_a_test(page: Path) -> None:
    assert [each for each in told(page) if each not in [*RUN_HERE, *SECRETS] and not is_known(each)] == []
    assert languages(page.read_text(encoding="utf-8")) <= SHELLS | DATA


@pytest.mark.parametrize(
    "text",
    [
        *(f"```{language}\nzap all\n```\n" for language in sorted(SHELLS)),
        "````bash title=x\n# why\nzap all\n````\n",
        "~~~bash\nzap all\n~~~\n",
        "1. So:\n   ```sh\n   $ zap \\\n     all   # why\n   ```\n",
    ],
)
def test_every_line_of_a_shells_block_is_a_command(text: str) -> None:
    assert commands(text) == ["zap all"]
    assert not is_known("zap all")


@pytest.mark.parametrize(
    "command", ["python x.py --y", "A=1 B=2 python main.py", "./tool.sh", "systemctl stop x", "sudo cp a b", "uv run x"]
)
@pytest.mark.parametrize("form", ["```\n{}\n```\n", "Say `{}`.\n", "So:\n\n    {}\n", "| a | ``{}`` |\n", "\t$ {}\n"])
def test_what_begins_like_a_command_is_one_wherever_it_stands(form: str, command: str) -> None:
    assert commands(form.format(command)) == [command]
    assert not is_known(command)


@pytest.mark.parametrize("text", ["`nginx` and `python`", "python is a language", "```json\n{}\n```\n", "`kill`"])
def test_a_name_is_no_command(text: str) -> None:
    assert commands(text) == []


def test_every_documented_measurement_takes_its_arguments() -> None:
    lines = [command for command in ALL if MEASURED.fullmatch(command)]
    missing = [path for line in lines for path in re.findall(r"\S+\.py", line) if not (REPO_DIR / path).is_file()]
    assert missing == []
    parsed = [line for line in lines if line.startswith("python ")]
    environment = {**os.environ, "PYTHONPATH": str(REPO_DIR)}
    command = [sys.executable, "-c", PARSE_ONLY]
    options = {"capture_output": True, "text": True, "cwd": REPO_DIR, "env": environment, "timeout": 150}
    done = subprocess.run(command, input="\n".join(parsed), **options)
    assert done.stdout.splitlines() == [""] * len(parsed), done.stdout + done.stderr


@pytest.mark.parametrize("command", [command for command in ALL if OURS.fullmatch(command)])
def test_every_documented_command_of_ours_takes_its_arguments(command: str) -> None:
    assert cli._parser().parse_args(shlex.split(command)[1:]).run


def test_the_tests_that_run_the_others_exist() -> None:
    assert [path for path in ELSEWHERE.values() if not (REPO_DIR / path).is_file()] == []
    used = [pattern for pattern in ELSEWHERE if any(re.fullmatch(pattern, c) for c in ALL)]
    assert set(ELSEWHERE) - set(used) == set()


@pytest.mark.parametrize("command", RUN_HERE)
def test_a_command_for_a_running_server_does_what_it_says(
    need: Need, host: HostServer, tmp_path: Path, command: str
) -> None:
    need("curl")
    assert ADDRESS in command
    (tmp_path / "job.json").write_text(json.dumps(job()))
    line = command.replace(ADDRESS, host.url).replace("curl ", "curl --silent --show-error --fail-with-body ", 1)
    script = ["bash", "-o", "pipefail", "-c", line]
    try:
        done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout or command.endswith("/free")
    finally:
        assert host.request("POST", "/parallel/resume", {})[0] == 200


@pytest.mark.parametrize("command", SECRETS)
def test_a_file_of_secrets_that_is_made_as_told_is_taken(need: Need, tmp_path: Path, command: str) -> None:
    program = next(name for name in ("caddy", "openssl") if name in command)
    need(program)
    line = command.replace("FILE", shlex.quote(str(tmp_path / "secrets")))
    options = {"capture_output": True, "text": True, "timeout": 60}
    # Without a terminal both ask on standard input.
    done = subprocess.run(["bash", "-c", line], input="open sesame\n" * 2, start_new_session=True, **options)
    kind = "bearer" if "rand" in command else "basic"
    entry = ["caddy" if program == "caddy" else "nginx", "--gpus", "2", "--auth", kind, str(tmp_path / "secrets")]
    assert cli.main([*entry, "--output", str(tmp_path / "written")]) == 0, done.stderr


def test_every_variable_is_in_the_page_about_configuration() -> None:
    page = (REPO_DIR / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)`", page, re.MULTILINE)) == known_variables()
    named = {name for each in PAGES for name in re.findall(r"\bCOMFY_PARALLEL_\w+", each.read_text(encoding="utf-8"))}
    assert named - known_variables() <= {"COMFY_PARALLEL_CACHE", "COMFY_PARALLEL_REQUIRE_HOST"}
