"""Geometry of fractals, drawn to the depth that a small image can show. Strokes are as in shapes.py."""

import math

import numpy as np

from vlmclassifier.plane_figures.shapes import Strokes, closed, ring

SQUARE = np.array([(0, 0), (1, 0), (1, 1), (0, 1)], dtype=float)

Cell = tuple[float, float, float]  # x and y of a square's lower left corner or centre, and its side


def substitute(points: np.ndarray, generator: np.ndarray, depth: int) -> np.ndarray:
    """Replace every segment of a path by the `generator`, `depth` times, and return the new path: [points, 2].

    `generator`: complex numbers that start with 0 and end with 1.
    """
    path = points[:, 0] + 1j * points[:, 1]
    for _ in range(depth):
        steps = np.diff(path)
        refined = path[:-1, None] + steps[:, None] * generator[None, :-1]  # [segments, points of the generator - 1]
        path = np.append(refined.ravel(), path[-1])
    return np.stack([path.real, path.imag], axis=1)


def lindenmayer(axiom: str, rules: dict[str, str], depth: int, degrees: float) -> np.ndarray:
    """Return the path of an L-system, [points, 2].

    After `depth` replacements by `rules`, the letters A, B and F are steps forward, + turns left and - turns right.
    """
    text = axiom
    for _ in range(depth):
        text = "".join(rules.get(letter, letter) for letter in text)
    heading, position, path = 0.0, 0j, [0j]
    for letter in text:
        if letter in "ABF":
            position += complex(math.cos(heading), math.sin(heading))
            path.append(position)
        elif letter == "+":
            heading += math.radians(degrees)
        elif letter == "-":
            heading += math.radians(-degrees)
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
    """A paper strip that was folded `folds` times in the same direction and opened to right angles."""
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
    """The outlines of the triangles that remain after `depth` steps."""
    triangles = [ring(3)]
    for _ in range(depth):
        triangles = [(triangle + corner) / 2 for triangle in triangles for corner in triangle]
    return [closed(triangle) for triangle in triangles]


def _square(cell: Cell) -> np.ndarray:
    """Return the outline of a square with the given lower left corner."""
    x, y, side = cell
    return closed(SQUARE * side + (x, y))


def sierpinski_carpet(depth: int = 2) -> Strokes:
    """The outer square and the squares that are cut out."""
    cells: list[Cell] = [(0.0, 0.0, 1.0)]
    strokes = [closed(SQUARE)]
    for _ in range(depth):
        smaller_cells = []
        for x, y, side in cells:
            for i in range(3):
                for j in range(3):
                    cell = (x + i * side / 3, y + j * side / 3, side / 3)
                    if (i, j) == (1, 1):
                        strokes.append(_square(cell))
                    else:
                        smaller_cells.append(cell)
        cells = smaller_cells
    return strokes


def vicsek_fractal(depth: int = 2) -> Strokes:
    """Squares in the form of a plus, each replaced by a smaller plus."""
    cells: list[Cell] = [(0.0, 0.0, 1.0)]
    for _ in range(depth):
        smaller_cells = []
        for x, y, side in cells:
            for i, j in ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2)):
                smaller_cells.append((x + i * side / 3, y + j * side / 3, side / 3))
        cells = smaller_cells
    return [_square(cell) for cell in cells]


def t_square_fractal(depth: int = 3) -> Strokes:
    """A square with squares of half its side centred on its corners, and so on for each of these."""
    strokes: Strokes = []
    newest: list[Cell] = [(0.0, 0.0, 1.0)]  # centres and sides
    for _ in range(depth):
        smaller_cells = []
        for x, y, side in newest:
            strokes.append(closed((SQUARE - 0.5) * side + (x, y)))
            for i in (-1, 1):
                for j in (-1, 1):
                    smaller_cells.append((x + i * side / 2, y + j * side / 2, side / 2))
        newest = smaller_cells
    return strokes


def cantor_set(depth: int = 4) -> Strokes:
    """The first steps of the construction below each other, each a row of bars."""
    strokes: Strokes = []
    bars = [(0.0, 1.0)]  # start and end
    for level in range(depth):
        y = -0.24 * level
        smaller_bars = []
        for start, end in bars:
            strokes.append(closed([(start, y), (end, y), (end, y + 0.12), (start, y + 0.12)]))
            third = (end - start) / 3
            smaller_bars += [(start, start + third), (end - third, end)]
        bars = smaller_bars
    return strokes


def pythagoras_tree(depth: int = 5) -> Strokes:
    """A square with two smaller squares on the legs of a right isosceles triangle on its top, and so on."""
    strokes: Strokes = []
    bases = [(0j, 1 + 0j)]  # the ends of the lower sides of squares, as complex numbers
    for _ in range(depth):
        smaller_bases = []
        for left, right in bases:
            up = (right - left) * 1j
            upper_left, upper_right, apex = left + up, right + up, (left + right) / 2 + 1.5 * up
            corners = [(z.real, z.imag) for z in (left, right, upper_right, upper_left)]
            strokes.append(closed(corners))
            smaller_bases += [(upper_left, apex), (apex, upper_right)]
        bases = smaller_bases
    return strokes


def h_tree(depth: int = 6) -> Strokes:
    """A segment with perpendicular segments, shorter by a factor sqrt 2, centred on its ends, and so on."""
    strokes: Strokes = []
    newest = [(0j, 1 + 0j)]  # centre and half of each segment, as complex numbers
    for _ in range(depth):
        smaller_segments = []
        for centre, half in newest:
            strokes.append(np.array([[z.real, z.imag] for z in (centre - half, centre + half)]))
            smaller_half = half * 1j / math.sqrt(2)
            smaller_segments += [(centre + half, smaller_half), (centre - half, smaller_half)]
        newest = smaller_segments
    return strokes


def apollonian_gasket(depth: int = 3) -> Strokes:
    """Circles in the gaps between touching circles, by the complex form of Descartes' theorem."""
    # A circle is its curvature (1 / radius, negative for the outer circle) and its centre as a complex number. A gap is
    # three circles that touch each other, and the known one of the two circles that touch all three.
    radius = 1 / (1 + 2 / math.sqrt(3))
    outer = (-1.0, 0j)
    first, second, third = [(1 / radius, complex(*point) * (1 - radius)) for point in ring(3)]
    circles = [outer, first, second, third]
    gaps = [
        (outer, first, second, third), (outer, second, third, first), (outer, first, third, second),
        (first, second, third, outer),
    ]  # fmt: skip
    for _ in range(depth):
        smaller_gaps = []
        for a, b, c, known in gaps:
            curvature = 2 * (a[0] + b[0] + c[0]) - known[0]
            centre = (2 * (a[0] * a[1] + b[0] * b[1] + c[0] * c[1]) - known[0] * known[1]) / curvature
            new = (curvature, centre)
            circles.append(new)
            smaller_gaps += [(a, b, new, c), (b, c, new, a), (a, c, new, b)]
        gaps = smaller_gaps
    strokes = []
    for curvature, centre in circles:
        corners = max(12, int(80 / max(1.0, abs(curvature) ** 0.5)))
        strokes.append(closed(ring(corners, 1 / abs(curvature)) + (centre.real, centre.imag)))
    return strokes
