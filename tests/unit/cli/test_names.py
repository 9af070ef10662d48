"""Messages of others in the names of the command line."""

from __future__ import annotations

from dataclasses import replace

import pytest

from limner.cli.names import error_text, in_options
from limner.errors import CapacityError, CheckpointError, InvalidRequest, OutputError
from limner.images.reference import ASK_BACKGROUND
from limner.memory import Workload
from limner.pipeline.admission import check_workload

OPTIONS = [
    *("--mask", "--canvas", "--mask-blur", "--padding-mask-crop", "--expand", "--strength", "--preserve", "--parallel"),
    *(
        "--size",
        "--steps",
        "--guidance",
        "--reference-weight",
        "--references",
        "--references-attention",
        "--background",
    ),
    *("--max-pixels", "--image", "--num-images"),
    *("--output", "--model", "--transformer", "--vae", "--text-encoder", "--memory-limit", "--lora"),
]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mask_image: it is white everywhere", "--mask: it is white everywhere"),
        ("width: 100 is no multiple", "--size: width 100 is no multiple"),
        ("num_inference_steps: 0", "--steps: 0"),
        ("mask_blur: needs mask_image or expand", "--mask-blur: needs --mask or --expand"),
        (
            "expand: mask_image and expand are given; expand first",
            "--expand: --mask and --expand are given; expand first",
        ),
        ("canvas: mask_image, expand, strength", "--canvas: --mask, --expand, --strength"),
        ("reuse: use parallel='tensor'", "reuse: use --parallel tensor"),
        ("model: as transformer=, vae= or text_encoder=", "--model: as --transformer, --vae or --text-encoder"),
        ("x: without references= it is joint", "x: without --references-attention it is joint"),
        (f"image 1: flatten it: {ASK_BACKGROUND}", "image 1: flatten it: --background white"),
    ],
)
def test_options_are_named(text: str, said: str) -> None:
    assert in_options(text, OPTIONS) == said


@pytest.mark.parametrize(
    "text",
    [
        "prompt: mentions 'image 3'",
        "prompt: not trained on 'mask_image'; its card: /a/mask_image/b",
        "/m: mask_image.png, ./memory_limit and text_encoder/x are files",
        "output of it: x",
    ],
)
def test_what_is_no_argument_stays(text: str) -> None:
    assert in_options(text, OPTIONS) == text


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["x", "-i", "memory_limit copy.png"], "image 1: memory_limit copy.png is a folder"),
        (["x", "-imemory_limit copy.png"], "image 1: memory_limit copy.png is a folder"),
        (["x", "--image=of text_encoder"], "image 1: of text_encoder is a folder"),
        (["x", "--lora", "a mask_image:0.5"], "--lora: a mask_image is neither a file nor a folder"),
    ],
)
def test_names_of_files_stay(words: list[str], text: str) -> None:
    assert in_options(text, OPTIONS) != text
    assert in_options(f"{text}; mask_image", OPTIONS, typed=words) == f"{text}; --mask"


def test_what_does_not_fit_is_no_option() -> None:
    """References may be of pictures, and tokens of many images."""
    workload = Workload(size=(512, 512), num_text=0, batch=64, references=((256, 256),) * 4)
    told = "4.00 GiB, 1.00 GiB are free; use"
    with pytest.raises(CapacityError) as caught:
        check_workload(4 << 30, 1 << 30, workload)
    assert error_text(caught.value, OPTIONS) == (
        f"references: 1024 reference tokens and 64 x 1024 own tokens need {told} fewer or smaller references "
        "(--max-pixels), a smaller output or fewer images at once"
    )
    with pytest.raises(CapacityError) as caught:
        check_workload(4 << 30, 1 << 30, replace(workload, references=()))
    assert error_text(caught.value, OPTIONS) == (
        f"size: 64 x 1024 own tokens need {told} a smaller output or fewer images at once"
    )
    assert error_text(CapacityError("memory_limit: 1 GiB are too little"), OPTIONS).startswith("--memory-limit: 1 GiB")
    assert error_text(InvalidRequest("references", "a.safetensors is no pack"), OPTIONS).startswith("--references: a.")


def test_errors() -> None:
    named = InvalidRequest("mask_image dir/canvas: a.png", "it has\ncolours")
    assert error_text(named, OPTIONS) == "--mask dir/canvas: a.png: it has colours"
    assert error_text(OutputError("output: a.png is there"), OPTIONS) == "--output: a.png is there"
    assert error_text(OutputError("output: a.png is there"), ["--keys"]) == "output: a.png is there"
    assert error_text(CheckpointError("lora: x"), OPTIONS) == "--lora: x"
    assert error_text(CapacityError("references of 3 pictures: 4 GiB"), OPTIONS) == "references of 3 pictures: 4 GiB"
