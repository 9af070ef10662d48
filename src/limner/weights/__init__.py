"""Checkpoint layouts, strict loading, digests. Files in, networks out."""
