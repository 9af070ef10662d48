"""A device that is not there: tensors that say "cuda" (or "mps"), compute on the CPU, and tell what a GPU would wait for."""

from tests.support.pretend.device import WRITES, Pretended, PretendedDevice, pretended_device, real

__all__ = ["WRITES", "Pretended", "PretendedDevice", "pretended_device", "real"]
