"""Geometry of fractals, drawn to the depth that a small picture can show. Strokes are as in `shapes`."""

import math

import numpy as np

from vlmclassifier.plane_figures.shapes import Strokes, closed, ring

SQUARE = np.array([(0, 0), (1, 0), (1, 1), (0, 1)], dtype=float)


def substitute(points: np.ndarray, generator: np.ndarray, depth: int) -> np.ndarray:
    """Replace every segment by the `generator` (complex numbers from 0 to 1), `depth` times: [points, 2]."""
    path = points[:, 0] + 1j * points[:, 1]
    for _ in range(depth):
        steps = np.diff(path)
        path = np.append((path[:-1, None] + steps[:, None] * generator[None, :-1]).ravel(), path[-1])
    return np.stack([path.real, path.imag], axis=1)


def lindenmayer(axiom: str, rules: dict[str, str], depth: int, degrees: float) -> np.ndarray:
    """Draw an L-system with a turtle: letters go forward where upper case A, B or F, + and - turn (left, right)."""
    text = axiom
    for _ in range(depth):
        text = "".join(rules.get(letter, letter) for letter in text)
    heading, place, path = 0.0, 0j, [0j]
    for letter in text:
        if letter in "ABF":
            place += complex(math.cos(heading), math.sin(heading))
            path.append(place)
        elif letter in "+-":
            heading += math.radians(degrees if letter == "+" else -degrees)
    return np.stack([np.real(path), np.imag(path)], axis=1)


KOCH = np.array([0, 1 / 3, 0.5 + 1j * math.sqrt(3) / 6, 2 / 3, 1])


def koch_curve() -> Strokes:
    return [substitute(np.array([(0.0, 0.0), (1.0, 0.0)]), KOCH, 3)]


def koch_snowflake() -> Strokes:
    return [substitute(closed(ring(3)[::-1]), KOCH, 3)]


def minkowski_sausage() -> Strokes:
    generator = np.array([0, 1, 1 + 1j, 2 + 1j, 2, 2 - 1j, 3 - 1j, 3, 4]) / 4
    return [substitute(np.array([(0.0, 0.0), (1.0, 0.0)]), generator, 2)]


def levy_c_curve() -> Strokes:
    return [substitute(np.array([(0.0, 0.0), (1.0, 0.0)]), np.array([0, 0.5 + 0.5j, 1]), 9)]


def dragon_curve(folds: int = 9) -> Strokes:
    """A paper strip folded `folds` times in the same direction, opened to right angles."""
    turns: list[int] = []
    for _ in range(folds):
        turns = [*turns, 1, *(-turn for turn in reversed(turns))]
    headings = np.concatenate([[0], np.cumsum(turns)]) * math.pi / 2
    steps = np.stack([np.cos(headings), np.sin(headings)], axis=1)
    return [np.vstack([[(0, 0)], np.cumsum(steps, axis=0)])]


def hilbert_curve() -> Strokes:
    return [lindenmayer("X", {"X": "+YF-XFX-FY+", "Y": "-XF+YFY+FX-"}, 4, 90)]


def gosper_curve() -> Strokes:
    return [lindenmayer("A", {"A": "A-B--B+A++AA+B-", "B": "+A-BB--B-A++A+B"}, 3, 60)]


def sierpinski_triangle(depth: int = 3) -> Strokes:
    """The outlines of the triangles that are left after `depth` steps."""
    triangles = [ring(3)]
    for _ in range(depth):
        triangles = [(triangle + corner) / 2 for triangle in triangles for corner in triangle]
    return [closed(triangle) for triangle in triangles]


def sierpinski_carpet(depth: int = 2) -> Strokes:
    """The outer square and the squares that are cut out."""
    cells, holes = [(0.0, 0.0, 1.0)], [closed(SQUARE)]
    for _ in range(depth):
        parts = [(x + i * s / 3, y + j * s / 3, s / 3, (i, j)) for x, y, s in cells for i in range(3) for j in range(3)]
        holes += [closed(SQUARE * s + (x, y)) for x, y, s, place in parts if place == (1, 1)]
        cells = [(x, y, s) for x, y, s, place in parts if place != (1, 1)]
    return holes


