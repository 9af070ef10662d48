"""Kernels in C, for what no library does fast enough.

Knows tensors and the machine (compiler, cache folder), and nothing else of Limner.
"""
