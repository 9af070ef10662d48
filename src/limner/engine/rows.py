"""Which images of a batch belong to which job, as jobs leave it. Knows nothing of pipelines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from limner.engine.queue import Job

__all__ = ["Rows"]

_T = TypeVar("_T")


class Rows:
    """The rows of a batch, one an image, in the order of its jobs."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = list(jobs)

    def drop(self, leaving: Sequence[Job]) -> list[int]:
        """Take jobs out. Return the rows that stay, by their numbers before."""
        stay: list[int] = []
        row = 0
        for job in self.jobs:
            if job not in leaving:
                stay += range(row, row + job.num_images)
            row += job.num_images
        self.jobs = [job for job in self.jobs if job not in leaving]
        return stay

    def split(self, values: Sequence[_T]) -> list[tuple[Job, tuple[_T, ...]]]:
        """Give each job its part of the values of all rows."""
        parts, row = [], 0
        for job in self.jobs:
            parts.append((job, tuple(values[row : row + job.num_images])))
            row += job.num_images
        return parts
