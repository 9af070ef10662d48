"""The goals of the GPU path, from the findings of a run on an H200 with klein-9b's geometry at 1024x1024."""

from __future__ import annotations

from typing import Any

__all__ = ["goals"]

_KEPT = {1: 1.3, 2: 1.6, 4: 2.1}
"""Kept references beside diffusers' K/V pipeline at its best, compiled or not, by the number of references."""
_NARROW = 1.4
"""Narrow products beside bfloat16."""
_SHARE = 0.5
"""Memory of 4 seeds over 4 references beside diffusers."""


def goals(findings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each goal with what was measured; `met` is None where the run has no number for it."""

    def of(part: str, **having: Any) -> dict[str, Any]:
        found = [one for one in findings if one["part"] == part and all(one.get(k) == v for k, v in having.items())]
        return found[-1] if found else {}

    made = []
    for number, wanted in _KEPT.items():
        seconds = of("steps", references=number).get("seconds", {})
        ours = [seconds.get("kept"), of("compiled", references=number).get("kept")]
        theirs = [seconds.get("diffusers_kv"), of("compiled diffusers", references=number).get("diffusers_kv")]
        best = [min((x for x in times if x), default=None) for times in (theirs, ours)]
        made.append(_goal(f"kept references, {number}", _ratio(*best), at_least=wanted))
    narrow = _ratio(of("steps", references=2).get("seconds", {}).get("kept"), of("int8 model").get("kept"))
    made.append(_goal("narrow products, 2 references", narrow, at_least=_NARROW))
    errors = of("errors")
    made.append(_goal("error within bfloat16's", _ratio(errors.get("limner"), errors.get("diffusers")), at_most=1.1))
    gib = of("seeds").get("gib", {})
    made.append(_goal("memory of 4 seeds", _ratio(gib.get("new"), gib.get("diffusers_kv")), at_most=_SHARE))
    return made


def _ratio(a: float | None, b: float | None) -> float | None:
    return round(a / b, 3) if a and b else None


def _goal(
    name: str, found: float | None, *, at_least: float | None = None, at_most: float | None = None
) -> dict[str, Any]:
    wanted = f"at least {at_least}" if at_least is not None else f"at most {at_most}"
    met = None
    if found is not None:
        met = found >= at_least if at_least is not None else found <= (at_most or 0)
    return {"goal": name, "wanted": wanted, "found": found, "met": met}
