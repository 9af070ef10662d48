"""Valid work in great numbers: jobs, references that nobody used before, webhooks whose receivers hang."""

from __future__ import annotations

import itertools
import threading

import httpx

from attacks.files import noise
from attacks.target import Target, text


def jobs(target: Target) -> None:
    """As many jobs as the server takes, none like another."""
    numbers = itertools.count()
    target.repeat(lambda client: target.submit(client, prompt=f"make it bigger {next(numbers)}"), threads=8)


def heavy_jobs(target: Target) -> None:
    """Jobs that each ask for as much as one request may: ten pictures and 50 steps."""
    target.repeat(lambda client: target.submit(client, num_images=10, num_inference_steps=50), threads=2)


def references(target: Target, *, side: int = 256) -> None:
    """Jobs with a reference that nobody used before."""
    numbers, lock = itertools.count(), threading.Lock()

    def send(client: httpx.Client) -> None:
        with lock:
            seed = next(numbers)
        picture = noise.__wrapped__(side, seed=seed)
        target.submit(client, input_image=text(picture))

    target.repeat(send, threads=4)


def uploads(target: Target, *, side: int = 256) -> None:
    """References that are uploaded and computed, and forgotten again."""
    numbers, lock = itertools.count(), threading.Lock()

    def send(client: httpx.Client) -> None:
        with lock:
            seed = next(numbers)
        answer = client.post("/v1/references", json={"images": [text(noise.__wrapped__(side, seed=seed))]})
        target.count(answer.status_code)
        if answer.status_code == 201:
            client.delete(f"/v1/references/{answer.json()['id']}")

    target.repeat(send, threads=4)


def cancelled_jobs(target: Target) -> None:
    """Jobs that are cancelled as soon as they are accepted."""

    def send(client: httpx.Client) -> None:
        id_ = target.submit(client, num_inference_steps=50)
        if id_ is not None:
            client.delete(f"/v1/jobs/{id_}")

    target.repeat(send, threads=4)


def hanging_webhooks(target: Target) -> None:
    """Jobs whose end is reported to a receiver that accepts connections and answers nothing."""
    assert target.hang is not None
    target.repeat(lambda client: target.submit(client, webhook_url=f"{target.hang}/hook"), threads=4)
