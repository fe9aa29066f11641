"""Draw a figure as an image with random pose, size, stroke width, fill, colours, background, noise and occluders.

An image depends only on (seed, class, index), so any image can be drawn again on any machine. The order of the random
draws is part of the data set: changing it changes every image.
"""

import hashlib
import math
from functools import cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from vlmclassifier.plane_figures.figures import FIGURES

SIZE = 48  # default side of an image in pixels
SUPERSAMPLING = 2
# Largest rotation. Below 30 degrees the rotation of a hexagon stays visible. With rotations by any angle, CLIP stays at
# chance level for a large part of its training.
TILT = math.radians(29)


def render(name: str, seed: int, index: int, size: int = SIZE) -> Image.Image:
    """Return image `index` of the class `name`: RGB, `size` x `size` pixels.

    Raises KeyError for a name that is not in FIGURES.
    """
    rng = np.random.default_rng([seed, _seed_of_class(name), index])
    canvas_size = size * SUPERSAMPLING
    pose = _random_pose(rng)
    strokes = [_to_pixels(stroke, pose, canvas_size) for stroke in _unit_strokes(name)]
    background, line_colour, fill_colour = _random_colours(rng)
    image = Image.new("RGB", (canvas_size, canvas_size), background)
    if rng.random() < 0.3:
        _darken_side(image, rng)
    if rng.random() < 0.45:
        image.paste(fill_colour, mask=_fill_mask(strokes, canvas_size))
    draw = ImageDraw.Draw(image)
    width = max(1, round(canvas_size * rng.uniform(0.018, 0.036)))
    for stroke in strokes:
        draw.line(stroke.ravel().tolist(), fill=line_colour, width=width, joint="curve" if width > 3 else None)
    _draw_occluders(draw, rng, canvas_size, background)
    return _add_noise(image.reduce(SUPERSAMPLING), rng)


@cache
def _seed_of_class(name: str) -> int:
    """Return 64 bits of a hash of the class name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


@cache
def _unit_strokes(name: str) -> tuple[np.ndarray, ...]:
    """Return a figure's strokes, y downwards, centred and scaled to stay inside a unit box at any allowed rotation."""
    strokes = FIGURES[name].draw()
    points = np.vstack(strokes)
    centre = (points.min(axis=0) + points.max(axis=0)) / 2
    longest_side = np.ptp(points, axis=0).max()
    extent = max(longest_side, 1.7 * np.hypot(*(points - centre).T).max())
    return tuple((stroke - centre) / extent * (1, -1) for stroke in strokes)


def _random_pose(rng: np.random.Generator) -> tuple[float, float, np.ndarray]:
    """Return the angle in radians, and size and centre (x, y) as shares of the canvas."""
    angle, scale = rng.uniform(-TILT, TILT), rng.uniform(0.62, 0.86)
    margin = (1 - scale) / 2
    return angle, scale, 0.5 + rng.uniform(-margin, margin, 2)


def _to_pixels(stroke: np.ndarray, pose: tuple[float, float, np.ndarray], canvas_size: int) -> np.ndarray:
    """Return a stroke in the pixels of the canvas: [points, 2]."""
    angle, scale, centre = pose
    rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    return (stroke @ rotation * scale + centre) * canvas_size


def _random_colours(rng: np.random.Generator) -> list[tuple[int, ...]]:
    """Return a light background colour, a dark line colour, and a fill colour between them."""
    return [_random_colour(rng, 195, 255), _random_colour(rng, 0, 95), _random_colour(rng, 110, 225)]


def _random_colour(rng: np.random.Generator, low: int, high: int) -> tuple[int, ...]:
    return tuple(int(value) for value in rng.uniform(low, high, 3))


def _darken_side(image: Image.Image, rng: np.random.Generator) -> None:
    """Darken the image gradually towards one side."""
    ramp = np.linspace(0, rng.uniform(10, 45), image.width)
    shade = np.repeat(ramp[None], image.width, 0).astype(np.uint8)
    layer = Image.fromarray(np.rot90(shade, int(rng.integers(4))).copy())
    image.paste(ImageChops.subtract(image, Image.merge("RGB", [layer] * 3)))


def _fill_mask(strokes: list[np.ndarray], canvas_size: int) -> Image.Image:
    """Return the inside of all closed strokes by the even-odd rule: holes are not filled."""
    mask = Image.new("1", (canvas_size, canvas_size))
    for stroke in strokes:
        if len(stroke) > 3 and np.abs(stroke[0] - stroke[-1]).max() < 1e-3 * canvas_size:
            stroke_mask = Image.new("1", (canvas_size, canvas_size))
            ImageDraw.Draw(stroke_mask).polygon(stroke.ravel().tolist(), fill=1)
            mask = ImageChops.logical_xor(mask, stroke_mask)
    return mask


def _draw_occluders(
    draw: ImageDraw.ImageDraw, rng: np.random.Generator, canvas_size: int, background: tuple[int, ...]
) -> None:
    """Draw up to two small discs or bars over the figure."""
    for _ in range(int(rng.choice(3, p=[0.6, 0.28, 0.12]))):
        x, y = rng.uniform(0.1, 0.9, 2) * canvas_size
        side = rng.uniform(0.06, 0.15) * canvas_size
        colour = background if rng.random() < 0.4 else _random_colour(rng, 60, 240)
        if rng.random() < 0.5:
            draw.ellipse((x - side / 2, y - side / 2, x + side / 2, y + side / 2), fill=colour)
        else:
            draw.rectangle((x - side, y - side / 3, x + side, y + side / 3), fill=colour)


def _add_noise(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Return the image with Gaussian noise, whose standard deviation is 2 to 11 grey levels."""
    pixels = np.asarray(image, dtype=np.float32)
    noise = rng.standard_normal(pixels.shape, dtype=np.float32) * np.float32(rng.uniform(2, 11))
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))
