"""Manners that diffusers' tests do not ask for: seeds, names, pictures, bars, memory, copies."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import threading
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from tests.support.lora_files import diffusers_names, make_pairs, write
from tests.support.network import GOOD, Network, default_context, reply
from tests.support.pictures import encoded
from tests.support.tiny import generators, picture

from limner import Flux2KleinKVPipeline, InvalidRequest, Pipeline, PipelineOutput
from limner.memory.pages import can_release
from limner.outbound.client import OutboundClient
from limner.pipeline.turns import Turns

SIZE = {"height": 64, "width": 64, "num_inference_steps": 1}


@pytest.fixture
def klein(tiny_folder: Path) -> Flux2KleinKVPipeline:
    return Flux2KleinKVPipeline.from_pretrained(tiny_folder)


def drawn(pipe: Any, *args: Any, **given: Any) -> Any:
    return pipe(*args, **{**SIZE, "seed": 0, "output_type": "pt", **given})


@pytest.mark.parametrize("integer", [int, np.int64, np.int32, np.uint8, torch.tensor])
def test_numbers_of_other_libraries(klein: Flux2KleinKVPipeline, integer: Any) -> None:
    out = klein(
        "a dog",
        height=integer(80),
        width=integer(64),
        num_inference_steps=integer(1),
        num_images_per_prompt=integer(2),
        seed=integer(3),
    )
    assert [image.size for image in out.images] == [(64, 80)] * 2
    assert out.seeds == (3, 4)
    plain = Pipeline.__call__(klein, "a dog", height=integer(80), width=integer(64), num_inference_steps=integer(1))
    assert isinstance(plain, PipelineOutput)


def test_seeds(klein: Flux2KleinKVPipeline) -> None:
    out = klein(["a", "b"], num_images_per_prompt=2, **SIZE, seed=7)
    assert out.seeds == (7, 8, 9, 10)
    assert klein(["a", "b"], **SIZE, seed=[5, 2]).seeds == (5, 2)
    same = klein("a", **SIZE, generator=generators(7)[0])
    assert same.images[0].tobytes() == out.images[0].tobytes()
    for seed in (-1, 1.5, True, "x", [1], 2**63):
        with pytest.raises(InvalidRequest, match="seed: "):
            klein(["a", "b"], **SIZE, seed=seed)
    with pytest.raises(InvalidRequest, match="seed and generator are both given"):
        klein("a", **SIZE, seed=1, generator=generators(1)[0])


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("num_inference_step", "num_inference_steps"),
        ("images", "image"),
        ("steps", "num_inference_steps"),
        ("promt", "prompt"),
        ("Seed", "seed"),
    ],
)
def test_unknown_arguments_suggest_the_right_one(
    name: str, meant: str, klein: Flux2KleinKVPipeline, tiny_folder: Path
) -> None:
    with pytest.raises(TypeError, match=f"{name}: is not an argument of .*call; did you mean {meant}"):
        klein(prompt="a", **{name: 1})
    if meant != "seed":
        with pytest.raises(InvalidRequest, match=f"did you mean {meant}"):
            Pipeline.__call__(klein, "a", **{name: 1})
    with pytest.raises(TypeError, match="torch_type: is not an argument of from_pretrained; did you mean torch_dtype"):
        Flux2KleinKVPipeline.from_pretrained(tiny_folder, torch_type=torch.float32)


def test_pictures_in_every_form(klein: Flux2KleinKVPipeline, tmp_path: Path) -> None:
    image = picture(64, 64)
    data, array = encoded(image), np.asarray(image)
    (tmp_path / "a.png").write_bytes(data)
    key = klein("a", image=image, **SIZE).reference_key
    with open(tmp_path / "a.png", "rb") as file:
        forms = [data, bytearray(data), io.BytesIO(data), file, tmp_path / "a.png", array, array / 255.0, array[None]]
        tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
        forms += [tensor, tensor[None] / 255, (tensor / 255).half().double()]
        found = [klein("a", image=form, **SIZE).reference_key for form in forms]
    assert found[:-1] == [key] * (len(forms) - 1)
    assert found[-1] is not None  # rounded by float16
    both = klein("a", image=np.stack([array, array]), **SIZE)
    assert len(both.references) == 2


def test_results_are_references_again(klein: Flux2KleinKVPipeline) -> None:
    keys = {
        klein("b", image=klein("a", **SIZE, seed=1, output_type=kind).images, **SIZE).reference_key
        for kind in ("pil", "np", "pt")
    }
    assert len(keys) == 1


def network(monkeypatch: pytest.MonkeyPatch, *answers: bytes) -> Network:
    net = Network(*answers, names={"pictures.example.org": ["93.184.215.14"], "inside.example.org": ["10.0.0.1"]})
    made = functools.partial(OutboundClient, resolver=net.resolve, connector=net, ssl_context=default_context())
    monkeypatch.setattr(Flux2KleinKVPipeline, "make_client", made)
    return net


def test_pictures_by_url_go_through_the_guard(klein: Flux2KleinKVPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    image = picture(64, 64)
    network(monkeypatch, reply(encoded(image)), reply(encoded(image)))
    assert klein.prefill(GOOD).key == klein.prefill(image).key
    assert drawn(klein, GOOD, "a").reference_key == drawn(klein, image, "a").reference_key
    for url, message in (
        ("https://inside.example.org/a.png", "image 2: the host inside.example.org has an address that is not public"),
        ("https://127.0.0.1/a.png", "image 2: 127.0.0.1 is not a public address"),
        ("http://pictures.example.org/a.png", "image 2: the URL has to begin with https://"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            drawn(klein, [image, url], "a")
    network(monkeypatch, reply(b"", status="404 Not Found"))
    with pytest.raises(InvalidRequest, match="image 1: the URL was answered with status 404"):
        drawn(klein, GOOD, "a")


def test_attention_kwargs_scale_loras(klein: Flux2KleinKVPipeline, tmp_path: Path) -> None:
    plain = drawn(klein, "a").images
    assert torch.equal(drawn(klein, "a", attention_kwargs={}, joint_attention_kwargs=None).images, plain)
    klein.load_lora_weights(write(tmp_path, diffusers_names(make_pairs())), "a")
    full = drawn(klein, "a").images
    half = drawn(klein, "a", joint_attention_kwargs={"scale": 0.5}).images
    assert klein.attention_kwargs == {"scale": 0.5}
    assert torch.equal(drawn(klein, "a").images, full)
    klein.set_adapters("a", 0.5)
    assert torch.equal(drawn(klein, "a").images, half)
    assert not torch.equal(half, full)
    assert torch.equal(drawn(klein, "a", attention_kwargs={"scale": 0}).images, plain)
    with pytest.raises(InvalidRequest, match="attention_kwargs: ip_adapter_image has no meaning here; allowed: scale"):
        drawn(klein, "a", attention_kwargs={"ip_adapter_image": 1})
    with pytest.raises(InvalidRequest, match="joint_attention_kwargs: is another name"):
        drawn(klein, "a", attention_kwargs={}, joint_attention_kwargs={})


def test_bar(klein: Flux2KleinKVPipeline, capsys: pytest.CaptureFixture[str]) -> None:
    heard: list[tuple[str, int, int]] = []
    klein("a", **SIZE, progress=lambda *what: heard.append(what))
    assert "it/s" not in capsys.readouterr().err
    assert ("step", 1, 1) in heard
    klein.set_progress_bar_config(disable=False, desc="drawing")
    klein("a", **SIZE)
    assert "drawing: 100%" in capsys.readouterr().err


@pytest.mark.skipif(not can_release(), reason="needs Linux")
def test_offloading_is_taking_turns(
    klein: Flux2KleinKVPipeline, tiny_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "limner")
    before = drawn(klein, picture(64, 64), "a").images
    for switch in (klein.enable_model_cpu_offload, klein.enable_sequential_cpu_offload, klein.enable_model_cpu_offload):
        switch()
        assert isinstance(klein.residency, Turns)
        klein._prompts.clear()
        assert torch.equal(
            drawn(klein, picture(64, 64, seed=1), "a").images, drawn(klein, picture(64, 64, seed=1), "a").images
        )
        assert torch.equal(drawn(klein, picture(64, 64), "a").images, before)
    assert "layers are in memory by turns" in caplog.text
    limited = Flux2KleinKVPipeline.from_pretrained(tiny_folder, memory_limit="8GiB")
    limited.enable_model_cpu_offload()
    assert not isinstance(limited.residency, Turns)
    assert "memory_limit has networks in memory by turns already" in caplog.text


@pytest.mark.skipif(not can_release(), reason="needs Linux")
def test_only_the_network_that_works_stays(klein: Flux2KleinKVPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    klein.enable_model_cpu_offload()
    released: list[str] = []
    monkeypatch.setattr(Turns, "release", lambda self, network: released.append(type(network).__name__))
    drawn(klein, picture(64, 64), "a")
    assert [set(released[i : i + 2]) for i in range(0, len(released), 2)] == [
        {"Transformer", "Autoencoder"},  # text
        {"Transformer", "TextEncoder"},  # pictures
        {"Autoencoder", "TextEncoder"},  # prefill
        {"Autoencoder", "TextEncoder"},  # steps
        {"Transformer", "TextEncoder"},  # decoding
    ]


@pytest.mark.parametrize("kind", [Pipeline, Flux2KleinKVPipeline])
def test_copies(kind: type[Pipeline], tiny_folder: Path) -> None:
    pipe = kind.from_pretrained(tiny_folder, kv_cache_dtype="int8")
    given = {**SIZE, "output_type": "pt", "image": picture(64, 64)}
    first = pipe(prompt="a", generator=generators(1)[0], **given)
    deep = copy.deepcopy(pipe)
    pickled = pickle.loads(pickle.dumps(pipe))
    for made in (deep, pickled):
        assert type(made) is kind
        assert made.transformer is not pipe.transformer
        second = made(prompt="a", generator=generators(1)[0], **given)
        assert torch.equal(cast(Any, first).images, second.images)
        assert made.digest == pipe.digest
    assert deep.store is pipe.store
    assert second.reference_cache == "miss"  # another store
    with torch.no_grad():
        deep.transformer.proj_out.weight.zero_()
    assert pipe.digest == pickled.digest


def test_copies_say_what_they_cannot_hold(klein: Flux2KleinKVPipeline, tmp_path: Path) -> None:
    klein.load_lora_weights(write(tmp_path, diffusers_names(make_pairs())), "a")
    for call in (copy.deepcopy, pickle.dumps):
        with pytest.raises(InvalidRequest, match=r"copy: LoRAs \['a'\] are loaded"):
            call(klein)


def test_warnings_reach_the_result(klein: Flux2KleinKVPipeline) -> None:
    assert drawn(klein, picture(64, 64), "put image 1 into image 2").warnings == (
        "prompt: mentions 'image 2', and 1 reference is given; give image 2, or change the prompt",
    )
    assert drawn(klein, [picture(64, 64), picture(64, 80)], "put image 1 into image 2").warnings == ()
    plain = Pipeline.__call__(klein, "the style of picture 1", **SIZE)
    assert isinstance(plain, PipelineOutput)
    assert "no reference is given" in plain.warnings[0]


def test_several_threads(klein: Flux2KleinKVPipeline) -> None:
    expected = [drawn(klein, "a", seed=seed).images for seed in range(2)]
    found: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: drawn(klein, "a", seed=i).images})) for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], expected[i]) for i in range(2))


def test_what_no_drop_in_takes(klein: Flux2KleinKVPipeline, tmp_path: Path) -> None:
    for given, message in (
        ({"push_to_hub": True}, "push_to_hub"),
        ({"variant": "../x"}, "variant"),
        ({"varient": "fp16"}, "did you mean variant|varient"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            klein.save_pretrained(tmp_path / "saved", **given)
    with pytest.raises(InvalidRequest, match="image: dict is not a picture or a list of pictures"):
        klein("a", image={"a": Image.new("RGB", (64, 64))})
