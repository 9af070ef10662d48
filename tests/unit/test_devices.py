"""Devices are a parameter all the way: nothing strays to the CPU, and what a GPU does is what the CPU does.

The "meta" device computes nothing, so it shows on any machine whether a tensor was made somewhere else.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.tiny import generators, picture, relative_error
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from limner import Pipeline, ReferenceStore
from limner.model import strips
from limner.model.attention import attend
from limner.model.kv import LayerKV, ReferenceKV, quantize_layer
from limner.model.transfer import on_device
from limner.tokens import image_ids, reference_ids, text_ids
from limner.weights.networks import empty_autoencoder, empty_transformer

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, this machine has none")


class Strays(TorchDispatchMode):
    """Floating point tensors of some size that were computed on another device."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device, self.found = device, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            large = isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.numel() > 64
            if large and tensor.device.type != self._device:
                self.found.append(f"{func}: {list(tensor.shape)} on {tensor.device}")
        return out


@pytest.mark.parametrize("int8", [False, True], ids=["bfloat16", "int8"])
@torch.no_grad()
def test_the_transformer_stays_on_its_device(int8: bool, pipe: Pipeline) -> None:
    transformer = empty_transformer(pipe.transformer.config, int8=int8, where="test").to(torch.bfloat16).eval()
    config = transformer.config

    def tokens(number: int, width: int) -> torch.Tensor:
        return torch.empty(1, number, width, dtype=torch.bfloat16, device="meta")

    with Strays("meta") as strays:
        kv = transformer.prefill(tokens(40, config.in_channels), reference_ids([(4, 4), (4, 6)]))
        velocity = transformer(
            tokens(16, config.in_channels).expand(2, -1, -1),
            tokens(8, config.text_width).expand(2, -1, -1),
            0.5,
            img_ids=image_ids((4, 4)),
            txt_ids=text_ids(8),
            references=kv,
        )
    assert (velocity.shape, velocity.device.type) == ((2, 16, config.in_channels), "meta")
    assert kv.device.type == "meta"
    assert strays.found == []


@torch.no_grad()
def test_strips_stay_on_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strips, "_PIXELS", 1)
    network = empty_autoencoder({"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4}, where="test")
    with Strays("meta") as strays:
        assert strips.encode(network, torch.empty(1, 3, 64, 96, device="meta")).shape == (1, 64, 8, 12)
        assert strips.decode(network, torch.empty(1, 32, 8, 12, device="meta")).shape == (1, 3, 64, 96)
    assert strays.found == []


@gpu
@needs_gpu
@torch.no_grad()
def test_a_gpu_attends_to_shared_references() -> None:
    """Flash twice, merged by log-sum-exp, against the formula in float32; half precision rounds to 2^-8."""
    q, k, v = (torch.randn(3, 40, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    kept = LayerKV(*(torch.randn(1, 70, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2)))
    exact = attend(q.float(), k.float(), v.float(), references=LayerKV(*(x.float() for x in kept)), kernel="dense")
    assert relative_error(attend(q, k, v, references=kept), exact) < 1e-2
    assert relative_error(attend(q, k, v, references=quantize_layer(kept, "int8")), exact) < 2e-2


@gpu
@needs_gpu
def test_kept_references_come_from_pinned_memory() -> None:
    host = ReferenceKV(
        layers=tuple(LayerKV(*(torch.randn(1, 8, 2, 16).pin_memory() for _ in range(2))) for _ in range(4))
    )
    for there, here in zip(on_device(host.layers, torch.device("cuda")), host.layers, strict=True):
        assert there.k.device.type == "cuda"
        assert torch.equal(there.k.cpu(), here.k)
        assert torch.equal(there.v.cpu(), here.v)


@gpu
@needs_gpu
@pytest.mark.parametrize("device_bytes", [None, 0], ids=["on the device", "in host memory"])
def test_a_gpu_draws_what_the_cpu_draws(device_bytes: int | None, pipe: Pipeline, tiny_folder: Any) -> None:
    """float32, other kernels, four steps."""
    there = Pipeline.from_pretrained(tiny_folder, device="cuda", store=ReferenceStore(device_bytes=device_bytes))
    words: dict[str, Any] = {"image": picture(96, 64), "height": 64, "width": 64, "output_type": "pt"}
    pictures = [p("a dog", generator=generators(1)[0], **words).images.cpu() for p in (pipe, there)]
    assert relative_error(pictures[1], pictures[0]) < 1e-3
    limited = Pipeline.from_pretrained(tiny_folder, device="cuda", memory_limit="2GiB")
    assert torch.equal(limited("a dog", generator=generators(1)[0], **words).images.cpu(), pictures[1])
