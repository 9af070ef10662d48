"""`limner edit` starts without the libraries that take longer to import than a small picture to draw."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from limner.weights.folder import bundled_model

SLOW = ("diffusers", "transformers", "peft", "scipy", "sympy", "torch._dynamo", "huggingface_hub", "fastapi", "ray")


def test_an_edit_imports_no_slow_libraries(tmp_path: Path) -> None:
    """In a process of its own, since tests import all of them."""
    out, cat = tmp_path / "out.png", bundled_model().parent / "samples" / "cat.png"
    program = (
        "import sys\n"
        "from limner.cli.main import main\n"
        f"assert main(['edit', 'x', '-i', {str(cat)!r}, '-o', {str(out)!r}, '--steps', '1']) == 0\n"
        f"print([name for name in {SLOW} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["[]"]), done.stderr
    assert out.is_file()
