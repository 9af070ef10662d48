"""The parts of the server that know no pictures and no models import neither."""

from __future__ import annotations

import subprocess
import sys


def test_the_parts_of_the_service_know_no_models() -> None:
    program = (
        "import sys, limner.server.access.keys, limner.outbound.pictures, limner.server.jobs.webhooks;"
        "print(sorted({'torch', 'numpy', 'PIL', 'diffusers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
