"""GGUF files through the `gguf` package: header, architecture, and tensors widened a few rows at a time.

Tensors in F32, F16 and BF16 are memory-mapped. Quantized ones become float32, rounded once to the requested dtype. Knows
no names of any network.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limner.errors import CheckpointError, first_line
from limner.weights.files import VALUES_AT_ONCE, TensorFile, TensorInfo, check_regular

__all__ = ["QUANTIZED", "GgufFile"]

QUANTIZED = frozenset(
    (
        *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
        *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
        *("IQ1_M", "IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS", "IQ4_NL"),
    )
)
"""Block formats that are read."""
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class GgufFile(TensorFile):
    """One GGUF file. `architecture` is that of its header, "" if it names none; `hyperparameters` are its single values."""

    architecture: str
    hyperparameters: Mapping[str, Any]

    def __init__(self, path: Path) -> None:
        check_regular(path)
        self.path, self.files, self.headers = path, (path,), ()
        try:
            self._reader = _open(path)
            field = self._reader.get_field("general.architecture")
            self.architecture = str(field.contents()) if field is not None else ""
            self.hyperparameters = {
                name: one.contents() for name, one in self._reader.fields.items() if len(one.types) == 1
            }
        except Exception as error:  # numpy and the reader raise many types for a damaged header
            raise CheckpointError(
                f"{path}: cannot be read as GGUF ({first_line(error)}); it is truncated or damaged, download it again"
            ) from error
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        for name, tensor in self._tensors.items():
            kind = tensor.tensor_type.name
            if kind not in QUANTIZED and kind not in _PLAIN:
                raise CheckpointError(
                    f"{path}: {name} is {kind}; allowed: {', '.join([*_PLAIN, *sorted(QUANTIZED)])}; take another file of "
                    "these weights"
                )
        self.infos = {
            name: TensorInfo(
                dtype=tensor.tensor_type.name,
                shape=tuple(int(size) for size in reversed(tensor.shape.tolist())),
                nbytes=int(tensor.n_bytes),
            )
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> Tensor:
        """Return a tensor, in float32 if it is quantized."""
        return self.read_as(name, None)

    def read_as(self, name: str, dtype: torch.dtype | None, rows: slice | None = None) -> Tensor:
        """Return some rows of a tensor (None: all) in a dtype (None: its own, float32 if quantized)."""
        tensor, kind = self._tensors[name], self.infos[name].dtype
        data = tensor.data if rows is None else tensor.data[rows]
        if kind in _PLAIN:
            plain: Tensor = torch.from_numpy(data).view(_PLAIN[kind])
            return plain if dtype is None else plain.to(dtype)
        from gguf.quants import dequantize

        width = self.infos[name].shape[-1]
        matrix = data.reshape(-1, data.shape[-1])
        found = torch.empty(len(matrix), width, dtype=dtype or torch.float32)
        step = max(1, VALUES_AT_ONCE // width)
        for start in range(0, len(matrix), step):
            found[start : start + step] = torch.from_numpy(dequantize(matrix[start : start + step], tensor.tensor_type))
        return found.view(*data.shape[:-1], width)


def _open(path: Path) -> Any:
    from gguf import GGUFReader

    class Reader(GGUFReader):
        """Refuse counts that point past the end; the package reads such arrays as empty and may not terminate."""

        def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
            import numpy as np

            end = int(offset) + int(count) * np.dtype(dtype).itemsize
            if end > len(self.data):
                raise ValueError(f"a header or tensor ends at byte {end}, the file at {len(self.data)}")
            return super()._get(offset, dtype, count, override_order)

    return Reader(path, "c")  # copy on write: torch warns about arrays that are read-only
