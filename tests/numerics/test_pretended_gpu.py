"""Whole calls on a GPU that is not there: the CPU's pictures, no mixed devices, and nothing in a step that waits.

What is not shown here: CUDA's own kernels and their rounding, and time.
"""

from __future__ import annotations

import functools
import math
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.lora_files import make_pairs, original
from tests.support.pretend import WRITES, PretendedDevice, pretended_device, real
from tests.support.tiny import generators, picture, relative_error

from limner import InvalidRequest, Pipeline, ReferenceStore
from limner.engine import EditRequest, Engine, Failed, Finished
from limner.images import prepare_reference
from limner.memory import residency
from limner.memory.plan import DEVICE_BASE
from limner.memory.staged import Staged
from limner.model import attention, transformer
from limner.model.gpu import attention_triton, choice, products
from limner.model.graphs import StepGraphs
from limner.model.kv import LayerKV

PICTURES = [picture(96, 64), picture(64, 80, seed=1)]
FLOAT32 = 1e-5
"""Other kernels of attention, and sums in another order: 3e-7 was seen."""


class Steps:
    """What a pretended device does between the beginning of the first step and the end of the last one."""

    def __init__(self, device: PretendedDevice) -> None:
        self._device, self.waits, self.uploads = device, Counter[str](), Counter[str]()
        self.launches = 0

    def __call__(self, part: str, done: int, of: int) -> None:
        if part == "step" and done == 0:
            self._device.clear()
        elif part == "step" and done == of:
            # those of the threads that write to disk go on beside the steps
            waits = {site: number for site, number in self._device.waits.items() if not site.endswith(WRITES)}
            self.waits, self.uploads = Counter(waits), Counter(self._device.uploads)
            self.launches = sum(self._device.launches.values())


def draw(pipe: Pipeline, **how: Any) -> Any:
    settings = {"prompt": "a dog", "height": 64, "width": 64, "image": PICTURES, "output_type": "pt"}
    return pipe(**{**settings, "generator": generators(1)[0], **how})


def draw_there(pipe: Pipeline, device: PretendedDevice, **how: Any) -> Any:
    """A call whose steps neither wait for the device nor send it anything."""
    steps = Steps(device)
    out = draw(pipe, progress=steps, **how)
    assert steps.launches > 0
    assert (steps.waits, steps.uploads) == (Counter(), Counter())
    return out


@pytest.fixture(scope="module")
def on_cpu(tiny_folder: Path) -> torch.Tensor:
    found: torch.Tensor = draw(Pipeline.from_pretrained(tiny_folder)).images
    return found


@pytest.mark.parametrize("tier", ["device", "memory", "disk"])
def test_an_edit(
    tier: str, on_cpu: torch.Tensor, pretended: PretendedDevice, tiny_folder: Path, tmp_path: Path
) -> None:
    tiers: dict[str, Any] = {"memory": {"device_bytes": 0}, "disk": {"device_bytes": 0, "memory_bytes": 0}}
    store = ReferenceStore(**tiers.get(tier, {}), **({"disk_path": tmp_path} if tier == "disk" else {}))
    pipe = Pipeline.from_pretrained(tiny_folder, device="cuda", store=store)
    new = draw_there(pipe, pretended)
    if tier == "disk":
        store.put(pipe.prefill(PICTURES))  # also where reading it takes longer than making it
        store.flush()
    kept = draw_there(pipe, pretended)
    assert (new.reference_cache, kept.reference_cache) == ("miss", "disk" if tier == "disk" else "memory")
    assert relative_error(real(kept.images), on_cpu) < FLOAT32
    assert torch.equal(real(kept.images), real(new.images))
    assert all(seconds > 0 for seconds in kept.timings.steps)
    held = store.find(kept.reference_key, device="cuda")
    assert held is not None
    assert held[0].device.type == ("cuda" if tier == "device" else "cpu")


NARROW = [{"quantize": "int8"}, {"quantize_text": True}, {"kv_cache_dtype": "int8"}, {"kv_cache_dtype": "fp8"}]


@pytest.mark.parametrize("how", NARROW, ids=str)
def test_narrow_formats(how: dict[str, Any], pretended: PretendedDevice, tiny_folder: Path) -> None:
    """int8 weights are multiplied in other ways than on a CPU: 2 % was seen."""
    here = Pipeline.from_pretrained(tiny_folder, **how)
    there = Pipeline.from_pretrained(tiny_folder, device="cuda", **how)
    error = relative_error(real(draw_there(there, pretended).images), draw(here).images)
    assert error < (FLOAT32 if "kv_cache_dtype" in how else 5e-2)


