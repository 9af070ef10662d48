"""Continue a picture beyond its right edge."""

import limner

pipe = limner.Pipeline.from_pretrained()
out = pipe("a beach", image="samples/beach.png", expand=(0, 0, 32, 0))
out.images[0].save("wider.png")
print(out.images[0].size)
