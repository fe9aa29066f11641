"""Geometry of figures made of straight lines and circular arcs.

Every function of this package's geometry returns strokes: arrays [points, 2] in any units, y upwards. A stroke whose
first point is its last is closed. Poses and sizes are the renderer's affair.
"""

import math

import numpy as np

Strokes = list[np.ndarray]


def closed(points: object) -> np.ndarray:
    """The polygon through `points`, its first point repeated at the end."""
    points = np.asarray(points, dtype=float)
    return np.vstack([points, points[:1]])


def ring(n: int, radius: float = 1.0, start: float = math.pi / 2) -> np.ndarray:
    """`n` points evenly on a circle, anticlockwise from the angle `start`: [n, 2]."""
    angles = start + 2 * math.pi * np.arange(n) / n
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def arc(centre: tuple[float, float], radius: float, first: float, last: float, points: int = 90) -> np.ndarray:
    """A circular arc from the angle `first` to `last` in degrees: [points, 2]."""
    angles = np.radians(np.linspace(first, last, points))
    return np.asarray(centre) + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def regular_polygon(n: int) -> Strokes:
    return [closed(ring(n))]


def star_polygon(n: int, step: int) -> Strokes:
    """The regular star {n/step}: every point joined to the `step`-th next; several pieces where they have a divisor."""
    points, pieces = ring(n), math.gcd(n, step)
    return [closed(points[[(start + k * step) % n for k in range(n // pieces)]]) for start in range(pieces)]


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
    """The common part of two equal circles, each through the other's centre."""
    return [closed(np.vstack([arc((-0.5, 0), 1, -60, 60)[:-1], arc((0.5, 0), 1, 120, 240)[:-1]]))]


def lune() -> Strokes:
    """The part of a disc that lies outside another one: a crescent."""
    outer = arc((0, 0), 1, 40, 320, 150)
    tip = outer[0]
    centre = (0.55, 0.0)
    radius, angle = math.hypot(tip[0] - centre[0], tip[1]), math.degrees(math.atan2(tip[1], tip[0] - centre[0]))
    return [closed(np.vstack([outer[:-1], arc(centre, radius, 360 - angle, angle, 120)[:-1]]))]


def annulus() -> Strokes:
    return [closed(ring(180)), closed(ring(120, 0.55))]


def reuleaux_triangle() -> Strokes:
    corners = ring(3)
    side = math.sqrt(3)
    arcs = [
        arc(tuple(corner), side, start, start + 60, 60)[:-1]
        for corner, start in zip(corners, (240, 0, 120), strict=True)
    ]
    return [closed(np.vstack(arcs))]


def arbelos() -> Strokes:
    """Between three half circles on one line that touch in pairs (Archimedes, Book of Lemmas, proposition 4)."""
    lower = [arc((-0.6, 0), 0.4, 180, 0, 50)[:-1], arc((0.4, 0), 0.6, 180, 0, 70)[:-1]]
    return [closed(np.vstack([arc((0, 0), 1, 0, 180)[:-1], *lower]))]


def penrose_triangle() -> Strokes:
    """Three L-shaped bars, each drawn as if it lay over the next."""
    turn = np.array([[-0.5, -math.sqrt(3) / 2], [math.sqrt(3) / 2, -0.5]])
    bar = closed([(-0.13, 1.05), (0.13, 1.05), (1.0, -0.46), (-0.43, -0.46), (-0.28, -0.2), (0.55, -0.2)])
    return [bar, bar @ turn.T, bar @ turn.T @ turn.T]


def necker_cube() -> Strokes:
    square = np.array([(-0.9, -0.9), (0.3, -0.9), (0.3, 0.3), (-0.9, 0.3)])
    back = square + 0.6
    return [closed(square), closed(back), *(np.stack(pair) for pair in zip(square, back, strict=True))]


def petersen_graph() -> Strokes:
    outer, inner = ring(5), ring(5, 0.5)
    star = closed(inner[[0, 2, 4, 1, 3]])
    return [closed(outer), star, *(np.stack(pair) for pair in zip(outer, inner, strict=True))]


def fano_plane() -> Strokes:
    corners = ring(3)
    heights = [np.stack([corner, -corner / 2]) for corner in corners]
    return [closed(corners), *heights, closed(ring(90, 0.5))]


def hopf_link() -> Strokes:
    """Two linked circles; the one that passes below is interrupted."""
    return _linked_circles([(-0.5, 0), (0.5, 0)], 0.9)


def borromean_link() -> Strokes:
    """Three circles, no two of them linked; each lies wholly over the next."""
    return _linked_circles([tuple(point) for point in ring(3, 0.55)], 0.9)


def _linked_circles(centres: list[tuple[float, float]], radius: float, gap: float = 0.17) -> Strokes:
    """Circles drawn with gaps where they pass below: alternating for two, cyclic for three."""
    strokes: Strokes = []
    angles = np.radians(np.linspace(0, 360, 361))
    for k, centre in enumerate(centres):
        points = np.asarray(centre) + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        under = np.zeros(len(points), dtype=bool)
        for j, other in enumerate(centres):
            if j == k:
                continue
            for sign, meeting in zip((1, -1), _meetings(centre, other, radius), strict=True):
                below = sign > 0 if len(centres) == 2 else (j - k) % len(centres) == 1
                if below:
                    under |= np.hypot(*(points - meeting).T) < gap
        strokes += runs(points[:-1], ~under[:-1])
    return strokes


def _meetings(first: tuple[float, float], second: tuple[float, float], radius: float) -> list[np.ndarray]:
    """The two points where circles of one radius meet, the one to the left of the way from first to second first."""
    a, b = np.asarray(first), np.asarray(second)
    way = b - a
    half = np.hypot(*way) / 2
    normal = np.array([-way[1], way[0]]) / (2 * half)
    height = math.sqrt(radius**2 - half**2)
    return [(a + b) / 2 + height * normal, (a + b) / 2 - height * normal]


def runs(points: np.ndarray, kept: np.ndarray) -> Strokes:
    """The maximal runs of kept points on a closed stroke, as strokes."""
    start = int(np.argmin(kept))  # a point that is left out
    points, kept = np.roll(points, -start, axis=0), np.roll(kept, -start)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], kept.astype(int), [0]])))
    return [points[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True) if b - a > 1]
