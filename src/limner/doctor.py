"""What Limner finds on a machine: devices, kernels, the compiler, versions, memory and disk, and what is missing.

Loads no model and changes nothing; the native kernels are built if they have not been.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from limner.errors import first_line
from limner.version import __version__

__all__ = ["Report", "examine"]

_EXTRAS = {"serve": "fastapi", "ray": "ray", "postgres": "psycopg", "mcp": "mcp"}
"""Extras of the package, and a module of each."""
_MODEL_BYTES = 40 << 30
"""Disk that klein-9B takes with its text encoder, in bfloat16."""
_OF_AN_INDEX = re.compile(r"cpu|cu\d+|rocm[\d.]+|xpu")
"""Builds of torch that an index of its own has. Others are of images, as Nvidia's, or were made here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """The findings, in groups of (name, value). `notes` may matter; `problems` keep Limner from running."""

    groups: dict[str, dict[str, str]]
    notes: tuple[str, ...]
    problems: tuple[str, ...]

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        found: list[str] = []
        for title, values in self.groups.items():
            found += [f"{title}:", *(f"  {name:18} {value}" for name, value in values.items())]
        found += [f"note: {note}" for note in self.notes]
        return found + [f"problem: {problem}" for problem in self.problems]

    def as_json(self) -> dict[str, object]:
        """Return the report as one object."""
        return asdict(self)


def examine() -> Report:
    """Look at this machine. Takes the seconds that importing torch takes, and a few where kernels are built."""
    notes: list[str] = []
    problems: list[str] = []
    groups = {"versions": _versions(notes, problems)}
    if not problems:
        _import_torch(problems)
    if not problems:
        groups["devices"] = _devices(notes)
        groups["kernels"] = _kernels(notes)
        groups["memory and disk"] = _room(notes)
    groups["extras"] = {
        name: "installed" if _has(module) else f"pip install 'limner[{name}]'" for name, module in _EXTRAS.items()
    }
    return Report(groups=groups, notes=tuple(notes), problems=tuple(problems))


