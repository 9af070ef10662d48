"""Prompts to text tokens, over a Qwen3, up to the last layer that is used.

The tokens are the hidden states after layers (L/4, L/2, 3L/4), concatenated on the feature axis. Later layers, the final
norm and the language model head are not loaded. Knows no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from limner.config import KnownWords
from limner.errors import CheckpointError, InvalidRequest
from limner.model.int8 import Int8Linear, settle_products
from limner.model.qwen3 import Qwen3

__all__ = ["TextEncoder", "TokenizedPrompt", "default_out_layers"]

_MAX_REPEATS = 2
"""How often a chat template may repeat the prompt."""
_MAX_TEMPLATE = 1 << 15
"""Characters that it may add."""


def default_out_layers(num_layers: int) -> tuple[int, int, int]:
    """Return the layers that klein models use of an encoder with `num_layers`: 9, 18 and 27 of 36."""
    return num_layers // 4, num_layers // 2, 3 * num_layers // 4


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizedPrompt:
    """`ids` and `mask` (S,), padded; `num_tokens` before cutting; `cut` is the text that did not fit, or ""."""

    ids: Tensor
    mask: Tensor
    num_tokens: int
    cut: str


class TextEncoder(nn.Module):
    """`network` is a `Qwen3`, or transformers' `Qwen3Model`, of `max(out_layers)` layers; unless these are all, its final
    norm is the identity. `tokenizer` is one of transformers, or a `limner.weights.plain_tokenizer.PlainTokenizer`.
    `known` are the only words that it was trained on, if there are such.
    """

    known = KnownWords()

    def __init__(self, network: Any, tokenizer: Any, *, out_layers: Sequence[int]) -> None:
        super().__init__()
        self.network = network
        self.tokenizer = tokenizer
        self.out_layers = tuple(out_layers)

    @property
    def dtype(self) -> torch.dtype:
        return self._weight.dtype

    @property
    def device(self) -> torch.device:
        return self._weight.device

    @property
    def _weight(self) -> Tensor:
        parameter: Tensor = next(self.network.parameters())
        return parameter

    @property
    def quantization(self) -> str | None:
        """ "int8" if the layers' matrices are `Int8Linear`, else None."""
        return "int8" if any(isinstance(module, Int8Linear) for module in self.modules()) else None

    def settle(self) -> None:
        """As `Transformer.settle`: int8 weights become fp8 on a GPU where that is faster."""
        settle_products(self, self.dtype)

    def rebuild_rotary(self) -> None:
        """Compute transformers' rotary frequencies again in float32: no checkpoint holds them, and casting rounds them."""
        if isinstance(self.network, Qwen3):  # keeps none
            return
        with torch.device(self.device):
            self.network.rotary_emb = type(self.network.rotary_emb)(config=self.network.config)

    @property
    def max_length(self) -> int:
        """The longest sequence, as the tokenizer declares it."""
        return int(self.tokenizer.model_max_length)

    def tokenize(self, prompt: str, *, max_sequence_length: int) -> TokenizedPrompt:
        """Tokenize one user turn of the chat template, thinking off, padded or cut to `max_sequence_length`."""
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        if len(text) > _MAX_REPEATS * len(prompt) + _MAX_TEMPLATE:
            raise CheckpointError(
                f"tokenizer: the chat template makes {len(text)} characters of a prompt of {len(prompt)}; take the "
                "template of Qwen3, which adds under 100"
            )
        ids = self.tokenizer(text, truncation=False, verbose=False)["input_ids"]
        padded = self.tokenizer(
            text, return_tensors="pt", padding="max_length", truncation=True, max_length=max_sequence_length
        )
        return TokenizedPrompt(
            ids=padded["input_ids"][0],
            mask=padded["attention_mask"][0],
            num_tokens=len(ids),
            cut=self._words(ids[max_sequence_length:]),
        )

    def _words(self, ids: list[int]) -> str:
        """Return the text of a prompt's tail, without the end of the template unless that is all."""
        text: str = self.tokenizer.decode(ids)
        return text.split(self.tokenizer.eos_token or "<|im_end|>")[0] or text

    def forward(self, prompts: Sequence[TokenizedPrompt], *, out_layers: Sequence[int] | None = None) -> Tensor:
        """Return text tokens (B, S_txt, len(out_layers) * hidden). `out_layers` may name any loaded layers.

        Raises `InvalidRequest` for other layers.
        """
        layers = self.out_layers if out_layers is None else tuple(out_layers)
        loaded = len(self.network.layers)
        if not layers or not all(isinstance(i, int) and 0 <= i <= loaded for i in layers):
            raise InvalidRequest(
                "text_encoder_out_layers",
                f"{list(layers)} has to name layers 0 to {loaded}; layers after the last one read are not loaded: give "
                "text_encoder_out_layers to from_pretrained to load more",
            )
        states = self._hidden_states(torch.stack([p.ids for p in prompts]), torch.stack([p.mask for p in prompts]))
        return torch.cat([states[i] for i in layers], dim=-1)

    def _hidden_states(self, ids: Tensor, mask: Tensor) -> Sequence[Tensor]:
        """Return the hidden states (B, S, C) before each layer and after the last of ids and mask (B, S)."""
        if isinstance(self.network, Qwen3):
            padded = not mask.all()  # known before the copy: no device is waited for
            states: Sequence[Tensor] = self.network(
                ids.to(self.device), mask.bool().to(self.device) if padded else None
            )
            return states
        out = self.network(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            output_hidden_states=True,
            use_cache=False,
        )
        return tuple(out.hidden_states)