def test_bfloat16_by_the_flash_kernel(on_cpu: torch.Tensor, pretended: PretendedDevice, tiny_folder: Path) -> None:
    there = Pipeline.from_pretrained(tiny_folder, device="cuda", dtype=torch.bfloat16)
    there.transformer.kernel = "flash"  # torch says which kernels a card takes, and without CUDA none
    out = draw_there(there, pretended)
    assert there.arithmetic.startswith("cuda/flash/bfloat16")
    assert relative_error(real(out.images), on_cpu) < 0.2  # random weights; as diffusers in bfloat16 on a CPU


@pytest.mark.parametrize("folder", ["standard_folder", "base_folder"])
def test_joint_references_and_guidance(
    folder: str, request: pytest.FixtureRequest, pretended: PretendedDevice, tmp_path: Path
) -> None:
    model = request.getfixturevalue(folder)
    here, there = Pipeline.from_pretrained(model), Pipeline.from_pretrained(model, device="cuda")
    how: dict[str, Any] = {"num_inference_steps": 2, "reuse": "step0", "reference_weights": [1, 0.5]}
    error = relative_error(real(draw_there(there, pretended, **how).images), draw(here, **how).images)
    assert error < FLOAT32


def test_masks_and_reference_guidance(pretended: PretendedDevice, tiny_folder: Path, pipe: Pipeline) -> None:
    mask = picture(96, 64).convert("L").point(lambda value: 255 * (value > 128))
    how: dict[str, Any] = {
        "canvas": PICTURES[0],
        "mask_image": mask,
        "strength": 0.7,
        "num_inference_steps": 2,
        "height": None,
        "width": None,
    }
    there = Pipeline.from_pretrained(tiny_folder, device="cuda")
    assert relative_error(real(draw_there(there, pretended, **how).images), draw(pipe, **how).images) < 1e-2  # 8 bits
    guided = {"reference_guidance": 1.5, "num_inference_steps": 2}
    assert relative_error(real(draw_there(there, pretended, **guided).images), draw(pipe, **guided).images) < FLOAT32


def test_loras(pretended: PretendedDevice, tiny_folder: Path, pipe: Pipeline) -> None:
    there = Pipeline.from_pretrained(tiny_folder, device="cuda")
    plain = real(draw_there(there, pretended).images)
    pictures = []
    for one in (pipe, there):
        one.load_lora_weights(original(make_pairs()))
        beside = draw(one).images
        one.fuse_lora()
        pictures += [real(beside), real(draw(one).images)]
    for here, elsewhere in zip(pictures[:2], pictures[2:], strict=True):
        assert relative_error(elsewhere, here) < FLOAT32
    assert relative_error(plain, pictures[2]) > 100 * FLOAT32


def test_steps_as_graphs(pretended: PretendedDevice, tiny_folder: Path) -> None:
    """Replayed: other prompts, seeds, levels, references and LoRAs give what they give without; one launch a step."""
    there = Pipeline.from_pretrained(tiny_folder, device="cuda")
    calls: list[dict[str, Any]] = [
        {},
        {"prompt": "a cat", "generator": generators(2)[0]},
        {"image": PICTURES[::-1], "num_inference_steps": 2},
        {"image": None},
        {"reference_weights": [1, 0.5], "num_images_per_prompt": 2, "generator": generators(3, 4)},
    ]

    def images(**how: Any) -> torch.Tensor:
        found: torch.Tensor = real(draw(there, **{"generator": generators(1)[0], **how}).images)
        return found

    def fresh(how: dict[str, Any]) -> dict[str, Any]:
        made = dict(how)
        if "generator" in made:
            made["generator"] = generators(3, 4) if isinstance(made["generator"], list) else generators(2)[0]
        return made

    for after in ("nothing", "a LoRA", "a fused LoRA"):
        if after == "a LoRA":
            there.load_lora_weights(original(make_pairs()))
        elif after == "a fused LoRA":
            there.fuse_lora()
        some = calls if after == "nothing" else calls[:1]
        there.use_cuda_graphs(False)
        want = [images(**fresh(how)) for how in some]
        if after == "nothing":
            graphs = StepGraphs()
        there.transformer.use(graphs=graphs)
        for _ in range(2):
            for how, image in zip(some, want, strict=True):
                assert torch.equal(images(**fresh(how)), image), how
    steps = Steps(pretended)
    draw(there, progress=steps)
    assert steps.launches < 4 * 20
    assert (steps.waits, steps.uploads) == (Counter(), Counter())


