"""The files of `packaging/`: their commands are commands of Limner, their metrics those of the service.

No container is built here. What can be checked without a builder is: each instruction, each path, each option.
"""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.support.promql import read_series, series_of
from tests.support.serving import Served

from limner.cli.main import build_parser
from limner.pipeline import Pipeline

ROOT = Path(__file__).parents[2]
PACKAGING = ROOT / "packaging"
RECORDED = ("limner:busy:ratio", "limner:references:hit_ratio", "limner:wait:seconds")


def instructions() -> list[tuple[str, str]]:
    """Return name and text of each instruction of the Containerfile, continued lines joined."""
    lines = [line for line in (PACKAGING / "Containerfile").read_text().splitlines() if not line.startswith("#")]
    found = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    return [(name, text) for name, _, text in (line.partition(" ") for line in found if line)]


def parse(command: Sequence[str]) -> dict[str, Any]:
    """Return the options of a command; argparse ends the test where one is unknown."""
    return vars(build_parser().parse_args(list(command)))


def test_the_containerfile_runs_the_service_as_a_user() -> None:
    found = instructions()
    texts = {name: text for name, text in found if name in ("ENTRYPOINT", "CMD", "USER", "EXPOSE", "HEALTHCHECK")}
    assert json.loads(texts["ENTRYPOINT"]) == ["limner"]
    options = parse(json.loads(texts["CMD"]))
    assert (options["host"], options["data"]) == ("0.0.0.0", "/data/jobs")
    assert str(options["port"]) == texts["EXPOSE"]
    assert f":{options['port']}/health" in texts["HEALTHCHECK"]
    assert texts["USER"] != "root"
    assert [name for name, _ in found].index("USER") > max(i for i, (name, _) in enumerate(found) if name == "RUN")


def test_the_containerfile_keeps_to_the_rules_of_its_linters() -> None:
    """Those of hadolint that apply: DL3006 to DL3009, DL3015, DL3020, DL3025, DL3042."""
    for name, text in instructions():
        if name == "FROM":
            assert re.search(r":[\w.-]*\d+\.\d+", text), f"{text}: no version"
        if name == "RUN" and "apt-get install" in text:
            assert "--yes --no-install-recommends" in text
            assert "rm -rf /var/lib/apt/lists/*" in text
        if name == "RUN":
            assert all("--no-cache-dir" in part for part in text.split("&&") if "pip install" in part)
        if name == "ENTRYPOINT":
            assert text.startswith("[")
        assert name != "ADD"


def test_what_is_copied_is_there_and_not_ignored() -> None:
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for name, text in instructions():
        if name == "COPY" and not text.startswith("--from"):
            for path in text.split()[:-1]:
                assert (ROOT / path).exists()
                assert path in sent


def test_the_services_of_compose() -> None:
    given = yaml.safe_load((PACKAGING / "compose.yaml").read_text())
    services = given["services"]
    options = parse(services["limner"]["command"])
    assert options["data"].startswith("postgresql://")
    assert options["store"].startswith("s3://")
    assert services["limner"]["ports"] == [f"127.0.0.1:{options['port']}:{options['port']}"]
    assert Path(PACKAGING / services["limner"]["build"]["context"]).resolve() == ROOT
    for name, service in services.items():
        assert set(service.get("depends_on", ())) <= set(services)
        assert set(service.get("secrets", ())) <= set(given["secrets"])
        assert all(v.split(":")[0] in given["volumes"] for v in service.get("volumes", ()))
        if name != "limner":
            assert re.search(r":[\w.-]*\d", service["image"])
    assert not any("password" in str(value).lower() and "/run/secrets" not in str(value) for value in services.values())
    asked = services["limner"]["environment"].values()
    assert {Path(v).name for v in asked if v.startswith("/run/secrets/")} == set(services["limner"]["secrets"])


def test_the_unit_of_systemd() -> None:
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(PACKAGING / "limner.service")
    program, *command = shlex.split(unit["Service"]["ExecStart"])
    options = parse(command)
    assert program == "/opt/limner/bin/limner"
    assert options["data"].startswith(f"/var/lib/{unit['Service']['StateDirectory']}/")
    assert int(unit["Service"]["TimeoutStopSec"]) > options["drain"]
    assert "MemoryDenyWriteExecute" not in unit["Service"]  # kernels are built and loaded


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_reads_the_unit(tmp_path: Path) -> None:
    text = (PACKAGING / "limner.service").read_text().replace("/opt/limner/bin/limner", "/bin/true")
    (tmp_path / "limner.service").write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", tmp_path / "limner.service"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, "limner.service" in done.stderr) == (0, False), done.stderr


