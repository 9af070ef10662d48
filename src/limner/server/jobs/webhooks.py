"""Webhooks: signing a body, delivering it once, and when to try again.

Owns the signature, which answers are final and the times between attempts. What is due, and what has been tried, is in
the store of jobs; which addresses may be reached is in `outbound`.

A delivery is tried until the receiver says that it has it, so it may arrive more than once: receivers go by the job's id.
"""

from __future__ import annotations

import hashlib
import hmac
import random
from dataclasses import dataclass
from enum import StrEnum

from limner.errors import InvalidRequest, RemoteError
from limner.server.outbound.client import OutboundClient, OutboundPolicy, Target

__all__ = [
    "MAX_URL_CHARACTERS",
    "SIGNATURE_HEADER",
    "Delivery",
    "DeliveryResult",
    "Outcome",
    "check_webhook_url",
    "deliver",
    "next_attempt",
    "outcome_of",
    "sign",
    "verify",
]

SIGNATURE_HEADER = "X-BFL-Signature"
MAX_URL_CHARACTERS = 2083
"""Of a webhook's URL, as in the hosted service."""


class Outcome(StrEnum):
    """What an attempt leads to."""

    DELIVERED = "delivered"
    RETRY = "retry"
    GIVEN_UP = "given up"


@dataclass(frozen=True, kw_only=True, slots=True)
class DeliveryResult:
    """One attempt. `status` is what the receiver answered, if it did; `problem` is for people, empty when delivered."""

    outcome: Outcome
    status: int | None = None
    problem: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Delivery:
    """When to try again: after `first_delay` seconds, then `factor` times as long each time, up to `longest_delay`.

    The defaults make 10 attempts in about 11 hours.
    """

    max_attempts: int = 10
    first_delay: float = 10.0
    factor: float = 3.0
    longest_delay: float = 6 * 3600.0
    give_up_after: float = 24 * 3600.0


def sign(secret: str, body: bytes) -> str:
    """`sha256=<hex>`: HMAC-SHA256 of the body under the secret (RFC 2104)."""
    return "sha256=" + hmac.new(secret.encode("utf-8", "surrogatepass"), body, hashlib.sha256).hexdigest()


def verify(secret: str, body: bytes, signature: str) -> bool:
    """Whether `signature` is that of the body; takes as long for a wrong one as for the right one."""
    return hmac.compare_digest(sign(secret, body).encode(), signature.encode("utf-8", "surrogatepass"))


def check_webhook_url(url: str, *, policy: OutboundPolicy, field: str = "webhook_url") -> Target:
    """Refuse a URL that will never be delivered to, when the job is submitted; raises InvalidRequest.

    The network is not asked: names are resolved and checked with each attempt.
    """
    return policy.check_url(url, field=field, max_characters=MAX_URL_CHARACTERS)


async def deliver(url: str, body: bytes, secret: str | None, *, client: OutboundClient) -> DeliveryResult:
    """One attempt to POST a JSON body. Never raises for what the other side does; redirects are not followed."""
    headers = {"Content-Type": "application/json"}
    if secret is not None:
        headers[SIGNATURE_HEADER] = sign(secret, body)
    try:
        check_webhook_url(url, policy=client.policy)
        reply = await client.request("POST", url, field="webhook_url", headers=headers, content=body)
    except InvalidRequest as error:
        return DeliveryResult(outcome=Outcome.GIVEN_UP, problem=str(error))
    except RemoteError as error:
        return DeliveryResult(outcome=Outcome.RETRY, problem=str(error))
    outcome = outcome_of(reply.status)
    problem = "" if outcome is Outcome.DELIVERED else f"webhook_url: answered with status {reply.status}"
    return DeliveryResult(outcome=outcome, status=reply.status, problem=problem)


def outcome_of(status: int) -> Outcome:
    """2xx: the receiver has it. 410 Gone: it wants no more. All others may be a mistake that somebody mends."""
    if 200 <= status < 300:
        return Outcome.DELIVERED
    return Outcome.GIVEN_UP if status == 410 else Outcome.RETRY


def next_attempt(
    attempts: int, now: float, rng: random.Random, *, first_attempt: float, policy: Delivery | None = None
) -> float | None:
    """When to try again after `attempts` failed ones, the first at `first_attempt`; None: no more.

    Times are in seconds of any one clock. Half of each delay is drawn, so that receivers that were down are not met by
    everything at once.
    """
    if attempts < 1:
        raise InvalidRequest("attempts", f"{attempts} is below 1; the first attempt is made at once")
    policy = policy or Delivery()
    if attempts >= policy.max_attempts:
        return None
    delay = policy.first_delay
    for _ in range(attempts - 1):
        delay = min(delay * policy.factor, policy.longest_delay)
    due = now + delay * (0.5 + 0.5 * rng.random())
    return due if due - first_attempt <= policy.give_up_after else None