def _has(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


def _tested_file() -> Path | None:
    """Return the file of the versions that are tested together: of the package, or of the checkout it runs from."""
    package = Path(__file__).parent
    files = (package / "tested-versions.txt", package.parents[1] / "constraints.txt")
    return next((file for file in files if file.is_file()), None)


def _tested() -> dict[str, str]:
    file = _tested_file()
    found = re.findall(r"^([\w.-]+)==(\S+)$", file.read_text(), re.M) if file else ()
    return {name.replace("_", "-"): version for name, version in found}


def _install(*names: str) -> str:
    """Return the command that installs the tested versions of packages, in any folder; torch from where it came.

    A torch that no index has is left as it is: "" if there is nothing else to install.
    """
    file = _tested_file()
    build = _build_of_torch() if "torch" in names else ""
    index = ""
    if build:
        if _OF_AN_INDEX.fullmatch(build) is None:
            return _install(*others) if (others := [name for name in names if name != "torch"]) else ""
        index = f" --extra-index-url https://download.pytorch.org/whl/{build}"
    words = ["pip install", *([f'-c "{file}"'] if file else ("--upgrade",)), *names]
    return " ".join(words) + index


def _build_of_torch() -> str:
    """Return what stands behind the "+" of torch's version, as "cpu", "cu130" or "gitba56102"; else ""."""
    try:
        return importlib.metadata.version("torch").partition("+")[2]
    except importlib.metadata.PackageNotFoundError:
        return ""


def _required() -> Iterator[tuple[str, str]]:
    """Yield name and least version of what the package requires, extras left out."""
    for text in importlib.metadata.requires("limner") or ():
        if found := re.fullmatch(r"([\w.-]+)\s*>=\s*([\w.]+)", text):
            yield found[1], found[2]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def _versions(notes: list[str], problems: list[str]) -> dict[str, str]:
    found = {"limner": __version__, "python": f"{platform.python_version()} ({sys.executable})"}
    tested, others = _tested(), {}
    for name, least in _required():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{name} is not installed; {_install(name)}")
            continue
        found[name] = version
        if _numbers(version) < _numbers(least):
            problems.append(f"{name} {version} is older than {least}; {_install(name) or 'get a newer build of it'}")
        elif _numbers(version)[:2] != _numbers(known := tested.get(name.replace("_", "-"), version))[:2]:
            others[name] = f"{name} {version} (tested: {known})"
    if others:
        command = f"; these are tested together: {install}" if (install := _install(*others)) else ""
        notes.append(f"other versions than those that are tested: {', '.join(others.values())}{command}")
    return found | {"tested versions": str(_tested_file() or "not found")}


def _import_torch(problems: list[str]) -> None:
    """Add a problem if torch is installed but cannot be imported, as where a library of CUDA is missing."""
    try:
        import torch  # noqa: F401
    except (ImportError, OSError) as error:
        problems.append(
            f"torch cannot be imported ({first_line(error)}); pip install --force-reinstall torch, a build for this machine"
        )


def _devices(notes: list[str]) -> dict[str, str]:
    import torch

    found = {"cpu": f"{_processor()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"}
    build = "CUDA " + torch.version.cuda if torch.version.cuda else "CPU"
    if getattr(torch.version, "hip", None):
        build = f"ROCm {torch.version.hip}"
    found["torch's build"] = build
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        found[f"cuda:{number}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if torch.backends.mps.is_available():
        found["mps"] = "available"
    if torch.version.cuda is None and shutil.which("nvidia-smi"):
        notes.append("there is an NVIDIA driver, and torch is built for the CPU; install a CUDA build of torch")
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _kernels(notes: list[str]) -> dict[str, str]:
    import torch

    from limner.model.attention import choose_kernel
    from limner.model.int8 import has_int8_products
    from limner.native import tiles
    from limner.native.kernels import why_missing

    reason = why_missing()
    found = {"native": "built" if reason is None else f"not used: {reason}"}
    cpu = torch.device("cpu")
    for dtype in (torch.bfloat16, torch.float32):
        found[f"attention {str(dtype).removeprefix('torch.')}"] = choose_kernel(cpu, dtype, 128)
    no_tiles = (tiles.why_missing() or "").partition("\n")[0]
    if not has_int8_products():
        found["int8 products"] = "widened: int8 saves memory, not time"
    elif no_tiles:
        found["int8 products"] = f"oneDNN, with a second copy of the weights; no AMX tiles: {no_tiles}"
    else:
        found["int8 products"] = "AMX tiles"
    if reason is not None and "compiler" in reason:
        notes.append(f"native kernels: {reason}; apt-get install gcc makes bfloat16 faster")
    elif reason is None and no_tiles and tiles.has_amx():
        remedy = "; GCC 11 or newer, as CC, builds them" if " says: " in no_tiles else ""
        notes.append(f"AMX tiles (products in int8 and bfloat16, attention in bfloat16): {no_tiles}{remedy}")
    return found


def _room(notes: list[str]) -> dict[str, str]:
    import psutil
    from huggingface_hub import constants

    from limner.memory.free import free_bytes

    def gib(number: float) -> str:
        return f"{number / 2**30:.1f} GiB"

    hub = Path(constants.HF_HUB_CACHE)
    there = next(folder for folder in (hub, *hub.parents) if folder.exists())
    disk = shutil.disk_usage(there)
    if disk.free < _MODEL_BYTES:
        notes.append(
            f"{hub} has {gib(disk.free)} free; klein-9b takes {gib(_MODEL_BYTES)}. HF_HOME or HF_HUB_CACHE names another "
            "folder"
        )
    return {
        "memory": f"{gib(free_bytes())} free of {gib(psutil.virtual_memory().total)}",
        "models of the hub": f"{hub}, {gib(disk.free)} free",
        "login at the hub": "yes" if _logged_in() else "no; gated models need one: hf auth login",
    }


def _logged_in() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None
