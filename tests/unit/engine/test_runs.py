"""A batch that lets others through: when it may, and what its times are then."""

from __future__ import annotations

from limner.engine import EditRequest, Job
from limner.engine.rows import Rows
from limner.engine.runs import Run
from limner.pipeline import Timings


def run(steps: int) -> Run:
    return Run(rows=Rows([]), num_steps=steps, num_bytes=0)


def test_others_are_let_through_for_half_of_the_time() -> None:
    batch = run(4)
    batch.steps_done = 1
    assert batch.may_pause(10.0)
    batch.pause(10.0, 13.0)
    assert not batch.may_pause(15.9)
    assert batch.may_pause(16.0)
    batch.steps_done = 4  # its last step is done: it ends first
    assert not batch.may_pause(100.0)


def test_a_batch_that_found_no_memory_beside_it_never_pauses_again() -> None:
    batch = run(4)
    batch.steps_done = 1
    batch.never_pause()
    batch.pause(1.0, 2.0)
    assert not batch.may_pause(1e9)


def test_pauses_are_no_time_of_the_steps() -> None:
    batch = run(3)
    for done, (start, end) in enumerate([(1.0, 3.0), (5.0, 5.5)], start=1):
        batch.steps_done = done
        batch.pause(start, end)
    assert batch.paused == 2.5
    timings = Timings(text=0.1, references=0.0, steps=(3.0, 1.5, 1.0), decode=0.2)
    assert batch.without_pauses(timings).steps == (1.0, 1.0, 1.0)


def test_the_work_that_is_left_is_that_of_the_steps_of_who_stays() -> None:
    def job(step_work: int) -> Job:
        asked = EditRequest(prompt="a", seeds=(1,))
        values = {"size": (64, 64), "listener": print, "owner": "a", "priority": 0, "deadline": None, "arrived": 0.0}
        return Job(id=f"{step_work}", request=asked, step_work=step_work, **values)  # type: ignore[arg-type]

    jobs = [job(2000), job(300)]
    batch = Run(rows=Rows(jobs), num_steps=5, num_bytes=0)
    assert batch.work_left == 5 * 2300
    batch.steps_done = 2
    assert batch.work_left == 3 * 2300
    batch.rows.drop(jobs[:1])
    assert batch.work_left == 3 * 300
