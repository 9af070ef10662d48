"""The plot of a report of whole calls: a bar for each engine, of the phases one after another. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from limner.bench.whole import PHASES, whole_names
from limner.errors import MissingExtra
from limner.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_phases", "save_phases"]

_TITLES = {
    "text": "text encoder",
    "encode": "references encoded",
    "prefill": "prefill",
    "steps": "steps",
    "decode": "decoder",
    "png": "PNG",
    "other": "other",
}


def draw_phases(report: dict[str, Any]) -> Figure:
    """Return a figure with a panel for each case, and in it a bar for each engine. Raises `MissingExtra`."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("the plot of whole calls", package="matplotlib", extra="recipes") from error
    cases = report["cases"]
    rows = sum(len(found["seconds"]) + 1 for found in cases)
    figure = Figure(figsize=(10, 0.45 * rows + 1.2), layout="constrained")
    panels = figure.subplots(len(cases), 1, sharex=True, squeeze=False)[:, 0]
    colors = mpl.colormaps["tab10"].colors  # type: ignore[attr-defined]
    for axes, found in zip(panels, cases, strict=True):
        names = [name for name in whole_names() if name in found["seconds"]][::-1]
        left = [0.0] * len(names)
        for phase, color in zip(PHASES, colors, strict=False):
            widths = [found["phases"][name][phase] for name in names]
            axes.barh([whole_names()[name] for name in names], widths, left=left, color=color, label=_TITLES[phase])
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for row, name in enumerate(names):
            times = found.get("times_diffusers_kv", {}).get(name)
            note = f" {found['seconds'][name]:.1f} s" + (f", {times:.2f}x" if times else "")
            axes.text(left[row], row, note, va="center", fontsize=8)
        case = found["case"]
        axes.set_title(f"{case['num_references']} references, {case['side']} x {case['side']}", fontsize=9)
        axes.margins(x=0.12)
    panels[-1].set_xlabel("seconds")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(PHASES), fontsize=8)
    figure.suptitle(
        f"prompt to PNG, {report['size']}, {report['dtype']}, {report['device']}, {report['date']}", fontsize=10
    )
    return figure


def save_phases(report: dict[str, Any], path: Path) -> None:
    """Write the plot as a PNG. Raises `MissingExtra` and `OutputError`."""
    figure = draw_phases(report)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=90, format="png")
