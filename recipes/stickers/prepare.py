"""Make the tokenizer and the training set, in OUT/tokenizer and OUT/data.pt.

The set is of sittings: some references and several examples (prompt, result) that share them, as a training batch shares
their keys and values. Every picture is encoded once. Of a result it also has the pictures whose stickers are all mirrored, and all grey, and
which token belongs to which sticker, so that training can ask for the form of each.
Sittings of `--controls` have which tokens are drawn, and where the part of the picture is that their reference shows.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2TokenizerFast

from common import Log, find_font
from controls import Control, control_cases, training_sitting
from judge import other_forms, told_forms
from limner.tokens import pack, patchify, unpack, unpatchify
from tasks import Example, Grammar
from train_autoencoder import pixels
from world import HELD_OUT, SIZES, STICKERS, TOKEN, Picture, Renderer

MAX_TOKENS = 48
ENOUGH_PROMPTS = 20000
TASKS = {"draw": 0.24, "edit": 0.24, "combine2": 0.17, "combine3": 0.16, "combine4": 0.19}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]


def chat(prompt: str) -> str:
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def make_tokenizer(prompts: list[str]) -> Qwen2TokenizerFast:
    """A small byte-level BPE with the Qwen pre-tokenizer and chat template."""
    base: Tokenizer = Qwen2TokenizerFast().backend_tokenizer
    small = Tokenizer(models.BPE())
    small.normalizer, small.pre_tokenizer, small.decoder = base.normalizer, base.pre_tokenizer, base.decoder
    trainer = trainers.BpeTrainer(
        vocab_size=768,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    small.train_from_iterator((chat(p) for p in prompts), trainer)
    tokenizer = Qwen2TokenizerFast(
        tokenizer_object=small,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token=None,
        bos_token=None,
        additional_special_tokens=SPECIAL[1:3],
        model_max_length=MAX_TOKENS,
        padding_side="right",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@torch.no_grad()
def encode(vae: AutoencoderKLFlux2, pictures: list[torch.Tensor]) -> torch.Tensor:
    """Pictures of one size to normalised tokens (n, S, C), float16."""
    stack = torch.stack(pictures).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        latents = patchify(vae.encode(stack).latent_dist.mode().float())
    mean, std = vae.bn.running_mean, (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
    return pack((latents - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)).half()


@torch.no_grad()
def sensitivity(vae: AutoencoderKLFlux2, tokens: torch.Tensor, *, seed: int) -> torch.Tensor:
    """The squared error of pixels in [0, 1] that a unit squared error of each token channel costs, (C,).

    `tokens` (n, S, C) are square pictures. Measured: noise of deviation 0.2 in one channel, then the decoder.
    """
    generator = torch.Generator().manual_seed(seed)
    mean, std = vae.bn.running_mean, (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
    side = math.isqrt(tokens.shape[1])

    def decode(x: torch.Tensor) -> torch.Tensor:
        return vae.decode(unpatchify(unpack(x * std + mean, grid=(side, side)))).sample

    tokens = tokens.float()
    plain, costs = decode(tokens), []
    for channel in range(tokens.shape[-1]):
        moved = tokens.clone()
        moved[..., channel] += 0.2 * torch.randn(moved.shape[:2], generator=generator)
        costs.append(((decode(moved) - plain) / 2).square().mean() / 0.2**2)
    return torch.stack(costs)


@dataclass(frozen=True)
class Part:
    """A part of a picture, (left, top, right, bottom), which a reference of `outpaint` shows."""

    picture: Picture
    box: tuple[int, int, int, int]

    @property
    def size(self) -> tuple[int, int]:
        left, top, right, bottom = self.box
        return (right - left, bottom - top)


class Pictures:
    """Number the pictures of each size, and encode each once."""

    def __init__(self, vae: AutoencoderKLFlux2, renderer: Renderer, log: Log) -> None:
        self._vae, self._renderer, self._log = vae, renderer, log
        self._numbers: dict[tuple[int, int], dict[Picture | Part, int]] = {}

    def number(self, picture: Picture | Part) -> int:
        known = self._numbers.setdefault(picture.size, {})
        return known.setdefault(picture, len(known))

    def forms(self, picture: Picture) -> tuple[list[int], torch.Tensor]:
        """The numbers of the picture with its stickers mirrored, and with them in grey (or in colour, those that are grey).

        And the sticker of each token (2, S), counted from 1. 0: no sticker, or one that cannot be told from its other form.
        """
        width, height = (side // TOKEN for side in picture.size)
        owners = torch.zeros(2, height, width, dtype=torch.int8)
        found = [picture, picture]
        for i, sticker in enumerate(picture.stickers):
            told = told_forms(picture, i, self._renderer)
            x, y = (start // TOKEN for start in sticker.box(picture.size))
            side = sticker.scale // TOKEN
            for which, form in enumerate(other_forms(picture, i)):
                owners[which, y : y + side, x : x + side] = i + 1 if form in told else 0
                if form in told:
                    found[which] = other_forms(found[which], i)[which]
        return [self.number(one) for one in found], owners.flatten(1)

    def encode(self) -> dict[tuple[int, int], torch.Tensor]:
        """Tokens (n, S, C) of all numbered pictures by size."""
        tokens = {}
        for size, known in self._numbers.items():
            pictures, parts = list(known), []
            for start in range(0, len(pictures), 32):
                some = pictures[start : start + 32]
                parts.append(encode(self._vae, [pixels(self._render(p)) for p in some]))
                if start % 6400 == 0:
                    self._log.write(size=str(size), encoded=start, of=len(pictures))
            tokens[size] = torch.cat(parts)
        return tokens

    def _render(self, picture: Picture | Part) -> Image.Image:
        if isinstance(picture, Part):
            return self._renderer.render(picture.picture).crop(picture.box)
        return self._renderer.render(picture)


def results(data: dict[str, Any], num: int) -> torch.Tensor:
    """Tokens (num, S, C) of the first square results in a training set."""
    numbers = [n for sitting in data["sittings"] if sitting["size"] == SIZES[0] for n in sitting["results"]]
    tokens: torch.Tensor = data["tokens"][SIZES[0]][numbers[:num]]
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--font", type=Path)
    parser.add_argument("--sittings", type=int, default=12000, help="reference sets, each with --asks examples")
    parser.add_argument("--asks", type=int, default=4)
    parser.add_argument(
        "--controls", type=int, default=0, help="sittings more, of one example each: masks and outpainting in turn"
    )
    parser.add_argument("--pool", type=int, default=14000, help="different reference pictures")
    parser.add_argument(
        "--validation", type=int, default=12, help="reference sets of each task and of held-out stickers"
    )
    parser.add_argument(
        "--tokenizer", type=Path, help="use the tokenizer of this folder, so that weights trained with it can go on"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    log = Log(args.out)
    renderer = Renderer(find_font(args.font))
    rng = random.Random(f"{args.seed}/examples")
    grammar = Grammar([*STICKERS.values(), *renderer.unnamed_glyphs()], pool=args.pool, seed=args.seed)
    tasks = rng.choices(list(TASKS), list(TASKS.values()), k=args.sittings)
    sittings: list[Sequence[Example]] = [grammar.sitting(rng, task, args.asks) for task in tasks]
    rng = random.Random(f"{args.seed}/controls")  # one of its own: the other sittings are the same with it and without
    sittings += [training_sitting(rng, grammar, ("mask", "outpaint")[i % 2]) for i in range(args.controls)]

    rng = random.Random(f"{args.seed}/validation")
    known = Grammar([*STICKERS.values()], evaluation=True)
    held_out = Grammar([*HELD_OUT.values()], evaluation=True)
    validation = [(known, task, task) for task in TASKS] + [(held_out, t, "held_out") for t in ("edit", "combine2")]
    watched: list[tuple[str, Sequence[Example]]] = [
        (name, g.sitting(rng, task, args.asks)) for g, task, name in validation for _ in range(args.validation)
    ]
    for task in ("mask", "outpaint") if args.controls else ():
        watched += [(task, [case]) for case in control_cases(task, args.validation, seed=args.seed + 1)]

    if args.tokenizer:
        tokenizer = Qwen2TokenizerFast.from_pretrained(args.tokenizer)
    else:
        prompts_read = [e.prompt for sitting in sittings for e in sitting]
        while len(prompts_read) < ENOUGH_PROMPTS:  # a small set does not show every word often enough to be one token
            prompts_read += [e.prompt for task in TASKS for e in grammar.sitting(rng, task, args.asks)]
        tokenizer = make_tokenizer(prompts_read)
    tokenizer.save_pretrained(args.out / "tokenizer")
    tokenizer = Qwen2TokenizerFast.from_pretrained(args.out / "tokenizer")
    texts = [chat(e.prompt) for sitting in [*sittings, *(s for _, s in watched)] for e in sitting]
    longest = max(len(ids) for ids in tokenizer(texts)["input_ids"])
    log.write(sittings=len(sittings), vocabulary=len(tokenizer), longest_prompt=longest)
    if longest > MAX_TOKENS:
        raise SystemExit(
            f"a prompt has {longest} tokens, over the {MAX_TOKENS} of the text encoder; shorten the grammar"
        )
    ids = tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt")

    vae = AutoencoderKLFlux2.from_pretrained(args.vae).eval().to(memory_format=torch.channels_last)
    pictures = Pictures(vae, renderer, log)
    prompts = itertools.count()

    def place(task: str, sitting: Sequence[Example]) -> dict[str, Any]:
        forms = [pictures.forms(e.result) for e in sitting]
        control = next((e for e in sitting if isinstance(e, Control)), None)
        references: list[Picture | Part] = [*sitting[0].references]
        more: dict[str, Any] = {}
        if control is not None:  # what is drawn of it, and where its part is: other sittings have neither
            if control.expand is not None:
                references = [Part(control.result, control.known)]
                more["origins"] = [(control.known[1] // TOKEN, control.known[0] // TOKEN)]
            more["drawn"] = torch.from_numpy(control.drawn_tokens().reshape(1, -1))
        return {
            "task": task,
            "size": sitting[0].result.size,
            "reference_sizes": [p.size for p in references],
            "references": [pictures.number(p) for p in references],
            "results": [pictures.number(e.result) for e in sitting],
            "forms": [numbers for numbers, _ in forms],
            "owners": torch.stack([owners for _, owners in forms]),
            "prompts": [next(prompts) for _ in sitting],
            **more,
        }

    data: dict[str, Any] = {
        "sittings": [place(sitting[0].task, sitting) for sitting in sittings],
        "validation": [place(name, sitting) for name, sitting in watched],
        "vocabulary": len(tokenizer),
        "ids": ids["input_ids"].to(torch.int16),
        "mask": ids["attention_mask"].bool(),
    }
    data["tokens"] = tokens = pictures.encode()
    data["pixel_cost"] = cost = sensitivity(vae, results(data, 32), seed=args.seed)
    torch.save(data, args.out / "data.pt")
    log.write(pictures=sum(len(t) for t in tokens.values()), pixel_cost=str([round(c, 5) for c in cost.tolist()]))


if __name__ == "__main__":
    main()
