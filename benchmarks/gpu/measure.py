"""A run on one device: its findings, its budget of seconds, and how time, memory and errors are measured."""

from __future__ import annotations

import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

__all__ = ["Part", "Run", "relative_error"]


@dataclass(frozen=True)
class Part:
    """A part of a run, and the seconds that it may take at full size."""

    call: Callable[[Run], None]
    seconds: int

    @property
    def name(self) -> str:
        return self.call.__name__


@dataclass(eq=False)
class Run:
    """`tiny`: shapes for a CPU, in seconds. `findings` are dictionaries with the part's name, written after each one."""

    device: torch.device
    tiny: bool
    budget: float
    output: Path | None = None
    quiet: bool = False
    findings: list[dict[str, Any]] = field(default_factory=list)
    start: float = field(default_factory=time.perf_counter)
    shared: dict[str, Any] = field(default_factory=dict)
    """What several parts use, such as the transformers of both engines."""

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        return self.budget - (time.perf_counter() - self.start)

    def say(self, part: str, **values: Any) -> None:
        found = {"part": part, "at": round(time.perf_counter() - self.start, 1)}
        self.findings.append(found | {name: value for name, value in values.items() if value is not None})
        if not self.quiet:
            print(json.dumps(self.findings[-1], default=str), flush=True)
        if self.output is not None:
            self.output.write_text(json.dumps(self.findings, default=str, indent=1) + "\n")

    def check(self, part: str, good: bool, **values: Any) -> None:
        """Report values, and a failure unless they are good."""
        self.say(part, **values, failed=None if good else True)

    def do(self, part: Part) -> None:
        """Run a part if there is time for it. Its errors are findings, and do not stop the others."""
        if self.left < part.seconds and not self.tiny:
            self.say(part.name, skipped=f"{self.left:.0f} s are left, it may take {part.seconds}")
            return
        try:
            part.call(self)
        except Exception as error:
            where = traceback.format_exc(limit=-4)[-900:]
            traceback.clear_frames(error.__traceback__)
            self.say(part.name, error=f"{type(error).__name__}: {error}"[:500], where=where)
        if self.cuda:
            gc.collect()
            torch.cuda.empty_cache()

    @property
    def failures(self) -> list[dict[str, Any]]:
        return [found for found in self.findings if found.get("failed") or found.get("error")]

    # measuring

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], Any], *, rounds: int = 3, warm: int = 1) -> float:
        """The median of some rounds, each until the device is done."""
        found = []
        for number in range(warm + (1 if self.tiny else rounds)):
            self.wait()
            start = time.perf_counter()
            call()
            self.wait()
            if number >= warm or self.tiny:
                found.append(time.perf_counter() - start)
        return statistics.median(found)

    def peak(self, call: Callable[[], Any]) -> float | None:
        """GiB on top of what is in use; None on a CPU, where `limner bench` measures it."""
        if not self.cuda:
            call()
            return None
        self.wait()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        self.wait()
        return round((torch.cuda.max_memory_allocated(self.device) - before) / 2**30, 3)

    def each(self, calls: dict[str, Callable[[], Any]], *, rounds: int = 5) -> dict[str, Any]:
        """Milliseconds by name; the first line of the error of what does not run here."""
        found: dict[str, Any] = {}
        for name, call in calls.items():
            try:
                found[name] = round(self.seconds(call, rounds=rounds) * 1e3, 3)
            except Exception as error:
                found[name] = str(error).partition("\n")[0][:120]
        return found


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a - b|| / ||b||."""
    wide, expected = a.detach().float().cpu(), b.detach().float().cpu()
    return float((wide - expected).norm() / expected.norm().clamp(min=1e-20))