@pytest.mark.parametrize("graphs", [False, True], ids=["launched", "replayed"])
def test_a_callback_is_one_step_behind_the_device(
    graphs: bool, pretended: PretendedDevice, tiny_folder: Path, on_cpu: torch.Tensor
) -> None:
    """Before each of its calls but the first, the host waits for the step before it."""
    there, steps, queued = Pipeline.from_pretrained(tiny_folder, device="cuda"), Steps(pretended), list[int]()
    there.transformer.use(graphs=StepGraphs() if graphs else None)
    ends: list[tuple[int, int]] = []

    def look(*_: Any) -> dict[str, Any]:
        ends.append(pretended.streams.current.now)  # the place in the stream of what was queued up to here
        queued.append(sum(not pretended.streams.is_done(dict([end])) for end in ends))
        return {}

    for _ in range(2):  # captured, replayed
        out = draw(there, progress=steps, callback_on_step_end=look)
        assert [(what.split()[0], number) for what, number in steps.waits.items()] == [("event.synchronize", 3)]
    assert queued == [1] * 8
    assert relative_error(real(out.images), on_cpu) < FLOAT32


def attention_as_tritons(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    references: Any = None,
    ref_bias: Any = None,
    own_bias: Any = None,
) -> torch.Tensor:
    """The formula of `attention_triton.attend`, with the biases that it is given."""
    held = LayerKV(k[:, :0], v[:, :0]) if references is None else references.dense(q.dtype)
    keys, values = (
        torch.cat([kept.expand(len(q), -1, -1, -1), own], dim=1) for kept, own in zip(held, (k, v), strict=True)
    )
    biases = [
        torch.zeros(of.shape[1], device=q.device) if bias is None else bias
        for of, bias in ((held.k, ref_bias), (k, own_bias))
    ]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) / q.shape[-1] ** 0.5 + torch.cat(biases) * math.log(2)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values)


def test_a_graph_keeps_the_weights_of_its_keys(
    monkeypatch: pytest.MonkeyPatch, pretended: PretendedDevice, tiny_folder: Path
) -> None:
    """Their biases are made once and kept, some of them: a graph reads none that others may push out."""
    monkeypatch.setattr(attention_triton, "takes", lambda *_: True)
    monkeypatch.setattr(attention_triton, "attend", attention_as_tritons)
    there = Pipeline.from_pretrained(tiny_folder, device="cuda")
    there.transformer.kernel = "triton"
    weighted: dict[str, Any] = {"reference_weights": [1, 0.5], "num_inference_steps": 2}
    want = real(draw(there, **weighted).images)
    assert relative_error(real(draw(there, num_inference_steps=2).images), want) > 100 * FLOAT32
    there.use_cuda_graphs()
    assert torch.equal(real(draw(there, **weighted).images), want)
    for number in range(16):  # as a call with other weights in each of its steps
        attention_triton.key_bias(((1, 1 + number / 16),), pretended.device)
    pretended.clear()
    assert torch.equal(real(draw(there, **weighted).images), want)
    assert pretended.launches["graph"] == 2


def test_other_threads_wait_while_a_graph_is_captured(pretended: PretendedDevice, tiny_folder: Path) -> None:
    """As the thread that writes references to disk: neither it nor the capture fails, and the graph has none of its work."""
    there = Pipeline.from_pretrained(tiny_folder, device="cuda")
    want, heard = real(draw(there).images), list[Any]()
    there.use_cuda_graphs()

    def copy_down() -> None:
        try:
            heard.append(torch.ones(3, device="cuda").add(1).cpu().tolist())
        except RuntimeError as error:
            heard.append(error)

    def meanwhile(*_: Any) -> None:
        if torch.cuda.is_current_stream_capturing():
            thread = threading.Thread(target=copy_down)
            thread.start()
            thread.join()

    hook = there.transformer.x_embedder.register_forward_hook(meanwhile)
    assert torch.equal(real(draw(there).images), want)
    hook.remove()
    assert heard == [[2.0, 2.0, 2.0]]


