"""What every training script of the recipe shares: the font, checkpoints that resume exactly, the log, the average.

Randomness of a step comes from `(seed, step)` alone, so a resumed run sees the same data and the same noise as one that
was never stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

FONT_PLACES = (
    Path(__file__).parent / "build" / "NotoColorEmoji.ttf",
    Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"),
)


def find_font(given: Path | None = None) -> Path:
    """The colour emoji font: the given file, the one that `run.sh` unpacked, or the system's."""
    for place in [given] if given else FONT_PLACES:
        if place.is_file():
            return place
    raise SystemExit(
        f"font {given or FONT_PLACES[0]} is not there; run recipes/stickers/run.sh font, or install fonts-noto-color-emoji"
    )


def step_rng(seed: int, step: int) -> tuple[random.Random, torch.Generator]:
    """The two random sources of one step."""
    rng = random.Random(f"{seed}/{step}")
    return rng, torch.Generator().manual_seed(rng.getrandbits(62))


def arguments(description: str, *, steps: int, batch: int, lr: float) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints, log and result")
    parser.add_argument("--font", type=Path, help="NotoColorEmoji.ttf")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from OUT/checkpoint.pt")
    parser.add_argument("--stop-after", type=int, help="checkpoint and stop after this step, of the same schedule")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="checkpoint and stop after this long")
    return parser


NEAR = 0.2
"""A sticker that has gone less than this part of the way to another form costs nothing."""


def form_loss(strayed: torch.Tensor) -> torch.Tensor:
    """The price of stickers that lose their form: (N,), 0 as they should be, 1 mirrored, or grey, to a mean.

    Half the square of what is over `NEAR`, a straight line over 1: where the forms differ by little, an error that has nothing to
    do with them can lie many times the way along it.
    """
    over = (strayed - NEAR).relu()
    return nn.functional.huber_loss(over, 0 * over, reduction="sum") / max(1, len(over))


class Average:
    """Exponential moving average of parameters; the decay ramps up with the number of steps."""

    def __init__(self, modules: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: p.detach().clone() for name, p in modules.named_parameters()}

    @torch.no_grad()
    def update(self, modules: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        names, params = zip(*modules.named_parameters(), strict=True)
        torch._foreach_lerp_([self.values[n] for n in names], [p.detach() for p in params], 1 - decay)

    @torch.no_grad()
    def copy_to(self, modules: nn.Module) -> None:
        for name, p in modules.named_parameters():
            p.copy_(self.values[name])


def rows(values: torch.Tensor, like: nn.Parameter) -> torch.Tensor:
    """A weight, or its gradient, as a matrix with a row for each output, in the order that `like` has in memory: of a weight a view."""
    last = like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last)
    return (values.permute(0, 2, 3, 1) if last else values).flatten(1)


class Optimizer:
    """Muon for the inner matrices (convolutions flattened to them), AdamW for the rest, one learning rate for both."""

    def __init__(self, modules: nn.Module, *, lr: float, matrices: Callable[[str, nn.Parameter], bool]) -> None:
        self._modules, self._lr = modules, lr
        named = list(modules.named_parameters())
        self._inner = [p for name, p in named if p.dim() > 1 and matrices(name, p)]
        chosen = {id(p) for p in self._inner}
        self._flat = [nn.Parameter(rows(p.detach(), p)) for p in self._inner]
        if any(flat.data_ptr() != p.data_ptr() for flat, p in zip(self._flat, self._inner, strict=True)):
            raise ValueError("a weight has a layout that is no matrix; a copy of it would be trained in its place")
        rest = [p for _, p in named if id(p) not in chosen]
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(self._flat, lr=lr, weight_decay=0.02, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    def step(self, loss: torch.Tensor, *, rate: float) -> None:
        """Backward, clip, and one step at `rate` times the learning rate."""
        self._modules.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._modules.parameters(), 1.0)
        for flat, p in zip(self._flat, self._inner, strict=True):
            flat.grad = None if p.grad is None else rows(p.grad, p)
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = self._lr * rate
            part.step()

    def state_dict(self) -> list[dict[str, Any]]:
        return [part.state_dict() for part in self._parts]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for part, state in zip(self._parts, states, strict=True):
            part.load_state_dict(state)


class Log:
    """JSON lines in OUT/log.jsonl, and a line on the terminal."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / "log.jsonl").open("a", buffering=1)
        self._start = time.monotonic()

    def write(self, **values: Any) -> None:
        values["seconds"] = round(time.monotonic() - self._start, 1)
        self._file.write(json.dumps(values) + "\n")
        print(" ".join(f"{k}={v:.5g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items()), flush=True)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes beside, then renames: a stopped run never leaves half a checkpoint."""
    beside = path.with_suffix(".tmp")
    torch.save(state, beside)
    os.replace(beside, path)


def snapshot(model: nn.Module, average: Average, optimizer: Optimizer, step: int, **more: Any) -> dict[str, Any]:
    """All that `restore` needs to go on after `step` steps exactly as if nothing had happened."""
    return {
        "model": model.state_dict(),
        "average": average.values,
        "optimizer": optimizer.state_dict(),
        "step": step,
        **more,
    }


def restore(path: Path, model: nn.Module, average: Average, optimizer: Optimizer) -> dict[str, Any]:
    """Puts a checkpoint's values back; gives the checkpoint."""
    state: dict[str, Any] = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    average.values = state["average"]
    optimizer.load_state_dict(state["optimizer"])
    return state
