"""The budget of memory: its numbers against real networks, what fits, and weights that leave by turns."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.support.tiny import generators, picture

from limner import CapacityError, InvalidRequest, Pipeline
from limner.config import MODELS, QWEN3_4B, QWEN3_8B, AutoencoderConfig, TextConfig
from limner.memory import (
    Formats,
    Request,
    autoencoder_bytes,
    cheapest,
    kv_bytes,
    make_plan,
    parse_bytes,
    text_bytes,
    transformer_bytes,
)
from limner.memory.pages import can_release, file_backed, release, resident
from limner.memory.residency import Residency
from limner.model.int8 import Int8Linear
from limner.pipeline.admission import Admission
from limner.weights.networks import empty_autoencoder, empty_text_network, empty_transformer

GIB = 2**30
needs_release = pytest.mark.skipif(not can_release(), reason="the system cannot drop pages of mapped files")


def nbytes(module: torch.nn.Module, itemsize: int) -> int:
    return sum(t.numel() * itemsize for t in module.state_dict().values() if t.is_floating_point())


@pytest.mark.parametrize(
    ("text", "number"), [("20GiB", 20 * GIB), ("14.5 GB", 14_500_000_000), ("512mib", 512 << 20), ("7", 7), (9, 9)]
)
def test_amounts_of_memory(text: str | int, number: int) -> None:
    assert parse_bytes(text) == number


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1 parsec", "1e9", 0, True, 1.5, "0", "inf"])
def test_what_is_no_amount_of_memory(text: object) -> None:
    with pytest.raises(InvalidRequest, match="memory_limit"):
        parse_bytes(text)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(MODELS))
def test_weights_are_those_of_the_networks(name: str) -> None:
    """To the byte: what the plan says, and what networks of that geometry on the meta device have."""
    geometry = MODELS[name]
    for quantize in (None, "int8"):
        network = empty_transformer(geometry.transformer, int8=quantize is not None, where="test")
        found = sum(t.nbytes for t in network.state_dict().values())
        itemsize = 4  # of the meta network: its wide tensors are float32
        assert transformer_bytes(geometry.transformer, Formats(itemsize=itemsize, quantize=quantize)) == found
    config = {"klein-4b": QWEN3_4B, "klein-9b": QWEN3_8B}[name]
    assert replace(TextConfig.from_transformers(config), num_used=27) == geometry.text_encoder
    text = empty_text_network(config, used=27, depth=36, where="test")
    assert text_bytes(geometry.text_encoder, itemsize=2) == nbytes(text, 2)
    assert autoencoder_bytes(AutoencoderConfig(), itemsize=2) == nbytes(empty_autoencoder({}, where="test"), 2)


def test_weights_of_a_small_model(pipe: Pipeline) -> None:
    geometry = pipe.geometry
    assert transformer_bytes(geometry.transformer, Formats(itemsize=4)) == nbytes(pipe.transformer, 4)
    assert text_bytes(geometry.text_encoder, itemsize=4) == nbytes(pipe.text_encoder.network, 4) + 4 * 16  # its norm
    assert autoencoder_bytes(geometry.autoencoder, itemsize=4) == nbytes(pipe.autoencoder, 4)
    refs = pipe.prefill([picture(64, 64), picture(96, 64)])
    assert kv_bytes(geometry.transformer, refs.num_tokens, itemsize=4, kv=None) == refs.nbytes == pipe.kv_bytes(40)
    narrow = Pipeline(
        transformer=pipe.transformer,
        autoencoder=pipe.autoencoder,
        text_encoder=pipe.text_encoder,
        kv_cache_dtype="int8",
    )
    assert narrow.prefill(picture(64, 64)).nbytes == narrow.kv_bytes(16)


EDIT = Request(size=(256, 256), references=((256, 256), (256, 256)))


def test_plan_of_a_large_model() -> None:
    """The sizes that the model's card and files give: 9.08 G parameters, 0.5 MiB of K/V a token."""
    plan = make_plan(MODELS["klein-9b"], EDIT, formats=Formats())
    assert plan.components["transformer weights"] == pytest.approx(2 * 9.08e9, rel=0.005)
    assert plan.components["K/V of references"] == 512 * 2**19
    assert [phase.name for phase in plan.phases] == ["encode text", "encode references", "prefill", "denoise", "decode"]
    assert [p.name for p in make_plan(MODELS["klein-9b"], Request(size=(256, 256)), formats=Formats()).phases] == [
        "encode text",
        "denoise",
        "decode",
    ]
    without = make_plan(MODELS["klein-9b"], Request(size=(256, 256)), formats=Formats())
    for name in ("denoise", "decode"):  # K/V stay until the end
        with_kv, none = (next(p for p in x.phases if p.name == name) for x in (plan, without))
        assert with_kv.anonymous - none.anonymous == plan.components["K/V of references"]
    parts = make_plan(MODELS["klein-9b"], EDIT, formats=Formats(), staging="parts")
    assert plan.peak - parts.peak > plan.components["text_encoder weights"]
    assert parts.peak < 20 * GIB
    assert parts.peak_anonymous < 2 * GIB
    int8 = make_plan(MODELS["klein-9b"], EDIT, formats=Formats(quantize="int8"), staging="parts")
    assert int8.peak < 14 * GIB
    assert int8.peak_anonymous > int8.components["int8 weights as packed for this CPU"]
    every = frozenset({"text_encoder", "transformer", "autoencoder"})
    converted = make_plan(MODELS["klein-9b"], EDIT, formats=Formats(anonymous=every), staging="layers", limit=GIB)
    assert converted.peak_anonymous > 28e9  # nothing leaves that has no file behind it
    here = make_plan(
        MODELS["klein-9b"],
        EDIT,
        formats=Formats(quantize="int8", anonymous=frozenset({"transformer"})),
        staging="parts",
    )
    assert here.peak - int8.peak > 7 * GIB


