"""The queue alone: order, fairness, batches, deadlines, cancellation, counts. No pipeline, no thread, a clock by hand."""

from __future__ import annotations

from typing import Any

import pytest
from tests.support.tiny import picture

from limner import Cancelled, InvalidRequest
from limner.config import ReferencePolicy
from limner.engine import Admission, EditRequest, Event, Job, PrefillRequest, RequestQueue, Started
from limner.engine.queue import too_late
from limner.errors import DeadlineExceeded, QueueFull
from limner.images import PreparedReference, prepare_reference
from limner.kinds import ISOLATED
from limner.memory import Workload


class Model:
    """A `ModelView` that needs a byte for each image."""

    default_size = (64, 64)
    sizes = ()
    reference_policy = ReferencePolicy()
    text_length = 512
    previews = False
    loras = ()
    digest = "d"
    kind = ISOLATED

    def memory_needed(self, *, num_ref: int, num_own: int, batch: int) -> int:
        return batch

    def memory_for(self, workload: Workload) -> int:
        return workload.batch


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def queue(clock: Clock) -> RequestQueue:
    return RequestQueue(Admission(model=Model(), max_waiting=6, max_batch=4, memory_bytes=3), clock=clock)


def reference(seed: int) -> PreparedReference:
    return prepare_reference(picture(64, 64, seed=seed), policy=ReferencePolicy())


REFERENCES = [reference(seed) for seed in range(2)]


def add(queue: RequestQueue, id: str, *, owner: str = "a", images: int = 1, ref: int | None = None, **more: Any) -> Job:
    options = {name: more.pop(name) for name in ("listener", "priority", "timeout", "accepted") if name in more}
    references = () if ref is None else (REFERENCES[ref],)
    request = EditRequest(prompt=id, seeds=tuple(range(images)), references=references, **more)
    given: dict[str, Any] = {"listener": lambda event: None, "priority": 0, "timeout": None, "accepted": False}
    return queue.add(request, id=id, owner=owner, **{**given, **options})


def prefill(queue: RequestQueue, id: str, *, owner: str = "a", ref: int = 0) -> Job:
    return queue.add(
        PrefillRequest(references=(REFERENCES[ref],)),
        id=id,
        listener=lambda event: None,
        owner=owner,
        priority=0,
        timeout=None,
        accepted=False,
    )


def take(queue: RequestQueue) -> list[str]:
    """The ids of the next batch, which has ended when this returns."""
    batch = queue.take_batch()
    for job in batch:
        assert queue.end(job)
    return [job.id for job in batch]


def test_the_oldest_of_one_owner_is_next(queue: RequestQueue, clock: Clock) -> None:
    for number, steps in enumerate((4, 5, 6)):  # nothing runs together
        clock.now = number
        add(queue, f"{number}", num_inference_steps=steps)
    assert [queue.position(id) for id in "012x"] == [0, 1, 2, None]
    assert [take(queue) for _ in range(4)] == [["0"], ["1"], ["2"], []]


def test_priority_is_before_service_and_service_before_age(queue: RequestQueue, clock: Clock) -> None:
    for number, (owner, priority) in enumerate((("a", 0), ("a", 0), ("b", 0), ("a", 1))):
        clock.now = number
        add(queue, f"{owner}{number}", owner=owner, priority=priority, num_inference_steps=number + 1)
    assert [take(queue) for _ in range(4)] == [["a3"], ["b2"], ["a0"], ["a1"]]


PIXELS = 64 * 64


def test_service_is_work(queue: RequestQueue) -> None:
    add(queue, "a1", owner="a", images=2, ref=0)
    add(queue, "b1", owner="b", ref=0)
    add(queue, "b2", owner="b", num_inference_steps=9)
    add(queue, "b3", owner="b", num_inference_steps=8)
    add(queue, "a2", owner="a", ref=1)
    assert take(queue) == ["a1", "b1"]
    assert queue._served == {"a": 9 * PIXELS, "b": 5 * PIXELS}  # the reference, and 4 steps of each image
    assert take(queue) == ["b2"]
    assert queue._served == {"a": 9 * PIXELS, "b": 14 * PIXELS}
    assert [take(queue) for _ in range(2)] == [["a2"], ["b3"]]


def test_a_returning_owner_has_no_credit_and_no_debt(queue: RequestQueue) -> None:
    for number in range(3):
        add(queue, f"a{number}", owner="a", num_inference_steps=number + 1)
    assert [take(queue) for _ in range(2)] == [["a0"], ["a1"]]
    add(queue, "b0", owner="b", num_inference_steps=11)
    add(queue, "b1", owner="b", num_inference_steps=12)
    assert queue._served == {"a": 3 * PIXELS, "b": 3 * PIXELS}  # b starts where a is
    assert [take(queue) for _ in range(3)] == [["b0"], ["a2"], ["b1"]]  # of equal ones, who has waited for a turn
    add(queue, "c0", owner="c", num_inference_steps=1)  # nobody else is active: what was is forgotten
    add(queue, "c1", owner="c", num_inference_steps=2)
    add(queue, "a3", owner="a", num_inference_steps=3)
    assert [take(queue) for _ in range(3)] == [["c0"], ["a3"], ["c1"]]


