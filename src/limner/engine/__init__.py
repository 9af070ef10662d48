"""Many requests, one device: a queue with priorities and fairness, batches, cancellation, deadlines, progress."""

from limner.engine.admission import Admission
from limner.engine.card import ModelCard, PipelineView
from limner.engine.engine import Engine
from limner.engine.events import EditResult, Event, Failed, Finished, LastEvent, Listener, Prefilled, Progress, Started
from limner.engine.futures import future_of
from limner.engine.load import load_in_thread
from limner.engine.protocol import Backend, ModelView
from limner.engine.queue import Job, RequestQueue
from limner.engine.stats import EngineStats
from limner.requests import EditRequest, PrefillRequest

__all__ = [
    "Admission",
    "Backend",
    "EditRequest",
    "EditResult",
    "Engine",
    "EngineStats",
    "Event",
    "Failed",
    "Finished",
    "Job",
    "LastEvent",
    "Listener",
    "ModelCard",
    "ModelView",
    "PipelineView",
    "PrefillRequest",
    "Prefilled",
    "Progress",
    "RequestQueue",
    "Started",
    "future_of",
    "load_in_thread",
]