def test_plan_grows_with_the_request() -> None:
    geometry, base = MODELS["klein-4b"], make_plan(MODELS["klein-4b"], EDIT, formats=Formats()).peak
    for larger in (
        replace(EDIT, size=(1024, 1024)),
        replace(EDIT, batch=64),
        replace(EDIT, references=((1024, 1024),) * 4),
    ):
        assert make_plan(geometry, larger, formats=Formats()).peak > base
    big = Request(size=(4096, 4096))
    whole = make_plan(geometry, big, formats=Formats(), whole_pixels=2**30)
    assert make_plan(geometry, big, formats=Formats()).peak < 0.6 * whole.peak


@pytest.mark.parametrize(
    ("limit", "staging", "quantize"),
    [(40, "whole", None), (20, "parts", None), (12, "parts", "int8"), (5, "layers", None)],
)
def test_the_cheapest_setting_that_fits(limit: int, staging: str, quantize: str | None) -> None:
    plan = cheapest(MODELS["klein-9b"], EDIT, formats=Formats(), limit=limit * GIB)
    assert (plan.staging, plan.formats.quantize) == (staging, quantize)
    assert plan.peak <= limit * GIB


def test_what_fits_nowhere_is_told_with_numbers() -> None:
    with pytest.raises(
        CapacityError, match=r"memory_limit: 1\.00 GiB are too little; the least is [2-4]\.\d+ GiB, while"
    ):
        cheapest(MODELS["klein-9b"], EDIT, formats=Formats(), limit=GIB)
    geometry = MODELS["klein-9b"]
    with pytest.raises(CapacityError, match="quantize=int8, kv_cache_dtype=None, staging whole"):
        cheapest(geometry, EDIT, formats=Formats(), limit=16 * GIB, device="cuda")  # a device has no staging
    card = cheapest(geometry, EDIT, formats=Formats(packed=False), limit=24 * GIB, device="cuda")
    assert (card.staging, card.formats.quantize, card.phases[0].file_backed) == ("whole", "int8", 0)
    assert 0 < card.host < GIB


