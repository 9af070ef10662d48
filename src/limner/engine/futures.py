"""A request as a future of `concurrent.futures`, for programs that wait for results rather than hear events.

Only of an `Engine`, which is in this process and may be asked from any thread.
"""

from __future__ import annotations

import threading
import uuid
from concurrent.futures import Future

from limner.engine.engine import Engine
from limner.engine.events import EditResult, Event, Failed, Finished
from limner.errors import Cancelled
from limner.requests import EditRequest

__all__ = ["future_of"]


def future_of(
    engine: Engine, request: EditRequest, *, owner: str = "local", priority: int = 0, timeout: float | None = None
) -> Future[EditResult]:
    """Submit a request and return the future of its result; requests that share references run as one batch.

    `cancel()` takes back a request that waits; of one that is being drawn, or that began and waits again for memory, it
    returns False and changes nothing. Arguments and errors are those of `submit`; what fails later is raised by `result()`,
    and `Cancelled` if the engine was closed before the request was done.
    """
    found: Future[EditResult] = Future()
    id_, lock, begun = uuid.uuid4().hex, threading.Lock(), list[bool]()

    def begin() -> bool:
        """From now on it cannot be taken back. False: it was before."""
        with lock:
            if not begun:
                begun.append(found.set_running_or_notify_cancel())
        return begun[0]

    def hear(event: Event) -> None:
        if begin() and isinstance(event, Finished):
            found.set_result(event.result)
        elif begin() and isinstance(event, Failed):
            found.set_exception(event.error)

    def end() -> None:
        if begin():
            found.set_exception(Cancelled("the engine was closed before this request was done; submit it to another"))

    engine.submit(request, id=id_, listener=hear, on_dropped=end, owner=owner, priority=priority, timeout=timeout)
    found.add_done_callback(lambda one: one.cancelled() and engine.cancel(id_))
    return found
