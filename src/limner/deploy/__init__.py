"""Limner on more than one process: routing, bulk editing."""
