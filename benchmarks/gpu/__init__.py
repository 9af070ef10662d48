"""The parts of benchmarks/device.py: `measure` (a run and its report), `correct`, `speed`, `memory`, `goals`."""