def test_who_has_had_more_than_the_least_keeps_it(queue: RequestQueue) -> None:
    add(queue, "a0", owner="a", images=3)
    add(queue, "b0", owner="b", num_inference_steps=1)
    assert take(queue) == ["a0"]
    assert queue._served == {"a": 12 * PIXELS, "b": 0}
    add(queue, "b1", owner="b", num_inference_steps=2)
    add(queue, "a1", owner="a", num_inference_steps=3)
    assert [take(queue) for _ in range(3)] == [["b0"], ["b1"], ["a1"]]


def test_batches_are_of_equal_references_size_and_steps(queue: RequestQueue) -> None:
    add(queue, "one", ref=0)
    add(queue, "other", ref=1)
    add(queue, "wide", ref=0, width=128, height=64)
    add(queue, "long", ref=0, num_inference_steps=9)
    add(queue, "two", ref=0, owner="b")
    add(queue, "same size", ref=0, width=64, height=64)
    assert take(queue) == ["one", "two", "same size"]
    assert [len(take(queue)) for _ in range(3)] == [1, 1, 1]


def test_batches_are_bounded_by_images_and_by_memory(clock: Clock) -> None:
    for memory, expected in ((9, ["a", "c"]), (3, ["a"])):
        queue = RequestQueue(Admission(model=Model(), max_waiting=9, max_batch=4, memory_bytes=memory), clock=clock)
        add(queue, "a", images=2)
        add(queue, "b", images=3)  # would be five
        add(queue, "c", images=2)
        assert take(queue) == expected


def test_prefills_run_alone(queue: RequestQueue) -> None:
    prefill(queue, "p")
    prefill(queue, "q")
    add(queue, "edit", ref=0)
    assert sorted(take(queue) for _ in range(3)) == [["edit"], ["p"], ["q"]]


def test_late_ones_leave_before_they_run(queue: RequestQueue, clock: Clock) -> None:
    clock.now = 100.0
    late, _ = add(queue, "late", timeout=5), add(queue, "in time", timeout=6)
    clock.now = 105.0
    assert queue.take_late() == [late]
    assert (late.deadline, late.is_late(104.9), late.is_late(105.0)) == (105.0, False, True)
    assert isinstance(too_late(late), DeadlineExceeded)
    assert queue.end(late, too_late(late))
    assert take(queue) == ["in time"]
    assert (queue.stats.failed, queue.stats.finished) == (1, 1)


def test_cancelling(queue: RequestQueue) -> None:
    waits, runs = add(queue, "waits", owner="b", num_inference_steps=9), add(queue, "runs", priority=1)
    assert queue.take_batch() == [runs]
    assert queue.cancel("waits") is waits
    assert not waits.running
    assert "waits" not in queue.waiting
    assert queue.cancel("waits") is None
    assert queue.cancel("runs") is runs
    assert (runs.running, runs.cancelled, queue.running) == (True, True, {"runs": runs})
    assert queue.cancel("runs") is None
    assert queue.cancel("nobody") is None
    assert [queue.end(job, Cancelled("so")) for job in (waits, runs, runs)] == [True, True, False]
    assert (queue.stats.cancelled, len(queue)) == (2, 0)


def test_who_comes_in_a_cancelled_ones_name_stays(queue: RequestQueue) -> None:
    before = add(queue, "x")
    queue.cancel("x")
    again = add(queue, "x")
    assert queue.end(before, Cancelled("so"))
    assert queue.waiting == {"x": again}


def test_refusals(queue: RequestQueue) -> None:
    for number in range(5):
        add(queue, f"{number}")
    queue.check_room()
    with pytest.raises(QueueFull, match="6 requests wait"):
        queue.check_room(num_admitted=1)
    with pytest.raises(InvalidRequest, match="'0' is in the queue already"):
        add(queue, "0")
    add(queue, "5")
    with pytest.raises(QueueFull, match="6 requests wait, which is all that may"):
        add(queue, "6")
    add(queue, "6", accepted=True)
    queue.take_batch()
    with pytest.raises(InvalidRequest, match="'0' is in the queue already"):  # it runs
        add(queue, "0", accepted=True)
    assert (queue.stats.accepted, queue.stats.refused) == (7, 2)
    queue.closed = True
    with pytest.raises(QueueFull, match="shutting down"):
        add(queue, "7", accepted=True)
    assert queue.stats.refused == 2


def test_a_lost_one_waits_again(queue: RequestQueue) -> None:
    job, _ = add(queue, "lost"), add(queue, "other")
    queue.start(job)
    assert (job.running, queue.snapshot().running, queue.snapshot().waiting) == (True, 1, 1)
    add(queue, "b", owner="b")  # starts at what a had before
    assert queue._served == {"a": 4 * PIXELS, "b": 0}
    queue.requeue(job)
    assert (job.running, list(queue.waiting)) == (False, ["other", "b", "lost"])
    assert queue._served == {"a": 0, "b": 0}  # what its owner was charged is given back, once
    assert take(queue)[0] in ("other", "lost")  # its owner asked first


