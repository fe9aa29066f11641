"""Generated stand-in images, for trying every path without real ones. Nothing can be learnt from them."""

import random

from PIL import Image, ImageDraw


def generated_image(rng: random.Random) -> Image.Image:
    """Six figures of random kind, place and colour on a plain background; width and height from 100 to 299 pixels."""

    def colour() -> tuple[int, ...]:
        return tuple(rng.randrange(256) for _ in range(3))

    size = (rng.randrange(100, 300), rng.randrange(100, 300))
    image = Image.new("RGB", size, colour())
    pen = ImageDraw.Draw(image)
    for _ in range(6):
        x, y, width, height = (rng.randrange(side) for side in (*size, *size))
        figure = rng.choice([pen.ellipse, pen.rectangle, pen.rounded_rectangle])
        figure((x - width // 2, y - height // 2, x + width // 2, y + height // 2), fill=colour())
    return image