def expressions(found: Any) -> list[str]:
    """Return every `expr` of a document of Grafana or Prometheus."""
    if isinstance(found, dict):
        own = [str(found["expr"])] if "expr" in found else []
        return own + [e for value in found.values() for e in expressions(value)]
    return [e for value in found for e in expressions(value)] if isinstance(found, list) else []


def test_dashboard_and_rules_ask_for_metrics_that_exist(pipe: Pipeline, tmp_path: Path) -> None:
    """A metric's name in a query is one that the service gives, with the labels that the query names."""
    with Served(pipe, tmp_path) as served:
        served.draw()
        text = served.http.get("/metrics").text
    given = set(re.findall(r"^(\w+)(?:\{| )", text, re.M)) | set(RECORDED)
    labels = set(re.findall(r'[{,](\w+)="', text)) | {"instance", "job"}
    dashboard = json.loads((PACKAGING / "grafana" / "limner.json").read_text())
    rules = yaml.safe_load((PACKAGING / "prometheus" / "rules.yml").read_text())
    asked = expressions(dashboard) + expressions(rules)
    assert len(asked) > 25
    instances = [one | {"instance": "here", "job": "limner"} for one in read_series(text)]
    up = {"__name__": "up", "instance": "here", "job": "limner"}
    failed = [one | {"status": "500"} for one in instances if one.get("status") == "200"]
    series = [up, *instances, *failed]
    for rule in (rule for group in rules["groups"] for rule in group["rules"]):
        found = series_of(rule["expr"], series)
        assert found, f"{rule['expr']}: gives nothing, whatever the values"
        if "record" in rule:
            series += [one | {"__name__": rule["record"]} for one in found]
    for expression in asked:
        assert series_of(expression.replace("$instance", ".*"), series), expression
        for name in re.findall(r"limner[:\w]+", expression.replace('job="limner"', "")):
            assert name in given, f"{expression}: {name}"
        for selector in re.findall(r"\{(.*?)\}", expression):
            assert set(re.findall(r"(\w+)\s*[=!]~?", selector)) <= labels, expression
        for names in re.findall(r"(?:by|without) \((.*?)\)", expression):
            assert {name.strip() for name in names.split(",")} <= labels, expression
    recorded = [rule["record"] for group in rules["groups"] for rule in group["rules"] if "record" in rule]
    assert tuple(recorded) == RECORDED
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    ("expression", "labels"),
    [
        ('a_total{tier="memory"}', [{"__name__": "a_total", "tier": "memory", "job": "x"}]),
        ('a_total{tier=~"d.*"} > 1', [{"__name__": "a_total", "tier": "disk", "job": "x"}]),
        ("sum without (tier) (rate(a_total[5m]))", [{"job": "x"}]),
        ("sum by (tier) (a_total)", [{"tier": "memory"}, {"tier": "disk"}]),
        ("b_total < 0.5 and rate(a_total[5m]) > 0", []),
        ("b_total < 0.5 and ignoring (tier) rate(a_total[5m]) > 0", [{"__name__": "b_total", "job": "x"}]),
        ("b_total and on (job) a_total", [{"__name__": "b_total", "job": "x"}]),
        ("60 * rate(b_total[5m]) / b_total", [{"job": "x"}]),
        ("rate(a_total[5m]) / rate(b_total[5m])", []),
        ("b_total unless b_total or b_total", [{"__name__": "b_total", "job": "x"}]),
    ],
)
def test_series_are_matched_by_their_labels(expression: str, labels: list[dict[str, str]]) -> None:
    known = read_series(
        '# HELP a_total A\na_total{tier="memory",job="x"} 1.0\na_total{tier="disk",job="x"} 0.0\nb_total{job="x"} 2\n'
    )
    assert series_of(expression, known) == labels


def test_a_match_of_many_to_one_is_refused() -> None:
    known = read_series('a{tier="memory"} 1\na{tier="disk"} 1\nb 1\n')
    with pytest.raises(ValueError, match="several series match one"):
        series_of("a / ignoring (tier) b", known)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (Debian: prometheus)")
def test_promtool_sees_the_alerts_fire() -> None:
    done = subprocess.run(
        ["promtool", "test", "rules", PACKAGING / "prometheus" / "rules_test.yml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
