"""Loading: no layer and no byte more than is used."""

from __future__ import annotations

from pathlib import Path

import pytest

from limner import Pipeline


def test_text_encoder_has_no_layer_that_nobody_reads(pipe: Pipeline) -> None:
    assert len(pipe.text_encoder.network.layers) == 3  # of 4
    assert not any("lm_head" in name for name, _ in pipe.text_encoder.named_parameters())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads the memory map of Linux")
def test_weights_stay_mapped_from_the_file(pipe: Pipeline, tiny_folder: Path) -> None:
    """No second copy: the memory of every large parameter is the file."""
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(tiny_folder) in line:
            start, _, end = line.split()[0].partition("-")
            ranges.append((int(start, 16), int(end, 16)))
    for part in (pipe.transformer, pipe.autoencoder, pipe.text_encoder):
        for name, p in part.named_parameters():
            assert any(start <= p.data_ptr() < end for start, end in ranges), name
