"""Rows of a batch: each job keeps its own as others leave."""

from __future__ import annotations

from limner.engine import EditRequest, Job
from limner.engine.rows import Rows


def job(id: str, images: int) -> Job:
    request = EditRequest(prompt=id, seeds=tuple(range(images)))
    return Job(
        id=id,
        request=request,
        size=(64, 64),
        listener=lambda event: None,
        owner="a",
        priority=0,
        deadline=None,
        arrived=0.0,
    )


def test_rows_follow_jobs_that_leave() -> None:
    a, b, c = job("a", 1), job("b", 2), job("c", 1)
    rows = Rows([a, b, c])
    assert rows.split("wxyz") == [(a, ("w",)), (b, ("x", "y")), (c, ("z",))]
    assert rows.drop([]) == [0, 1, 2, 3]
    assert rows.drop([a]) == [1, 2, 3]
    assert rows.split("xyz") == [(b, ("x", "y")), (c, ("z",))]
    assert rows.drop([b]) == [2]
    assert rows.jobs == [c]
    assert rows.split([]) == [(c, ())]
    assert rows.drop([c]) == []
