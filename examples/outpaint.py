"""Continue a picture beyond its right edge."""

import limner

pipe = limner.Pipeline.from_pretrained()
out = pipe("only the background, without the sticker", image="samples/meadow.png", expand=(0, 0, 32, 0))
out.images[0].save("wider.png")
print(out.images[0].size)
