"""Take references to another process or machine as one file."""

import limner

pipe = limner.Pipeline.from_pretrained()
pipe.prefill(["samples/beach.png", "samples/cat.png"]).save("cast.safetensors")

refs = limner.References.load("cast.safetensors")  # checked; a damaged file is refused
out = pipe("put the cat from image 2 into image 1", references=refs)
out.images[0].save("from-pack.png")
