"""Which kernels run on a device: the table, and that what is wrong, raises or is slower does not run."""

from __future__ import annotations

import logging
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.support.pretend import PretendedDevice

from limner.model import attention
from limner.model.gpu import attention_triton, choice, fused, launch, products, with_lse
from limner.model.kv import LayerKV, quantize_layer

CUDA = torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A card by its compute capability, of which torch says that it takes all kernels."""

    def make(capability: tuple[int, int] | None) -> None:
        monkeypatch.setattr(choice, "capability", lambda device: capability)
        monkeypatch.setattr(choice, "_takes", lambda name, device, dtype, dim: True)

    return make


@pytest.mark.parametrize(
    ("capability", "dtype", "first"),
    [
        ((9, 0), torch.bfloat16, ["cudnn", "flash3", "triton"]),
        ((10, 0), torch.bfloat16, ["cudnn", "flash4", "triton"]),
        ((12, 0), torch.bfloat16, ["triton", "flash"]),
        ((8, 0), torch.float16, ["triton", "flash"]),
        ((8, 9), torch.float32, ["efficient", "sdpa"]),
        (None, torch.bfloat16, ["flash", "triton"]),
    ],
)
def test_candidates_of_a_card(capability: Any, dtype: torch.dtype, first: list[str], card: Any) -> None:
    card(capability)
    found = choice.attention_candidates(CUDA, dtype, 128)
    assert found[: len(first)] == first
    assert found[-1] == "sdpa"
    assert set(found) <= set(attention.KERNELS)


def test_a_device_without_kernels_runs_torchs_own() -> None:
    for device in ("mps", "xpu"):
        assert attention.choose_kernel.__wrapped__(torch.device(device), torch.float16, 128) == "sdpa"
    assert choice.products_candidates(torch.device("mps"), torch.float16) == []


def test_torch_is_asked_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, device, **options: empty(*shape, **options))
    monkeypatch.setattr(choice, "capability", lambda device: (7, 5))

    def take(kind: str) -> Any:
        return lambda params, debug: asked.append(kind) or kind == "efficient"

    for kind in ("flash", "cudnn", "efficient"):
        monkeypatch.setattr(torch.backends.cuda, f"can_use_{kind}_attention", take(kind))
    assert choice.attention_candidates(CUDA, torch.float16, 128) == ["efficient", "sdpa"]
    assert asked == ["flash", "cudnn", "efficient"]


def test_products_of_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, found in (((8, 0), ["int8"]), ((8, 9), ["int8", "fp8"]), ((12, 0), ["int8", "fp8"])):
        monkeypatch.setattr(choice, "capability", lambda device, found=capability: found)
        assert choice.products_candidates(CUDA, torch.bfloat16) == found
        assert choice.products_candidates(CUDA, torch.float32) == ["int8"]


def test_what_is_wrong_or_raises_is_not_chosen(caplog: pytest.LogCaptureFixture) -> None:
    errors = {"right": 1e-3, "wrong": 0.5, "nan": float("nan"), "also": 1e-3, "best": 1e-3}
    times = {"right": 1.0, "also": 0.95, "best": 0.5}

    def check(name: str) -> float:
        if name == "broken":
            raise RuntimeError("no kernel image is available\nfor this card")
        return errors[name]

    def rank(*names: str) -> list[str]:
        return choice.rank("test", names, check=check, limit=1e-2, measure=times.__getitem__)

    with caplog.at_level(logging.INFO, logger="limner"):
        assert rank("wrong", "broken", "nan", "right") == ["right"]
    assert "broken does not run: no kernel image is available" in caplog.text
    assert "wrong is wrong here, by 0.5" in caplog.text
    assert rank("wrong", "broken") == []
    assert rank("right", "also")[0] == "right"  # 5 % are noise: machines of one kind have to choose alike
    assert rank("right", "also", "wrong", "best") == ["best", "right", "also"]


def test_attention_on_a_card_is_checked_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU in place of a card: its flash kernel is right, one that forgets the log-sum-exp is not."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(choice, "attention_candidates", lambda *a: ["cudnn", "flash3", "flash", "sdpa"])
    monkeypatch.setattr(attention, "CPU_KERNELS", attention.KERNELS)
    flash = with_lse.CALLS["flash"]
    monkeypatch.setitem(with_lse.CALLS, "cudnn", lambda q, k, v: (flash(q, k, v)[0], flash(q, k, v)[1] * 0))
    monkeypatch.setattr(choice, "seconds", lambda device, call: call() is None)
    assert attention._choose_on_gpu(cpu, torch.bfloat16, 64) == "flash"
    monkeypatch.setattr(choice, "attention_candidates", lambda *a: ["cudnn", "sdpa"])
    assert attention._choose_on_gpu(cpu, torch.bfloat16, 64) == "sdpa"


def test_a_card_where_triton_does_not_compile(
    monkeypatch: pytest.MonkeyPatch, pretended: PretendedDevice, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a C compiler: torch's kernels are merged by torch's operators, and the log says why."""

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("Failed to find C compiler")

    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(launch, "_found", {})
    for module in (launch, fused, attention_triton):
        monkeypatch.setattr(module, "launch", refuse)
    monkeypatch.setattr(choice, "_takes", lambda name, device, dtype, dim: name in ("flash", "triton"))
    monkeypatch.setattr(choice, "seconds", lambda device, call: call() is None)
    assert attention.choose_kernel.__wrapped__(pretended.device, torch.bfloat16, 64) == "flash"
    with torch.no_grad():
        assert products.quantize(torch.ones(2, 64, device=pretended.device), torch.int8)[0].shape == (2, 64)
    (said,) = [one.getMessage() for one in caplog.records if "Triton's kernels do not run" in one.message]
    assert said.endswith("cuda:0, torch's operators do: Failed to find C compiler")


