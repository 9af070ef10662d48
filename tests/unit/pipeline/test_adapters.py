"""LoRAs in a pipeline: several at once, fused and not, over int8, in the content key."""

from __future__ import annotations

import itertools
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.lora_files import (
    EVERYWHERE,
    ONE,
    PAIRS,
    QKV,
    SHAPES,
    deltas,
    dense,
    diffusers_names,
    kohya,
    kron_tensors,
    make_pairs,
    original,
    peft,
    velocity,
    write,
)
from tests.support.tiny import MAX_TOKENS, TEXT_LAYERS, generators, picture, relative_error
from torch import Tensor

from limner import CheckpointError, InvalidRequest, Pipeline, ReferenceStore
from limner.model.int8 import Int8Linear
from limner.model.lora import Branches, matrix_shapes
from limner.weights import digest
from limner.weights.lora import load_lora

# float32 through 4 steps, summed in another order: seen below 1e-6 (relative); another scale or half gives 1e-2 and more
TOLERANCE = 1e-5


def draw(pipe: Pipeline, **options: Any) -> Any:
    return pipe("a dog", image=picture(64, 64), generator=generators(1)[0], output_type="pt", **options)


@pytest.fixture
def theirs(tiny_folder: Path) -> Any:
    """diffusers' pipeline, to be changed by one test."""
    from diffusers import Flux2KleinKVPipeline

    pytest.importorskip("peft")
    pipe = Flux2KleinKVPipeline.from_pretrained(tiny_folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(pipe: Any, **options: Any) -> Tensor:
    return pipe(
        prompt="a dog",
        image=picture(64, 64),
        generator=generators(1)[0],
        output_type="latent",
        max_sequence_length=MAX_TOKENS,
        num_inference_steps=2,
        **options,
    ).images


def same_picture(pipe: Pipeline, theirs: Any) -> None:
    assert relative_error(pictures(pipe), pictures(theirs, text_encoder_out_layers=TEXT_LAYERS)) <= TOLERANCE


WITHOUT_NORM_OUT = {name: pair for name, pair in PAIRS.items() if "adaLN" not in name}  # diffusers swaps no halves


THEIR_DIALECTS = {
    "diffusers": lambda: diffusers_names(PAIRS),
    "original": lambda: original(WITHOUT_NORM_OUT),
    "PEFT": lambda: peft(WITHOUT_NORM_OUT),
    "kohya": lambda: kohya(EVERYWHERE, alpha=2.5),
    "LoKr": lambda: {k: v for k, v in kron_tensors(rows=4)[0].items() if "adaLN" not in k},
}


@pytest.mark.parametrize("dialect", THEIR_DIALECTS)
def test_same_pictures_as_diffusers(dialect: str, pipe: Pipeline, theirs: Any, tmp_path: Path) -> None:
    file, before = write(tmp_path, THEIR_DIALECTS[dialect]()), pictures(pipe)
    pipe.load_lora_weights(file)
    theirs.load_lora_weights(tmp_path, weight_name=file.name)
    same_picture(pipe, theirs)
    assert relative_error(pictures(pipe), before) > 0.05  # and the LoRA matters


@pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT: that there are several adapters, and that they are merged
def test_several_with_strengths_as_in_diffusers(pipe: Pipeline, theirs: Any, tmp_path: Path) -> None:
    """The same calls of both give the same pictures, and the same names of what is active."""
    header = json.dumps(
        {"transformer.r": 3, "transformer.lora_alpha": 1, "transformer.target_modules": ["to_k", "to_v"]}
    )
    names = {name for name in deltas(PAIRS) if name.endswith(("attn.to_k", "attn.to_v"))}
    small = {
        key: value
        for key, value in diffusers_names(make_pairs(2, rank=3)).items()
        if key.removeprefix("transformer.").rpartition(".lora")[0] in names
    }
    files = [
        write(tmp_path, kohya(EVERYWHERE, alpha=3.0), "a.safetensors"),
        write(tmp_path, small, "b.safetensors", lora_adapter_metadata=header),
    ]
    calls: list[Callable[[Any], Any]] = [
        lambda p: p.load_lora_weights(str(files[0]), adapter_name="a"),
        lambda p: p.load_lora_weights(str(files[1]), "b"),
        lambda p: p.set_adapters(["a", "b"], [0.7, -1.5]),
        lambda p: p.set_adapters(["b", "a"]),
        lambda p: p.set_adapters("a", 0.25),
        lambda p: p.set_adapters(["a", "b"], 0.5),
        lambda p: p.fuse_lora(lora_scale=0.8),
        lambda p: p.unfuse_lora(),
        lambda p: p.fuse_lora(adapter_names=["a", "b"]),
        lambda p: p.unload_lora_weights(),
    ]
    for number, call in enumerate(calls):
        for each in (pipe, theirs):
            call(each)
        if number == 7:  # diffusers leaves `lora_scale` in its strengths
            pipe.set_adapters(["a", "b"], 0.4)
        assert pipe.get_active_adapters() == list(theirs.get_active_adapters()), number
        assert pipe.get_list_adapters() == theirs.get_list_adapters()
        same_picture(pipe, theirs)


def hadamard() -> dict[str, Tensor]:
    """A LoHa of every matrix, and below it nothing that is low-rank."""
    one, two = make_pairs(1, rank=2), make_pairs(2, rank=2)
    return {
        f"{name}.hada_w{i}_{side}": value
        for i, pairs in ((1, one), (2, two))
        for name, (down, up) in pairs.items()
        for side, value in (("a", up * 3), ("b", down * 3))
    }


def differences() -> dict[str, Tensor]:
    return {f"diffusion_model.{name}.diff": up @ down for name, (down, up) in PAIRS.items()}


@pytest.mark.parametrize(
    "tensors", [lambda: original(PAIRS, alpha=2.0), lambda: kron_tensors()[0], hadamard, differences]
)
def test_a_branch_is_the_sum_of_weights(tensors: Callable[[], dict[str, Tensor]], pipe: Pipeline) -> None:
    """Float64, so that nothing but the formula is compared: the matrix with the update in it, beside it, and fused."""
    pipe.to(torch.float64)
    expected = Pipeline(
        transformer=pipe.transformer, autoencoder=pipe.autoencoder, text_encoder=pipe.text_encoder
    )  # the same network, looked at without LoRAs
    lora = load_lora(tensors(), shapes=matrix_shapes(pipe.transformer))
    state = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    for name, update in lora.updates.items():
        state[f"{name}.weight"] += 0.6 * dense(update)
    before = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    pipe.transformer.load_state_dict(state)
    wanted, wanted_picture = velocity(expected), draw(expected).images
    pipe.transformer.load_state_dict(before)
    pipe.load_lora_weights(tensors(), "a")
    pipe.set_adapters("a", 0.6)
    for _ in range(2):
        assert relative_error(velocity(pipe), wanted) <= 1e-12
        assert relative_error(draw(pipe).images, wanted_picture) <= 1e-12
        pipe.fuse_lora()


def test_order_and_names_change_nothing(pipe: Pipeline) -> None:
    one, two = original(PAIRS), kohya(make_pairs(1, names=SHAPES))
    pipe.load_lora_weights(one, "a")
    pipe.load_lora_weights(two, "b")
    pipe.set_adapters(["a", "b"], [0.3, 0.9])
    expected, key = velocity(pipe), pipe.reference_weights
    pipe.set_adapters(["b", "a"], [0.9, 0.3])
    assert torch.equal(velocity(pipe), expected)
    assert pipe.reference_weights == key
    pipe.unload_lora_weights()
    pipe.load_lora_weights(two, "x")
    pipe.load_lora_weights(one, "y")
    pipe.set_adapters(["x", "y"], [0.9, 0.3])
    assert torch.equal(velocity(pipe), expected)
    assert pipe.reference_weights == key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unfuse_gives_the_very_tensors_back(dtype: torch.dtype, tiny_folder: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(tiny_folder, dtype=dtype)
    before = {name: (p, p.data_ptr(), p.clone()) for name, p in pipe.transformer.named_parameters()}
    base, picture_before = pipe.reference_weights, draw(pipe).images
    pipe.load_lora_weights(write(tmp_path, original(PAIRS)), "a")
    pipe.load_lora_weights(kohya(make_pairs(1, names=SHAPES)), "b")
    pipe.set_adapters(["a", "b"], [0.3, 0.9])
    beside = pipe.reference_weights
    pipe.fuse_lora()
    assert pipe.fused_loras == {"a", "b"}
    wide = {n: v.double() for n, (_, _, v) in before.items()}
    for name, parameter in pipe.transformer.named_parameters():  # rounded once
        if name.removesuffix(".weight") in deltas(PAIRS):
            matrix = name.removesuffix(".weight")
            wide[name] = wide[name] + 0.3 * deltas_of(pipe, "a")[matrix] + 0.9 * deltas_of(pipe, "b").get(matrix, 0)
            exact = wide[name]
            assert ((parameter.double() - exact).abs() <= torch.finfo(dtype).eps * 0.51 * exact.abs() + 1e-7).all()
            assert torch.equal(before[name][0], before[name][2])  # what is kept beside was not touched
    fused = pipe.reference_weights
    assert len({base, beside, fused}) == 3
    pipe.unfuse_lora()
    assert pipe.reference_weights == beside
    pipe.unload_lora_weights()
    for name, parameter in pipe.transformer.named_parameters():
        kept, address, value = before[name]
        assert parameter is kept
        assert parameter.data_ptr() == address
        assert torch.equal(parameter, value)
    assert pipe.reference_weights == base
    assert torch.equal(draw(pipe).images, picture_before)


def deltas_of(pipe: Pipeline, name: str) -> dict[str, Tensor]:
    return {target: dense(update) for target, update in pipe._adapters._loaded[name].updates.items()}


def test_fused_weights_outlive_unloading(pipe: Pipeline) -> None:
    """As in diffusers; and, other than there, they can be taken out, and others can act beside them."""
    base, base_key = velocity(pipe), pipe.reference_weights
    pipe.load_lora_weights(original(PAIRS), "a")
    pipe.load_lora_weights(kohya(make_pairs(1, names=SHAPES)), "b")
    pipe.set_adapters(["a", "b"], [0.3, 0.9])
    both = velocity(pipe)
    pipe.set_adapters("a", 0.3)
    pipe.fuse_lora()
    with pytest.raises(InvalidRequest, match=r"\['a'\] are fused, .*unfuse_lora\(\) first"):
        pipe.set_adapters(["a", "b"], 1.0)
    with pytest.raises(InvalidRequest, match="'a' is fused; unfuse_lora"):
        pipe.delete_adapters("a")
    pipe.unload_lora_weights()
    assert pipe.get_list_adapters() == {}
    pipe.load_lora_weights(kohya(make_pairs(1, names=SHAPES)), "a")  # the name is free
    pipe.set_adapters("a", 0.9)
    assert relative_error(velocity(pipe), both) <= TOLERANCE
    pipe.fuse_lora()  # both are in the weights now, each of them once
    assert relative_error(velocity(pipe), both) <= TOLERANCE
    pipe.fuse_lora()
    assert relative_error(velocity(pipe), both) <= TOLERANCE
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert torch.equal(velocity(pipe), base)
    assert pipe.reference_weights == base_key


def test_fused_with_nothing_is_nothing(pipe: Pipeline) -> None:
    base, key = velocity(pipe), pipe.reference_weights
    pipe.load_lora_weights(original(PAIRS), "a")
    pipe.fuse_lora(lora_scale=0.0)
    assert torch.equal(velocity(pipe), base)
    assert pipe.reference_weights == key
    pipe.unfuse_lora()
    assert relative_error(velocity(pipe), base) > 0.05


def test_moves_and_casts(tiny_folder: Path) -> None:
    """A cast pipeline is one that was loaded in that dtype, fused or not."""
    expected, pipe = Pipeline.from_pretrained(tiny_folder, dtype=torch.bfloat16), Pipeline.from_pretrained(tiny_folder)
    for each in (expected, pipe):
        each.load_lora_weights(original({n: p for n, p in PAIRS.items() if "single" in n}), "a")
        each.load_lora_weights(kohya({n: p for n, p in EVERYWHERE.items() if "single" not in n}), "b")
        each.fuse_lora(adapter_names=["a"])
    pipe.to(torch.bfloat16).to("cpu")
    assert torch.equal(velocity(pipe), velocity(expected))
    assert pipe.reference_weights == expected.reference_weights
    assert pipe.get_active_adapters() == expected.get_active_adapters()
    for each in (expected, pipe):
        each.unfuse_lora()
    assert torch.equal(velocity(pipe), velocity(expected))
    assert pipe.reference_weights == expected.reference_weights


def test_over_int8(tiny_folder: Path, pipe: Pipeline) -> None:
    """The branch adds to int8 products what it adds to those of any weights; nothing of a small update is lost."""
    quantized = Pipeline.from_pretrained(tiny_folder, quantize="int8")
    values = {name: value.clone() for name, value in quantized.transformer.state_dict().items()}
    base, key = velocity(quantized), quantized.reference_weights
    shapes = matrix_shapes(quantized.transformer)
    assert shapes == matrix_shapes(pipe.transformer)
    tensors = original(make_pairs(size=1e-3))  # less than half a step of 8 bits
    lora = load_lora(tensors, shapes=shapes)
    quantized.load_lora_weights(tensors)
    for name in ("transformer_blocks.0.attn.to_k", "single_transformer_blocks.1.attn.to_qkv_mlp_proj"):
        module, x = quantized.transformer.get_submodule(name), torch.randn(2, 7, 32)
        assert isinstance(module, Int8Linear)
        exact = x.double() @ dense(lora.updates[name]).t()
        for given in (x, module.prepare(x)):
            gained = module(given) - module.forward(given)
            assert relative_error(gained, exact) <= 1e-3  # the difference of two float32 that are 1000 times larger
            part = module(given, slice(5, 17)) - module.forward(given, slice(5, 17))
            assert relative_error(part, exact[..., 5:17]) <= 1e-3
    assert quantized.reference_weights != key
    with pytest.raises(InvalidRequest, match=r"fuse_lora: \S+ is int8, .*leave adapters unfused"):
        quantized.fuse_lora()
    assert quantized.get_active_adapters() == ["default_0"]
    assert quantized.fused_loras == set()
    quantized.load_lora_weights(original(PAIRS))
    pipe.load_lora_weights(original(PAIRS))
    assert relative_error(velocity(quantized), velocity(pipe)) <= 0.05  # int8 alone
    assert relative_error(velocity(quantized), base) >= 0.1
    quantized.unload_lora_weights()
    assert torch.equal(velocity(quantized), base)
    assert quantized.reference_weights == key
    assert all(torch.equal(value, values[name]) for name, value in quantized.transformer.state_dict().items())


def test_bfloat16(tiny_folder: Path) -> None:
    """Both ways round to 8 bits in their own places: as far from float32 as from each other."""
    pipe, wide = Pipeline.from_pretrained(tiny_folder, dtype=torch.bfloat16), Pipeline.from_pretrained(tiny_folder)
    for each in (pipe, wide):
        each.load_lora_weights(original(PAIRS))
    expected = velocity(wide)
    assert relative_error(velocity(pipe), expected) <= 0.03
    pipe.fuse_lora()
    assert relative_error(velocity(pipe), expected) <= 0.03


def test_bad_arguments(pipe: Pipeline) -> None:
    pipe.load_lora_weights(original(PAIRS), "a")
    for call, message in (
        (lambda: pipe.load_lora_weights(original(PAIRS), "a"), "'a' is loaded already"),
        (lambda: pipe.load_lora_weights(original(PAIRS), ""), "'' is not a name"),
        (lambda: pipe.set_adapters("b"), r"\['b'\] are not loaded; loaded: \['a'\]"),
        (lambda: pipe.set_adapters(["a", "a"]), "twice"),
        (lambda: pipe.set_adapters(["a"], [1.0, 2.0]), "2 weights for 1 adapters"),
        (lambda: pipe.set_adapters("a", float("nan")), "nan is not a finite number"),
        (lambda: pipe.set_adapters("a", "1"), "'1' is not a finite number"),
        (lambda: pipe.set_adapters("a", {"unet": 1.0}), "only a weight of the transformer"),
        (lambda: pipe.fuse_lora(lora_scale=float("inf")), "lora_scale: inf"),
        (lambda: pipe.fuse_lora(["text_encoder"]), "has to be"),
        (lambda: pipe.fuse_lora(adapter_names=["c"]), "not loaded"),
        (lambda: pipe.delete_adapters("c"), "not loaded"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            call()
    assert pipe.get_active_adapters() == ["a"]
    pipe.set_adapters("a", {"transformer": 0.5})
    assert pipe._adapters.applied[0].strength == 0.5
    pipe.set_adapters("a", 1e39)
    before = dict(pipe.transformer.named_parameters())
    with pytest.raises(InvalidRequest, match="is not finite in torch.float32"):
        pipe.fuse_lora()
    assert all(p is before[name] for name, p in pipe.transformer.named_parameters())
    assert pipe.fused_loras == set()


def test_names_and_deleting(pipe: Pipeline) -> None:
    for _ in range(2):
        pipe.load_lora_weights(original(ONE))
    assert pipe.get_list_adapters() == {"transformer": ["default_0", "default_1"]}
    pipe.delete_adapters("default_0")
    pipe.load_lora_weights(original(ONE))
    assert pipe.get_list_adapters() == {"transformer": ["default_1", "default_2"]}


def test_references_of_other_loras_are_never_used(tiny_folder: Path, tmp_path: Path) -> None:
    file = write(tmp_path, original(PAIRS))
    pipe = Pipeline.from_pretrained(tiny_folder, store=ReferenceStore(disk_path=tmp_path / "store"))
    base = draw(pipe)
    references, seen = pipe.prefill(picture(64, 64)), {pipe.reference_weights}
    pipe.load_lora_weights(file, "a")
    for strength in (1.0, 0.5, 0.5 + 2**-52, -0.5):
        pipe.set_adapters("a", strength)
        assert pipe.reference_weights not in seen
        seen.add(pipe.reference_weights)
        out = draw(pipe)
        assert out.reference_cache == "miss"
        assert not torch.equal(out.images, base.images)
        with pytest.raises(InvalidRequest, match="prefill the pictures with this pipeline"):
            pipe("a dog", references=references)
    pipe.set_adapters("a", 0.5)
    again = draw(pipe)
    assert again.reference_cache == "memory"
    assert again.metadata["loras"] == [
        {
            "name": "a",
            "digest": load_lora(file, shapes=matrix_shapes(pipe.transformer)).digest,
            "strength": 0.5,
            "fused": False,
        }
    ]
    pipe.fuse_lora()  # other roundings
    assert draw(pipe).reference_cache == "miss"
    pipe.unfuse_lora()
    assert draw(pipe).reference_cache == "memory"
    for leave in (lambda: pipe.set_adapters("a", 0.0), lambda: pipe.set_adapters([]), pipe.unload_lora_weights):
        leave()
        out = draw(pipe)
        assert out.reference_cache == "memory"
        assert torch.equal(out.images, base.images)
        assert "loras" not in out.metadata


def test_two_processes_agree_on_the_key(tiny_folder: Path, tmp_path: Path) -> None:
    first, second = (
        write(tmp_path, make_(pairs), name)
        for make_, pairs, name in (
            (original, PAIRS, "a.safetensors"),
            (kohya, make_pairs(1, names=SHAPES), "b.safetensors"),
        )
    )
    program = (
        "import sys, limner\n"
        "pipe = limner.Pipeline.from_pretrained(sys.argv[1])\n"
        "for name, file in zip('xy', sys.argv[2:]): pipe.load_lora_weights(file, name)\n"
        "pipe.set_adapters(['x', 'y'], [0.1, 0.7])\n"
        "print(pipe.reference_weights); pipe.fuse_lora(); print(pipe.reference_weights)"
    )
    arguments = [sys.executable, "-c", program, str(tiny_folder), str(first), str(second)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    pipe = Pipeline.from_pretrained(tiny_folder)
    pipe.load_lora_weights(second, "b")
    pipe.load_lora_weights(first, "a")
    pipe.set_adapters(["b", "a"], [0.7, 0.1])
    beside = pipe.reference_weights
    pipe.fuse_lora()
    assert done.stdout.split() == [beside, pipe.reference_weights]


def test_the_key_costs_no_reading_of_weights(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = Pipeline.from_pretrained(tiny_folder)
    key = pipe.reference_weights
    pipe.load_lora_weights(original(PAIRS), "a")
    monkeypatch.setattr(digest, "_digest", lambda tensors: pytest.fail("bytes were read"))
    found = [pipe.reference_weights]
    pipe.set_adapters("a", 0.5)
    found.append(pipe.reference_weights)
    pipe.fuse_lora()
    found.append(pipe.reference_weights)
    pipe.unfuse_lora()
    found.append(pipe.reference_weights)
    assert len({key, *found}) == 4
    assert found[1] == found[3]


def test_weights_that_change_while_fused_are_read(pipe: Pipeline) -> None:
    """The key is then that of the bytes: neither that of the sum nor, later, that of the weights before."""
    base = pipe.reference_weights
    pipe.load_lora_weights(original(ONE), "a")
    pipe.fuse_lora()
    fused = pipe.reference_weights
    pipe.transformer.proj_out.weight.data.mul_(2)
    changed = pipe.reference_weights
    pipe.load_lora_weights(original({QKV: make_pairs(1)[QKV]}), "b")
    pipe.fuse_lora()
    twice = pipe.reference_weights
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert len({base, fused, changed, twice, pipe.reference_weights}) == 5
    pipe.transformer.proj_out.weight.data.div_(2)
    assert pipe.reference_weights == base


def test_replaced_matrices_get_their_branches_again(tiny_folder: Path, pipe: Pipeline) -> None:
    """Else K/V made without a LoRA would be kept under the key of those with it."""
    from limner.model.int8 import quantize_blocks

    expected = Pipeline.from_pretrained(tiny_folder, quantize="int8")
    for each in (pipe, expected):
        each.load_lora_weights(original(PAIRS))
    quantize_blocks(pipe.transformer)
    alone = {
        "prompt": "a dog",
        "height": 64,
        "width": 64,
        "output_type": "pt",
    }  # without references no key is asked for
    found, wanted = (each(**alone, generator=generators(1)[0]).images for each in (pipe, expected))
    assert torch.equal(found, wanted)
    assert pipe.reference_weights == expected.reference_weights
    assert torch.equal(velocity(pipe), velocity(expected))
    assert torch.equal(draw(pipe).images, draw(expected).images)


def test_a_replaced_transformer_has_no_loras(
    tiny_folder: Path, pipe: Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    key = pipe.reference_weights
    pipe.load_lora_weights(original(PAIRS))
    pipe.transformer = Pipeline.from_pretrained(tiny_folder).transformer
    with caplog.at_level(logging.WARNING, "limner"):
        assert pipe.reference_weights == key
    assert "['default_0'] were of the last one" in caplog.text
    assert pipe.get_list_adapters() == {}


def test_pipelines_that_share_a_transformer_share_its_loras(pipe: Pipeline) -> None:
    """Else one would keep K/V made with the LoRA of the other under the key of the base."""
    other = Pipeline(transformer=pipe.transformer, autoencoder=pipe.autoencoder, text_encoder=pipe.text_encoder)
    base = other.reference_weights
    pipe.load_lora_weights(original(PAIRS), "a")
    assert other.get_active_adapters() == ["a"]
    assert other.reference_weights == pipe.reference_weights != base
    other.unload_lora_weights()
    assert pipe.reference_weights == base


def test_a_file_may_be_written_over(pipe: Pipeline, tmp_path: Path) -> None:
    """By the next training, in place: what was loaded stays what its digest says, as do tensors that were given."""
    file, tensors = write(tmp_path, original(PAIRS)), {k: v.clone() for k, v in original(PAIRS).items()}
    pipe.load_lora_weights(file, "a")
    pipe.load_lora_weights(tensors, "b")
    data = bytearray(file.read_bytes())
    data[-4000:] = bytes(4000)
    with file.open("rb+") as same:
        same.write(data)
    for value in tensors.values():
        value.zero_()
    for name in ("a", "b"):
        for target, expected in deltas(PAIRS).items():
            torch.testing.assert_close(deltas_of(pipe, name)[target], expected, rtol=1e-12, atol=1e-15)


def test_matrices_replaced_while_fused_are_not_written_over(pipe: Pipeline) -> None:
    pipe.load_lora_weights(original(ONE))
    pipe.fuse_lora()
    attention = pipe.transformer.transformer_blocks[0].attn
    attention.to_k = Int8Linear.of(attention.to_k)
    with pytest.raises(CheckpointError, match=r"transformer_blocks.0.attn.to_k was replaced since fuse_lora"):
        pipe.unfuse_lora()


def test_a_callback_may_not_change_loras_under_references(pipe: Pipeline) -> None:
    pipe.load_lora_weights(original(PAIRS), "a")
    strengths = itertools.cycle([0.25, 0.75])

    def change(pipe: Pipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> None:
        pipe.set_adapters("a", next(strengths))

    with pytest.raises(InvalidRequest, match="changed the LoRAs, and the K/V of the references"):
        draw(pipe, callback_on_step_end=change)
    assert pipe("a dog", height=64, width=64, callback_on_step_end=change).images


def test_prompt_tokens_are_kept(pipe: Pipeline) -> None:
    draw(pipe)
    kept = {key: value[0] for key, value in pipe._prompts._cache.items()}
    pipe.load_lora_weights(original(PAIRS))
    draw(pipe)
    assert list(pipe._prompts._cache) == list(kept)
    assert all(pipe._prompts._cache[key][0] is kept[key] for key in kept)


def test_branches_that_find_no_memory_leave_nothing(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe.load_lora_weights(original(PAIRS), "a")
    expected = velocity(pipe)

    def fail(*args: Any, **options: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Branches, "__init__", fail)
    for call in (lambda: pipe.load_lora_weights(original(PAIRS), "b"), lambda: pipe.set_adapters("a", 0.5)):
        with pytest.raises(Exception, match="memory ran out"):
            call()
    assert (pipe.get_active_adapters(), pipe.get_list_adapters()) == (["a"], {"transformer": ["a"]})
    assert torch.equal(velocity(pipe), expected)


def part(pairs: dict[str, tuple[Tensor, Tensor]], kind: str) -> dict[str, Tensor]:
    return diffusers_names({name: pair for name, pair in pairs.items() if kind in name})


SEQUENCES: dict[str, list[Callable[[Any], Any]]] = {
    "disabled": [lambda p: p.disable_lora()],
    "disabled twice, then enabled": [lambda p: p.disable_lora(), lambda p: p.disable_lora(), lambda p: p.enable_lora()],
    "other strengths while disabled": [
        lambda p: p.disable_lora(),
        lambda p: p.set_adapters(["a", "b"], [0.2, 0.3]),
        lambda p: p.enable_lora(),
    ],
    "fused and disabled": [lambda p: p.fuse_lora(), lambda p: p.disable_lora()],
    "unloaded while disabled": [
        lambda p: p.disable_lora(),
        lambda p: p.unload_lora_weights(),
        lambda p: p.enable_lora(),
    ],
    "one of two deleted": [lambda p: p.delete_adapters("b")],
    "the active one deleted": [lambda p: p.set_adapters("b"), lambda p: p.delete_adapters("b")],
    "all deleted": [lambda p: p.delete_adapters(["a", "b"])],
    "one fused whose matrices are its own": [
        lambda p: p.set_adapters("c", 0.4),
        lambda p: p.fuse_lora(adapter_names=["b"]),
    ],
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT: that adapters are merged, unmerged, deleted while active
@pytest.mark.parametrize("case", SEQUENCES)
def test_switches_as_in_diffusers(case: str, pipe: Pipeline, theirs: Any) -> None:
    """The same calls give the same pictures, and the same names of what is loaded and active."""
    names = ["b", "c"] if "own" in case else ["a", "b"]
    files = {
        "a": diffusers_names(make_pairs(1)),
        "b": part(make_pairs(2), "single_blocks"),
        "c": part(make_pairs(3), "double_blocks"),
    }
    for each in (pipe, theirs):
        for name in names:
            each.load_lora_weights(dict(files[name]), adapter_name=name)
        each.set_adapters(names, [0.5, 0.8])
        for call in SEQUENCES[case]:
            call(each)
    assert pipe.get_active_adapters() == list(theirs.get_active_adapters())
    assert pipe.get_list_adapters() == theirs.get_list_adapters()
    same_picture(pipe, theirs)


def test_disabled_is_the_base_and_enabled_is_as_before(pipe: Pipeline) -> None:
    base, key = velocity(pipe), pipe.reference_weights
    pipe.disable_lora()  # nothing is loaded: no effect
    pipe.load_lora_weights(original(PAIRS), "a")
    assert pipe.reference_weights != key
    for fuse in (False, True):
        if fuse:
            pipe.fuse_lora()
        before, its_key = velocity(pipe), pipe.reference_weights
        pipe.disable_lora()
        assert torch.equal(velocity(pipe), base)
        assert pipe.reference_weights == key
        assert pipe.fused_loras == ({"a"} if fuse else set())
        with pytest.raises(InvalidRequest, match=r"disabled; enable_lora\(\) first"):
            pipe.fuse_lora()
        pipe.enable_lora()
        assert torch.equal(velocity(pipe), before)
        assert pipe.reference_weights == its_key
    pipe.unload_lora_weights()  # what is fused now is part of the weights
    fused = velocity(pipe)
    pipe.load_lora_weights(original(ONE), "b")
    pipe.disable_lora()
    assert torch.equal(velocity(pipe), fused)


def test_what_diffusers_would_let_stop_is_refused(pipe: Pipeline) -> None:
    """diffusers fuses one of two, and the other stops where that one is; a scale acts on what is active there."""
    pipe.load_lora_weights(original(PAIRS), "a")
    pipe.load_lora_weights(part(PAIRS, "single_blocks"), "b")
    pipe.load_lora_weights(part(PAIRS, "double_blocks"), "c")
    pipe.set_adapters(["a", "b"])
    before = velocity(pipe)
    with pytest.raises(InvalidRequest, match=r"\['b'\] are active too and would stop acting .*with set_adapters"):
        pipe.fuse_lora(adapter_names=["a"])
    pipe.set_adapters("a")
    with pytest.raises(InvalidRequest, match=r"without \['a'\] none of \['b', 'c'\] is active"):
        pipe.delete_adapters("a")
    pipe.set_adapters("c")
    with pytest.raises(InvalidRequest, match=r"lora_scale=0.5 acts on what is active \(\['c'\]\)"):
        pipe.fuse_lora(adapter_names=["b"], lora_scale=0.5)
    pipe.set_adapters(["a", "b"])
    assert torch.equal(velocity(pipe), before)
