"""A picture that the classifier of pictures mistakes."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFilter


def abstract() -> Image.Image:
    """Blurred ellipses, found by search, that the classifier takes for what they are not."""
    image = Image.new("RGB", (128, 128), (174, 84, 155))
    draw = ImageDraw.Draw(image)
    for x, y, a, b, *colour in ELLIPSES:
        draw.ellipse((x - a, y - b, x + a, y + b), fill=tuple(colour))
    return image.filter(ImageFilter.GaussianBlur(3))


ELLIPSES = (
    (97, 66, 4, 41, 164, 175, 65),
    (100, 118, 53, 27, 180, 159, 113),
    (131, 91, 24, 6, 169, 188, 89),
    (19, 126, 28, 23, 210, 79, 173),
    (34, 40, 36, 38, 189, 106, 157),
    (76, 87, 46, 39, 163, 119, 68),
)
