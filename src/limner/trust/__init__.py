"""Checks of what is asked and drawn, and where pictures say that they come from."""
