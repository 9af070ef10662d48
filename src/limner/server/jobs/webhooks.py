"""Webhooks: signing a body, one attempt to deliver it, and the time of the next attempt.

Owns the signature, which answers are final and the times between attempts. The job store knows what is due and what was
tried; `outbound` decides which addresses may be reached.

Attempts go on until the receiver confirms, so a webhook may arrive more than once: receivers tell them apart by job id.
"""

from __future__ import annotations

import hashlib
import hmac
import random
from dataclasses import dataclass
from enum import StrEnum

from limner.errors import InvalidRequest, RemoteError
from limner.outbound.client import OutboundClient
from limner.outbound.policy import OutboundPolicy
from limner.outbound.urls import Target

__all__ = [
    "MAX_URL_CHARACTERS",
    "SECRET_HEADER",
    "SIGNATURE_HEADER",
    "Delivery",
    "DeliveryResult",
    "Outcome",
    "check_webhook_secret",
    "check_webhook_url",
    "deliver",
    "next_attempt",
    "outcome_of",
    "sign",
    "verify",
]

SIGNATURE_HEADER = "X-BFL-Signature"
"""What older examples of the hosted service check: an HMAC of the body."""
SECRET_HEADER = "X-Webhook-Secret"
"""What the official client of the hosted service checks: the secret as it is."""
MAX_URL_CHARACTERS = 2083
"""The limit of the hosted service."""


class Outcome(StrEnum):
    """What follows from an attempt."""

    DELIVERED = "delivered"
    RETRY = "retry"
    GIVEN_UP = "given up"


@dataclass(frozen=True, kw_only=True, slots=True)
class DeliveryResult:
    """One attempt. `status` is the receiver's answer, if any; `problem` is for people, empty if delivered."""

    outcome: Outcome
    status: int | None = None
    problem: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Delivery:
    """Times between attempts: `first_delay` seconds, then `factor` times as long each time, up to `longest_delay`.

    The defaults make 10 attempts in about 11 hours.
    """

    max_attempts: int = 10
    first_delay: float = 10.0
    factor: float = 3.0
    longest_delay: float = 6 * 3600.0
    give_up_after: float = 24 * 3600.0


def sign(secret: str, body: bytes) -> str:
    """Return `sha256=<hex>`: HMAC-SHA256 of the body under the secret (RFC 2104)."""
    return "sha256=" + hmac.new(secret.encode("utf-8", "surrogatepass"), body, hashlib.sha256).hexdigest()


def verify(secret: str, body: bytes, signature: str) -> bool:
    """Return whether `signature` is that of the body, in constant time."""
    return hmac.compare_digest(sign(secret, body).encode(), signature.encode("utf-8", "surrogatepass"))


def check_webhook_url(url: str, *, policy: OutboundPolicy, field: str = "webhook_url") -> Target:
    """Refuse, at submission, a URL that can never be delivered to. Raises `InvalidRequest`.

    Makes no network request: names are resolved and checked at each attempt.
    """
    return policy.check_url(url, field=field, max_characters=MAX_URL_CHARACTERS)


def check_webhook_secret(secret: str) -> None:
    """Raise `InvalidRequest` for a secret that a header cannot carry as it is."""
    if not _is_for_header(secret):
        raise InvalidRequest(
            "webhook_secret", "is empty, or has spaces at an end or control characters, which no header carries"
        )


def _is_for_header(secret: str) -> bool:
    return bool(secret) and secret == secret.strip() and secret.isprintable()


async def deliver(url: str, body: bytes, secret: str | None, *, client: OutboundClient) -> DeliveryResult:
    """Make one attempt to POST a JSON body. Never raises for what the receiver does; redirects are not followed."""
    headers = {"Content-Type": "application/json"}
    if secret is not None:
        headers[SIGNATURE_HEADER] = sign(secret, body)
        if _is_for_header(secret):  # jobs of older versions may have any
            headers[SECRET_HEADER] = secret
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
    """Judge an answer: 2xx is delivered, 410 Gone gives up, all others may be a temporary fault of the receiver."""
    if 200 <= status < 300:
        return Outcome.DELIVERED
    return Outcome.GIVEN_UP if status == 410 else Outcome.RETRY


def next_attempt(
    attempts: int, now: float, rng: random.Random, *, first_attempt: float, policy: Delivery | None = None
) -> float | None:
    """Return when to try again after `attempts` failed ones, the first at `first_attempt`; None: give up.

    Times are in seconds of any one clock. Half of each delay is random, so that a receiver that was down does not get
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
