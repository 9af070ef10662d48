"""Repaint a part of a picture: pixels outside of the mask stay, bit for bit beyond its feather of 8 pixels (mask_blur)."""

from PIL import Image, ImageDraw

import limner

pipe = limner.Pipeline.from_pretrained()
mask = Image.new("L", (128, 128))  # black stays
ImageDraw.Draw(mask).rectangle((0, 32, 63, 95), fill=255)  # white is repainted
images = ["samples/beach.png", "samples/cat.png"]
out = pipe("put the cat from image 2 into image 1 on the left", image=images, mask_image=mask)
out.images[0].save("masked.png")
