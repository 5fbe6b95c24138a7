"""The dashboard and the alert rules: Prometheus' own tool accepts them, and every series they name exists."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.deploy.conftest import Need
from tests.host.jobs import quick
from tests.host.server import HostServer

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(180)]

FOLDER = Path(__file__).resolve().parents[2] / "grafana"
CASES = Path(__file__).resolve().parent / "alerts_test.yml"
BOARD = json.loads((FOLDER / "dashboard.json").read_text(encoding="utf-8"))
RULES = yaml.safe_load((FOLDER / "alerts.yml").read_text(encoding="utf-8"))["groups"][0]["rules"]
# A GPU's alone, or without samples before the first of a kind.
EMPTY_ON_A_CPU = {"comfy_parallel_device_utilisation_ratio"} | {
    f"comfy_parallel_{name}_total" for name in ("graph_replays", "graph_captures", "eager_steps")
}


def expressions() -> list[str]:
    shown = [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]
    return [*shown, *(rule["expr"] for rule in RULES)]


def promtool(need: Need, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [need("promtool"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def test_promtool_accepts_the_rules_and_prometheus_configuration(need: Need) -> None:
    for arguments in (("check", "rules", FOLDER / "alerts.yml"), ("check", "config", FOLDER / "prometheus.yml")):
        done = promtool(need, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(RULES)} rules found" in done.stdout


def test_each_alert_fires_when_it_should_and_not_before(need: Need, tmp_path: Path) -> None:
    shutil.copy(FOLDER / "alerts.yml", tmp_path)
    shutil.copy(CASES, tmp_path)
    done = promtool(need, "test", "rules", CASES.name, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    tested = {
        case["alertname"]
        for test in yaml.safe_load(CASES.read_text())["tests"]
        for case in test["alert_rule_test"]
        if case.get("exp_alerts")
    }
    assert tested == {rule["alert"] for rule in RULES}


def test_prometheus_can_read_every_expression_of_the_dashboard(need: Need, tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{number}", "expr": expr.replace("$instance", ".*")}
        for number, expr in enumerate(expressions())
    ]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    done = promtool(need, "check", "rules", tmp_path / "rules.yml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_series_that_is_named_is_told_by_a_running_server(need: Need, host: HostServer) -> None:
    host.run(quick(1), 0)
    status, text = host.request("GET", "/metrics")
    assert status == 200
    assert promtool(need, "check", "metrics", input=text).stderr == ""
    families = list(text_string_to_metric_families(text))
    told = {sample.name for family in families for sample in family.samples}
    named = set(re.findall(r"comfy_parallel_\w+", " ".join(expressions())))
    assert named - told <= EMPTY_ON_A_CPU
    assert {f"{family.name}{'_total' * (family.type == 'counter')}" for family in families} >= EMPTY_ON_A_CPU


def test_the_panels_have_their_own_place_and_name() -> None:
    taken = {
        (x, y)
        for panel in BOARD["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    }
    assert len(taken) == sum(panel["gridPos"]["w"] * panel["gridPos"]["h"] for panel in BOARD["panels"])
    assert max(x for x, _ in taken) < 24
    for key in ("id", "title"):
        names = [(panel[key], panel["type"]) for panel in BOARD["panels"]]
        assert len(set(names)) == len(names)


def test_the_page_about_monitoring_names_every_metric(host: HostServer) -> None:
    page = (FOLDER.parent / "docs" / "monitoring.md").read_text(encoding="utf-8")
    families = text_string_to_metric_families(host.request("GET", "/metrics")[1])
    told = {f"{family.name}{'_total' * (family.type == 'counter')}" for family in families}
    assert {f"comfy_parallel_{name}" for name in re.findall(r"`([a-z_]+)(?:\{[a-z_, ]*\})?`", table(page))} == told


def table(page: str) -> str:
    """The metrics' names: the first column."""
    rows = page[page.index("| metric |") : page.index("## The log")].splitlines()[2:]
    return " ".join(row.split("|")[1] for row in rows if row)
