"""Pictures in and out: formats, decoding with limits, references, encoding with metadata. Knows nothing of models."""

from limner.files import printable
from limner.images.canvas import (
    CanvasPlan,
    CanvasReport,
    check_drawn,
    cut,
    cut_mask,
    feathered,
    known_box,
    plan_canvas,
    stitch,
)
from limner.images.decode import decode
from limner.images.encode import check_output, encode, numbered, save, side_by_side
from limner.images.expand import expand_canvas, expanded_size
from limner.images.formats import FORMATS, MEDIA_TYPES, SUFFIXES, format_of
from limner.images.limits import MAX_DECODED_PIXELS, MAX_FILE_BYTES
from limner.images.mask import check_marked, describe_mask, mask_of_picture, picture_of_mask, read_alpha_mask, read_mask
from limner.images.metadata import is_ours, picture_metadata, read_metadata
from limner.images.preserve import Preserved, preserve
from limner.images.reference import (
    Picture,
    PreparedReference,
    ReferenceReport,
    background_colour,
    prepare_canvas,
    prepare_reference,
    prepare_references,
    put_back,
)
from limner.images.tensors import to_pil, to_pixels

__all__ = [
    "FORMATS",
    "MAX_DECODED_PIXELS",
    "MAX_FILE_BYTES",
    "MEDIA_TYPES",
    "SUFFIXES",
    "CanvasPlan",
    "CanvasReport",
    "Picture",
    "PreparedReference",
    "Preserved",
    "ReferenceReport",
    "background_colour",
    "check_drawn",
    "check_marked",
    "check_output",
    "cut",
    "cut_mask",
    "decode",
    "describe_mask",
    "encode",
    "expand_canvas",
    "expanded_size",
    "feathered",
    "format_of",
    "is_ours",
    "known_box",
    "mask_of_picture",
    "numbered",
    "picture_metadata",
    "picture_of_mask",
    "plan_canvas",
    "prepare_canvas",
    "prepare_reference",
    "prepare_references",
    "preserve",
    "printable",
    "put_back",
    "read_alpha_mask",
    "read_mask",
    "read_metadata",
    "save",
    "side_by_side",
    "stitch",
    "to_pil",
    "to_pixels",
]
