"""Weights by turns on a GPU that is not there: plans hold for models of true size, and no stream overtakes another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.support.pretend import Pretended, PretendedDevice, pretended_device, real

from limner import CapacityError
from limner.config import KLEIN_9B, MODELS, QWEN3_8B
from limner.kinds import ISOLATED
from limner.memory import Formats, MemoryPlan, Workload, cheapest, make_plan
from limner.memory.plan import DEVICE_BASE
from limner.memory.staged import Staged
from limner.model.autoencoder import Autoencoder
from limner.model.text_encoder import TextEncoder, TokenizedPrompt
from limner.pipeline.adapters import Adapters
from limner.pipeline.networks import Networks
from limner.references import References
from limner.tokens import image_ids, pack, reference_ids, text_ids
from limner.weights.digest import WeightDigests
from limner.weights.networks import empty_autoencoder, empty_text_network, empty_transformer

GIB = 2**30
FOUR = Workload(size=(1024, 1024), references=((1024, 1024),) * 4)
LIMIT = 24 * GIB


def klein_9b(device: PretendedDevice, formats: Formats, *, limit: int) -> Networks:
    """The networks of klein-9b, without values, under a limit."""
    networks: list[Any] = [
        empty_transformer(KLEIN_9B, int8=formats.quantize == "int8", where="test"),
        Autoencoder(empty_autoencoder({}, where="test")),
        TextEncoder(empty_text_network(QWEN3_8B, used=27, depth=36, where="test"), None, out_layers=(9, 18, 27)),
    ]
    for network in networks:
        device.on_host(network.eval(), torch.bfloat16)
    transformer, autoencoder, text_encoder = networks
    digests, staged = WeightDigests(), Staged(limit, device.device)
    transformer.use(staging=staged)
    made = Networks(
        transformer=transformer,
        autoencoder=autoencoder,
        text_encoder=text_encoder,
        adapters=Adapters.of(transformer, digests),
        digests=digests,
        residency=staged,
        kv_cache_dtype=formats.kv,
        kind=ISOLATED,
    )
    made.adopt()
    return made


@torch.no_grad()
def peaks(networks: Networks, workload: Workload, device: PretendedDevice) -> dict[str, int]:
    """The peak bytes of each phase of a call, and on the way that nothing waits where steps are drawn."""
    found: dict[str, int] = {}

    def phase(name: str, call: Callable[[], Any], *, cached: int = 0) -> Any:
        for network in (networks.transformer, networks.autoencoder, networks.text_encoder):
            networks.residency.release(network)  # others stay if there is room, which a plan does not count on
        device.clear()
        with networks.working(name, workload, cached=cached):
            out = call()
        found[name] = device.peak
        if name in ("prefill", "denoise"):
            assert not device.waits
        return out

    grid, transformer = (64, 64), networks.transformer
    prompt = TokenizedPrompt(
        ids=torch.zeros(512, dtype=torch.int64), mask=torch.ones(512, dtype=torch.int64), num_tokens=512, cut=""
    )
    txt = phase("encode text", lambda: networks.text_encoder([prompt]))
    pixels = torch.zeros(1, 3, 1024, 1024)
    tokens = phase(
        "encode references",
        lambda: torch.cat([pack(networks.autoencoder.encode(pixels)) for _ in workload.references], dim=1),
    )
    ids = reference_ids([grid] * len(workload.references))
    kv = phase("prefill", lambda: transformer.prefill(tokens, ids), cached=networks.kv_bytes(workload.num_ref))
    if networks.kv_cache_dtype is not None:
        kv = References.make(kv, weights="", kernel="", quantization=networks.kv_cache_dtype, reports=())
    tokens = None
    noise = torch.zeros(1, 4096, KLEIN_9B.in_channels, dtype=torch.bfloat16, device="cuda")
    places: dict[str, Any] = {"img_ids": image_ids(grid), "txt_ids": text_ids(512)}
    places["rope"] = transformer.rope(torch.cat([places["txt_ids"], places["img_ids"]]))
    sigma = torch.ones((), device="cuda")

    phase("denoise", lambda: transformer(noise, txt, sigma, references=kv, **places))
    latents = torch.zeros(1, 32, 128, 128, dtype=torch.bfloat16, device="cuda")
    phase("decode", lambda: networks.autoencoder.decode(latents).mul(0.5).clamp(0, 1))
    return found


def plan_of(how: str) -> MemoryPlan:
    formats = Formats(packed=False)
    if how == "cheapest":
        return cheapest(MODELS["klein-9b"], FOUR, formats=formats, limit=LIMIT, device="cuda")
    return make_plan(MODELS["klein-9b"], FOUR, formats=formats, limit=LIMIT, device="cuda", staging="layers")


@pytest.mark.parametrize("how", ["cheapest", "layers"])
def test_a_plan_of_klein_9b_holds_in_24_gib(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(how)
    assert plan.peak <= LIMIT
    with pretended_device(monkeypatch, with_values=False) as device:
        device.limit = LIMIT - DEVICE_BASE
        networks = klein_9b(device, plan.formats, limit=LIMIT)
        measured = peaks(networks, FOUR, device)
    planned = {phase.name: phase.total - DEVICE_BASE for phase in plan.phases}
    assert measured.keys() == planned.keys()
    print({name: (round(measured[name] / GIB, 2), round(planned[name] / GIB, 2)) for name in planned})
    for name, nbytes in measured.items():
        assert nbytes <= LIMIT - DEVICE_BASE
        assert nbytes <= 1.02 * planned[name], name


def test_layers_pass_through_two_buffers(pretended: PretendedDevice) -> None:
    """Any number of layers and of buffers' worth of room gives the same, and each layer runs with its own weights."""

    class Chain(torch.nn.Module):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.first = torch.nn.Linear(8, 8)
            self.blocks = torch.nn.ModuleList([torch.nn.Linear(8, 8, bias=i % 2 == 0) for i in range(number)])

    for number in (1, 2, 3, 5, 8):
        chain = Chain(number).requires_grad_(False)
        x = torch.randn(4, 8)
        want = x
        for block in chain.blocks:
            want = torch.tanh(block(want))
        for block in chain.blocks:
            want = torch.tanh(block(want))
        staged = Staged(1 << 40, pretended.device)
        staged.adopt(chain, list(chain.blocks))
        assert chain.first.weight.device.type == "cuda"
        assert chain.blocks[0].weight.is_pinned()
        known = staged._staged[chain]
        for room in sorted({known.nbytes, known.least, *range(known.least, known.nbytes, 200)}):
            staged.release(chain)
            there = x.to("cuda")
            staged.limit = DEVICE_BASE + staged._others() + room
            pretended.clear()
            with staged.working(chain, growth=0):
                y = there
                for _ in range(2):
                    for block in staged.visit(chain.blocks):
                        y = torch.tanh(block(y))
            torch.testing.assert_close(real(y), want)
            assert (sum(pretended.waits.values()), sum(pretended.uploads.values())) == (0, 0)
            assert known.on_device <= room
    staged.limit = DEVICE_BASE + staged._others() + known.least - 1
    staged.release(chain)
    with (
        pytest.raises(CapacityError, match="memory_limit: .* are too little for Chain"),
        staged.working(chain, growth=0),
    ):
        pass


def test_shadows_leave_networks_as_they_are(pretended: PretendedDevice) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8)).eval()

    net = Net().requires_grad_(False)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    inside, staged = net.network, Staged(1 << 40, pretended.device)
    staged.adopt(net)
    with staged.working(net, growth=0):
        assert isinstance(net.network[0].weight, Pretended)
        assert next(net.modules()) is net
        assert all(not isinstance(p, Pretended) for p in net.parameters())  # what digests and LoRAs find
        with staged.working(net, growth=0):  # a call within a call
            pass
    assert net.network is inside
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name])
    torch.cuda.synchronize()
    net.network[0].weight.add_(1)  # the copy on the device is old now
    with staged.working(net, growth=0):
        assert torch.equal(real(net.network[0].weight), inside[0].weight)
