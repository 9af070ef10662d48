"""Limner on many machines: which replica a request goes to, and what runs it there."""