def vicsek_fractal(depth: int = 2) -> Strokes:
    """Squares in the form of a plus, each replaced by a smaller plus."""
    cells = [(0.0, 0.0, 1.0)]
    for _ in range(depth):
        places = ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2))
        cells = [(x + i * s / 3, y + j * s / 3, s / 3) for x, y, s in cells for i, j in places]
    return [closed(SQUARE * s + (x, y)) for x, y, s in cells]


def t_square_fractal(depth: int = 3) -> Strokes:
    """A square with half as large squares centred on its corners, and so on outwards."""
    squares, newest = [], [(0.0, 0.0, 1.0)]
    for _ in range(depth):
        squares += newest
        newest = [(x + i * s / 2, y + j * s / 2, s / 2) for x, y, s in newest for i in (-1, 1) for j in (-1, 1)]
    return [closed((SQUARE - 0.5) * s + (x, y)) for x, y, s in squares]


def cantor_set(depth: int = 4) -> Strokes:
    """The first steps one below the other, each a row of bars."""
    bars, strokes = [(0.0, 1.0)], []
    for level in range(depth):
        y = -0.24 * level
        strokes += [closed([(a, y), (b, y), (b, y + 0.12), (a, y + 0.12)]) for a, b in bars]
        bars = [part for a, b in bars for part in ((a, a + (b - a) / 3), (b - (b - a) / 3, b))]
    return strokes


def pythagoras_tree(depth: int = 5) -> Strokes:
    """A square with two smaller ones on its top, in a right isosceles triangle, and so on."""
    strokes, bases = [], [(0j, 1 + 0j)]
    for _ in range(depth):
        grown = []
        for a, b in bases:
            up = (b - a) * 1j
            c, d, apex = a + up, b + up, (a + b) / 2 + 1.5 * up
            strokes.append(closed([(z.real, z.imag) for z in (a, b, d, c)]))
            grown += [(c, apex), (apex, d)]
        bases = grown
    return strokes


def h_tree(depth: int = 6) -> Strokes:
    """A segment, at each end a perpendicular one shorter by sqrt 2, and so on."""
    strokes, newest = [], [(0j, 1 + 0j)]
    for _ in range(depth):
        ends = []
        for centre, half in newest:
            strokes.append(np.array([[z.real, z.imag] for z in (centre - half, centre + half)]))
            ends += [(centre + sign * half, half * 1j / math.sqrt(2)) for sign in (1, -1)]
        newest = ends
    return strokes


def apollonian_gasket(depth: int = 3) -> Strokes:
    """Circles in the gaps between touching circles, by Descartes' theorem in its complex form."""
    radius = 1 / (1 + 2 / math.sqrt(3))
    inner = [complex(*point) * (1 - radius) for point in ring(3)]
    outer = (-1.0, 0j)
    first = [(1 / radius, z) for z in inner]
    circles = [outer, *first]
    gaps = [(outer, first[i], first[j], first[3 - i - j]) for i, j in ((0, 1), (1, 2), (0, 2))] + [(*first, outer)]
    for _ in range(depth):
        following = []
        for a, b, c, known in gaps:
            k = 2 * (a[0] + b[0] + c[0]) - known[0]
            new = (k, (2 * (a[0] * a[1] + b[0] * b[1] + c[0] * c[1]) - known[0] * known[1]) / k)
            circles.append(new)
            following += [(a, b, new, c), (b, c, new, a), (a, c, new, b)]
        gaps = following
    return [closed(ring(max(12, int(80 / max(1.0, abs(k) ** 0.5))), 1 / abs(k)) + (z.real, z.imag)) for k, z in circles]
