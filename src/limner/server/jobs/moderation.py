"""Safety checks of jobs, in threads; pictures that passed are remembered.

Knows nothing of what follows from a finding.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from PIL import Image

from limner.images import PreparedReference
from limner.server.jobs.offload import Offload
from limner.trust.safety import Checks, Finding

__all__ = ["Moderation"]

_MAX_REMEMBERED = 4096


class Moderation:
    """The checks of a server, used in one event loop."""

    def __init__(self, checks: Checks, *, offload: Offload) -> None:
        self._checks = checks
        self._offload = offload
        self._passed: OrderedDict[tuple[str, int], None] = OrderedDict()  # (digest of a reference, tolerance)

    async def check_prompt(self, prompt: str, *, tolerance: int) -> Finding | None:
        """Return why a prompt is refused, or None."""
        return await self._offload.run(self._checks.check_prompt, prompt, tolerance=tolerance)

    async def check_references(self, pictures: Sequence[PreparedReference], *, tolerance: int) -> Finding | None:
        """Return why references are refused, or None. Pictures that passed at this tolerance are not checked again."""
        names = [(p.report.digest, tolerance) for p in pictures]
        if all(name in self._passed for name in names):
            for name in names:
                self._passed.move_to_end(name)
            return None
        images = [Image.frombytes("RGB", p.report.processed_size, p.data) for p in pictures]
        finding = await self._offload.run(self._checks.check_images, images, role="input", tolerance=tolerance)
        if finding is None:
            self._passed.update(dict.fromkeys(names))
            while len(self._passed) > _MAX_REMEMBERED:
                self._passed.popitem(last=False)
        return finding

    async def check_results(self, pictures: Sequence[Image.Image], *, tolerance: int) -> Finding | None:
        """Return why drawn pictures are refused, or None."""
        return await self._offload.run(self._checks.check_images, pictures, role="output", tolerance=tolerance)
