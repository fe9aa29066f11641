"""Draw a figure as a picture: pose, size, stroke, fill, colours, ground, noise, occluders.

A picture is a function of (seed, class, index) alone, so that any one of them can be drawn again anywhere.
"""

import hashlib
import math
from functools import cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from vlmclassifier.plane_figures.figures import FIGURES

SIZE = 48
SUPERSAMPLING = 2
TILT = math.radians(29)  # below 30 degrees a hexagon's tilt stays visible; full turns keep CLIP at chance for long


def render(name: str, seed: int, index: int, size: int = SIZE) -> Image.Image:
    """The picture number `index` of the class `name`: RGB, `size` x `size` pixels.

    Raises KeyError for a name that is not in FIGURES.
    """
    rng = np.random.default_rng([seed, _number(name), index])
    canvas = size * SUPERSAMPLING
    strokes = [_pixels(stroke, pose, canvas) for pose in [_pose(rng)] for stroke in _unit_strokes(name)]
    ground, ink, filling = _colours(rng)
    image = Image.new("RGB", (canvas, canvas), ground)
    if rng.random() < 0.3:
        _gradient(image, rng)
    if rng.random() < 0.45:
        mask = _fill_mask(strokes, canvas)
        image.paste(filling, mask=mask)
    pen = ImageDraw.Draw(image)
    width = max(1, round(canvas * rng.uniform(0.018, 0.036)))
    for stroke in strokes:
        pen.line(stroke.ravel().tolist(), fill=ink, width=width, joint="curve" if width > 3 else None)
    _occlude(pen, rng, canvas, ground)
    return _noisy(image.reduce(SUPERSAMPLING), rng)


@cache
def _number(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


@cache
def _unit_strokes(name: str) -> tuple[np.ndarray, ...]:
    """The strokes centred and scaled so that they stay inside a unit box when they are tilted, y downwards."""
    strokes = FIGURES[name].draw()
    points = np.vstack(strokes)
    centre, sides = (points.min(axis=0) + points.max(axis=0)) / 2, np.ptp(points, axis=0)
    extent = max(sides.max(), 1.7 * np.hypot(*(points - centre).T).max())
    return tuple((stroke - centre) / extent * (1, -1) for stroke in strokes)


def _pose(rng: np.random.Generator) -> tuple[float, float, np.ndarray]:
    """Angle, size as a share of the canvas, centre as a share of the canvas."""
    angle, scale = rng.uniform(-TILT, TILT), rng.uniform(0.62, 0.86)
    room = (1 - scale) / 2
    return angle, scale, 0.5 + rng.uniform(-room, room, 2)


def _pixels(stroke: np.ndarray, pose: tuple[float, float, np.ndarray], canvas: int) -> np.ndarray:
    angle, scale, centre = pose
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    return (stroke @ turn * scale + centre) * canvas


def _colours(rng: np.random.Generator) -> tuple[tuple[int, ...], ...]:
    """A light ground, a dark ink, a filling between them."""
    ground, ink, filling = rng.uniform(195, 255, 3), rng.uniform(0, 95, 3), rng.uniform(110, 225, 3)
    return tuple(tuple(int(value) for value in colour) for colour in (ground, ink, filling))


def _gradient(image: Image.Image, rng: np.random.Generator) -> None:
    """Darken the ground towards one side."""
    ramp = np.linspace(0, rng.uniform(10, 45), image.width)
    shade = np.repeat(ramp[None], image.width, 0).astype(np.uint8)
    layer = Image.fromarray(np.rot90(shade, int(rng.integers(4))).copy())
    image.paste(ImageChops.subtract(image, Image.merge("RGB", [layer] * 3)))


def _fill_mask(strokes: list[np.ndarray], canvas: int) -> Image.Image:
    """The inside of all closed strokes by the even-odd rule: holes stay open."""
    mask = Image.new("1", (canvas, canvas))
    for stroke in strokes:
        if len(stroke) > 3 and np.abs(stroke[0] - stroke[-1]).max() < 1e-3 * canvas:
            part = Image.new("1", (canvas, canvas))
            ImageDraw.Draw(part).polygon(stroke.ravel().tolist(), fill=1)
            mask = ImageChops.logical_xor(mask, part)
    return mask


def _occlude(pen: ImageDraw.ImageDraw, rng: np.random.Generator, canvas: int, ground: tuple[int, ...]) -> None:
    """Up to two small discs or bars over the figure."""
    for _ in range(int(rng.choice(3, p=[0.6, 0.28, 0.12]))):
        (x, y), side = rng.uniform(0.1, 0.9, 2) * canvas, rng.uniform(0.06, 0.15) * canvas
        colour = ground if rng.random() < 0.4 else tuple(int(value) for value in rng.uniform(60, 240, 3))
        if rng.random() < 0.5:
            pen.ellipse((x - side / 2, y - side / 2, x + side / 2, y + side / 2), fill=colour)
        else:
            pen.rectangle((x - side, y - side / 3, x + side, y + side / 3), fill=colour)


def _noisy(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    pixels = np.asarray(image, dtype=np.float32)
    noise = rng.standard_normal(pixels.shape, dtype=np.float32) * np.float32(rng.uniform(2, 11))
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))
