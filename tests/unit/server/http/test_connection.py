"""What is parsed of connections that all send at once, round by round of the event loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from limner.server.http.connection import Intake


class Loop:
    """Rounds by hand: parsing takes 2 ms each time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.soon: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()

    def time(self) -> float:
        return self.now

    def call_soon(self, call: Callable[..., None], *args: Any) -> None:
        self.soon.append((call, args))

    def round(self) -> None:
        self.now += 0.001
        for _ in range(len(self.soon)):
            call, args = self.soon.popleft()
            call(*args)


class Connection:
    def __init__(self, loop: Loop, intake: Intake, parsed: list[str], name: str) -> None:
        self.loop, self.intake, self.parsed, self.name = loop, intake, parsed, name

    def send(self) -> None:
        if self.intake.is_open(self.loop):  # type: ignore[arg-type]
            self.take_up()
        else:
            self.intake.wait(self)  # type: ignore[arg-type]

    def take_up(self) -> None:
        self.loop.now += 0.002
        self.parsed.append(self.name)


def test_a_crowd_is_parsed_in_several_rounds_and_in_order() -> None:
    loop, intake, parsed = Loop(), Intake(), []  # type: ignore[var-annotated]
    for number in range(8):
        Connection(loop, intake, parsed, f"{number}").send()
    assert parsed == ["0", "1", "2"]
    loop.round()
    Connection(loop, intake, parsed, "late").send()
    assert parsed == ["0", "1", "2", "3", "4", "5"]
    loop.round()
    assert parsed == ["0", "1", "2", "3", "4", "5", "6", "7", "late"]
    loop.round()
    assert not loop.soon  # nothing is left
    Connection(loop, intake, parsed, "next").send()
    assert parsed[-1] == "next"