@pytest.mark.parametrize("room", ["parts", "layers"])
def test_weights_by_turns(room: str, on_cpu: torch.Tensor, pretended: PretendedDevice, tiny_folder: Path) -> None:
    """One network at a time, or layers through two buffers; LoRAs beside and in the weights."""
    there = Pipeline.from_pretrained(tiny_folder, device="cuda", memory_limit="2GiB")
    staged = there.residency
    assert isinstance(staged, Staged)
    assert there.device.type == "cuda"
    passing = dict[str, int]()
    before = {name: p.data_ptr() for name, p in there.text_encoder.named_parameters()}

    def limited(network: Any, growth: int) -> None:
        known = staged._staged[network]
        room_for = known.nbytes if room == "parts" else known.least
        staged.limit = DEVICE_BASE + staged._others() + growth + room_for

    staged.free_bytes = lambda device: 1 << 40  # type: ignore[method-assign]  # the limit changes in each phase
    enter = staged._bring

    def bring(known: Any, growth: int) -> None:
        limited(known.module, growth)
        enter(known, growth)
        passing[type(known.module).__name__] = len(known.passing)

    staged._bring = bring  # type: ignore[method-assign]
    new = draw_there(there, pretended)
    kept = draw_there(there, pretended)
    assert kept.reference_cache == "memory"
    assert relative_error(real(new.images), on_cpu) < FLOAT32
    assert torch.equal(real(kept.images), real(new.images))
    on_device = [type(known.module).__name__ for known in staged._staged.values() if known.on_device]
    assert on_device == ["Autoencoder"]  # the last one that worked
    assert before == {name: p.data_ptr() for name, p in there.text_encoder.named_parameters()}
    assert (passing["Transformer"] > 0, passing["Autoencoder"]) == (room == "layers", 0)
    assert not any(known.passing for known in staged._staged.values())  # they have left
    assert not pretended.waits.keys() & {"copy"}
    there.load_lora_weights(original(make_pairs()))
    beside = real(draw_there(there, pretended).images)
    there.fuse_lora()
    fused = real(draw_there(there, pretended).images)
    assert relative_error(fused, beside) < FLOAT32
    assert relative_error(beside, on_cpu) > 100 * FLOAT32
    with pytest.raises(InvalidRequest, match="to: weights with a memory_limit stay where they are"):
        there.to("cpu")


@pytest.mark.parametrize("how", [{"quantize": "int8"}, {"quantize_text": True}], ids=["transformer", "text"])
@pytest.mark.parametrize("limit", [None, "2GiB"])
def test_kernels_are_tried_when_a_model_is_loaded(
    limit: str | None,
    how: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    pretended: PretendedDevice,
    tiny_folder: Path,
) -> None:
    """Never in a step, whose time and memory they would take: products of int8 weights, attention to narrow K/V."""
    tried, rank = list[str](), choice.rank

    def watched(what: str, *rest: Any, **how: Any) -> list[str]:
        tried.append(what)
        return rank(what, *rest, **how)

    for module in (choice, products):
        monkeypatch.setattr(module, "rank", watched)
    monkeypatch.setattr(products, "_right", {})
    reads_narrow = functools.cache(attention.reads_narrow.__wrapped__)
    for user in (attention, transformer):
        monkeypatch.setattr(user, "reads_narrow", reads_narrow)
    monkeypatch.setattr(attention_triton, "takes", lambda *_: True)
    monkeypatch.setattr(attention_triton, "attend", attention_as_tritons)
    there = Pipeline.from_pretrained(tiny_folder, device="cuda", kv_cache_dtype="int8", memory_limit=limit, **how)
    loaded = tried.copy()
    assert {what.partition(" on ")[0] for what in loaded} == {
        "int8 weights",
        "attention to int8 references",
        "attention to fp8 references",
    }
    draw_there(there, pretended)
    assert tried == loaded


def test_arithmetic_under_a_limit_is_that_of_the_device(pretended: PretendedDevice, tiny_folder: Path) -> None:
    """Weights in host memory run on the device: keys of references name what runs there."""
    how: dict[str, Any] = {"device": "cuda", "quantize": "int8"}
    free, limited = (Pipeline.from_pretrained(tiny_folder, **how, memory_limit=x) for x in (None, "2GiB"))
    assert limited.arithmetic == free.arithmetic
    assert limited.arithmetic.startswith("cuda/")
    assert torch.equal(real(draw(limited).images), real(draw(free).images))


