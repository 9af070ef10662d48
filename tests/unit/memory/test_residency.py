"""Weights that leave by turns under a limit, with the same pictures bit for bit."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tests.support.native import has_tiles, without_tiles
from tests.support.tiny import generators, picture

from limner import CapacityError, InvalidRequest, Pipeline
from limner.memory import residency as residency_module
from limner.memory.pages import can_release, resident
from limner.memory.residency import Residency
from limner.model.int8 import Int8Linear, has_int8_products
from limner.pipeline.admission import Admission
from limner.weights.digest import WeightDigests

GIB = 2**30
needs_release = pytest.mark.skipif(not can_release(), reason="the system cannot drop pages of mapped files")


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
        found = resident()  # counted once: the system adds pages late, and a few would be missing
        if self.room is not None:
            own, sizes = self._bytes[network], [self._bytes[layer] for layer in self._networks[network]]
            if self.room == "layers" and sizes:
                own += 2 * max(sizes) + (sizes[0] if len(sizes) > 3 else 0) - sum(sizes)
            self.limit, self._libraries = growth + self._packed_later(network) + own, -found[1]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("limner.memory.residency.resident", lambda: found)
            super()._enter(network, growth)

    def release(self, network: torch.nn.Module) -> None:
        if network in self._networks:  # not a table
            self.left.add(type(network).__name__)
        super().release(network)

    def _after_layer(self, layer: torch.nn.Module, *_: object) -> None:
        if self._resident is not None and layer not in self._resident:
            self.left.add(type(layer).__name__)
        super()._after_layer(layer)


@needs_release
@pytest.mark.parametrize(
    ("quantize", "quantize_text", "copies"),
    [(None, False, False), ("int8", False, False), ("int8", True, False), ("int8", False, True), ("int8", True, True)],
)
def test_a_limit_changes_no_bit(
    quantize: str | None,
    quantize_text: bool,
    copies: bool,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Networks by turns, and layers by turns: the picture is that of the pipeline without a limit.

    `copies`: int8 products read packed copies, as on CPUs without tiles.
    """
    from limner.weights.convert import convert

    if copies:
        without_tiles(monkeypatch)
    folder = tiny_folder
    if quantize:
        convert(tiny_folder, folder := tmp_path / "int8", to="int8", quantize_text=quantize_text)
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
            layers = {"Qwen3Layer", "DoubleBlock", "SingleBlock"}
            assert residency.left - networks == (
                layers if room == "layers" else {"DoubleBlock", "SingleBlock"} if packs else set()
            )
        assert torch.equal(call(pipe), expected), room


def packed(network: torch.nn.Module) -> list[int]:
    return [m.packed_bytes for m in network.modules() if isinstance(m, Int8Linear)]


