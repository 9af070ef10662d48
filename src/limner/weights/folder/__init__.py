"""The diffusers folder of a model: find it and its parts, read its settings, load its networks strictly."""

from limner.weights.files import read_json
from limner.weights.folder.kind import FoundKind, chosen_kind, find_kind, kind_of_index, kind_of_transformer
from limner.weights.folder.load import load_autoencoder, load_text_encoder, load_transformer, transformer_digest
from limner.weights.folder.location import PARTS, bundled_model, resolve_model, resolve_part
from limner.weights.folder.settings import FolderSettings, read_settings

__all__ = [
    "PARTS",
    "FolderSettings",
    "FoundKind",
    "bundled_model",
    "chosen_kind",
    "find_kind",
    "kind_of_index",
    "kind_of_transformer",
    "load_autoencoder",
    "load_text_encoder",
    "load_transformer",
    "read_json",
    "read_settings",
    "resolve_model",
    "resolve_part",
    "transformer_digest",
]
