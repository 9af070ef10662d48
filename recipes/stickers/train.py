"""Trains transformer and text encoder of the bundled model together, on 0 to 4 references in one mixture.

A step runs the code path of inference: `Transformer.prefill` on the references, which see only each other at noise level
0, then `Transformer.forward` with their keys and values. The loss is that of rectified flow on the velocity.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from common import Average, Log, Optimizer, arguments, save_checkpoint, step_rng
from limner.config import TransformerConfig
from limner.model.transformer import Transformer
from limner.schedule import empirical_mu
from limner.tokens import image_ids, reference_ids, text_ids

CHANNELS = 48
TEXT_LAYERS = (1, 2, 3)
TEXT = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, "tie_word_embeddings": True}  # fmt: skip
GEOMETRY = TransformerConfig(
    num_double_blocks=2, num_single_blocks=6, num_heads=6, head_dim=32, text_width=128 * len(TEXT_LAYERS),
    in_channels=CHANNELS, out_channels=CHANNELS, rope_axes=(8, 8, 8, 8), time_channels=128,
)  # fmt: skip
DECAY_PART = 0.35


class Model(nn.Module):
    """Transformer and text encoder with one loss."""

    def __init__(self, vocabulary: int, *, pad: int) -> None:
        super().__init__()
        self.transformer = Transformer(GEOMETRY)
        self.text_encoder = Qwen3ForCausalLM(Qwen3Config(vocab_size=vocabulary, pad_token_id=pad, **TEXT))
        for name, p in self.transformer.named_parameters():
            if p.dim() == 2:
                zero = "modulation" in name or name.startswith(("norm_out", "proj_out"))
                nn.init.zeros_(p) if zero else nn.init.normal_(p, std=0.02 if "time" in name else p.shape[1] ** -0.5)
                if name.endswith(("to_out.weight", "to_out.0.weight", "linear_out.weight", "to_add_out.weight")):
                    p.data.mul_(0.5)

    def forward(self, batch: dict[str, Any], noise: Tensor, sigma: Tensor) -> Tensor:
        """Squared error of the velocity, (B,)."""
        out = self.text_encoder.model(
            input_ids=batch["ids"], attention_mask=batch["mask"], output_hidden_states=True, use_cache=False
        )
        txt = torch.cat([out.hidden_states[i] for i in TEXT_LAYERS], dim=-1)
        references = None
        if batch["references"]:
            ref = torch.cat(batch["references"], dim=1)
            references = self.transformer.prefill(ref, reference_ids([grid(size) for size in batch["reference_sizes"]]))
        clean = batch["result"]
        noisy = torch.lerp(clean, noise, sigma[:, None, None])
        velocity = self.transformer(
            noisy,
            txt,
            sigma,
            img_ids=image_ids(grid(batch["size"])),
            txt_ids=text_ids(txt.shape[1]),
            references=references,
        )
        return (velocity.float() - (noise - clean)).square().mean((1, 2))


def grid(size: tuple[int, int]) -> tuple[int, int]:
    """Token grid (h, w) of a picture of (width, height) pixels."""
    return size[1] // 16, size[0] // 16


class Batches:
    """Batches of one layout each (sizes of result and references), drawn in proportion to the examples they have."""

    def __init__(self, data: dict[str, Any]) -> None:
        self._data = data
        self._buckets: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for i, e in enumerate(data["examples"]):
            self._buckets[e["result"][0], tuple(size for size, _ in e["references"])].append(i)

    def draw(self, rng: random.Random, size: int) -> dict[str, Any]:
        key = rng.choices(list(self._buckets), [len(b) for b in self._buckets.values()])[0]
        return self.collect([rng.choice(self._buckets[key]) for _ in range(size)])

    def collect(self, chosen: list[int]) -> dict[str, Any]:
        tokens, examples = self._data["tokens"], self._data["examples"]
        size, sizes = examples[chosen[0]]["result"][0], [s for s, _ in examples[chosen[0]]["references"]]
        return {
            "size": size,
            "reference_sizes": sizes,
            "result": tokens[size][[examples[i]["result"][1] for i in chosen]].float(),
            "references": [
                tokens[s][[examples[i]["references"][slot][1] for i in chosen]].float() for slot, s in enumerate(sizes)
            ],
            "ids": self._data["ids"][chosen].long(),
            "mask": self._data["mask"][chosen],
        }


def draw_sigma(generator: torch.Generator, num: int, num_tokens: int) -> Tensor:
    """Mostly logit-normal levels under the shift of a 4-step run, some uniform ones."""
    e_mu = math.exp(empirical_mu(num_tokens, num_steps=4))
    base = torch.sigmoid(torch.randn(num, generator=generator))
    shifted = e_mu / (e_mu + (1 / base - 1))
    uniform = torch.rand(num, generator=generator)
    kind = torch.rand(num, generator=generator)
    return torch.where(kind < 0.15, uniform, torch.where(kind < 0.25, torch.ones(num), shifted))


def learning_rate(step: int, steps: int) -> float:
    """Warm-up, constant, then linearly to 0 over the last part."""
    return min(1.0, (step + 1) / 100, max(0.0, (steps - step) / (DECAY_PART * steps)))


def main() -> None:
    parser = arguments(__doc__ or "", steps=1150, batch=32, lr=2e-3)
    parser.add_argument("--data", required=True, help="data.pt that prepare.py wrote")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    log = Log(args.out)
    data = torch.load(args.data, weights_only=True)
    batches = Batches(data)
    torch.manual_seed(args.seed)
    model = Model(data["vocabulary"], pad=0)
    optimizer = Optimizer(model, lr=args.lr, matrices=lambda name, p: "blocks." in name or ".layers." in name)
    average = Average(model, 0.998)
    first = 0
    if args.resume:
        state = torch.load(args.out / "checkpoint.pt", weights_only=True)
        model.load_state_dict(state["model"])
        average.values = state["average"]
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    log.write(parameters=sum(p.numel() for p in model.parameters()), examples=len(data["examples"]), first=first)
    losses: dict[int, list[float]] = defaultdict(list)
    for step in range(first, args.steps):
        rng, generator = step_rng(args.seed, step)
        batch = batches.draw(rng, args.batch)
        noise = torch.randn(batch["result"].shape, generator=generator)
        sigma = draw_sigma(generator, args.batch, noise.shape[1])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch, noise, sigma).mean()
        optimizer.step(loss, rate=learning_rate(step, args.steps))
        average.update(model, step)
        losses[len(batch["references"])].append(loss.item())
        if (step + 1) % 50 == 0:
            log.write(step=step + 1, **{f"loss_{n}_references": sum(v) / len(v) for n, v in sorted(losses.items())})
            losses.clear()
        stop = log.seconds > args.minutes * 60 or step + 1 == args.steps
        if stop or (step + 1) % 200 == 0:
            state = {
                "model": model.state_dict(),
                "average": average.values,
                "optimizer": optimizer.state_dict(),
                "step": step + 1,
            }
            save_checkpoint(args.out / "checkpoint.pt", state)
        if stop:
            break


if __name__ == "__main__":
    main()
