"""Compute the K/V of references once, and use them for any prompt."""

import limner

pipe = limner.Pipeline.from_pretrained()
refs = pipe.prefill(["samples/beach.png", "samples/cat.png"])
print(refs)
for place in ("on the left", "in the top right corner"):
    out = pipe(f"put the cat from image 2 into image 1 {place}", references=refs)
    out.images[0].save(f"cat {place}.png")
    assert out.reference_cache == "given"  # nothing was computed again
