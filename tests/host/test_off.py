"""Off is stock; what cannot be used ends the start; a host that does not fit starts as it is."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from comfy_parallel import patches
from comfy_parallel.patches.model_management import Alias
from tests.conftest import REPO_DIR
from tests.host.conftest import MakeServer
from tests.host.jobs import outcome
from tests.host.server import JSON, HostServer, HostServerError, clean_environment
from tests.host.workflows import node

pytestmark = [pytest.mark.host, pytest.mark.timeout(900)]

DUMP = Path(__file__).with_name("dump.py")
APPLY_REVERT = Path(__file__).with_name("apply_revert.py")
TARGETS = {patch.target: patch for patch in patches.ALL}
UNSEEN = {  # by kind and qualified name
    "comfy.model_management:get_free_memory",  # is the host's own code with another view of torch
    "comfy.ops:pick_operations",  # is wrapped only where models share a class of layers
    "comfy.ops:scaled_dot_product_attention",  # is wrapped only where it sets process-wide flags
    "execution:PromptQueue",  # is the host's by name; the queue's own classes show the difference
}
SWITCH = "COMFY_MULTI_GPU_SCHED"
OUR_PATHS = ("/queue/all", "/debug/queues", "/metrics", "/parallel/")
OUR_ROUTES = tuple(prefix + path for prefix in ("", "/api") for path in OUR_PATHS)
STOCK_ROUTES = ("/object_info", "/extensions", "/queue", "/features")


# The patches put on and taken off in a process of their own; it works while the tests start hosts.


@pytest.fixture(scope="module", autouse=True)
def reports(host_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Any]]]:
    """What apply_revert.py prints, by mode."""
    with ThreadPoolExecutor(1) as pool:
        runs = [
            (modes, pool.submit(apply_revert, host_dir, tmp_path_factory.mktemp("base"), modes))
            for modes in (("off", "late", "failures"), ("early",))
        ]
        yield {mode: run for modes, run in runs for mode in modes}


def apply_revert(host_dir: Path, base_dir: Path, modes: tuple[str, ...]) -> Any:
    command = [sys.executable, "-W", "ignore", str(APPLY_REVERT), str(host_dir), str(base_dir), *modes]
    run = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-6000:]
    return json.loads(run.stdout.splitlines()[-1])


# What a host looks like, from inside and from outside.


@dataclass(frozen=True)
class Seen:
    """A host's dump, its answers, what a client gets to see of a job, and the log."""

    inside: JSON
    statuses: dict[str, int]
    answers: JSON
    job: list[Any]
    log: str


def look(
    make_server: MakeServer, base_dir: Path, *, is_linked: bool = True, header: int | None = 99, **options: Any
) -> Seen:
    """Start a host with the pack that dumps; no stock host knows the header."""
    links = {"dump.py": DUMP, **({"comfy_parallel": REPO_DIR} if is_linked else {})}
    (base_dir / "custom_nodes").mkdir(parents=True)
    for name, target in links.items():
        (base_dir / "custom_nodes" / name).symlink_to(target)
    env = {"CPT_TARGETS": json.dumps(sorted(TARGETS)), **options.pop("env", {})}
    server = make_server(base_dir, link=False, env=env, **options)
    inside = server.request("GET", "/dump")[1]
    statuses = {path: server.request("GET", path)[0] for path in OUR_ROUTES}
    answers = {path: server.request("GET", path)[1] for path in STOCK_ROUTES}
    seen = Seen(placeless(inside, server), statuses, placeless(answers, server), run_job(server, header), server.log())
    server.stop()
    return seen


def placeless(value: Any, server: HostServer) -> Any:
    """The same for a host in another folder."""
    return json.loads(json.dumps(value).replace(str(server.base_dir), "BASE").replace(str(server.host_dir), "HOST"))


def run_job(server: HostServer, header: int | None) -> list[Any]:
    """What a client sees of a job, by names: the values differ from run to run."""
    workflow = {
        "image": node("EmptyImage", width=16, height=16, batch_size=1, color=0),
        "out": node("PreviewImage", images=["image", 0]),
    }
    with server.websocket() as client:
        reply = server.submit(workflow, header, client.client_id)
        client.wait_for(lambda event: event["type"] == "executing" and event["data"]["node"] is None)
        entry = server.wait([reply["prompt_id"]])[reply["prompt_id"]]
        events = {event["type"]: sorted(event["data"]) for event in client.events}
    assert outcome(entry) == "success"
    return [sorted(reply), sorted(entry), len(entry["prompt"]), sorted(entry["prompt"][3]), events]


