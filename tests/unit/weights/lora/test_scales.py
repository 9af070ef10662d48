"""Scales in configurations of adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.support.lora_files import PAIRS, diffusers_names, peft, write

from limner import CheckpointError
from limner.weights.lora import load_lora


def test_scales_of_configurations(shapes: dict[str, tuple[int, int]], tmp_path: Path) -> None:
    """diffusers writes them into the header, PEFT beside the file."""
    tensors = diffusers_names(PAIRS)
    values: dict[str, Any] = {"r": 4, "lora_alpha": 8, "alpha_pattern": {"transformer_blocks.1.attn.to_q": 2}}
    header = json.dumps({f"transformer.{k}": v for k, v in values.items()} | {"text_encoder.lora_alpha": 1})
    found = load_lora(write(tmp_path, tensors, lora_adapter_metadata=header), shapes=shapes)
    expected = {name: 0.5 if name == "transformer_blocks.1.attn.to_q" else 2.0 for name in shapes}
    assert {name: update.scale for name, update in found.updates.items()} == expected
    file = write(tmp_path, peft(PAIRS), "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 6, "use_rslora": True}))
    assert {update.scale for update in load_lora(file, shapes=shapes).updates.values()} == {3.0}
    for bad, message in (
        ({"use_dora": True}, "DoRA"),
        ({"r": 4, "lora_alpha": "x"}, "lora_alpha='x'"),
        ({"r": 0, "lora_alpha": 1}, "r=0"),
        ({"r": 4, "lora_alpha": 1, "alpha_pattern": {"(a+)+": 1}}, "pattern"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(bad))
        with pytest.raises(CheckpointError, match=message):
            load_lora(file, shapes=shapes)
