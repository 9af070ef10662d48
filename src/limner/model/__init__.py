"""The networks. This package knows torch and `limner.config`, `limner.tokens`: no files, pictures or environment."""
