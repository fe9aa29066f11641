"""Geometry of figures made of straight lines and circular arcs.

In this file, curves.py and fractals.py, the function of a figure returns its strokes: arrays [points, 2] in any unit,
y upwards. A stroke is closed if its first point is its last. The renderer decides pose and size.
"""

import math

import numpy as np

Strokes = list[np.ndarray]


def closed(points: object) -> np.ndarray:
    """Return the polygon through `points` with its first point repeated at the end: [points + 1, 2]."""
    points = np.asarray(points, dtype=float)
    return np.vstack([points, points[:1]])


def ring(n: int, radius: float = 1.0, start: float = math.pi / 2) -> np.ndarray:
    """Return `n` points evenly spaced on a circle, anticlockwise from the angle `start` in radians: [n, 2]."""
    angles = start + 2 * math.pi * np.arange(n) / n
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def arc(centre: tuple[float, float], radius: float, first: float, last: float, points: int = 90) -> np.ndarray:
    """Return a circular arc from the angle `first` to `last` in degrees: [points, 2]."""
    angles = np.radians(np.linspace(first, last, points))
    return np.asarray(centre) + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def regular_polygon(n: int) -> Strokes:
    return [closed(ring(n))]


def star_polygon(n: int, step: int) -> Strokes:
    """Return the regular star {n/step}, in which every point is joined to the `step`-th next.

    It has gcd(n, step) closed strokes.
    """
    points, stroke_count = ring(n), math.gcd(n, step)
    strokes = []
    for start in range(stroke_count):
        indices = [(start + k * step) % n for k in range(n // stroke_count)]
        strokes.append(closed(points[indices]))
    return strokes


def polygon(*points: tuple[float, float]) -> Strokes:
    return [closed(points)]


def rhombus() -> Strokes:
    return polygon((0, 1), (-0.55, 0), (0, -1), (0.55, 0))


def kite() -> Strokes:
    return polygon((0, 0.6), (-0.65, 0.1), (0, -1.2), (0.65, 0.1))


def dart() -> Strokes:
    return polygon((0, 1), (-0.9, -0.8), (0, -0.2), (0.9, -0.8))


def greek_cross() -> Strokes:
    a, b = 1 / 3, 1.0
    return polygon(
        (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a), (-a, -b), (a, -b), (a, -a), (b, -a), (b, a)
    )


def t_tetromino() -> Strokes:
    return polygon((-1.5, 1), (-1.5, 0), (-0.5, 0), (-0.5, -1), (0.5, -1), (0.5, 0), (1.5, 0), (1.5, 1))


def l_tetromino() -> Strokes:
    return polygon((-1, 1.5), (-1, -1.5), (1, -1.5), (1, -0.5), (0, -0.5), (0, 1.5))


def circle() -> Strokes:
    return [closed(ring(180))]


def ellipse() -> Strokes:
    return [closed(ring(180) * (1, 0.5))]


def semicircle() -> Strokes:
    return [closed(arc((0, 0), 1, 0, 180))]


def circular_sector() -> Strokes:
    return [closed(np.vstack([[(0, 0)], arc((0, 0), 1, 50, 130)]))]


def vesica_piscis() -> Strokes:
    """The intersection of two equal discs, each through the other's centre."""
    return [closed(np.vstack([arc((-0.5, 0), 1, -60, 60)[:-1], arc((0.5, 0), 1, 120, 240)[:-1]]))]


def lune() -> Strokes:
    """A crescent: the part of a disc outside another disc."""
    outer = arc((0, 0), 1, 40, 320, 150)
    tip = outer[0]
    centre = (0.55, 0.0)
    radius = math.hypot(tip[0] - centre[0], tip[1])
    angle = math.degrees(math.atan2(tip[1], tip[0] - centre[0]))
    return [closed(np.vstack([outer[:-1], arc(centre, radius, 360 - angle, angle, 120)[:-1]]))]


def annulus() -> Strokes:
    return [closed(ring(180)), closed(ring(120, 0.55))]


def reuleaux_triangle() -> Strokes:
    corners = ring(3)
    side = math.sqrt(3)
    arcs = []
    for corner, start in zip(corners, (240, 0, 120), strict=True):
        arcs.append(arc(tuple(corner), side, start, start + 60, 60)[:-1])
    return [closed(np.vstack(arcs))]


def arbelos() -> Strokes:
    """The region between three semicircles on one line (Archimedes, Book of Lemmas, proposition 4)."""
    upper = arc((0, 0), 1, 0, 180)[:-1]
    lower_left, lower_right = arc((-0.6, 0), 0.4, 180, 0, 50)[:-1], arc((0.4, 0), 0.6, 180, 0, 70)[:-1]
    return [closed(np.vstack([upper, lower_left, lower_right]))]


def penrose_triangle() -> Strokes:
    """Three L-shaped bars, each drawn as if it were in front of the next."""
    turn = np.array([[-0.5, -math.sqrt(3) / 2], [math.sqrt(3) / 2, -0.5]])
    bar = closed([(-0.13, 1.05), (0.13, 1.05), (1.0, -0.46), (-0.43, -0.46), (-0.28, -0.2), (0.55, -0.2)])
    return [bar, bar @ turn.T, bar @ turn.T @ turn.T]


def necker_cube() -> Strokes:
    front = np.array([(-0.9, -0.9), (0.3, -0.9), (0.3, 0.3), (-0.9, 0.3)])
    back = front + 0.6
    return [closed(front), closed(back), *_segments(front, back)]


def petersen_graph() -> Strokes:
    outer, inner = ring(5), ring(5, 0.5)
    star = closed(inner[[0, 2, 4, 1, 3]])
    return [closed(outer), star, *_segments(outer, inner)]


def _segments(first: np.ndarray, last: np.ndarray) -> Strokes:
    """Return the line segments from each point of `first` to the same point of `last`; both are [points, 2]."""
    return [np.stack(ends) for ends in zip(first, last, strict=True)]


def fano_plane() -> Strokes:
    corners = ring(3)
    heights = [np.stack([corner, -corner / 2]) for corner in corners]
    return [closed(corners), *heights, closed(ring(90, 0.5))]


def hopf_link() -> Strokes:
    """Two linked circles; each has a gap where it passes below the other."""
    return _linked_circles([(-0.5, 0), (0.5, 0)], 0.9)


def borromean_link() -> Strokes:
    """Three circles of which no two are linked; each passes below the next."""
    return _linked_circles([tuple(point) for point in ring(3, 0.55)], 0.9)


def _linked_circles(centres: list[tuple[float, float]], radius: float, gap: float = 0.17) -> Strokes:
    """Return circles with gaps where they pass below another one.

    Two circles pass below each other at one of their two intersections; of three circles each is below the next.
    """
    strokes: Strokes = []
    angles = np.radians(np.linspace(0, 360, 361))
    for k, centre in enumerate(centres):
        points = np.asarray(centre) + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        is_hidden = np.zeros(len(points), dtype=bool)
        for j, other in enumerate(centres):
            if j == k:
                continue
            left, right = _intersections(centre, other, radius)
            if len(centres) == 2:
                passes_below = [left]
            elif (j - k) % len(centres) == 1:
                passes_below = [left, right]
            else:
                passes_below = []
            for crossing in passes_below:
                is_hidden |= np.hypot(*(points - crossing).T) < gap
        strokes += visible_strokes(points[:-1], ~is_hidden[:-1])
    return strokes


def _intersections(first: tuple[float, float], second: tuple[float, float], radius: float) -> list[np.ndarray]:
    """Return the two intersections of circles with the same radius, seen from the first centre: left, then right."""
    a, b = np.asarray(first), np.asarray(second)
    direction = b - a
    half = np.hypot(*direction) / 2
    normal = np.array([-direction[1], direction[0]]) / (2 * half)
    height = math.sqrt(radius**2 - half**2)
    return [(a + b) / 2 + height * normal, (a + b) / 2 - height * normal]


def visible_strokes(points: np.ndarray, is_visible: np.ndarray) -> Strokes:
    """Return the visible parts of a closed stroke: the maximal runs of at least two visible points.

    `points`: [points, 2] without the repeated first point; `is_visible`: [points], at least one point is hidden.
    """
    hidden = int(np.argmin(is_visible))
    points, is_visible = np.roll(points, -hidden, axis=0), np.roll(is_visible, -hidden)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], is_visible.astype(int), [0]])))
    strokes = []
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        if end - start > 1:
            strokes.append(points[start:end])
    return strokes