def differing(stock: Seen, other: Seen) -> list[str]:
    """What of a host's inside, besides our own modules, is not as on stock."""
    found: list[str] = []
    for section, expected in stock.inside.items():
        actual = other.inside[section]
        if section == "modules":
            missing, more = (
                set(expected) - set(actual),
                {name for name in set(actual) - set(expected) if not is_ours(name)},
            )
            found += [f"{section}: {name}" for name in missing | more]
        elif isinstance(expected, dict):
            found += [f"{section}: {name}" for name in leaves(expected, actual)]
        elif expected != actual and section != "scheduler":
            found.append(f"{section}: {expected} on stock, {actual} here")
    return sorted(found)


def leaves(expected: JSON, actual: JSON) -> Iterator[str]:
    for name in expected.keys() | actual.keys():
        one, other = expected.get(name), actual.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from (f"{name}.{leaf}" for leaf in leaves(one, other))
        elif one != other:
            yield name


def is_ours(module: str) -> bool:
    return module.partition(".")[0] == "comfy_parallel" or module == "BASE/custom_nodes/comfy_parallel"


@pytest.fixture(scope="module")
def looks(make_module_server: MakeServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seen]:
    """A host without this repository, hosts with it and the scheduler off in both ways, and one with it on."""
    variants: dict[str, dict[str, Any]] = {
        "stock": {"slots": None, "is_linked": False},
        "unset": {"slots": None},
        "0": {"slots": None, "env": {SWITCH: "0", "COMFY_NUM_GPUS": "nonsense"}},
        "on": {"slots": "cpu,cpu", "header": None},
    }

    def look_at(name: str) -> Seen:
        return look(make_module_server, tmp_path_factory.mktemp("host") / "base", **variants[name])

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(variants, pool.map(look_at, variants), strict=True))


@pytest.mark.parametrize("switch", ["unset", "0"])
def test_off_the_host_is_stock_inside(looks: dict[str, Seen], switch: str) -> None:
    """Attributes, classes of modules, finders, threads, middlewares, routes, the queue, what is imported."""
    assert differing(looks["stock"], looks[switch]) == []
    ours = [name for name in looks[switch].inside["modules"] if is_ours(name)]
    assert "comfy_parallel.install" in ours, "the start script has not run"
    assert [
        name for name in ours if name.startswith(("comfy_parallel.patches", "comfy_parallel.http.middleware"))
    ] == []
    assert looks[switch].inside["scheduler"] == [False, 0]


@pytest.mark.parametrize("switch", ["unset", "0"])
def test_off_the_host_is_stock_outside(looks: dict[str, Seen], switch: str) -> None:
    assert looks[switch].statuses == dict.fromkeys(OUR_ROUTES, 404)
    assert looks[switch].answers == looks["stock"].answers
    assert looks[switch].job == looks["stock"].job


def test_on_every_patch_shows(looks: dict[str, Seen]) -> None:
    """Or the comparison would say nothing."""
    stock, on = looks["stock"], looks["on"]
    before, after = stock.inside["targets"], on.inside["targets"]
    unseen = {target for target in TARGETS if before[target] == after[target]}
    absent = {target for target in unseen if before[target] is None}
    assert unseen - absent <= UNSEEN
    assert all(not TARGETS[target].is_required or isinstance(TARGETS[target], Alias) for target in absent)
    for section in ("module_classes", "meta_path", "middlewares", "routes", "queue", "attributes", "threads"):
        assert stock.inside[section] != on.inside[section], section
    assert on.inside["scheduler"] == [True, 2]
    assert on.statuses == dict.fromkeys(OUR_ROUTES, 200)
    assert on.job != stock.job


# Values that cannot be used.


@pytest.mark.parametrize(
    ("name", "value", "fix"),
    [
        (SWITCH, "yes", "1 (on) or 0 (off)"),
        ("COMFY_NUM_GPUS", "0", "whole number from 1 to 999, or leave it unset"),
        ("COMFY_NUM_GPUS", "two", "whole number from 1 to 999, or leave it unset"),
        ("COMFY_PARALLEL_DEVICES", "0,1", "a comma-separated list like cuda:0,cuda:1 or cpu,cpu"),
        ("COMFY_PARALLEL_DEVICES", "cpu,cuda:0", "all slots must be of one kind"),
        ("COMFY_PARALLEL_SLOTS_PER_GPU", "-1", "whole number from 1 to 999, or leave it unset"),
        ("COMFY_PARALLEL_SLOTS_PER_GPU", "1.5", "whole number from 1 to 999, or leave it unset"),
        ("COMFY_PARALLEL_DEFAULT_GPU", "first", "auto or to the number of a slot"),
        ("COMFY_PARALLEL_STRICT", "true", "1 (on) or 0 (off)"),
        # This one can be judged only once the host knows its devices.
        ("COMFY_PARALLEL_DEVICES", "cuda:0,cuda:1", "start ComfyUI without --cpu, or name cpu devices"),
    ],
)
def test_a_value_that_cannot_be_used_ends_the_start(make_server: MakeServer, name: str, value: str, fix: str) -> None:
    message = refusal(make_server, env={name: value})
    (line,) = [line for line in message.splitlines() if line.startswith("comfy_parallel: ")]
    assert re.search(rf"{name}='?{re.escape(value)}'?: ", line)
    assert fix in line


