"""How much memory a call takes, and keeping it within a limit. `residency`, `pages` and `free` are imported by their path:
they need torch, and what is exported here does not."""

from limner.memory.amounts import parse_bytes, show_bytes
from limner.memory.components import (
    Formats,
    Workload,
    activations,
    autoencoder_bytes,
    call_bytes,
    kv_bytes,
    text_bytes,
    transformer_bytes,
)
from limner.memory.components import Workload as Request
from limner.memory.control import control_bytes, phase_bytes, reused_bytes
from limner.memory.plan import LIBRARIES, MemoryPlan, Phase, Staging, cheapest, make_plan

__all__ = [
    "LIBRARIES",
    "Formats",
    "MemoryPlan",
    "Phase",
    "Request",
    "Staging",
    "Workload",
    "activations",
    "autoencoder_bytes",
    "call_bytes",
    "cheapest",
    "control_bytes",
    "kv_bytes",
    "make_plan",
    "parse_bytes",
    "phase_bytes",
    "reused_bytes",
    "show_bytes",
    "text_bytes",
    "transformer_bytes",
]
