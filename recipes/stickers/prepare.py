"""Makes the tokenizer and the training set: examples with their pictures encoded once, in OUT/tokenizer and OUT/data.pt."""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2TokenizerFast

from common import Log, find_font
from limner.tokens import pack, patchify
from tasks import Example, Grammar
from train_autoencoder import pixels
from world import STICKERS, Picture, Renderer

MAX_TOKENS = 48
TASKS = {"draw": 0.2, "edit": 0.36, "combine2": 0.24, "combine3": 0.1, "combine4": 0.1}
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
        tokenizer_object=small, pad_token="<|endoftext|>", eos_token="<|im_end|>", unk_token=None, bos_token=None,
        additional_special_tokens=SPECIAL[1:3], model_max_length=MAX_TOKENS, padding_side="right",
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@torch.no_grad()
def encode(vae: AutoencoderKLFlux2, pictures: list[torch.Tensor]) -> torch.Tensor:
    """Pictures of one size to normalised tokens (n, S, C), float16."""
    latents = patchify(vae.encode(torch.stack(pictures)).latent_dist.mode())
    mean, std = vae.bn.running_mean, (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
    return pack((latents - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)).half()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--font", type=Path)
    parser.add_argument("--examples", type=int, default=40000)
    parser.add_argument("--pool", type=int, default=12000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    log = Log(args.out)
    renderer = Renderer(find_font(args.font))
    glyphs = [*STICKERS.values(), *renderer.unnamed_glyphs()]
    grammar = Grammar(glyphs, pool=args.pool, seed=args.seed)
    rng = random.Random(f"{args.seed}/examples")
    tasks = rng.choices(list(TASKS), list(TASKS.values()), k=args.examples)
    examples = [grammar.draw(rng, task) for task in tasks]

    tokenizer = make_tokenizer([e.prompt for e in examples])
    tokenizer.save_pretrained(args.out / "tokenizer")
    tokenizer = Qwen2TokenizerFast.from_pretrained(args.out / "tokenizer")
    texts = [chat(e.prompt) for e in examples]
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    log.write(examples=len(examples), vocabulary=len(tokenizer), longest_prompt=max(lengths))
    ids = tokenizer(texts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")

    numbers: dict[tuple[int, int], dict[Picture, int]] = {}
    for e in examples:
        for picture in (*e.references, e.result):
            known = numbers.setdefault(picture.size, {})
            known.setdefault(picture, len(known))
    vae = AutoencoderKLFlux2.from_pretrained(args.vae).eval()
    tokens: dict[tuple[int, int], torch.Tensor] = {}
    for size, known in numbers.items():
        pictures, parts = list(known), []
        for start in range(0, len(pictures), 32):
            parts.append(encode(vae, [pixels(renderer.render(p)) for p in pictures[start : start + 32]]))
            if start % 3200 == 0:
                log.write(size=str(size), encoded=start, of=len(pictures))
        tokens[size] = torch.cat(parts)

    def place(e: Example) -> dict[str, Any]:
        return {
            "task": e.task,
            "result": (e.result.size, numbers[e.result.size][e.result]),
            "references": [(p.size, numbers[p.size][p]) for p in e.references],
        }

    torch.save(
        {
            "tokens": tokens,
            "examples": [place(e) for e in examples],
            "vocabulary": len(tokenizer),
            "ids": ids["input_ids"].to(torch.int16),
            "mask": ids["attention_mask"].bool(),
        },
        args.out / "data.pt",
    )
    log.write(pictures=sum(len(t) for t in tokens.values()))


if __name__ == "__main__":
    main()