def refusal(make_server: MakeServer, **options: Any) -> str:
    """What a host says that does not start and says why."""
    with pytest.raises(HostServerError, match="the host ended with status 2\n") as error:
        make_server(slots="cpu,cpu", **options)
    return plain(str(error.value))


def plain(log: str) -> str:
    """Newer hosts write each line's level, in colours."""
    return re.sub(r"^\[[A-Z]+\] ", "", re.sub(r"\x1b\[[0-9;]*m", "", log), flags=re.MULTILINE)


# Hosts that do not fit.


@dataclass(frozen=True)
class Misfit:
    """A change in a host's source, and what is told of it."""

    path: str
    pattern: str
    replacement: str
    told: str
    changed: str


MISFITS = {
    "seen in the source": Misfit(
        "comfy_execution/graph_utils.py",
        r"def set_default_prefix\(cls, prefix_root,(.*\n.*) = prefix_root",
        r"def set_default_prefix(cls, root,\1 = root",
        "comfy_execution.graph_utils:GraphBuilder.set_default_prefix: expected parameters "
        "('cls', 'prefix_root', 'call_index', 'graph_index'), host has ('cls', 'root', 'call_index', 'graph_index')",
        "targets: comfy_execution.graph_utils:GraphBuilder.set_default_prefix",
    ),
    "seen once imported": Misfit(
        "comfy/model_management.py",
        r"\n(current_loaded_models\b.*)= \[\]",
        r"\n\1= __import__('collections').UserList()",
        "comfy.model_management:current_loaded_models: expected list, found UserList",
        "targets: comfy.model_management:current_loaded_models",
    ),
}


def misfitting(host_dir: Path, home: Path, misfit: Misfit) -> Path:
    """A copy of the host with the change."""

    def skipped(folder: str, names: list[str]) -> set[str]:
        user_data = {".git", "models", "input", "output", "temp", "user", "custom_nodes", "tests", "tests-unit"}
        return user_data if Path(folder) == host_dir else set()

    shutil.copytree(host_dir, home, symlinks=True, ignore=skipped)
    path = home / misfit.path
    text, count = re.subn(misfit.pattern, misfit.replacement, path.read_text())
    assert count == 1, "this host needs another change"
    path.write_text(text)
    return home


@pytest.mark.parametrize("kind", MISFITS)
def test_a_host_that_does_not_fit_starts_as_stock_and_says_why(
    make_server: MakeServer, looks: dict[str, Seen], host_dir: Path, tmp_path: Path, kind: str
) -> None:
    misfit = MISFITS[kind]
    changed = misfitting(host_dir, tmp_path / "misfit", misfit)
    seen = look(make_server, tmp_path / "base", host_dir=changed, slots="cpu,cpu", may_be_stock=True)
    assert told(seen.log) == [misfit.told]
    names = [name for name in differing(looks["stock"], seen) if not name.startswith("namespaces: ")]
    assert names == [misfit.changed]
    assert seen.statuses == dict.fromkeys(OUR_ROUTES, 404)
    assert (seen.answers, seen.job) == (looks["stock"].answers, looks["stock"].job)


@pytest.mark.parametrize("kind", MISFITS)
def test_a_host_that_does_not_fit_is_refused_when_strict(
    make_server: MakeServer, host_dir: Path, tmp_path: Path, kind: str
) -> None:
    changed = misfitting(host_dir, tmp_path / "misfit", MISFITS[kind])
    message = refusal(make_server, host_dir=changed, env={"COMFY_PARALLEL_STRICT": "1"})
    assert f"comfy_parallel: {MISFITS[kind].told}\n" in message


PARTLY = {
    "a feature": Misfit(
        "comfy/utils.py",
        r"def copy_to_param\(obj, attr, value\):",
        "def copy_to_param(obj, name, value):\n    attr = name",
        "comfy_parallel: weights does not fit this ComfyUI, so every slot keeps its own copy of its weights "
        "(COMFY_PARALLEL_WEIGHTS=off asks for that): comfy.utils:copy_to_param: expected parameters "
        "('obj', 'attr', 'value'), host has ('obj', 'name', 'value')",
        "start with COMFY_PARALLEL_WEIGHTS=off to do without",
    ),
    "a feature, while it is applied": Misfit(
        "comfy/samplers.py",
        r"(?s)\A(.*)\Z",
        r"\1\ncollections = None\n",
        "comfy_parallel: this ComfyUI does without speed: comfy.samplers:collections: AttributeError",
        "",
    ),
    "an unknown global": Misfit(
        "node_helpers.py",
        r"\ndef conditioning_set_values\b",
        r"\nSEEN = {}\ndef see(name):\n    SEEN[name] = 1\n\ndef conditioning_set_values",
        "comfy_parallel: unknown global SEEN (node_helpers.py:",
        "unknown global SEEN (node_helpers.py:",
    ),
}


