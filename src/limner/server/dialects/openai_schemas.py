"""Wire schemas of the OpenAI Images dialect. Source: the types of the `openai` Python package (2026-08)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from limner.requests import MAX_PROMPT_CHARACTERS

__all__ = ["EDIT_FORM", "Generation", "ImageData", "Images", "ModelEntry", "Models"]

MAX_IMAGES = 10
MAX_PARTIAL = 3


class Generation(BaseModel):
    """Body of /v1/images/generations; /v1/images/edits has these fields as a form, and pictures."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT_CHARACTERS)
    model: str | None = Field(None, max_length=200)
    n: int | None = Field(1, ge=1, le=MAX_IMAGES)
    size: str | None = Field("auto", max_length=20, description='"auto" or WIDTHxHEIGHT, multiples of 16')
    response_format: Literal["b64_json", "url"] | None = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] | None = "png"
    output_compression: int | None = Field(None, ge=0, le=100)
    quality: Literal["auto", "low", "medium", "high", "standard", "hd"] | None = None
    background: Literal["auto", "opaque", "transparent"] | None = None
    moderation: Literal["auto", "low"] | None = None
    style: Literal["vivid", "natural"] | None = None
    input_fidelity: Literal["high", "low"] | None = None
    stream: bool | None = False
    partial_images: int | None = Field(0, ge=0, le=MAX_PARTIAL)
    user: str | None = Field(None, max_length=1000)
    seed: int | None = Field(None, ge=0, le=2**63 - 1)
    num_inference_steps: int | None = Field(4, ge=1, le=50)
    references: str | None = Field(None, max_length=200)


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


EDIT_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["prompt"],
                    "properties": {
                        "image": {"type": "array", "items": {"type": "string", "format": "binary"}, "maxItems": 16},
                        "image[]": {"type": "array", "items": {"type": "string", "format": "binary"}, "maxItems": 16},
                        **{name: {"type": "string"} for name in Generation.model_fields},
                    },
                }
            }
        },
    }
}
"""For the OpenAPI document: /v1/images/edits reads its form itself."""
