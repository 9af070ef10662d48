"""JSON of bodies: read as the standard says, each name once, and never much at a time."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest

from limner.errors import InvalidRequest
from limner.server.http.json_body import MAX_PARTS, _once, read_json

LONG = "A" * 100_000


def read(body: bytes | str) -> Any:
    return read_json(body if isinstance(body, bytes) else body.encode(), max_text=8 << 20)


@pytest.mark.parametrize(
    "value",
    [
        {},
        [1, 2.5, -3e9, None, True, {"a": ["b", {"c": "d"}]}],
        "text",
        {"prompt": 'a, b, [c], {d} \\ " \u00e9 \U0001f600 \ud800 \n' * 50},
        {"prompt": "a, " * 10_000, "n": 1},
        {"a": LONG, "b": "short", "c": [LONG + "B", 7], "d": {"e": LONG}},
        {"picture": LONG * 50},
        {"picture": '\\"/' * 500_000},
        {"prompt": "\u00e9\U0001f600" * 20_000, "n": 1},
    ],
)
def test_values_are_those_of_the_standard_parser(value: Any) -> None:
    assert read(json.dumps(value)) == value
    assert read(json.dumps(value, ensure_ascii=False).encode(errors="replace")) is not None
    assert read(json.dumps(value, indent=2)) == value


def test_an_escaped_slash_in_a_picture() -> None:
    """As some encoders write base64; the end of a slice may fall into an escape."""
    for shift in range(7):
        body = '{"a": "' + "A" * shift + "\\u002b\\/" * 400_000 + '"}'
        assert read(body) == {"a": "A" * shift + "+/" * 400_000}


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{",
        '{"a": "b',
        '{"a": "' + LONG,
        '{"a": "' + LONG + '\\"}',
        '{"a": "' + LONG + '\n"}',
        '{"a": "' + LONG + '\\x"}',
        '{"a": "' + LONG * 30 + "\\u00zz" + LONG * 30 + '"}',
        f'"{LONG}""{LONG}"',
        f'{{"a": -"{LONG}"}}',
        f'{{"a": 1"{LONG}"}}',
        f'{{"{LONG}": 1}}',
        "nul",
        '{"a": 1}}',
    ],
)
def test_what_is_no_json(body: str) -> None:
    with pytest.raises(json.JSONDecodeError):
        read(body)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ('{"a": 1, "b": 2, "a": 3}', "the name 'a' is there twice"),
        ('{"x": {"b": 2, "\\u0062": 3}}', "the name 'b' is there twice"),
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": -Infinity, "b": "' + LONG + '"}', "-Infinity is not JSON"),
        (b'{"a": "\xff"}', "invalid start byte"),
        ("1" * 5000, "limit"),
        ("[" * 500 + '"a"' + "]" * 500, None),
        ("[" * 2000, "has over 1000 lists, objects and values"),
        (json.dumps(dict.fromkeys(map(str, range(MAX_PARTS + 1)))), "has over 1000 lists"),
        ('"' * 200_000, "has over 1000 lists"),
        (" " * (5 << 20) + "1", "bytes beside long texts"),
        (json.dumps({str(i): "A" * 60_000 for i in range(100)}), "bytes beside long texts"),
        (json.dumps({"a" * 1001: 1}), "a name has 1001 characters"),
        (json.dumps({"a": "A" * (9 << 20)}), "a text has over the 8388608 bytes"),
        (json.dumps({"a": "\u00e9" * (1 << 20)}, ensure_ascii=False), "is no base64"),
        (json.dumps({"a": "\u00e9" * (1 << 20)}), "is no base64"),
    ],
)
def test_what_is_refused(body: bytes | str, problem: str | None) -> None:
    if problem is None:
        read(body)
        return
    with pytest.raises(InvalidRequest, match=problem) as refused:
        read(body)
    assert str(refused.value).startswith("body: ")
    assert len(str(refused.value)) < 300


def test_names_are_compared_once_each() -> None:
    counts = []
    for number in (100, 200):
        compared = 0

        class Name(str):
            __slots__ = ()

            def __eq__(self, other: object) -> bool:
                nonlocal compared
                compared += 1
                return super().__eq__(other)

            __hash__ = str.__hash__

        names = [Name(i) for i in range(number)]
        with pytest.raises(InvalidRequest, match="twice"):
            _once([(name, 0) for name in [*names, Name(number - 1)]])
        counts.append(compared)
    assert counts[1] < 4 * number


def test_other_threads_go_on_while_a_large_body_is_read() -> None:
    body = json.dumps({f"input_image_{i}": "A" * (7 << 20) for i in range(8)}).encode()
    ended, longest = threading.Event(), 0.0

    def tick() -> None:
        nonlocal longest
        last = time.perf_counter()
        while not ended.is_set():
            time.sleep(0.001)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now

    thread = threading.Thread(target=tick)
    thread.start()
    assert len(read(body)) == 8
    ended.set()
    thread.join()
    assert longest < 1.0  # 0.02 to 0.05 where nothing else runs
