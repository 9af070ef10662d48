"""One wire dialect each."""
