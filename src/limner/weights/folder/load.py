"""Load the networks of a model strictly, each from a folder or a file of any layout.

Tensors that are stored wide are memory-mapped and become the parameters themselves, so weights are in memory once. Every
tensor that is missing, unexpected, of another shape or not finite is named. Pickles are never opened.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from limner.config import TransformerConfig
from limner.errors import CheckpointError, first_line
from limner.model.autoencoder import Autoencoder
from limner.model.divide import Sharding, agree_on_arithmetic, divide
from limner.model.shards import Ranks
from limner.model.text_encoder import TextEncoder
from limner.model.transformer import Transformer
from limner.weights.checkpoint import Checkpoint
from limner.weights.digest import digest_tensors
from limner.weights.networks import empty_autoencoder, empty_text_network, empty_transformer, text_layers
from limner.weights.parts import open_part
from limner.weights.tokenizer import load_tokenizer

__all__ = ["load_autoencoder", "load_text_encoder", "load_transformer", "transformer_digest"]


def load_transformer(
    source: Path,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    quantize: str | None = None,
    like: Path | None = None,
    variant: str | None = None,
    after: Callable[[Tensor], None] | None = None,
    ranks: Ranks | None = None,
) -> Transformer:
    """Load the transformer of a folder or file; `like` is a config.json for what the shapes of a file do not say,
    `variant` which weights of a folder are read.

    `quantize` "int8" makes the blocks' matrices int8; a checkpoint in Limner's int8 has them so already. `after` is
    called with each tensor that was read. With `ranks` this process loads its shard: at most the shard and one whole
    tensor are copied. Raises `CheckpointError`.
    """
    checkpoint, transformer = _open_transformer(source, quantize=quantize, like=like, variant=variant)
    ranks = ranks or Ranks.single()
    whole, sharding = transformer.state_dict(), Sharding(config=transformer.config, ranks=ranks)
    divide(transformer, ranks)

    def own(name: str, value: Tensor) -> Tensor:
        part = sharding.part(name, value)
        of_file = value.untyped_storage().nbytes() > value.nbytes
        # A view of the file stays mapped. A view of a tensor that was cast would hold the whole tensor in memory.
        return part if of_file or part.nbytes == value.nbytes else part.clone()

    _assign(transformer, checkpoint, dtype=dtype, device=device, after=after, expected=whole, own=own)
    agree_on_arithmetic(transformer, ranks)
    return transformer


def transformer_digest(
    source: Path,
    *,
    dtype: torch.dtype | None,
    quantize: str | None = None,
    like: Path | None = None,
    variant: str | None = None,
) -> str:
    """Return the digest of the whole transformer that `load_transformer` loads, read tensor by tensor."""
    checkpoint, transformer = _open_transformer(source, quantize=quantize, like=like, variant=variant)
    return digest_tensors(checkpoint.stream(transformer.state_dict(), dtype))


def _open_transformer(
    source: Path, *, quantize: str | None, like: Path | None, variant: str | None
) -> tuple[Checkpoint, Transformer]:
    """Return the checkpoint, and its network on the meta device."""
    checkpoint = open_part("transformer", source, like=like, variant=variant)
    config = TransformerConfig.from_diffusers(checkpoint.config, where=str(source))
    int8 = quantize == "int8" or checkpoint.layout.quantization == "int8"
    return checkpoint, empty_transformer(config, int8=int8, where=source)


def load_autoencoder(
    source: Path,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    like: Path | None = None,
    variant: str | None = None,
    after: Callable[[Tensor], None] | None = None,
) -> Autoencoder:
    """Load the autoencoder of a diffusers folder, or of a file with diffusers' or the original's names."""
    checkpoint = open_part("vae", source, like=like, variant=variant)
    network = empty_autoencoder(checkpoint.config, where=source / "config.json" if source.is_dir() else source)
    _assign(network, checkpoint, dtype=dtype, device=device, after=after)
    return Autoencoder(network)


def load_text_encoder(
    source: Path,
    tokenizer_folder: Path,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    out_layers: tuple[int, ...] | None = None,
    quantize: str | None = None,
    like: Path | None = None,
    variant: str | None = None,
    after: Callable[[Tensor], None] | None = None,
) -> TextEncoder:
    """Load a Qwen3 from a folder or file up to the last layer that is read; later layers and the head stay on disk.

    `quantize` "int8" makes the layers' matrices int8; a checkpoint in Limner's int8 has them so already. Raises
    `CheckpointError`, also for a tokenizer that does not fit.
    """
    tokenizer = load_tokenizer(tokenizer_folder)
    checkpoint = open_part("text_encoder", source, like=like, variant=variant)
    depth, layers = text_layers(checkpoint.config, out_layers, where=source)
    used = max(layers)
    where = source / "config.json" if source.is_dir() else source
    int8 = quantize == "int8" or checkpoint.layout.quantization == "int8"
    network = empty_text_network(checkpoint.config, used=used, depth=depth, where=where, int8=int8)
    _assign(network, checkpoint, dtype=dtype, device=device, used=used, depth=depth, after=after)
    try:
        encoder = TextEncoder(network, tokenizer, out_layers=layers)
        encoder.rebuild_rotary()
        largest = int(encoder.tokenize("a", max_sequence_length=8).ids.max())
    except Exception as error:  # three libraries raise their own types for a damaged tokenizer
        raise CheckpointError(f"{tokenizer_folder}: the tokenizer cannot be used ({first_line(error)})") from error
    if max(largest + 1, len(tokenizer)) > network.config.vocab_size:
        raise CheckpointError(
            f"{tokenizer_folder}: the tokenizer has {len(tokenizer)} tokens, the text encoder {network.config.vocab_size}; "
            "they are of different models"
        )
    return encoder


def _assign(
    module: nn.Module,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    used: int | None = None,
    depth: int | None = None,
    after: Callable[[Tensor], None] | None = None,
    expected: Mapping[str, Tensor] | None = None,
    own: Callable[[str, Tensor], Tensor] | None = None,
) -> None:
    """Assign the tensors of a checkpoint to a module on the meta device, one at a time.

    int8 matrices of the module are quantized one by one, unless they are stored so: a model is never in memory both wide
    and narrow. `used` and `depth` are for a text encoder without its last layers. `after` is called with each tensor. A
    module that is a shard gets its part of each tensor from `own`, and the whole network's tensors as `expected`.
    Raises `CheckpointError`.
    """
    expected = module.state_dict() if expected is None else expected
    checkpoint.check(expected, used=used, depth=depth)
    tensors = {}
    for name, value in checkpoint.stream(expected, dtype):
        tensors[name] = (value if own is None else own(name, value)).to(device)
        if after is not None:
            after(tensors[name])
    module.load_state_dict(tensors, strict=True, assign=True)
    module.requires_grad_(False)
    module.eval()
