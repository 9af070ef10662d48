"""References that passed are not checked again, at the same tolerance."""

from __future__ import annotations

import asyncio

from tests.support.jobs import reference
from tests.support.serving import Words

from limner.server.jobs.moderation import Moderation
from limner.server.jobs.offload import Offload
from limner.trust.safety import Checks


def test_what_passed_is_remembered() -> None:
    words, pictures = Words(), [reference(1), reference(2)]

    async def run() -> None:
        offload = Offload()
        moderation = Moderation(Checks(checks=(words,)), offload=offload)
        try:
            for tolerance, looked in ((2, 2), (2, 2), (3, 4)):
                assert await moderation.check_references(pictures, tolerance=tolerance) is None
                assert words.looked == looked
            words.refuse.add("input")
            assert await moderation.check_references([reference(3)], tolerance=2) is not None
            assert await moderation.check_references([reference(3)], tolerance=2) is not None  # a refusal is not
            assert await moderation.check_references(pictures, tolerance=2) is None
            assert await moderation.check_prompt("forbidden", tolerance=2) is not None
        finally:
            offload.close()

    asyncio.run(run())