def test_versions_of_flash_attention_are_activated_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    active: list[str | None] = [None]
    versions = SimpleNamespace(
        current_flash_attention_impl=lambda: active[-1],
        activate_flash_attention_impl=active.append,
        restore_flash_attention_impl=lambda: active.append(None),
    )
    monkeypatch.setattr(with_lse, "torch_attention", versions)
    for wanted in ("FA3", "FA3", "FA4", None, None):
        with_lse._activate(wanted)
    assert active == [None, "FA3", "FA4", None]
    monkeypatch.setattr(with_lse, "torch_attention", SimpleNamespace())
    with_lse._activate(None)
    with pytest.raises(RuntimeError, match="does not know FA3"):
        with_lse._activate("FA3")


def test_narrow_references_are_read_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever kernel was chosen, where the Triton kernel is right."""
    called: list[str] = []
    monkeypatch.setattr(attention, "reads_narrow", lambda *a: True)
    monkeypatch.setattr(attention, "_triton", lambda q, *a: called.append("triton") or q)
    q = torch.randn(1, 4, 2, 16)
    kept = LayerKV(*(torch.randn(1, 6, 2, 16) for _ in range(2)))
    attention.attend(q, q, q, references=kept)
    assert called == []
    attention.attend(q, q, q, references=quantize_layer(kept, "fp8"))
    assert called == ["triton"]
    attention.attend(q, q, q, references=quantize_layer(kept, "fp8"), kernel="dense")
    assert called == ["triton"]


def test_gradients_of_narrow_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton kernel records none, so the formula runs over their widened values."""
    monkeypatch.setattr(attention, "reads_narrow", lambda *a: True)
    q, k, v = (torch.randn(1, 4, 2, 16) for _ in range(3))
    kept = quantize_layer(LayerKV(*(torch.randn(1, 6, 2, 16) for _ in range(2))), "int8")
    found = attention.attend(q.requires_grad_(), k, v, references=kept)
    assert torch.equal(found, attention.attend(q, k, v, references=kept, kernel="dense"))
    assert torch.autograd.grad(found.sum(), q)[0].abs().sum() > 0


def test_a_cpu_imports_no_triton() -> None:
    words = (
        "import sys, torch; from limner.model.transformer import Transformer; from limner.model.attention import attend\n"
        "from limner.model.int8 import Int8Linear; from limner.model.arithmetic import Linear\n"
        "x = torch.randn(1, 9, 2, 16); attend(x, x, x); Int8Linear.of(Linear(32, 32))(x.flatten(2))\n"
        "print('triton' in sys.modules, 'limner.model.gpu.kernels' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
    assert not launch.available(torch.device("cpu"))
    assert not attention_triton.takes(torch.device("cpu"), torch.bfloat16, 128)
