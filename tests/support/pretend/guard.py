"""Builds and loads `guard.cpp`, with which a build of torch without CUDA makes tensors that say "cuda" or "mps"."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch

__all__ = ["load_guard"]

_SOURCE = Path(__file__).with_name("guard.cpp")
_BUILD = Path(__file__).parents[3] / "build" / "pretend"


@cache
def load_guard() -> str | None:
    """Load the guards, built at first use into `build/`; return None, or why that is not possible."""
    if torch.version.cuda is not None or torch.version.hip is not None:
        return "pretends a GPU on builds of torch without CUDA"
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if compiler is None:
        return "needs a C++ compiler, to pretend a GPU"
    digest = hashlib.sha256(f"{torch.__version__}{_SOURCE.read_text()}".encode()).hexdigest()[:12]
    library = _BUILD / f"guard-{digest}.so"
    if not library.exists():
        torch_folder, made = Path(torch.__file__).parent, library.with_suffix(f".{os.getpid()}")
        _BUILD.mkdir(parents=True, exist_ok=True)
        command = [compiler, "-O1", "-std=c++20", "-shared", "-fPIC", _SOURCE, "-o", made]
        command += [f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}", "-lc10"]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
        if done.returncode:
            return f"the guard of the pretended GPU does not build: {done.stderr[-500:]}"
        made.replace(library)  # other processes may build it too
    ctypes.CDLL(str(library))
    return None
