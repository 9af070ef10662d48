"""Updates reach those who watch, up to the final one."""

from __future__ import annotations

import asyncio
import contextlib

from limner.server.jobs.updates import Update, UpdateFeed


def test_a_watcher_hears_the_last_update_and_all_that_follow() -> None:
    async def run() -> list[str]:
        feed = UpdateFeed()
        feed.publish(Update(state="running", step=1))
        states = []
        async for update in feed.watch(idle=None):
            assert update is not None
            states.append(f"{update.state} {update.step}")
            if len(states) == 1:
                feed.publish(Update(state="running", step=2))
                feed.publish(Update(state="ready", step=2))
        await feed.wait()
        assert feed.watchers == set()
        return states

    assert asyncio.run(run()) == ["running 1", "running 2", "ready 2"]


def test_a_quiet_feed_gives_none_and_a_closed_one_ends() -> None:
    async def run() -> None:
        feed = UpdateFeed()
        async with contextlib.aclosing(feed.watch(idle=0.01)) as updates:
            first = await anext(updates)
            assert first is not None
            assert first.state == "queued"
            assert await anext(updates) is None
            feed.close()
            assert [update async for update in updates if update is not None] == []
        await feed.wait()

    asyncio.run(run())
