"""A request as a future of `concurrent.futures`, for programs that wait for results rather than hear events."""

from __future__ import annotations

import uuid
from concurrent.futures import Future

from limner.engine.events import EditResult, Event, Failed, Finished
from limner.engine.protocol import Backend
from limner.requests import EditRequest

__all__ = ["future_of"]


def future_of(
    engine: Backend, request: EditRequest, *, owner: str = "local", priority: int = 0, timeout: float | None = None
) -> Future[EditResult]:
    """Submit a request and return the future of its result; requests that share references run as one batch.

    `cancel()` of a future that has not begun takes the request back. Arguments and errors are those of `submit`; what
    fails later is raised by `result()`.
    """
    found: Future[EditResult] = Future()
    id_ = uuid.uuid4().hex

    def hear(event: Event) -> None:
        if isinstance(event, Finished) and found.set_running_or_notify_cancel():
            found.set_result(event.result)
        elif isinstance(event, Failed) and found.set_running_or_notify_cancel():
            found.set_exception(event.error)

    engine.submit(request, id=id_, listener=hear, owner=owner, priority=priority, timeout=timeout)
    found.add_done_callback(lambda one: one.cancelled() and engine.cancel(id_))
    return found
