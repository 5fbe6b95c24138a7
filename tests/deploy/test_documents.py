"""The documents: links lead somewhere, both READMEs have the same commands, and every command is run by a test."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from comfy_parallel.config import known_variables
from tests.deploy.conftest import Need
from tests.deploy.test_nginx import job
from tests.host.server import HostServer

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(180)]

REPO_DIR = Path(__file__).resolve().parents[2]
READMES = ("README.md", "README.zh.md")
PAGES = sorted({*REPO_DIR.glob("*.md"), *(REPO_DIR / "docs").glob("*.md")} - {REPO_DIR / "CHANGELOG.md"})
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
    r"\./start_multi_gpu\.sh --dry-run": "tests/deploy/test_start_script.py",
    r"\./start_multi_gpu\.sh --devices .*": "tests/deploy/test_real_start.py",
    r"\./quick_test\.sh": "tests/deploy/test_quick_test.py",
    r"pip install \.": "tests/deploy/test_link.py",
    r"nginx -t": "tests/deploy/test_nginx_command.py",
    r"git apply --reverse .*": "tests/deploy/test_fork_diff.py",
}
NOT_HERE = {
    r"(COMFYUI_PATH=\S+ )?ray start .*": "Ray's own; tests/host/test_ray.py starts a cluster by its module for tests",
    r"pip install 'comfy-parallel\[ray\]'": "tests/setup.sh installs it",
    r"git clone URL_OF_THIS_REPOSITORY .*": "the address differs",
    r"systemctl reload nginx": "no service manager",
    r"journalctl -u .*": "no service manager",
    r"comfy-parallel( \w+)?": "a name, no command line",
    r"pip install (prometheus-client )?nvidia-ml-py": "the tests' own requirements have what they need",
}


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """The commands of a page: each line of its bash blocks, and what begins like a command in running text."""
    lines = [line for block in blocks(page) for line in block.splitlines()]
    inline = re.findall(
        r"`((?:curl|comfy-parallel|\./|git apply|journalctl|pip install) ?[^`]*)`", page.read_text("utf-8")
    )
    found = [re.sub(r"\s+", " ", re.sub(r"\s+# .*", "", line)) for line in [*lines, *inline]]
    return [part.strip() for line in found for part in line.split(" && ") if part.strip()]


def is_known(command: str) -> bool:
    return any(re.fullmatch(pattern, command) for pattern in (ELSEWHERE | NOT_HERE))


RUN_HERE = sorted({command for page in PAGES for command in commands(page) if command.startswith("curl")})


def test_both_readmes_have_the_same_commands() -> None:
    english, chinese = (commands(REPO_DIR / name) for name in READMES)
    assert len(english) > 8
    assert english == chinese
    pictures = [len(re.findall(r"^```$", (REPO_DIR / name).read_text("utf-8"), re.MULTILINE)) for name in READMES]
    assert pictures[0] == pictures[1]


def test_both_readmes_name_the_same_files_variables_and_figures() -> None:
    def told(name: str) -> list[list[str]]:
        text = (REPO_DIR / name).read_text(encoding="utf-8")
        links = sorted(set(re.findall(r"\]\((?!README)([^)]+)\)", text)))
        return [links, sorted(set(re.findall(r"COMFY_\w+", text))), sorted(re.findall(r"\b\d+\.\d\d\b", text))]

    assert told(READMES[0]) == told(READMES[1])


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
    assert [each for each in commands(page) if each not in RUN_HERE and not is_known(each)] == []


def test_the_tests_that_run_the_others_exist() -> None:
    assert [path for path in ELSEWHERE.values() if not (REPO_DIR / path).is_file()] == []
    used = [pattern for pattern in ELSEWHERE if any(re.fullmatch(pattern, c) for p in PAGES for c in commands(p))]
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


def test_every_variable_is_in_the_page_about_configuration() -> None:
    page = (REPO_DIR / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)`", page, re.MULTILINE)) == known_variables()
    named = {name for each in PAGES for name in re.findall(r"\bCOMFY_PARALLEL_\w+", each.read_text(encoding="utf-8"))}
    assert named - known_variables() <= {"COMFY_PARALLEL_CACHE", "COMFY_PARALLEL_REQUIRE_HOST"}