@pytest.mark.parametrize("kind", PARTLY)
def test_a_host_that_fits_but_for_a_part_runs_slots_without_it(
    make_server: MakeServer, host_dir: Path, tmp_path: Path, kind: str
) -> None:
    misfit = PARTLY[kind]
    changed = misfitting(host_dir, tmp_path / "misfit", misfit)
    server = make_server(host_dir=changed, slots="cpu,cpu", env={"COMFY_PARALLEL_STRICT": "0"})
    assert len(server.request("GET", "/queue/all")[1]["queues"]) == 2
    image = node("EmptyImage", width=16, height=16, batch_size=1, color=0)
    reply = server.submit({"out": node("PreviewImage", images=["i", 0]), "i": image}, 1)
    assert reply["gpu_id"] == 1
    assert outcome(server.wait([reply["prompt_id"]])[reply["prompt_id"]]) == "success"
    wait_for_line(server, misfit.told)
    assert [line.startswith(misfit.told) for line in told(server.log())].count(True) == 1
    server.stop()
    if misfit.changed:
        message = refusal(make_server, host_dir=changed, env={"COMFY_PARALLEL_STRICT": "1"})
        assert misfit.changed in message


def wait_for_line(server: HostServer, line: str) -> None:
    """Some things are looked for while the host runs already."""
    end = time.monotonic() + 60
    while line not in server.log() and time.monotonic() < end:
        time.sleep(0.2)


def test_a_feature_that_is_switched_off_needs_no_patch(make_server: MakeServer, host_dir: Path, tmp_path: Path) -> None:
    changed = misfitting(host_dir, tmp_path / "misfit", PARTLY["a feature"])
    env = {"COMFY_PARALLEL_STRICT": "1", "COMFY_PARALLEL_WEIGHTS": "off"}
    server = make_server(host_dir=changed, slots="cpu,cpu", env=env)
    assert not [line for line in told(server.log()) if "weights" in line]


def told(log: str) -> list[str]:
    """What the lines of ours in a log say, without how they begin."""
    begin = r"comfy_parallel does not fit this ComfyUI \S+ and stays OFF; ComfyUI runs one job at a time\. "
    named = re.compile(r"(?<![/\w])comfy_parallel(?![/\w])")  # a folder on some path may have our name too
    lines = [line for line in plain(log).splitlines() if named.search(line)]
    return [re.sub(begin, "", line) for line in lines]


# Taking the patches off again.


def test_off_the_start_script_changes_nothing_by_identity(reports: dict[str, Future[Any]]) -> None:
    report = reports["off"].result()["off"]
    untouched = {"changed": [], "new_threads": 0, "same_environment": True}
    assert report == {"results": {"None": untouched, "0": untouched}, "remnants": []}


def test_patches_of_an_imported_host_come_off_by_identity_any_number_of_times(reports: dict[str, Future[Any]]) -> None:
    report = reports["late"].result()["late"]
    first, *others = report["rounds"]
    assert len(others) == 2
    assert others == [first, first]
    assert (first["is_on"], first["left"]) == (True, [])
    owners = {re.split("[.:]", change)[0] for change in first["changed"]}
    assert {"execution", "server", "comfy", "torch", "numpy", "random", "threading"} <= owners
    assert report["remnants"] == []


def test_patches_come_off_a_host_that_was_imported_with_them(reports: dict[str, Future[Any]]) -> None:
    report = reports["early"].result()["early"]
    assert (report["is_on"], report["missing"]) == (True, [])
    assert {"execution.PromptQueue", "comfy.model_management.current_loaded_models"} <= set(report["with_patches"])
    assert report["remnants"] == []


def test_a_failure_at_any_patch_leaves_every_attribute_as_it_was(reports: dict[str, Future[Any]]) -> None:
    report = reports["failures"].result()["failures"]
    assert {target for target, patch in TARGETS.items() if patch.is_required} <= set(report["present"])
    outcomes = report["outcomes"]
    assert [target for target, *_ in outcomes["after"]] == report["present"]
    modules = {target.partition(":")[0] for target in report["present"]}
    assert {target.partition(":")[0] for target, *_ in outcomes["mismatch"]} == modules
    for kind, tries in outcomes.items():
        assert tries, kind
        for target, feature, messages, is_untouched, left in tries:
            is_core = feature == "core"
            (message,) = messages
            assert message.startswith("all: " if is_core else f"{feature}: "), (kind, target)
            assert "injected" in message, (kind, target)
            assert (is_untouched, left) == (is_core, []), (kind, target)
