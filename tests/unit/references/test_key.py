"""What the content key covers."""

from __future__ import annotations

import torch

from limner.references import reference_key


def test_key_covers_everything_that_matters() -> None:
    base = {"weights": "w", "dtype": torch.float32, "arithmetic": "chunked", "digests": ["a", "b"]}
    changes = [
        {"weights": "x"},
        {"dtype": torch.bfloat16},
        {"arithmetic": "flash"},
        {"digests": ["b", "a"]},
        {"digests": ["ab"]},
        {"quantization": "int8"},
    ]
    assert len({reference_key(**(base | change)) for change in [{}, *changes]}) == 1 + len(changes)
