"""Assemble the bundled model: OUT in the diffusers layout (float16 files), and the sample pictures next to it."""

from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinKVPipeline, Flux2Transformer2DModel
from torch import Tensor
from transformers import Qwen2TokenizerFast

from common import find_font
from limner.model.autoencoder import Autoencoder
from limner.model.preview import LatentPreview
from limner.tokens import unpack
from prepare import results
from tasks import vocabulary
from train import GEOMETRY, Model, load_folder
from world import HELD_OUT, LARGE, MEDIUM, SIZES, STICKERS, Picture, Renderer, Scene, Sticker

SAMPLES = {
    "beach": Picture(scene=Scene(name="beach", variant=3)),
    "meadow": Picture(scene=Scene(name="meadow", variant=5)),
    "cat": Picture(scene=Scene(name="white", variant=1), stickers=(Sticker(glyph=STICKERS["cat"]),)),
    "dog": Picture(scene=Scene(name="room", variant=2), stickers=(Sticker(glyph=STICKERS["dog"], scale=LARGE),)),
    "rocket": Picture(
        scene=Scene(name="night sky", variant=4),
        stickers=(Sticker(glyph=STICKERS["rocket"], scale=MEDIUM, column="right", row="top"),),
    ),
    "duck": Picture(scene=Scene(name="sea", variant=6), stickers=(Sticker(glyph=HELD_OUT["duck"], scale=MEDIUM),)),
}


@torch.no_grad()
def fit_preview(vae: AutoencoderKLFlux2, tokens: Tensor) -> LatentPreview:
    """The map from latents of square pictures, tokens (n, S, C), to what the decoder makes of them, at an eighth."""
    side = math.isqrt(tokens.shape[1])
    latents = unpack(tokens.float(), grid=(side, side))
    autoencoder = Autoencoder(vae.float().eval())
    pictures = torch.cat([autoencoder.decode(autoencoder.denormalise(part)) for part in latents.split(32)])
    return LatentPreview.fit(latents, F.avg_pool2d((pictures / 2 + 0.5).clamp(0, 1), 8))


@torch.no_grad()
def blend(model: Model, folder: Path, *, share: float, text_share: float) -> None:
    """Move weights back towards those that training started from, which are in `folder`; 1 leaves them.

    A run learns its tasks, and forgets some of what is no longer trained, such as prompts that the split withholds. The idea is that of Wortsman et al. 2022, "Robust fine-tuning of zero-shot models".
    """
    before = copy.deepcopy(model)
    load_folder(before, folder)
    for old, new, part in (
        (before.transformer, model.transformer, share),
        (before.text_encoder, model.text_encoder, text_share),
    ):
        for a, b in zip(old.parameters(), new.parameters(), strict=True):
            b.copy_(torch.lerp(a, b, part))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder with best.pt of train.py")
    parser.add_argument("--data", type=Path, required=True, help="data.pt that prepare.py wrote")
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--font", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--blend",
        type=Path,
        help="a model folder, that of train.py --init; the result lies on the line from it to the run",
    )
    parser.add_argument("--share", type=float, help="with --blend: how far along the line the transformer is; 0.5")
    parser.add_argument("--text-share", type=float, help="and the text encoder; 0, which leaves that of the folder")
    args = parser.parse_args()
    for name, share in (("--share", args.share), ("--text-share", args.text_share)):
        if share is not None and not args.blend:
            parser.error(f"{name} needs --blend")
        if share is not None and not 0 <= share <= 1:
            parser.error(f"{name} {share} is not within 0 to 1")

    tokenizer = Qwen2TokenizerFast.from_pretrained(args.tokenizer)
    state = torch.load(args.run / "best.pt", weights_only=True)
    model = Model(len(tokenizer), pad=tokenizer.pad_token_id)
    model.load_state_dict(state["model"])
    if args.blend:
        blend(model, args.blend, share=0.5 if args.share is None else args.share, text_share=args.text_share or 0.0)
    transformer = Flux2Transformer2DModel(**GEOMETRY.to_diffusers())
    transformer.load_state_dict(model.transformer.state_dict())
    vae = AutoencoderKLFlux2.from_pretrained(args.vae)
    preview = fit_preview(vae, results(torch.load(args.data, weights_only=True), 1024))
    pipe = Flux2KleinKVPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=vae.half(),
        text_encoder=model.text_encoder.half(),
        tokenizer=tokenizer,
        transformer=transformer.half(),
    )
    shutil.rmtree(args.out / "stickers", ignore_errors=True)
    pipe.save_pretrained(args.out / "stickers")
    config = args.out / "stickers" / "vae" / "config.json"  # without the path from which diffusers took it
    told = {name: value for name, value in json.loads(config.read_text()).items() if name != "_name_or_path"}
    config.write_text(json.dumps(told, indent=2, sort_keys=True) + "\n")
    settings = {
        "default_size": list(SIZES[0]),
        "sizes": [list(size) for size in SIZES],
        "default_dtype": "float32",
        "max_reference_pixels": math.prod(SIZES[0]),
        "words": vocabulary(),
        "latent_preview": {
            "weight": [[round(w, 4) for w in row] for row in preview.weight.tolist()],
            "bias": [round(b, 4) for b in preview.bias.tolist()],
        },
    }
    (args.out / "stickers" / "limner.json").write_text(json.dumps(settings) + "\n")
    shutil.copy(Path(__file__).parent / "model-card.md", args.out / "stickers" / "README.md")
    (args.out / "samples").mkdir(exist_ok=True)
    renderer = Renderer(find_font(args.font))
    for name, sample in SAMPLES.items():
        renderer.render(sample).save(args.out / "samples" / f"{name}.png")
    print(f"step {state['step']}: {args.out / 'stickers'}")


if __name__ == "__main__":
    main()