def test_a_wait_is_counted_once_however_often_a_job_begins(queue: RequestQueue, clock: Clock) -> None:
    clock.now = 10.0
    job = add(queue, "again")
    for now in (13.0, 17.0):
        queue.start(job)
        queue.count_wait(job, until=now)
        queue.requeue(job)
    assert queue.stats.waited_seconds == 7.0


def test_a_stopped_one_stays_charged(queue: RequestQueue) -> None:
    job = add(queue, "stopped")
    add(queue, "b", owner="b")
    queue.start(job)
    assert queue.cancel("stopped") is job
    queue.end(job, Cancelled("so"))
    assert queue._served == {"a": 4 * PIXELS, "b": 0}


def test_dropped_ones_hear_nothing_and_count_for_nothing(queue: RequestQueue) -> None:
    heard: list[Event] = []
    runs = add(queue, "runs", listener=heard.append)
    queue.take_batch()
    waits = add(queue, "waits", listener=heard.append)
    runs.tell(Started())
    assert queue.drop_all() == [runs, waits]
    for job in (runs, waits):
        job.tell(Started())
        assert not queue.end(job)
    assert (len(heard), len(queue), queue.stats.finished) == (1, 0, 0)


def test_listeners_that_raise_are_logged(queue: RequestQueue, caplog: pytest.LogCaptureFixture) -> None:
    def broken(event: Event) -> None:
        raise ValueError("deaf")

    add(queue, "broken", listener=broken).tell(Started())
    assert "the listener of request broken failed" in caplog.text


def test_one_owner_leaves_room_while_others_ask(clock: Clock) -> None:
    """What another asks for next waits for the whole batch; a minute after its last request batches are whole again."""
    queue = RequestQueue(Admission(model=Model(), max_waiting=40, max_batch=8, memory_bytes=40), clock=clock)
    add(queue, "b0", owner="b")
    assert take(queue) == ["b0"]
    for i in range(20):
        add(queue, f"a{i}")
    assert len(take(queue)) == 4
    clock.now = 61.0
    assert len(take(queue)) == 8
    add(queue, "b1", owner="b")
    add(queue, "b2", owner="b", ref=0)
    both = take(queue)
    assert both[0] == "b1"  # served least
    assert len(both) == 8  # b's request is among them


def test_an_owner_is_charged_for_the_work_of_each_job(clock: Clock) -> None:
    """Batches, many pictures and many steps buy nobody more of the engine than small jobs one by one."""
    queue = RequestQueue(Admission(model=Model(), max_waiting=40, max_batch=8, memory_bytes=40), clock=clock)
    for i in range(3):
        add(queue, f"heavy{i}", owner="a", images=4, num_inference_steps=50)
    assert [job.id for job in queue.take_batch()] == ["heavy0", "heavy1"]  # and they run
    for i in range(30):
        add(queue, f"small{i}", owner="b", num_inference_steps=4)
    for _ in range(3):  # 12 small ones are 48 steps of a picture, a's were 400
        assert all(id_.startswith("small") for id_ in take(queue))


def test_guidance_divides_batches(queue: RequestQueue) -> None:
    add(queue, "a1", guidance_scale=3.0, negative_prompt="rain")
    add(queue, "a2", guidance_scale=3.0)
    add(queue, "a3", guidance_scale=2.0)
    assert take(queue) == ["a1", "a2"]


def between(
    queue: RequestQueue, *, owner: str = "a", priority: int = 0, steps: int = 50, num_bytes: int = 1
) -> list[str]:
    """The ids of what may run between two steps of a picture of 64x64 pixels, with that many left."""
    batch = queue.take_between(owners={owner}, priority=priority, work=PIXELS * steps, num_bytes=num_bytes)
    return [job.id for job in batch]


def test_short_ones_of_others_run_between_two_steps(queue: RequestQueue) -> None:
    add(queue, "a1", num_inference_steps=1)
    add(queue, "b1", owner="b", num_inference_steps=20, width=64, height=64)
    add(queue, "b2", owner="b", num_inference_steps=4, width=64, height=64)
    add(queue, "b3", owner="b", num_inference_steps=4, width=64, height=64)
    assert between(queue, steps=5) == []  # half of what is left, at most
    assert between(queue, steps=8) == ["b2"]  # alone
    assert queue.running.keys() == {"b2"}
    assert between(queue, owner="b", steps=1) == []  # a1 takes the model's size, which is as large
    assert between(queue, owner="b", steps=2) == ["a1"]
    assert between(queue) == ["b1"]
    assert between(queue, num_bytes=3) == []  # no memory beside those that run
    assert between(queue, priority=1) == []
    assert between(queue) == ["b3"]
    prefill(queue, "p", owner="c", ref=0)  # is as much work as a step of its pixels
    assert between(queue, steps=1) == []
    assert between(queue, steps=2) == ["p"]


def test_late_ones_do_not_run_between_two_steps(queue: RequestQueue, clock: Clock) -> None:
    add(queue, "b1", owner="b", num_inference_steps=1, width=64, height=64, timeout=1.0)
    clock.now = 1.0
    assert between(queue) == []
    assert [job.id for job in queue.take_late()] == ["b1"]
