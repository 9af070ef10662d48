"""The version of the package, as a value: who needs it imports it from here and not from the package root."""

__all__ = ["__version__"]

__version__ = "0.1.0"
