"""LoRA files: find and read them, translate their dialects, check them against a transformer."""

from limner.weights.lora.inspect import LoraReport, inspect_lora
from limner.weights.lora.load import LoraWeights, load_lora
from limner.weights.lora.source import resolve_lora

__all__ = ["LoraReport", "LoraWeights", "inspect_lora", "load_lora", "resolve_lora"]
