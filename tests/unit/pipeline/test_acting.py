"""Calls with LoRAs of their own: which act, what acts before and after, and whose K/V are used."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.lora_files import make_pairs, original, write
from tests.support.tiny import generators, picture
from torch import Tensor

from limner import Cancelled, InvalidRequest, Pipeline
from limner.images import prepare_reference
from limner.requests import EditRequest, read_loras


def draw(pipe: Pipeline, **options: Any) -> Any:
    return pipe("a dog", image=picture(64, 64), generator=generators(1)[0], output_type="pt", **options)


def hooks(pipe: Pipeline) -> list[Any]:
    return [hook for module in pipe.transformer.modules() for hook in module._forward_hooks.values()]


def test_a_call_draws_as_if_its_loras_were_set(styled: Pipeline) -> None:
    """Bit for bit, with the same metadata and keys; what was set acts before and after."""
    before = draw(styled)
    for loras in ({"b": 0.5}, [("b", -0.25), ("a", 1)], (), {"a": 0.7}, {"a": 0.0, "b": 2}):
        own = draw(styled, loras=loras)
        again = draw(styled)
        pairs = list(loras.items()) if isinstance(loras, dict) else list(loras)
        styled.set_adapters([name for name, _ in pairs], [strength for _, strength in pairs])
        expected = draw(styled)
        styled.set_adapters(["a"], [0.7])
        assert torch.equal(own.images, expected.images), loras
        assert own.metadata == expected.metadata
        assert own.reference_key == expected.reference_key
        assert torch.equal(again.images, before.images)
        assert [lora["strength"] for lora in again.metadata["loras"]] == [0.7]
    assert not torch.equal(draw(styled, loras={"b": 0.5}).images, before.images)
    assert styled.get_active_adapters() == ["a"]


def test_requests_that_are_drawn_together_have_the_same(styled: Pipeline) -> None:
    references = (prepare_reference(picture(64, 64), policy=styled.reference_policy),)

    def request(loras: Any) -> EditRequest:
        return EditRequest(prompt="a dog", seeds=(1,), references=references, control={"loras": loras})

    both = styled.draw([request({"b": 0.5, "a": 1}), request([("a", 1.0), ("b", 0.5)])], output_type="pt")
    assert {lora["name"]: lora["strength"] for lora in both.metadata["loras"]} == {"a": 1.0, "b": 0.5}
    with pytest.raises(InvalidRequest, match="loras: .* cannot be drawn together"):
        styled.draw([request({"b": 0.5}), request({"b": 0.25})])
    with pytest.raises(InvalidRequest, match="loras: .* cannot be drawn together"):
        styled.draw([request(None), request({"a": 0.7})])


def test_a_request_that_is_repainted_keeps_its_loras(styled: Pipeline) -> None:
    references = (prepare_reference(picture(64, 64), policy=styled.reference_policy),)
    request = EditRequest(
        prompt="a dog", seeds=(1,), references=references, control={"strength": 0.5, "loras": {"b": 0.5}}
    )
    out = styled.draw([styled.opened(request)])
    assert [(lora["name"], lora["strength"]) for lora in out.metadata["loras"]] == [("b", 0.5)]


def test_kv_of_one_are_never_used_under_another(styled: Pipeline) -> None:
    image = picture(64, 64)
    kv: dict[str, Tensor] = {}
    keys = {}
    for name, loras in {"set": None, "b": {"b": 0.5}, "weaker": {"b": 0.25}, "none": ()}.items():
        found, source = styled.prefill_from(image, loras=loras)
        assert source == "miss", name
        kv[name], keys[name] = found.layers[-1][0], found.key
        assert draw(styled, loras=loras).reference_cache == "memory"
    assert len(set(keys.values())) == 4
    assert not any(torch.equal(kv[x], kv[y]) for x in kv for y in kv if x < y)
    for name, loras in {"b": {"b": 0.5}, "set": None, "none": {}, "weaker": [("b", 0.25)]}.items():
        found, source = styled.prefill_from(image, loras=loras)
        assert (source, found.key) == ("memory", keys[name])
        assert torch.equal(found.layers[-1][0], kv[name])
    given = styled.prefill(image, loras={"b": 0.5})
    assert draw_given(styled, given, loras={"b": 0.5}).reference_cache == "given"
    for other in (None, {"b": 0.25}, ()):
        with pytest.raises(InvalidRequest, match="prefill the pictures with this pipeline"):
            draw_given(styled, given, loras=other)


def draw_given(pipe: Pipeline, references: Any, **options: Any) -> Any:
    return pipe("a dog", references=references, generator=generators(1)[0], num_inference_steps=1, **options)


@pytest.mark.parametrize("error", [ValueError, Cancelled, KeyboardInterrupt])
def test_what_was_set_acts_again_after_errors_and_interruption(styled: Pipeline, error: type[BaseException]) -> None:
    before = draw(styled)

    def stop(*_: Any) -> None:
        raise error("stop")

    with pytest.raises(error):
        draw(styled, loras={"b": 2.0}, callback_on_step_end=stop)

    def interrupt(pipe: Pipeline, *_: Any) -> None:
        pipe._interrupt = True

    draw(styled, loras={"b": 2.0}, callback_on_step_end=interrupt)
    after = draw(styled)
    assert torch.equal(after.images, before.images)
    assert after.metadata == before.metadata


def test_a_call_within_a_call_has_its_own_and_gives_back(styled: Pipeline) -> None:
    """As the engine draws between two steps: with other LoRAs, with those that are set, and prefills."""
    expected = draw(styled, loras={"b": 0.5})
    inner: dict[str, Any] = {}

    def between(pipe: Pipeline, step: int, *_: Any) -> None:
        if step == 0:
            inner["own"] = pipe("a cat", generator=generators(2)[0], output_type="pt", loras={"a": -1.0})
        elif step == 1:
            inner["set"] = pipe("a cat", generator=generators(2)[0], output_type="pt")
            inner["prefill"] = pipe.prefill(picture(64, 64, seed=9))

    outer = draw(styled, loras={"b": 0.5}, callback_on_step_end=between)
    assert torch.equal(outer.images, expected.images)
    alone = {
        "own": styled("a cat", generator=generators(2)[0], output_type="pt", loras={"a": -1.0}),
        "set": styled("a cat", generator=generators(2)[0], output_type="pt"),
    }
    for name, one in alone.items():
        assert torch.equal(inner[name].images, one.images), name
        assert inner[name].metadata == one.metadata
    assert not torch.equal(alone["own"].images, alone["set"].images)
    assert styled.prefill_from(picture(64, 64, seed=9))[1] == "memory"


def test_other_threads_see_what_is_set(styled: Pipeline) -> None:
    """The server asks for keys while the engine draws, whose thread has other LoRAs."""
    prepared = (prepare_reference(picture(64, 64), policy=styled.reference_policy),)
    expected, digest, seen = styled.key_of(prepared), styled.digest, []

    def look() -> None:
        seen.append((styled.key_of(prepared), styled.digest))

    def between(pipe: Pipeline, *_: Any) -> None:
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        assert pipe.key_of(prepared) != expected

    draw(styled, loras={"b": 0.5}, callback_on_step_end=between)
    assert set(seen) == {(expected, digest)}


def test_another_thread_cannot_draw_with_others_meanwhile(styled: Pipeline) -> None:
    refused: list[str] = []

    def other(loras: Any) -> None:
        try:
            styled("a cat", num_inference_steps=1, loras=loras)
        except InvalidRequest as error:
            refused.append(str(error))

    def between(*_: Any) -> None:
        for loras in (None, {"b": 0.25}, {"b": 0.5}):
            thread = threading.Thread(target=other, args=(loras,))
            thread.start()
            thread.join()

    alone = draw(styled, loras={"b": 0.5}, num_inference_steps=1)
    drawn = draw(styled, loras={"b": 0.5}, num_inference_steps=1, callback_on_step_end=between)
    assert len(refused) == 2
    assert all("another thread draws with other LoRAs" in text for text in refused)
    assert torch.equal(drawn.images, alone.images)


def test_a_thread_with_the_same_ones_uses_what_is_attached(styled: Pipeline) -> None:
    """Also where others acted in between: nothing is attached beside it, and nothing is taken away from the first."""
    adapters, found = styled.networks.adapters, []

    def other() -> None:
        with adapters.acting({"b": 0.5}):
            found.append((hooks(styled), adapters.applied))

    with adapters.acting({"b": 0.5}):
        there, applied = hooks(styled), adapters.applied
        with adapters.acting({"b": 0.25}):
            assert hooks(styled) != there
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert hooks(styled) == there
    assert found == [(there, applied)]


def test_the_same_ones_are_not_made_again(styled: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    make = type(styled.networks.adapters)._made
    monkeypatch.setattr(
        "limner.pipeline.adapters.Adapters._made", lambda self, loras: made.append(loras) or make(self, loras)
    )
    there = hooks(styled)
    with styled.networks.adapters.acting({"a": 0.7}):  # as it is set
        assert hooks(styled) == there
    with styled.networks.adapters.acting({"b": 0.5}):
        own = hooks(styled)
    assert (len(made), hooks(styled)) == (1, there)
    assert not set(map(id, own)) & set(map(id, there))
    with styled.networks.adapters.acting([("b", 0.5)]):
        assert hooks(styled) == own  # the same objects, by which CUDA graphs are found again
    with styled.networks.adapters.acting(()):
        assert hooks(styled) == []
    with styled.networks.adapters.acting({"b": 0.5}):
        assert hooks(styled) == own
    assert len(made) == 1
    styled.set_adapters("b", 0.25)
    with styled.networks.adapters.acting({"b": 0.5}):
        assert hooks(styled) != own
    assert len(made) == 3


def test_what_is_replaced_or_moved_is_not_used_again(styled: Pipeline, tmp_path: Path) -> None:
    draw(styled, loras={"b": 0.5})
    styled.delete_adapters("b")
    styled.load_lora_weights(write(tmp_path, original(make_pairs(5)), "c.safetensors"), "b")
    styled.set_adapters(["a"], [0.7])
    new = draw(styled, loras={"b": 0.5})
    styled.set_adapters(["b"], [0.5])
    assert torch.equal(new.images, draw(styled).images)
    styled.set_adapters([], [])  # so that nothing but what the last call had is to be moved
    draw(styled, loras={"b": 0.5})
    styled.to(torch.bfloat16)
    own = draw(styled, loras={"b": 0.5})
    styled.set_adapters(["b"], [0.5])
    assert torch.equal(own.images, draw(styled).images)


def test_what_is_set_stays_while_a_call_has_its_own(styled: Pipeline) -> None:
    adapters = styled.networks.adapters
    changes = {
        "set": lambda: styled.set_adapters("b"),
        "delete": lambda: styled.delete_adapters("b"),
        "unload": styled.unload_lora_weights,
        "disable": styled.disable_lora,
        "enable": styled.enable_lora,
        "fuse": styled.fuse_lora,
        "unfuse": styled.unfuse_lora,
        "move": lambda: styled.to(torch.bfloat16),
    }
    for name, change in changes.items():
        with adapters.acting({"b": 0.5}), pytest.raises(InvalidRequest, match="a call with LoRAs of its own is drawn"):
            change()
        assert [(one.name, one.strength) for one in adapters.applied] == [("a", 0.7)], name
    assert adapters.names == ["a", "b"]


def test_own_ones_act_while_those_that_are_set_are_disabled(styled: Pipeline) -> None:
    expected = draw(styled, loras={"b": 0.5})
    styled.disable_lora()
    assert "loras" not in draw(styled).metadata
    own = draw(styled, loras={"b": 0.5})
    assert torch.equal(own.images, expected.images)
    assert own.metadata == expected.metadata
    styled.enable_lora()
    assert draw(styled).metadata["loras"][0]["name"] == "a"


def test_fused_ones_are_refused_with_the_remedy(styled: Pipeline) -> None:
    styled.fuse_lora()
    for loras in ({"b": 0.5}, {"a": 1.0}, ()):
        with pytest.raises(InvalidRequest, match=r"loras: a is fused into the weights, .* unfuse_lora\(\) first"):
            draw(styled, loras=loras)
    styled.disable_lora()  # out of the weights
    assert [one["name"] for one in draw(styled, loras={"b": 0.5}).metadata["loras"]] == ["b"]
    styled.enable_lora()
    styled.unload_lora_weights()  # as in diffusers, fused ones stay in the weights
    with pytest.raises(InvalidRequest, match="loras: a is fused into the weights"):
        draw(styled, loras=())
    styled.unfuse_lora()
    assert "loras" not in draw(styled, loras=()).metadata


@pytest.mark.parametrize(
    ("loras", "message"),
    [
        ({"c": 1.0}, "loras: 'c' not loaded; loaded: a, b; more are loaded with --lora FILE when limner starts"),
        ({"a": float("nan")}, "loras: nan of 'a' is not a finite number"),
        ({"a": True}, "loras: True of 'a' is not a finite number"),
        ({"a": None}, "loras: None of 'a' is not a finite number"),
        ({"a": 10**400}, "loras: a number of over 300 digits of 'a' is not a finite number"),
        ({"a": "0.5"}, "loras: '0.5' of 'a' is not a finite number"),
        ([("a", 1.0), ("a", 2.0)], "names a LoRA twice; add up its strengths"),
        ("a", "loras: 'a' is not names with strengths"),
        (["a", "b"], "is not names with strengths"),
        ([("a", 1.0, 2.0)], "is not names with strengths"),
        ({3: 1.0}, "is not names with strengths"),
        (0.5, "loras: 0.5 is not names with strengths"),
    ],
    ids=str,
)
def test_what_is_refused_changes_nothing(loras: Any, message: str, styled: Pipeline) -> None:
    there = hooks(styled)
    with pytest.raises(InvalidRequest) as refused:
        draw(styled, loras=loras)
    assert message in str(refused.value)
    assert hooks(styled) == there


def test_without_loras_none_can_be_named(pipe: Pipeline) -> None:
    with pytest.raises(InvalidRequest, match="'a' not loaded; none is loaded; more are loaded with --lora FILE"):
        draw(pipe, loras={"a": 1.0})
    assert torch.equal(draw(pipe, loras={}).images, draw(pipe).images)


def test_they_are_read_in_the_order_of_names() -> None:
    assert read_loras({"b": 1, "a": 0.5}) == read_loras([["a", 0.5], ("b", 1.0)]) == (("a", 0.5), ("b", 1.0))
    assert read_loras(None) is None
    assert read_loras({}) == ()
