"""What a serving process does before it serves."""

from __future__ import annotations

import gc

from limner.memory.free import spare_garbage_collector


class Held:
    """Something that is alive at the start."""


def test_the_collector_leaves_alone_what_is_there_at_the_start() -> None:
    held = Held()
    try:
        spare_garbage_collector()
        assert gc.get_freeze_count() > 10_000
        assert not any(one is held for one in gc.get_objects())
        later = Held()
        assert any(one is later for one in gc.get_objects())
    finally:
        gc.unfreeze()
