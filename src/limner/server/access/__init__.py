"""Who may call, and how much."""

from limner.server.access.keys import KeyRing, Owner, check_bind, new_key
from limner.server.access.limits import Limiter, LimitPolicy, Slot

__all__ = ["KeyRing", "LimitPolicy", "Limiter", "Owner", "Slot", "check_bind", "new_key"]