@needs_release
def test_packed_copies_of_a_text_encoder(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They stay where all networks have room. Else they do not outlast a layer's run, while the transformer's do."""
    without_tiles(monkeypatch)
    how = {"quantize": "int8", "quantize_text": True}
    free = Pipeline.from_pretrained(tiny_folder, **how)
    if not free.formats.packed:
        pytest.skip("this CPU has no int8 dot products")
    expected = call(free)
    assert all(packed(free.text_encoder))
    monkeypatch.setattr("limner.pipeline.load.Residency", Watched)
    monkeypatch.setattr(Admission, "check_limit", lambda own, workload: None)
    for room in (None, "parts", "layers"):
        pipe, most = Pipeline.from_pretrained(tiny_folder, **how, memory_limit="1TiB"), []
        residency, text = pipe.residency, pipe.text_encoder
        assert isinstance(residency, Watched)
        residency.room = room
        one = sum(m.weight.nbytes for m in text.network.layers[0].modules() if isinstance(m, Int8Linear))
        assert residency._packed_later(text) == one
        for layer in text.network.layers:
            layer.register_forward_pre_hook(lambda *_, text=text, most=most: most.append(sum(packed(text))))
        assert torch.equal(call(pipe), expected)
        assert most == ([0, one, 2 * one] if room is None else [0, 0, 0])
        assert all(packed(text)) if room is None else not any(packed(text))
        assert all(packed(pipe.transformer))


@needs_release
def test_packed_copies_make_room_for_another_network(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that needs more than the one before: copies of the text encoder leave before the transformer is refused."""
    without_tiles(monkeypatch)
    pipe = Pipeline.from_pretrained(tiny_folder, quantize="int8", quantize_text=True, memory_limit="1TiB")
    if not pipe.formats.packed:
        pytest.skip("this CPU has no int8 dot products")
    expected = call(pipe)
    residency = pipe.residency
    assert residency is not None
    assert all(packed(pipe.text_encoder))
    residency.limit = 1
    with pytest.raises(CapacityError), residency.working(pipe.transformer, growth=0):
        pass
    assert not any(packed(pipe.text_encoder))
    residency.limit = 1 << 40
    assert torch.equal(call(pipe), expected)


@needs_release
@pytest.mark.parametrize("int8", [False, pytest.param(True, marks=has_tiles)])
def test_layers_that_ran_leave(int8: bool, tmp_path: Path) -> None:
    """Six layers of 16 MiB with room for four: the first two stay, of the others no more than two are there at once.

    int8 products that read weights as they are stored make no copies.
    """
    width = 4096 if int8 else 2048
    weights = [torch.randint(-127, 127, (width, width), dtype=torch.int8) if int8 else torch.randn(width, width)] * 6
    save_file({f"{i}.weight": weight + i for i, weight in enumerate(weights)}, tmp_path / "x.safetensors")
    with torch.device("meta"):
        kind = Int8Linear if int8 else partial(torch.nn.Linear, bias=False)
        network = torch.nn.Sequential(*(kind(width, width) for _ in range(6)))
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        state = {f"{i}.weight": file.get_tensor(f"{i}.weight") for i in range(6)}
    state |= {f"{i}.weight_scale": torch.full((width,), 1e-4) for i in range(6)} if int8 else {}
    network.load_state_dict(state, assign=True)
    size = 16 << 20
    x = torch.ones(1, width)
    with torch.no_grad():
        expected = network(x)
    residency = Residency(1 << 40)
    residency.adopt(network, list(network))
    residency.release(network)
    base = resident()[0] - resident()[1]
    residency._libraries, residency.limit = 0, resident()[1] + 4 * size + size // 2
    seen = []
    with torch.no_grad(), residency.working(network, growth=0):
        for layer in residency.visit(network):
            x = layer(x)
            seen.append(round((resident()[0] - resident()[1] - base) / size))
    assert torch.equal(x, expected)
    assert seen == [1, 2, 3, 3, 3, 3]
    assert not any(packed(network))
    assert residency._resident is None


@needs_release
def test_weights_that_are_looked_at_beside_packed_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is room for all weights, but not beside the copies of a network that packs: every layer and digest keep to it.

    A table of which a working network reads a few rows is read as a whole by a digest.
    """
    without_tiles(monkeypatch)
    if not has_int8_products():
        pytest.skip("this CPU has no int8 dot products")
    monkeypatch.setattr(residency_module, "_SPARE", 1 << 20)
    size = 4 << 20
    one = torch.randint(-127, 127, (2048, 2048), dtype=torch.int8)
    save_file({f"{i}.weight": one + i for i in range(12)} | {"table": one.clone()}, tmp_path / "x.safetensors")
    scale = torch.full((2048,), 1e-3)
    with torch.device("meta"):
        layers = [Int8Linear(2048, 2048) for _ in range(12)]
        table = torch.nn.Embedding(1, 1)
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        for i, layer in enumerate(layers):
            layer.weight, layer.weight_scale = file.get_tensor(f"{i}.weight"), scale
        table.weight = torch.nn.Parameter(file.get_tensor("table"), requires_grad=False)
    packing, other = torch.nn.Sequential(*layers[:6]), torch.nn.Sequential(*layers[6:], table)
    x = torch.ones(1, 2048)
    layers[0](x)  # what the first product of a process takes
    layers[0].unpack()
    residency = Residency(1 << 40)
    residency.adopt(packing, layers[:6])
    residency.adopt(other, layers[6:], tables=[table], hooks=True)
    digests, found, seen = WeightDigests(after=residency.after_read), [], []
    for network in (packing, other):
        residency.release(network)
    base = resident()[0] - resident()[1]
    residency._libraries = base

    def look() -> None:
        found.append([digests.of(network) for network in (packing, other)])
        seen.append(resident()[0])

    def mapped() -> int:
        return round((resident()[0] - resident()[1] - base) / size)

    residency.limit = resident()[1] + base + 25 * size // 2  # not the table too
    residency.adopt(packing, layers[:6])
    look()
    assert seen.pop() < residency.limit
    residency.limit = resident()[1] + base + 16 * size
    residency.adopt(packing, layers[:6])
    assert mapped() == 0
    digests = WeightDigests(after=residency.after_read)
    look()
    assert mapped() == 13
    with residency.working(other, growth=5 * size // 2):  # room for all layers, not for the table too
        assert mapped() == 6  # its layers
    look()
    for _ in range(2):
        with residency.working(packing, growth=0):
            for layer in residency.visit(packing):
                x = layer(x)
                seen.append(resident()[0])
        look()
    assert packed(packing) == [size] * 6
    assert [round(max(0, now - residency.limit) / size, 1) for now in seen] == [0] * len(seen)
    assert all(one == found[0] for one in found)


@needs_release
def test_a_limit_that_is_too_small_is_refused(tiny_folder: Path, pipe: Pipeline) -> None:
    with pytest.raises(CapacityError, match=re.escape("memory_limit: 0.10 GiB are too little; the least is 0.3")):
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
    monkeypatch.setattr("limner.pipeline.load.check_device", lambda device: torch.device("mps"))
    with pytest.raises(InvalidRequest, match="memory_limit: is for the CPU"):
        Pipeline.from_pretrained(tiny_folder, memory_limit="1TiB", device="mps")


def test_without_a_limit_nothing_happens(pipe: Pipeline) -> None:
    """No network is adopted, nothing is refused and no page leaves; a limited pipeline keeps its own staging."""
    unlimited = Residency.unlimited()
    assert pipe.residency is None
    unlimited.adopt(pipe.transformer)
    assert unlimited.mapped(pipe.transformer)
    with unlimited.working(pipe.transformer, growth=1 << 60):
        assert list(unlimited.visit(pipe.transformer.transformer_blocks)) == list(pipe.transformer.transformer_blocks)


@needs_release
def test_a_pipeline_without_a_limit_leaves_that_of_another(tiny_folder: Path) -> None:
    """They share the transformer."""
    limited = Pipeline.from_pretrained(tiny_folder, memory_limit="1TiB")
    parts = {"autoencoder": limited.autoencoder, "text_encoder": limited.text_encoder}
    Pipeline(transformer=limited.transformer, **parts).to("cpu")
    assert limited.transformer.execution.staging is limited.residency