def test_an_int8_text_encoder_by_turns(pretended: PretendedDevice, tiny_folder: Path) -> None:
    """Its int8 matrices and their scales come to the device layer by layer, and give the same bits as there all the time."""
    whole = Pipeline.from_pretrained(tiny_folder, device="cuda", quantize_text=True)
    turns = Pipeline.from_pretrained(tiny_folder, device="cuda", quantize_text=True, memory_limit="2GiB")
    assert turns.text_encoder.quantization == "int8"
    assert turns.text_encoder.device.type == "cpu"
    found, expected = (real(draw_there(pipe, pretended).images) for pipe in (turns, whole))
    assert torch.equal(found, expected)


def test_the_engine_draws_a_batch(pretended: PretendedDevice, tiny_folder: Path, pipe: Pipeline) -> None:
    there, heard, ended = Pipeline.from_pretrained(tiny_folder, device="cuda"), [], threading.Event()

    def hear(event: Any) -> None:
        if isinstance(event, (Finished, Failed)):
            heard.append(event)
            if len(heard) == 3:
                ended.set()

    engine = Engine(there, max_batch=4)
    prepared = (prepare_reference(PICTURES[0], policy=there.reference_policy),)
    for seed in range(3):
        request = EditRequest(prompt="a dog", seeds=(seed,), references=prepared, width=64, height=64)
        engine.submit(request, id=str(seed), listener=hear)
    assert ended.wait(60)
    engine.close()
    assert [type(event).__name__ for event in heard] == ["Finished"] * 3, heard


def test_the_engine_halves_a_batch_for_which_memory_is_too_little(
    pretended: PretendedDevice, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what failed holds nothing: each try begins with the memory that was in use before."""
    there = Pipeline.from_pretrained(tiny_folder, device="cuda")
    monkeypatch.setattr(residency, "free_bytes", lambda device: 1 << 40)  # so that no call is refused before
    peaks = []
    for number in (2, 4):
        pretended.clear()
        draw(there, image=None, num_images_per_prompt=number, generator=generators(*range(number)))
        peaks.append(pretended.peak)
    pretended.limit, heard, ended, begun = sum(peaks) // 2, [], threading.Event(), []

    def hear(event: Any) -> None:
        if isinstance(event, (Finished, Failed)):
            heard.append(event)
            if len(heard) == 4:
                ended.set()

    whole = Pipeline.draw

    def watched(pipe: Pipeline, requests: Any, **how: Any) -> Any:
        begun.append((len(requests), pretended.live))
        return whole(pipe, requests, **how)

    monkeypatch.setattr(Pipeline, "draw", watched)
    engine = Engine(there, max_batch=4)
    with engine._changed:  # so that it finds all of them
        for seed in range(4):
            request = EditRequest(prompt="a dog", seeds=(seed,), width=64, height=64)
            engine.submit(request, id=str(seed), listener=hear)
    assert ended.wait(60)
    engine.close()
    assert [type(event).__name__ for event in heard] == ["Finished"] * 4, heard
    assert [number for number, _ in begun] == [4, 2, 2]
    assert len({live for _, live in begun}) == 1, begun
    assert [event.result.batch for event in heard] == [2] * 4


def test_moved_pipelines_and_previews(on_cpu: torch.Tensor, pretended: PretendedDevice, pipe: Pipeline) -> None:
    moved = pipe.to("cuda")
    assert relative_error(real(draw_there(moved, pretended).images), on_cpu) < FLOAT32
    bundled, seen = Pipeline.from_pretrained(device="cuda"), []

    def look(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(tensors["preview"].device.type)
        return {"rows": [1]} if step == 0 else {}

    out = bundled(
        ["a cat", "a dog"],
        height=64,
        width=64,
        num_inference_steps=2,
        callback_on_step_end=look,
        callback_on_step_end_tensor_inputs=["preview"],
    )
    assert (seen, len(out.images)) == (["cuda"] * 2, 1)


def test_nothing_is_float64_on_mps(monkeypatch: pytest.MonkeyPatch, on_cpu: torch.Tensor, tiny_folder: Path) -> None:
    from limner.model import strips

    with pretended_device(monkeypatch, kind="mps") as device:
        there = Pipeline.from_pretrained(tiny_folder, device="mps")
        assert relative_error(real(draw(there).images), on_cpu) < 1e-4  # positions in float32
        monkeypatch.setattr(strips, "_PIXELS", 1)
        network = there.autoencoder.network
        with torch.no_grad():
            latents = strips.encode(network, torch.rand(1, 3, 64, 64).to(device.device))
            strips.decode(network, latents.chunk(2, dim=1)[0])
        there.load_lora_weights(original(make_pairs()))
        draw(there)
        with pytest.raises(TypeError, match="no float64"):
            torch.zeros(2, device="mps").double()
