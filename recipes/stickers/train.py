"""Train transformer and text encoder of the bundled model together, on 0 to 4 references in one mixture.

A step runs the code path of inference: `Transformer.prefill` on the references, which see only each other at noise level
0, then `Transformer.forward` with their keys and values. Training profits from cached K/V as drawing does: the examples of
a sitting share their references, so one prefill, and its gradient, serves several of them.

A model that runs in 4 steps is trained on its own runs: each example is drawn at noise level 1, and then once more at a
later level, from what the model itself drew and not from the truth. From the truth it would learn at the late levels to
clean up what only the truth can show there, and blur when it meets its own drawing. The loss is the squared error of the
velocity at both, each channel weighted by what its error costs in pixels, and how far each sticker has gone the way to its mirror
image or to grey: a koala is nearly grey, and the first alone leaves it grey.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from common import Average, Log, Optimizer, arguments, form_loss, restore, save_checkpoint, snapshot, step_rng
from limner.config import TransformerConfig
from limner.model.layers import LayerKV
from limner.model.transformer import ReferenceKV, Transformer
from limner.schedule import Schedule, euler_step
from limner.tokens import image_ids, reference_ids, text_ids

CHANNELS = 48
TEXT_LAYERS = (1, 2, 3)
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
GEOMETRY = TransformerConfig(
    num_double_blocks=2,
    num_single_blocks=6,
    num_heads=4,
    head_dim=64,
    text_width=128 * len(TEXT_LAYERS),
    in_channels=CHANNELS,
    out_channels=CHANNELS,
    rope_axes=(16, 16, 16, 16),
    time_channels=128,
)
DECAY_PART = 0.4
NUM_STEPS = 4
LATER_SHARES = (0.15, 0.2, 0.65)
DRAW_WEIGHT = 2
"""How much oftener a sitting without references is drawn than one with them."""


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

    def encode(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the inputs of `Transformer.forward` other than noisy tokens and noise level."""
        out = self.text_encoder.model(
            input_ids=batch["ids"], attention_mask=batch["mask"], output_hidden_states=True, use_cache=False
        )
        txt = torch.cat([out.hidden_states[i] for i in TEXT_LAYERS], dim=-1)
        references = None
        if batch["references"]:
            ids = reference_ids([grid(size) for size in batch["reference_sizes"]], batch["origins"])
            kept = self.transformer.prefill(torch.cat(batch["references"], dim=1), ids)
            asks = len(txt) // len(batch["references"][0])
            references = ReferenceKV(
                layers=tuple(LayerKV(*(x.repeat_interleave(asks, dim=0) for x in layer)) for layer in kept.layers)
            )
        return {
            "txt_tokens": txt,
            "img_ids": image_ids(grid(batch["size"])),
            "txt_ids": text_ids(txt.shape[1]),
            "references": references,
        }

    def forward(self, batch: dict[str, Any], noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Errors of the picture, (B, S, C): drawn at level 1, and at `sigma` (B,) from the model's own drawing.

        Of tokens that are not drawn, the later level has those of the truth, as the pipeline keeps them; they count nothing.
        """
        clean, given = batch["result"], self.encode(batch)
        first = self.transformer(noise, sigma=torch.ones_like(sigma), **given).float()
        level = sigma[:, None, None]
        own, drawn = noise - first.detach(), batch["drawn"]
        noisy = torch.lerp(own if drawn is None else torch.where(drawn, own, clean), noise, level)
        later = self.transformer(noisy, sigma=sigma, **given).float()
        errors = noise - first - clean, noisy - level * later - clean
        return errors if drawn is None else (errors[0] * drawn, errors[1] * drawn)

    @torch.no_grad()
    def sample(self, batch: dict[str, Any], noise: Tensor) -> Tensor:
        """The tokens that 4 steps give, (B, S, C)."""
        given = self.encode(batch)
        sigmas = Schedule().sigmas(noise.shape[1], num_inference_steps=NUM_STEPS)
        x = noise
        for sigma, after in pairwise(sigmas):
            x = euler_step(x, self.transformer(x, sigma=sigma, **given), sigma=sigma, next_sigma=after)
            if (drawn := batch["drawn"]) is not None:
                x = torch.where(drawn, x, torch.lerp(batch["result"], noise, after))
        return x


def load_folder(model: Model, folder: Path) -> None:
    """The weights of a model folder, such as the bundled model's."""
    for name, part in (("transformer", model.transformer), ("text_encoder", model.text_encoder)):
        file = (
            folder / name / ("model.safetensors" if name == "text_encoder" else "diffusion_pytorch_model.safetensors")
        )
        missing = part.load_state_dict(load_file(file), strict=False).missing_keys
        if set(missing) - {"lm_head.weight"}:  # tied to the embedding
            raise SystemExit(f"{file} lacks {', '.join(missing)}; it is of another geometry")


def strayed(error: Tensor, batch: dict[str, Any], cost: Tensor) -> Tensor:
    """Return how far each sticker has moved towards another form (N,): 0 is right, 1 is mirrored, or grey.

    That is the part of the `error` (B, S, C) that lies along the way to the picture of the other form, in the tokens of the sticker.
    """
    found = []
    for form, owners in zip(batch["forms"], batch["owners"].unbind(1), strict=True):
        way = form - batch["result"]
        owner = nn.functional.one_hot(owners, 5)[..., 1:].float()
        along, length = (torch.einsum("bsc,c,bsk->bk", x * way, cost, owner) for x in (error, way))
        found.append(along[length > 0] / length[length > 0])
    return torch.cat(found)


def grid(size: tuple[int, int]) -> tuple[int, int]:
    """Token grid (h, w) of a picture of (width, height) pixels."""
    return size[1] // 16, size[0] // 16


def _bases(data: dict[str, Any]) -> dict[str, Any]:
    """What training sets have to have in common."""
    channels = {tokens.shape[-1] for tokens in data["tokens"].values()}
    return {
        "the tokenizer": data["vocabulary"],
        "the length of prompts": data["ids"].shape[1],
        "the autoencoder": channels,
    }


def joined(sets: list[dict[str, Any]]) -> dict[str, Any]:
    """Several training sets, of one tokenizer and autoencoder, as one; the price in pixels is that of the first.

    Validation of pictures whose size the first set lacks is named for it. Of one size the first set's validation is used.
    """
    first, *others = sets
    for number, data in enumerate(others, start=2):
        if differ := [name for name, one in _bases(first).items() if _bases(data)[name] != one]:
            raise SystemExit(
                f"--data: set {number} differs from the first in {' and '.join(differ)}; make both with the same"
            )
        starts = {size: len(first["tokens"].get(size, ())) for size in data["tokens"]}
        prompts, known = len(first["ids"]), {sitting["size"] for sitting in first["validation"]}
        for sitting in (*data["sittings"], *data["validation"]):
            own = starts[sitting["size"]]
            sitting["results"] = [n + own for n in sitting["results"]]
            sitting["forms"] = [[n + own for n in numbers] for numbers in sitting["forms"]]
            sizes = sitting["reference_sizes"]
            sitting["references"] = [n + starts[size] for n, size in zip(sitting["references"], sizes, strict=True)]
            sitting["prompts"] = [n + prompts for n in sitting["prompts"]]
        for size, tokens in data["tokens"].items():
            first["tokens"][size] = torch.cat([first["tokens"][size], tokens]) if size in first["tokens"] else tokens
        first["sittings"] += data["sittings"]
        new = [sitting for sitting in data["validation"] if sitting["size"] not in known]
        first["validation"] += [{**sitting, "task": f"small_{sitting['task']}"} for sitting in new]
        for name in ("ids", "mask"):
            first[name] = torch.cat([first[name], data[name]])
    return first


class Batches:
    """Batches of sittings of one layout each (sizes of result and references, their places, whether all is drawn), drawn in proportion to their number,
    those to draw from text `draw_weight` times as often."""

    def __init__(self, data: dict[str, Any], *, draw_weight: float = DRAW_WEIGHT) -> None:
        self._data = data
        self._draw_weight = draw_weight
        self._layouts: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
        for sitting in data["sittings"]:
            layout = (
                sitting["size"],
                tuple(sitting["reference_sizes"]),
                tuple(sitting.get("origins", ())),
                "drawn" in sitting,
            )
            self._layouts[layout].append(sitting)

    def draw(self, rng: random.Random, examples: int) -> dict[str, Any]:
        layouts = list(self._layouts.values())
        shares = [len(layout) * (1 if layout[0]["references"] else self._draw_weight) for layout in layouts]
        (sittings,) = rng.choices(layouts, shares)
        if not sittings[0]["references"]:  # the cheapest steps, and the task that needs the most examples
            examples *= 2
        return self.collect([rng.choice(sittings) for _ in range(examples // len(sittings[0]["prompts"]))])

    def validation(self) -> dict[str, list[dict[str, Any]]]:
        """Batches of one sitting each, by task."""
        found: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for sitting in self._data["validation"]:
            found[sitting["task"]].append(self.collect([sitting]))
        return found

    def collect(self, sittings: list[dict[str, Any]]) -> dict[str, Any]:
        tokens, size, sizes = self._data["tokens"], sittings[0]["size"], sittings[0]["reference_sizes"]
        prompts = [i for s in sittings for i in s["prompts"]]
        return {
            "size": size,
            "reference_sizes": sizes,
            "origins": sittings[0].get("origins"),
            "drawn": torch.cat([s["drawn"] for s in sittings])[..., None] if "drawn" in sittings[0] else None,
            "result": tokens[size][[i for s in sittings for i in s["results"]]].float(),
            "forms": [
                tokens[size][[numbers[which] for s in sittings for numbers in s["forms"]]].float() for which in range(2)
            ],
            "owners": torch.cat([s["owners"] for s in sittings]).long(),
            "references": [
                tokens[one][[s["references"][slot] for s in sittings]].float() for slot, one in enumerate(sizes)
            ],
            "ids": self._data["ids"][prompts].long(),
            "mask": self._data["mask"][prompts],
        }


def last_level(num_tokens: int) -> float:
    return Schedule().sigmas(num_tokens, num_inference_steps=NUM_STEPS)[-2].item()


def draw_sigma(generator: torch.Generator, num: int, num_tokens: int) -> Tensor:
    """Mostly the later levels of a 4-step run, the last, which makes the picture, most often; the rest between."""
    levels = Schedule().sigmas(num_tokens, num_inference_steps=NUM_STEPS)[1:-1]
    run = levels[torch.multinomial(torch.tensor(LATER_SHARES), num, replacement=True, generator=generator)]
    spread = 1 - (1 - 0.5 * levels.min()) * torch.rand(num, generator=generator)
    return torch.where(torch.rand(num, generator=generator) < 0.88, run, spread)


def learning_rate(step: int, steps: int) -> float:
    """Warm-up, constant, then linearly to 0 over the last part."""
    return min(1.0, (step + 1) / 100, max(0.0, (steps - step) / (DECAY_PART * steps)))


@torch.no_grad()
def validate(model: Model, batches: dict[str, list[dict[str, Any]]], cost: Tensor) -> dict[str, float]:
    """By task: PSNR in dB of 4-step results, from token errors at their price in pixels; the share of stickers that are
    nearer to another form."""
    found = {}
    for task, some in batches.items():
        errors, strays = [], []
        for i, batch in enumerate(some):
            noise = torch.randn(batch["result"].shape, generator=torch.Generator().manual_seed(i))
            with torch.autocast("cpu", torch.bfloat16):
                result = model.sample(batch, noise)
            error = result.float() - batch["result"]
            errors.append((error.square() * cost).sum(-1).mean().item())
            strays.append(strayed(error, batch, cost) > 0.5)
        found[f"psnr_{task}"] = -10 * math.log10(sum(errors) / len(errors))
        if sum(map(len, strays)):
            found[f"strayed_{task}"] = torch.cat(strays).float().mean().item()
    return found


def compile_blocks(transformer: Transformer) -> None:
    """Fuse the operations between matrix products; one compilation serves all lengths."""
    torch.fx.experimental._config.use_duck_shape = False
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        for name in ("forward", "prefill", "forward_last"):
            if hasattr(block, name):
                setattr(block, name, torch.compile(getattr(block, name), dynamic=True))


def main() -> None:
    parser = arguments(__doc__ or "", steps=4500, batch=48, lr=2e-3)
    parser.add_argument("--data", required=True, nargs="+", help="data.pt that prepare.py wrote; several: all of them")
    parser.add_argument(
        "--draw-weight", type=float, default=DRAW_WEIGHT, help="how much oftener to draw without references"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks (needs a C++ compiler)")
    parser.add_argument(
        "--form-weight", type=float, default=1.0, help="what a sticker of another form weighs in the loss"
    )
    parser.add_argument("--validate-every", type=int, default=400, help="steps between validations")
    parser.add_argument(
        "--init", type=Path, help="start from the weights of a model folder, such as the bundled model's"
    )
    args = parser.parse_args()
    log = Log(args.out)
    data = joined([torch.load(file, weights_only=True) for file in args.data])
    cost = data["pixel_cost"]
    weights = cost**0.75 / (cost**0.75).mean()  # between the price in pixels and equal care for small detail
    batches = Batches(data, draw_weight=args.draw_weight)
    watched = batches.validation()
    torch.manual_seed(args.seed)
    model, judged = (Model(data["vocabulary"], pad=0) for _ in range(2))
    if args.init:
        load_folder(model, args.init)
    optimizer = Optimizer(model, lr=args.lr, matrices=lambda name, p: "blocks." in name or ".layers." in name)
    average = Average(model, 0.997)
    first, best = 0, -math.inf
    if args.resume:
        state = restore(args.out / "checkpoint.pt", model, average, optimizer)
        first, best = state["step"], state["best"]
    log.write(parameters=sum(p.numel() for p in model.parameters()), sittings=len(data["sittings"]), first=first)
    if args.compile:
        compile_blocks(model.transformer)
    losses: dict[int, list[tuple[float, ...]]] = defaultdict(list)
    for step in range(first, args.steps):
        rng, generator = step_rng(args.seed, step)
        batch = batches.draw(rng, args.batch)
        noise = torch.randn(batch["result"].shape, generator=generator)
        sigma = draw_sigma(generator, len(noise), noise.shape[1])
        with torch.autocast("cpu", torch.bfloat16):
            errors = model(batch, noise, sigma)
        # under the last level of a run the velocity, which is the error over the level, would weigh too much
        levels = (1.0, sigma.clamp(min=last_level(noise.shape[1]))[:, None, None])
        first_loss, later_loss = (
            ((error / level).square() * weights).mean() for error, level in zip(errors, levels, strict=True)
        )
        strays = torch.cat([strayed(error, batch, cost) for error in errors])
        parts = (first_loss, later_loss, form_loss(strays))
        loss = first_loss + later_loss + args.form_weight * parts[2]
        optimizer.step(loss, rate=learning_rate(step, args.steps))
        average.update(model, step)
        losses[len(batch["references"])].append(tuple(part.item() for part in parts))
        if (step + 1) % min(50, args.steps // 6 or 1) == 0:
            by_count = {
                f"{name}_{n}_references": sum(some[i] for some in steps) / len(steps)
                for n, steps in sorted(losses.items())
                for i, name in enumerate(("loss", "later_loss", "form_loss"))
            }
            known = [value for name, value in by_count.items() if name.startswith("loss")]
            log.write(step=step + 1, loss=sum(known) / len(known), **by_count)
            losses.clear()
        stop = log.seconds > args.minutes * 60 or step + 1 in (args.steps, args.stop_after)
        if step + 1 == args.steps or (step + 1) % args.validate_every == 0:
            average.copy_to(judged)
            scores = validate(judged, watched, cost)
            known = [value for name, value in scores.items() if name.startswith("psnr")]
            score = sum(known) / len(known)
            log.write(step=step + 1, score=score, **scores)
            if score > best:
                best = score
                save_checkpoint(args.out / "best.pt", {"model": judged.state_dict(), "step": step + 1, "score": score})
        if stop or (step + 1) % 200 == 0:
            save_checkpoint(args.out / "checkpoint.pt", snapshot(model, average, optimizer, step + 1, best=best))
        if stop:
            break


if __name__ == "__main__":
    main()
