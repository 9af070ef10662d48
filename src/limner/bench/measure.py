"""What every measurement of `limner bench` needs: the machine, peaks of memory, seconds on a device.

Knows no networks and no engines.
"""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import torch

from limner.memory.free import give_back
from limner.version import __version__

__all__ = ["Peak", "grown", "machine", "now"]


def now(device: torch.device) -> float:
    """Return seconds of a clock, once the work that was queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def machine(device: torch.device) -> dict[str, Any]:
    """Return device, threads, versions and date, which every report has.

    `load_average` is that of the minute before: what other programs took, if it is called before anything is measured.
    """
    import diffusers

    name = platform.processor()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return {
        "device": name,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "load_average": round(psutil.getloadavg()[0], 2),
        "versions": {
            "limner": __version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        },
        "date": date.today().isoformat(),
    }


class Peak:
    """Peak of the resident memory of this process while the block runs, over what it was before, in bytes."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._process = device, psutil.Process()
        self._done = threading.Event()
        self.nbytes = 0

    def __enter__(self) -> Peak:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._start = torch.cuda.memory_allocated(self._device)
            return self
        give_back()
        self._start = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.nbytes = max(self.nbytes, self._process.memory_info().rss - self._start)

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            self.nbytes = torch.cuda.max_memory_allocated(self._device) - self._start
            return
        self.nbytes = max(self.nbytes, self._process.memory_info().rss - self._start)
        self._done.set()
        self._thread.join()


def grown(call: Callable[[], object]) -> int:
    """Make a call, and return by how many bytes this process grew at most, as the system counts; 0 where it does not.

    Unlike `Peak` it misses nothing that is there for a moment. Linux with /proc/self/clear_refs counts.
    """
    give_back()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the highest so far is what is there now
        before = _status("VmRSS")
    except OSError:
        call()
        return 0
    call()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    """Return bytes that /proc/self/status has under a name."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) << 10
