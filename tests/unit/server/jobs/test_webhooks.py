"""Webhooks: signatures, answers, and the times between attempts."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from itertools import pairwise

import pytest
from tests.support.network import PUBLIC, Network, default_context, redirect, reply, serving

from limner.errors import InvalidRequest
from limner.outbound.client import OutboundClient
from limner.outbound.policy import OutboundPolicy
from limner.outbound.urls import Origin
from limner.server.jobs.webhooks import (
    SIGNATURE_HEADER,
    Delivery,
    DeliveryResult,
    Outcome,
    check_webhook_url,
    deliver,
    next_attempt,
    outcome_of,
    sign,
    verify,
)

BODY = b'{"id":"1","status":"Ready"}'
HOOK = "https://hooks.example.org/done?job=1"


def test_the_signature_is_hmac_sha256() -> None:
    """Test case 2 of RFC 4231."""
    assert sign("Jefe", b"what do ya want for nothing?") == (
        "sha256=5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
    )


def test_verify() -> None:
    signature = sign("secret", BODY)
    assert verify("secret", BODY, signature)
    for secret, body, wrong in (
        ("Secret", BODY, signature),
        ("secret", BODY + b" ", signature),
        ("secret", BODY, signature.removeprefix("sha256=")),
        ("secret", BODY, signature.upper()),
        ("secret", BODY, signature[:-1]),
        ("secret", BODY, "sha256=é\ud800"),
        ("secret", BODY, ""),
    ):
        assert not verify(secret, body, wrong)


def attempt(network: Network, url: str = HOOK, secret: str | None = "secret", **policy: object) -> DeliveryResult:
    network.names.setdefault("hooks.example.org", [PUBLIC])

    async def run() -> DeliveryResult:
        client = OutboundClient(
            OutboundPolicy(**policy), resolver=network.resolve, connector=network, ssl_context=default_context()
        )  # type: ignore[arg-type]
        return await deliver(url, BODY, secret, client=client)

    return asyncio.run(run())


def test_a_delivery() -> None:
    network = Network(reply(b"thanks"))
    assert attempt(network) == DeliveryResult(outcome=Outcome.DELIVERED, status=200)
    assert network.connected == [(PUBLIC, 443)]
    assert network.tls == ["hooks.example.org"]
    head, _, body = network.sent.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0] == "POST /done?job=1 HTTP/1.1"
    assert f"Content-Length: {len(BODY)}" in lines
    assert "Content-Type: application/json" in lines
    assert body == BODY
    (signature,) = (line.removeprefix(f"{SIGNATURE_HEADER}: ") for line in lines if line.startswith(SIGNATURE_HEADER))
    assert verify("secret", body, signature)
    assert network.received < 1000


def test_without_a_secret_there_is_no_signature() -> None:
    network = Network(reply(b""))
    assert attempt(network, secret=None).outcome is Outcome.DELIVERED
    assert SIGNATURE_HEADER.encode() not in network.sent


def test_a_secret_that_is_no_text_does_not_stop_the_delivery() -> None:
    assert attempt(Network(reply(b"")), secret="\ud800").outcome is Outcome.DELIVERED


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (200, Outcome.DELIVERED),
        (201, Outcome.DELIVERED),
        (204, Outcome.DELIVERED),
        (299, Outcome.DELIVERED),
        (410, Outcome.GIVEN_UP),
        (300, Outcome.RETRY),
        (400, Outcome.RETRY),
        (401, Outcome.RETRY),
        (404, Outcome.RETRY),
        (429, Outcome.RETRY),
        (500, Outcome.RETRY),
        (503, Outcome.RETRY),
    ],
)
def test_answers(status: int, outcome: Outcome) -> None:
    assert outcome_of(status) is outcome
    result = attempt(Network(reply(b"", status=f"{status} X", length=None if status == 204 else True)))
    assert (result.outcome, result.status) == (outcome, status)
    assert (result.problem == "") is (outcome is Outcome.DELIVERED)


def test_an_answer_without_an_end_is_not_waited_for() -> None:
    network = Network([reply(b"", length=10**9), *[bytes(1000)] * 5])
    assert attempt(network).outcome is Outcome.DELIVERED
    assert network.received < 1000


def test_redirects_are_not_followed() -> None:
    network = Network(redirect("https://127.0.0.1/", "307 T"))
    assert attempt(network).outcome is Outcome.RETRY
    assert network.connected == [(PUBLIC, 443)]


def test_failures_that_may_pass_are_tried_again() -> None:
    for network in (Network(b""), Network(dead=[PUBLIC]), Network(b"nonsense")):
        result = attempt(network)
        assert (result.outcome, result.status) == (Outcome.RETRY, None)
        assert "webhook_url" in result.problem
    assert attempt(Network(), "https://unknown.example.org/").outcome is Outcome.RETRY
    result = attempt(Network(reply(), pause=1), total_seconds=0.05)
    assert (result.outcome, result.problem) == (Outcome.RETRY, "webhook_url: hooks.example.org took too long")


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1/",
        "https://169.254.169.254/",
        "http://hooks.example.org/",
        "https://hooks.example.org:22/",
        "https://a:b@hooks.example.org/",
        "https://[::ffff:10.0.0.1]/",
        "https://localhost/",
        "https://0x7f.1/",
        "",
        "https://hooks.example.org/" + "a" * 2058,
    ],
)
def test_urls_that_are_refused_when_submitted_and_when_delivered(url: str) -> None:
    with pytest.raises(InvalidRequest, match="webhook_url"):
        check_webhook_url(url, policy=OutboundPolicy())
    network = Network()
    result = attempt(network, url)
    assert result.outcome is Outcome.GIVEN_UP
    assert result.problem.startswith("webhook_url: ")
    assert (network.asked, network.connected) == ([], [])


def test_the_longest_url() -> None:
    url = "https://hooks.example.org/" + "a" * 2057
    assert len(url) == 2083
    assert str(check_webhook_url(url, policy=OutboundPolicy())) == url
    assert attempt(Network(reply(b"")), url).outcome is Outcome.DELIVERED


def test_a_name_that_became_private_is_given_up() -> None:
    network = Network(names={"hooks.example.org": ["192.168.0.9"]})
    assert attempt(network).outcome is Outcome.GIVEN_UP
    assert network.connected == []


def test_a_real_receiver_on_an_allowed_loopback_address() -> None:
    heads = []

    async def nobody(host: str, port: int) -> Sequence[str]:
        raise AssertionError("an address is not resolved")

    def answer(head: bytes) -> bytes:
        heads.append(head.decode())
        return reply(b"", status="204 No Content", length=None)

    async def run() -> None:
        async with serving(None, answer, []) as port:
            url = f"http://127.0.0.1:{port}/hook"
            allowed = OutboundPolicy(allowed=frozenset({Origin.parse(f"http://127.0.0.1:{port}")}))
            check_webhook_url(url, policy=allowed)
            result = await deliver(url, BODY, "secret", client=OutboundClient(allowed, resolver=nobody))
            assert result == DeliveryResult(outcome=Outcome.DELIVERED, status=204)
            result = await deliver(url, BODY, "secret", client=OutboundClient(resolver=nobody))
            assert result.outcome is Outcome.GIVEN_UP

    asyncio.run(run())
    assert len(heads) == 1
    assert f"{SIGNATURE_HEADER}: {sign('secret', BODY)}" in heads[0]


def times(policy: Delivery, rng: random.Random, *, start: float = 1000.0) -> list[float]:
    """When the attempts are made if every one fails at once."""
    made, now = [start], start
    while (due := next_attempt(len(made), now, rng, first_attempt=start, policy=policy)) is not None:
        now = due
        made.append(now)
    return made


def test_delays_grow_and_end_after_the_last_attempt() -> None:
    for seed in range(50):
        made = times(Delivery(), random.Random(seed))
        assert len(made) == 10
        delays = [b - a for a, b in pairwise(made)]
        for k, delay in enumerate(delays):
            longest = min(10.0 * 3.0**k, 6 * 3600.0)
            assert longest / 2 <= delay <= longest
        assert made[-1] - made[0] < 24 * 3600


def test_jitter_is_drawn_and_repeats_with_its_seed() -> None:
    assert times(Delivery(), random.Random(1)) == times(Delivery(), random.Random(1))
    firsts = {times(Delivery(), random.Random(seed))[1] for seed in range(20)}
    assert len(firsts) == 20


def test_it_ends_after_a_day_whatever_the_count() -> None:
    policy = Delivery(max_attempts=10_000, first_delay=600, give_up_after=24 * 3600)
    made = times(policy, random.Random(0))
    assert len(made) < 20
    assert made[-1] - made[0] <= 24 * 3600
    # a service that was down for two days does not bring up the past
    assert next_attempt(1, 200_000.0, random.Random(0), first_attempt=0.0) is None


def test_the_first_attempt_needs_no_time() -> None:
    with pytest.raises(InvalidRequest, match="attempts"):
        next_attempt(0, 0.0, random.Random(0), first_attempt=0.0)
