"""The pretended GPU refuses and counts what a real one would: else the tests that use it would show nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.support.pretend import PretendedDevice, real
from tests.support.pretend.streams import Race


def test_it_refuses_other_devices(pretended: PretendedDevice) -> None:
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    assert real(there * torch.tensor(2.0)).tolist() == [2.0] * 3  # a number may come from anywhere
    with pytest.raises(RuntimeError, match="same device"):
        here + there
    with pytest.raises(RuntimeError, match="same device"):
        torch.cat([there, here])


@pytest.mark.parametrize(
    ("call", "waits", "uploads"),
    [
        (lambda x: x.sum(), 0, 0),
        (lambda x: x.sum().item(), 1, 0),
        (lambda x: bool((x > 0).all()), 1, 0),
        (lambda x: x.cpu(), 1, 0),
        (lambda x: x.nonzero(), 1, 0),
        (lambda x: x[x > 0], 1, 0),
        (lambda x: x[[0, 2]], 0, 1),
        (lambda x: x + torch.ones(3).to("cuda"), 0, 1),
        (lambda x: torch.tensor([1.0, 2.0], device="cuda"), 0, 1),
        (lambda x: torch.cuda.synchronize(), 1, 0),
        (lambda x: torch.ones(3).pin_memory().to("cuda", non_blocking=True), 0, 0),
    ],
)
def test_it_counts(
    call: Callable[[torch.Tensor], object], waits: int, uploads: int, pretended: PretendedDevice
) -> None:
    x = torch.ones(3, device="cuda")
    pretended.clear()
    call(x)
    assert (sum(pretended.waits.values()), sum(pretended.uploads.values())) == (waits, uploads)


def test_it_counts_memory(pretended: PretendedDevice) -> None:
    x = torch.zeros(1000, device="cuda")
    assert pretended.live == 4096
    view, other = x[10:], x + 1
    assert (pretended.live, torch.cuda.memory_allocated()) == (8192, 8192)
    del x, other
    assert (pretended.live, pretended.peak) == (4096, 8192)
    del view
    assert pretended.live == 0
    pretended.limit = 1024
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        torch.zeros(1000, device="cuda")


def test_it_finds_races(pretended: PretendedDevice) -> None:
    side, main = torch.cuda.Stream(), torch.cuda.current_stream()
    host, slot = torch.ones(8).pin_memory(), torch.zeros(8, device="cuda")
    with torch.cuda.stream(side), pytest.raises(Race, match="and the main stream write"):
        slot.copy_(host, non_blocking=True)  # zeros may come after it
    side.wait_stream(main)
    with torch.cuda.stream(side):
        slot.copy_(host, non_blocking=True)
    with pytest.raises(Race, match="the main stream reads what stream 1 writes"):
        slot + 1
    with pytest.raises(Race, match="the host overwrites what stream 1 reads"):
        host.zero_()
    done = side.record_event()
    main.wait_event(done)
    assert real(slot + 1).tolist() == [2.0] * 8
    with pytest.raises(Race, match="stream 1 overwrites what the main stream reads"), torch.cuda.stream(side):
        slot.copy_(host, non_blocking=True)
    done.synchronize()
    host.zero_()


def test_events_have_times_when_they_are_done(pretended: PretendedDevice) -> None:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    torch.ones(3, device="cuda")
    end.record()
    with pytest.raises(RuntimeError, match="not done"):
        start.elapsed_time(end)
    end.synchronize()
    assert start.elapsed_time(end) > 0
    assert sum(pretended.waits.values()) == 1
