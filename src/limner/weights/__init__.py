"""Weights: checkpoint layouts, strict loading, LoRA files, digests. Files in, networks out."""