@pytest.fixture
def mapped(tmp_path: Path) -> Iterator[torch.Tensor]:
    from safetensors import safe_open
    from safetensors.torch import save_file

    save_file({"x": torch.arange(1 << 20, dtype=torch.float32)}, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        yield file.get_tensor("x")


@needs_release
def test_pages_leave_and_come_back(mapped: torch.Tensor) -> None:
    assert file_backed([mapped, torch.zeros(4)]) == [mapped]
    assert mapped.sum() > 0
    before = resident()
    assert release(mapped)
    assert resident()[0] < before[0] - (3 << 20)
    assert torch.equal(mapped, torch.arange(1 << 20, dtype=torch.float32))


@needs_release
@pytest.mark.parametrize("scans", [True, False], ids=["scan", "pagemap"])
def test_what_was_written_stays(scans: bool, mapped: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that was changed in place is not what is in the file."""
    if not scans:

        def no_scan(*_: int) -> int:
            raise OSError("before Linux 6.7")

        monkeypatch.setattr("limner.memory.pages._scan", no_scan)
    assert mapped.sum() > 0
    assert release(mapped)
    mapped[500_000] = -1
    assert not release(mapped)
    assert mapped[500_000] == -1
    own = torch.ones(1 << 20)
    assert not release(own)
    assert own.sum() == 1 << 20


def call(pipe: Pipeline) -> torch.Tensor:
    out = pipe("a dog", image=picture(96, 64), height=64, width=96, generator=generators(3)[0], output_type="pt")
    found: torch.Tensor = out.images
    return found


class Watched(Residency):
    """Says what left. With `room` each network has room for itself alone ("parts"), or not even that ("layers")."""

    room: str | None = None

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.left: set[str] = set()

    def _enter(self, network: torch.nn.Module, growth: int) -> None:
        if self.room is not None:
            own, sizes = self._bytes[network], [self._bytes[layer] for layer in self._networks[network]]
            if self.room == "layers" and sizes:
                own += 2 * max(sizes) + (sizes[0] if len(sizes) > 3 else 0) - sum(sizes)
            unpacked = sum(
                m.weight.nbytes - m.packed_bytes
                for m in network.modules()
                if isinstance(m, Int8Linear) and m.multiplies_int8()
            )
            self.limit, self._libraries = growth + unpacked + own, -resident()[1]
        super()._enter(network, growth)

    def release(self, network: torch.nn.Module) -> None:
        self.left.add(type(network).__name__)
        super().release(network)

    def _after_layer(self, layer: torch.nn.Module, *_: object) -> None:
        if self._resident is not None and layer not in self._resident:
            self.left.add(type(layer).__name__)
        super()._after_layer(layer)


@needs_release
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_limit_changes_no_bit(
    quantize: str | None, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Networks by turns, and layers by turns: the picture is that of the pipeline without a limit."""
    from limner.weights.convert import convert

    folder = tiny_folder
    if quantize:
        convert(tiny_folder, folder := tmp_path / "int8", to="int8")
    expected = call(Pipeline.from_pretrained(folder))
    monkeypatch.setattr("limner.pipeline.load.Residency", Watched)
    networks = {"Transformer", "Autoencoder", "TextEncoder"}
    for room in (None, "parts", "layers"):
        pipe = Pipeline.from_pretrained(folder, memory_limit="1TiB")
        residency = pipe.residency
        assert isinstance(residency, Watched)
        assert pipe.formats.anonymous == frozenset()
        residency.room = room
        monkeypatch.setattr(Admission, "check_limit", lambda own, workload: None)
        assert torch.equal(call(pipe), expected), room
        packs = quantize is not None and pipe.formats.packed
        if room is None and not packs:
            assert residency.left == set()  # there is room for all
        if room is not None:
            assert networks <= residency.left
            layers = {"Qwen3DecoderLayer", "DoubleBlock", "SingleBlock"}
            assert residency.left - networks == (
                layers if room == "layers" else {"DoubleBlock", "SingleBlock"} if packs else set()
            )
        assert torch.equal(call(pipe), expected), room


@needs_release
def test_layers_that_ran_leave(tmp_path: Path) -> None:
    """Six layers of 4 MiB with room for four: the first two stay, of the others no more than two are there at once."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    save_file({f"{i}.weight": torch.randn(1024, 1024) for i in range(6)}, tmp_path / "x.safetensors")
    with torch.device("meta"):
        network = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024, bias=False) for _ in range(6)))
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        network.load_state_dict({f"{i}.weight": file.get_tensor(f"{i}.weight") for i in range(6)}, assign=True)
    size = 4 << 20
    x = torch.ones(1, 1024)
    with torch.no_grad():
        expected = network(x)
    residency = Residency(1 << 40)
    residency.adopt(network, list(network))
    residency.release(network)
    base = resident()[0] - resident()[1]
    residency._libraries, residency.limit = 0, resident()[1] + 4 * size + (1 << 20)
    seen = []
    with torch.no_grad(), residency.working(network, growth=0):
        for layer in residency.visit(network):
            x = layer(x)
            seen.append(round((resident()[0] - resident()[1] - base) / size))
    assert torch.equal(x, expected)
    assert seen == [1, 2, 3, 3, 3, 3]
    assert residency._resident is None


@needs_release
def test_a_limit_that_is_too_small_is_refused(tiny_folder: Path, pipe: Pipeline) -> None:
    with pytest.raises(CapacityError, match=re.escape("memory_limit: 0.10 GiB are too little; the least is 0.6")):
        Pipeline.from_pretrained(tiny_folder, memory_limit=107_374_182)
    with pytest.raises(InvalidRequest, match="memory_limit: 'much' is not an amount"):
        Pipeline.from_pretrained(tiny_folder, memory_limit="much")
    limited = Pipeline.from_pretrained(tiny_folder, memory_limit="1GiB")
    with pytest.raises(CapacityError, match=r"memory_limit: 1\.00 GiB .* while it does 'decode'"):
        limited("a dog", width=4096, height=4096)
    residency = limited.residency
    assert residency is not None
    refused = pytest.raises(CapacityError, match="too little for Transformer: .* missing beside 2.00 GiB")
    with refused, residency.working(limited.transformer, growth=2 * GIB):
        pass


@needs_release
def test_changed_weights_stay_changed_under_a_limit(tiny_folder: Path) -> None:
    """A LoRA merged in place would be lost if its pages were dropped."""
    pipe = Pipeline.from_pretrained(tiny_folder, memory_limit="1TiB")
    assert pipe.residency is not None
    weight = pipe.transformer.single_transformer_blocks[0].attn.to_out.weight
    before = pipe.reference_weights
    weight.data.mul_(2)
    kept = weight.clone()
    pipe.residency._tight = True
    assert pipe.reference_weights != before
    pipe.residency.release(pipe.transformer)
    assert torch.equal(weight, kept)
    pipe.to(torch.bfloat16)
    assert pipe.residency._bytes[pipe.transformer] == 0
    assert "transformer" in pipe.formats.anonymous


def test_limits_elsewhere_are_refused(monkeypatch: pytest.MonkeyPatch, tiny_folder: Path) -> None:
    monkeypatch.setattr("limner.memory.residency.can_release", lambda: False)
    with pytest.raises(InvalidRequest, match="memory_limit: needs Linux"):
        Pipeline.from_pretrained(tiny_folder, memory_limit="1TiB")
    monkeypatch.setattr("limner.pipeline.load.check_device", lambda device: torch.device("cuda"))
    with pytest.raises(InvalidRequest, match="memory_limit: is for the CPU"):
        Pipeline.from_pretrained(tiny_folder, memory_limit="1TiB", device="cuda")
