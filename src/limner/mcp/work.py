"""Waits for the engine on behalf of a call: its progress is told, and a call that is cancelled stops its draw.

Knows nothing of tools and of the protocol.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable

from limner.engine.events import Event, Failed, Finished, Prefilled, Progress, Started
from limner.engine.protocol import Backend
from limner.requests import EditRequest, PrefillRequest

__all__ = ["Report", "run_request"]

Report = Callable[[int, int, str], Awaitable[None]]
"""Called with the number of steps that are done, the number of all, and a few words."""


async def run_request(
    engine: Backend, request: EditRequest | PrefillRequest, *, report: Report
) -> Finished | Prefilled:
    """Return the last event of a request. Cancelled, it leaves the engine after the present step.

    Raises what the engine raises or reports.
    """
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[Event] = asyncio.Queue()
    id, num_steps = uuid.uuid4().hex, 1
    if isinstance(request, EditRequest):
        num_steps = request.num_inference_steps or engine.model.kind.num_inference_steps

    def listener(event: Event) -> None:  # in the engine's thread
        if not loop.is_closed():
            loop.call_soon_threadsafe(events.put_nowait, event)

    engine.submit(request, id=id, listener=listener)
    try:
        while True:
            event = await events.get()
            if isinstance(event, Started):
                await report(0, num_steps, "drawing" if isinstance(request, EditRequest) else "computing K/V")
            elif isinstance(event, Progress):
                await report(event.step, event.num_inference_steps, f"step {event.step} of {event.num_inference_steps}")
            elif isinstance(event, Failed):
                raise event.error
            else:
                return event
    except asyncio.CancelledError:
        engine.cancel(id)
        raise
