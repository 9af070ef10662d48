"""Wire schemas of the OpenAI Images dialect. Source: the types of the `openai` Python package (2026-08).

Further fields are those that vLLM-Omni and SGLang take on the same paths.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from limner.options import MAX_MODEL_NAME
from limner.requests import MAX_PROMPT_CHARACTERS
from limner.server.dialects.control_fields import ControlFields, Expansion, LoraFields
from limner.server.dialects.unused import ABOUT, Guidance, NegativePrompt, Unused, UnusedField, UnusedFlag

__all__ = [
    "EDIT_BODY",
    "Edit",
    "EditForm",
    "Generation",
    "ImageData",
    "ImageSource",
    "Images",
    "ModelEntry",
    "Models",
    "NestedUrl",
]

MAX_IMAGES = 10
MAX_PARTIAL = 3
_Choice = Annotated[str | None, Field(max_length=20), ABOUT, Unused("auto")]


class Generation(LoraFields):
    """Body of /v1/images/generations; /v1/images/edits has these fields as a form, and pictures."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT_CHARACTERS)
    model: str | None = Field(None, max_length=MAX_MODEL_NAME)
    n: int | None = Field(1, ge=1, le=MAX_IMAGES)
    size: str | None = Field(
        "auto", max_length=20, description='"auto", as image 1 is used, or WIDTHxHEIGHT, multiples of 16'
    )
    width: int | None = Field(None, ge=1, le=16384, description="with height, instead of size")
    height: int | None = Field(None, ge=1, le=16384, description="with width, instead of size")
    response_format: Literal["b64_json", "url"] | None = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] | None = "png"
    output_compression: int | None = Field(None, ge=0, le=100, description="quality of jpeg and webp; png: 100 alone")
    background: str | None = Field(
        None, max_length=100, description="auto, opaque, or the colour behind transparent references, as white or #fff"
    )
    stream: bool | None = False
    partial_images: int | None = Field(0, ge=0, le=MAX_PARTIAL)
    user: str | None = Field(None, max_length=1000)
    seed: int | None = Field(None, ge=0, le=2**63 - 1)
    num_inference_steps: int | None = Field(None, ge=1, le=50, description="null: the model's own")
    references: str | None = Field(None, max_length=200)
    safety_identifier: str | None = Field(None, max_length=1000)

    quality: _Choice = None
    moderation: _Choice = None
    style: _Choice = None
    input_fidelity: _Choice = None
    complexity: _Choice = None
    # vLLM-Omni and SGLang
    negative_prompt: NegativePrompt = None
    guidance_scale: Guidance = None
    true_cfg_scale: UnusedField = None
    flow_shift: UnusedField = None
    max_sequence_length: UnusedField = None
    generator_device: UnusedField = None
    layers: UnusedField = None
    lora: UnusedField = None
    bot_task: UnusedField = None
    system_prompt: UnusedField = None
    use_system_prompt: UnusedField = None
    extra_params: UnusedField = None
    infer_align_image_size: UnusedFlag = None
    vae_use_slicing: UnusedFlag = None
    vae_use_tiling: UnusedFlag = None
    output_quality: Annotated[Any, ABOUT, Unused("default")] = None
    enable_teacache: UnusedFlag = None
    enable_upscaling: UnusedFlag = None
    enhance_prompt: UnusedFlag = None
    diffusers_kwargs: UnusedField = None


class EditForm(Generation, ControlFields):
    """The fields of /v1/images/edits that are no pictures."""


class NestedUrl(BaseModel):
    """A URL as chat messages have it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    url: str


class ImageSource(BaseModel):
    """A picture of a JSON body: a URL, data URL or base64. Files are not kept under ids here."""

    model_config = ConfigDict(extra="forbid", strict=True)

    image_url: str | NestedUrl | None = None
    file_id: str | None = None

    @property
    def text(self) -> str | None:
        return self.image_url.url if isinstance(self.image_url, NestedUrl) else self.image_url


class Edit(EditForm):
    """JSON body of /v1/images/edits. `images` is OpenAI's; `image` and `url` are what others take."""

    parts = (Expansion, ImageSource, NestedUrl)

    images: list[ImageSource | str] | None = Field(None, max_length=16)
    image: str | list[str] | None = None
    url: str | list[str] | None = None
    mask: ImageSource | str | None = None
    canvas: ImageSource | str | None = Field(
        None, description="the picture to repaint, which is no reference; without it the first picture"
    )


class ImageData(BaseModel):
    b64_json: str | None = None
    url: str | None = None


class Images(BaseModel):
    created: int
    data: list[ImageData]
    output_format: str
    size: str
    quality: str
    background: str
    usage: dict[str, Any]
    limner: dict[str, Any]


class ModelEntry(BaseModel):
    id: str
    object: str = "model"
    created: int = 0
    owned_by: str = "limner"


class Models(BaseModel):
    object: str = "list"
    data: list[ModelEntry]


def _whole(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema with what it refers to in place, since it stands in another document."""
    parts = schema.pop("$defs", {})

    def filled(value: Any) -> Any:
        if isinstance(value, list):
            return [filled(one) for one in value]
        if not isinstance(value, dict):
            return value
        if "$ref" in value:
            return filled(parts[value["$ref"].rpartition("/")[2]])
        return {name: filled(one) for name, one in value.items()}

    whole: dict[str, Any] = filled(schema)
    return whole


_FILES = {"type": "array", "items": {"type": "string", "format": "binary"}, "maxItems": 16}
_TEXTS = {"type": "array", "items": {"type": "string"}, "maxItems": 16}
EDIT_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["prompt"],
                    "properties": {
                        "image": _FILES,
                        "image[]": _FILES,
                        "url": _TEXTS,
                        "url[]": _TEXTS,
                        "mask": {"type": "string", "format": "binary"},
                        "canvas": {"type": "string", "format": "binary"},
                        **{name: {"type": "string"} for name in EditForm.model_fields},
                    },
                }
            },
            "application/json": {"schema": _whole(Edit.model_json_schema())},
        },
    }
}
"""For the OpenAPI document: /v1/images/edits reads its body itself."""
