"""Names that are not known: of other tools, and mistyped; of models, as repositories have them."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from limner.errors import InvalidRequest
from limner.mcp.inputs import EditInputs as ToolEditInputs
from limner.mcp.inputs import GenerateInputs, read_inputs
from limner.models import published, similar
from limner.server.dialects.bfl import EditInputs, Inputs
from limner.server.dialects.openai_schemas import Edit, EditForm, Generation
from limner.server.dialects.references import ReferenceInputs
from limner.server.dialects.unknown_fields import told
from limner.spelling import meant, no_option


@pytest.mark.parametrize(
    ("name", "known", "found"),
    [
        ("promt", ["prompt", "image"], "prompt"),
        ("--cfg-scale", ["--guidance", "--steps"], "--guidance"),
        ("steps", ["num_inference_steps", "step_callback"], "num_inference_steps"),
        ("num_inference_steps", ["steps"], "steps"),
        ("H", ["width", "height"], "height"),
        ("size", ["width", "height"], "width"),
        ("Seed", ["seed"], "seed"),
        ("frobnicate", ["prompt", "n"], None),
        ("x", ["n"], None),
        ("num_images", ["input_image", "prompt"], None),
        ("num_images_per_prompt", ["image_prompt"], None),
        ("references", ["reference_weights"], None),
        ("mask_image", ["num_images"], None),
    ],
)
def test_what_is_meant(name: str, known: list[str], found: str | None) -> None:
    assert meant(name, known) == found
    assert meant("sed", ["seed"], near=False) is None
    assert no_option("--sampler") is not None
    assert no_option("--steps") is None


@pytest.mark.parametrize(
    ("kind", "body", "place", "message"),
    [
        (Inputs, {"widht": 64}, ("widht",), "is not a field here; did you mean width?"),
        (Inputs, {"images": []}, ("images",), "did you mean input_image?"),
        (Inputs, {"n_images": 2}, ("n_images",), "is not a field here; leave it out"),
        (Inputs, {"num_inference_steps": 4}, ("num_inference_steps",), "did you mean steps?"),
        (Inputs, {"finetune_idd": "x"}, ("finetune_idd",), "is not a field here; leave it out"),
        (EditInputs, {"expand": {"siz": [64, 64]}}, ("expand", "Expansion", "siz"), "did you mean size?"),
        (Generation, {"steps": 4}, ("steps",), "did you mean num_inference_steps?"),
        (Edit, {"images": [{"imag_url": "x"}]}, ("images", 0, "ImageSource", "imag_url"), "did you mean image_url?"),
        (EditForm, {"maskblur": "4"}, ("maskblur",), "did you mean mask_blur?"),
        (ReferenceInputs, {"image": ["x"]}, ("image",), "did you mean images?"),
    ],
)
def test_unknown_fields_of_bodies(kind: type[BaseModel], body: dict[str, Any], place: Any, message: str) -> None:
    """And what else is wrong with a body is told as it is without them."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({"prompt": 7, **body})
    found = {one["loc"]: told(one, kind) for one in caught.value.errors()}
    assert message in found[place]
    if "prompt" in kind.model_fields:
        assert found["prompt",] == "Input should be a valid string"


@pytest.mark.parametrize("field", ["images", "input_image", "ref_images", "reference_images"])
def test_unknown_arguments_of_tools(field: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{field}: is not an argument of this tool; did you mean pictures?"):
        read_inputs(ToolEditInputs, {"prompt": "a", "pictures": ["a.png"], field: ["b.png"]})
    with pytest.raises(InvalidRequest, match="^mask_image: is not an argument of this tool; they are: "):
        read_inputs(GenerateInputs, {"prompt": "a", "mask_image": "b.png"})


@pytest.mark.parametrize(
    ("name", "hub_id"),
    [
        ("KLEIN-4B", "FLUX.2-klein-4B"),
        ("FLUX.2-klein-base-4B", "FLUX.2-klein-base-4B"),
        ("black-forest-labs/flux.2-klein-9b-kv", "FLUX.2-klein-9b-kv"),
        ("flux2-klein-4b", "FLUX.2-klein-4B"),
        ("klein-4b-base", "FLUX.2-klein-base-4B"),
        ("FLUX.2 [klein] 9B", "FLUX.2-klein-9B"),
        ("someone/FLUX.2-klein-4B", None),
        ("klein-4b-fp8", None),
        ("klein", None),
    ],
)
def test_names_of_published_models(name: str, hub_id: str | None) -> None:
    found = published(name)
    assert (None if found is None else found.hub_id) == (hub_id and f"black-forest-labs/{hub_id}")
    assert (similar("klein4b"), similar("klein-4b-fp8"), similar("stickers")) == ("klein-4b", "klein-4b", None)
