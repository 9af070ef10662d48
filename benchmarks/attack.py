"""One caller against all others: what each attack on a running service does to a bystander who has another key.

For each attack a server with the bundled model (a process of its own, on 127.0.0.1 alone) is attacked by one owner for some
seconds, while another one sends an edit each second and reads its picture. Measured are the bystander's jobs, lost and
failed ones, and the seconds until a picture is read and a webhook came; the longest pause of the server's event loop; and
the server's memory before and afterwards, without the K/V and pictures that it keeps on purpose.

A pause is the longest answer to GET /healthz, asked for every 10 ms by a process of its own with a higher priority, less
the median answer of an idle server. The attacker's process has a lower priority than the server, as a machine
elsewhere is. "idle" is the same without an attack.

Targets: no job lost or failed; the worst delay below three times the idle median and a second; no pause of 0.1 s; memory
back within 10 %. Memory is measured while no job is under way; where jobs of an attack did not end in time, "unsettled" is
missed instead.

    .venv/bin/python benchmarks/attack.py -o benchmarks/results/attack.json
    .venv/bin/python benchmarks/attack.py --attacks crumbs jobs --seconds 5

Each entry says the command and the date of its run, and the median of the idle server that it was judged by. The file is
written after each attack; what it lacks is in its "not_run". `--add` keeps what the file of `-o` has of other attacks: so
all can be tried in parts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from attacks.catalog import ATTACKS, OF_TLS, hanging
from attacks.witness import Seen
from service import Server, free_port, machine

HERE = Path(__file__).parent
KEYS = {name: f"{name}-key-of-a-benchmark" for name in ("attacker", "bystander", "operator")}
_STOP = 60.0
"""Seconds that an attacker may take to end once his time is over."""
_SETTLE = 300.0
"""Seconds in which a server ends the jobs of an attack; "heavy_jobs" has 240 of 50 steps."""
_CLEAN = 15.0
"""Seconds in which a server gives back memory that is free."""
_PAUSE, _MEMORY = 0.1, 1.10


class Attacked:
    """A server and what is measured of it."""

    def __init__(self, folder: Path, *options: str, hang: str, webhooks: int) -> None:
        allowed = [word for origin in (hang, f"http://127.0.0.1:{webhooks}") for word in ("--allow-origin", origin)]
        os.environ["LIMNER_KEYS"] = ",".join(f"{name}:{key}" for name, key in KEYS.items())
        self.server = Server(folder, *allowed, *options, key=KEYS["operator"])
        self.server.wait()
        self.process = psutil.Process(self.server.process.pid)
        self.hang, self.webhooks = hang, webhooks
        self.run(None, 3.0)  # what is made once

    def run(self, name: str | None, seconds: float) -> dict[str, Any]:
        """Attack for a time, or not at all, and say what the bystander saw."""
        before = self._memory() if self._is_at_rest() else None
        words = [self.server.url, KEYS["bystander"], str(seconds), str(self.webhooks)]
        witness = _start("attacks.witness", *words)
        attacker = None
        if name is not None:
            attacker = _start("attacks.catalog", name, self.server.url, KEYS["attacker"], str(seconds), self.hang)
        output, _ = witness.communicate(timeout=seconds + 300)
        found = {k: Seen(**v) for line in output.splitlines() for k, v in json.loads(line).items()}
        bystander, pulse = found["bystander"], found.get("pulse", Seen())
        bystander.pings = pulse.pings
        bystander.problems += pulse.problems
        report: dict[str, Any] = {"attack": name or "idle", **bystander.summary()}
        if attacker is not None:
            try:
                report["answers"] = json.loads(attacker.communicate(timeout=_STOP)[0] or "{}")
            except subprocess.TimeoutExpired:
                attacker.kill()
                report["answers"] = "not stopped in time"
        report["settled_seconds"] = settled = self._settle()
        after = None if settled is None else self._memory_after(before)
        return report | {"mib_before": before, "mib_after": after}

    def _is_at_rest(self) -> bool:
        return not self.server.metrics()["limner_jobs_live"]

    def _settle(self) -> float | None:
        """Wait until no job is under way; return how long that took, None if they did not end."""
        start = time.monotonic()
        while not self._is_at_rest():
            if time.monotonic() - start >= _SETTLE:
                return None
            time.sleep(0.2)
        return round(time.monotonic() - start, 1)

    def _memory_after(self, before: float | None) -> float:
        """As `_memory`, once a server at rest has had time to give back what is over `before`."""
        time.sleep(1.0)  # for connections that are closed, and what they held
        start = time.monotonic()
        while time.monotonic() - start < _CLEAN and before is not None and self._memory() > _MEMORY * before:
            time.sleep(1.0)  # it gives back now and then
        return self._memory()

    def _memory(self) -> float:
        """MiB that are resident, without K/V and pictures that are kept on purpose."""
        metrics = self.server.metrics()
        kept = metrics["limner_references_bytes"] + metrics["limner_pictures_bytes"]
        return round((self.process.memory_info().rss - kept) / 2**20, 1)


def _start(module: str, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", module, *words], cwd=HERE, stdout=subprocess.PIPE, text=True)


def judge(report: dict[str, Any], idle: dict[str, Any]) -> dict[str, Any]:
    """Add the pause and which targets were missed."""
    missed = [] if not report["problems"] and report["jobs"] else ["jobs"]
    if report["worst"] is not None and report["worst"] > 3 * idle["p50"] + 1:
        missed.append("delay")
    pause = None
    if report["ping_worst"] is not None:
        pause = round(report["ping_worst"] - idle["ping_p50"], 3)
        missed += ["pause"] if pause >= _PAUSE else []
    before, after = report["mib_before"], report["mib_after"]
    if before is None or after is None:  # memory of a server that works says nothing
        missed.append("unsettled")
    elif after > _MEMORY * before:
        missed.append("memory")
    run = {"command": shlex.join(sys.argv), "date": machine()["date"], "idle_p50": idle["p50"]}
    return report | {"pause": pause, "missed": missed} | run


def certificate(folder: Path) -> tuple[str, ...]:
    """Options for a server that speaks TLS with a key made here."""
    key, chain = folder / "key.pem", folder / "chain.pem"
    words = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "1"]
    subprocess.run(["openssl", *words, "-keyout", key, "-out", chain], check=True, capture_output=True)
    return ("--tls-certificate", str(chain), "--tls-key", str(key))


COLUMNS = ("attack", "jobs", "lost", "p50", "worst", "webhook", "pause", "MiB before", "MiB after", "missed")


def line(report: dict[str, Any]) -> str:
    shown = [report["attack"], report["jobs"], len(report["problems"]), report["p50"], report["worst"]]
    shown += [report["webhook_worst"], report["pause"], report["mib_before"], report["mib_after"]]
    widths = (18, 5, 5, 7, 7, 8, 7, 11, 10)
    return " ".join(f"{value!s:>{width}}" for value, width in zip(shown, widths, strict=True)) + (
        "  " + (" ".join(report["missed"]) or "-")
    )


def kept(file: dict[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """The entries of a file but those of some attacks and of idle servers, each with the run that it is of."""
    run = {"command": file["command"], "date": file["date"]}  # of entries that do not say it
    idle = [one["p50"] for one in file["attacks"] if one["attack"] == "idle"]
    if len(set(idle)) == 1:
        run["idle_p50"] = idle[0]
    return [run | one for one in file["attacks"] if one["attack"] not in ("idle", *names)]


def summary(reports: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """The file: of the last run, and all attacks that are there; "not_run" are the others."""
    there = {one["attack"] for one in reports}
    return {
        "benchmark": "attack",
        **machine(),
        "command": shlex.join(sys.argv),
        "seconds_of_each": seconds,
        "not_run": [name for name in ATTACKS if name not in there],
        "missed": {one["attack"]: one["missed"] for one in reports if one["missed"]},
        "median_of_medians": round(statistics.median(one["p50"] for one in reports if one["p50"]), 3),
        "attacks": reports,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attacks", nargs="+", choices=tuple(ATTACKS), default=tuple(ATTACKS), metavar="NAME")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each attack")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--add", action="store_true", help="keep other attacks of the file that is there")
    args = parser.parse_args()
    if args.add and args.output is None:
        parser.error("--add needs the file of --output")
    reports: list[dict[str, Any]] = []
    if args.add and args.output.exists():
        reports = kept(json.loads(args.output.read_text()), args.attacks)
    print("{:>18} {:>5} {:>5} {:>7} {:>7} {:>8} {:>7} {:>11} {:>10}  {}".format(*COLUMNS), flush=True)
    with tempfile.TemporaryDirectory() as base, hanging() as hang:
        folder = Path(base)
        for options, names in (
            ((), [name for name in args.attacks if name not in OF_TLS]),
            (("tls",), [name for name in args.attacks if name in OF_TLS]),
        ):
            if not names:
                continue
            more = certificate(folder) if options else ()
            attacked = Attacked(folder / f"data{len(more)}", *more, hang=hang, webhooks=free_port())
            try:
                idle = attacked.run(None, args.seconds)
                for report in itertools.chain([idle], (attacked.run(name, args.seconds) for name in names)):
                    reports.append(judge(report, idle))
                    print(line(reports[-1]), flush=True)
                    for problem in reports[-1]["problems"][:3]:
                        print(f"    {problem}", file=sys.stderr, flush=True)
                    if args.output:
                        args.output.write_text(json.dumps(summary(reports, args.seconds), indent=1) + "\n")
            finally:
                attacked.server.stop()
    report = summary(reports, args.seconds)
    print(json.dumps({name: report[name] for name in ("benchmark", "device", "date", "not_run", "missed")}))
    sys.exit(bool(report["missed"]))


if __name__ == "__main__":
    main()
