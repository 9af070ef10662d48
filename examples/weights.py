"""Let references count more or less, without computing them again."""

import limner

pipe = limner.Pipeline.from_pretrained()
refs = pipe.prefill(["samples/meadow.png", "samples/dog.png"])
for weight in (0.0, 0.5, 1.0):
    out = pipe("put the dog from image 2 into image 1", references=refs, reference_weights=[1.0, weight])
    out.images[0].save(f"dog-{weight}.png")
