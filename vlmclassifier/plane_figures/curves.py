"""Geometry of curves given by formulas.

The letters of the parameters are those of the references in figures.py. Of unbounded curves only a part is drawn.
Strokes are as in shapes.py.
"""

import math

import numpy as np

from vlmclassifier.plane_figures.shapes import Strokes, closed, visible_strokes

TURN = 2 * math.pi


def parametric(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the stroke of the coordinates `x` and `y`, both [points]: [points, 2]."""
    return np.stack([x, y], axis=1)


def polar(radius: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Return the stroke of polar coordinates, both [points], angles in radians: [points, 2]."""
    return parametric(radius * np.cos(angle), radius * np.sin(angle))


def loop(points: np.ndarray) -> np.ndarray:
    """Return an exactly closed stroke of points whose last one equals the first up to rounding."""
    return closed(points[:-1])


def turn_angles(points: int = 241, turns: float = 1.0) -> np.ndarray:
    """Return evenly spaced angles in radians from 0 to `turns` full turns: [points]."""
    return np.linspace(0, turns * TURN, points)


# Conics and cubics


def parabola() -> Strokes:
    x = np.linspace(-1, 1, 121)
    return [parametric(x, 1.8 * x**2)]


def hyperbola() -> Strokes:
    t = np.linspace(-1.6, 1.6, 81)
    return [parametric(sign * 0.5 * np.cosh(t), 0.5 * np.sinh(t)) for sign in (1, -1)]


def folium_of_descartes() -> Strokes:
    """x = 3t/(1+t^3), y = 3t^2/(1+t^3): the loop and both arms towards the asymptote."""
    t = np.tan(np.linspace(-0.5, math.pi / 2 + 0.5, 241))  # passes infinity, where the curve passes the origin
    x, y = 3 * t / (1 + t**3), 3 * t**2 / (1 + t**3)
    return [parametric(x, y)]


def cissoid_of_diocles() -> Strokes:
    t = np.linspace(-2.6, 2.6, 161)
    return [parametric(t**2 / (1 + t**2), t**3 / (1 + t**2))]


def right_strophoid() -> Strokes:
    t = np.linspace(-1.75, 1.75, 201)
    return [parametric((1 - t**2) / (1 + t**2), t * (t**2 - 1) / (t**2 + 1))]


def witch_of_agnesi() -> Strokes:
    x = np.linspace(-2.0, 2.0, 141)
    return [parametric(x, 1 / (1 + x**2))]


def tschirnhausen_cubic() -> Strokes:
    t = np.linspace(-2.6, 2.6, 181)
    return [parametric(3 - t**2, t * (3 - t**2) / 3)]


def semicubical_parabola() -> Strokes:
    t = np.linspace(-1.25, 1.25, 141)
    return [parametric(t**2, t**3)]


def trident_of_newton() -> Strokes:
    """xy = x^3 + x^2 + x - 1: one branch like a parabola and one that rises along the y axis."""
    left, right = np.linspace(-2.1, -0.22, 100), np.linspace(0.26, 1.35, 80)
    return [parametric(1.3 * x, x**2 + x + 1 - 1 / x) for x in (left, right)]


# Quartics and higher


def lemniscate_of_bernoulli() -> Strokes:
    t = turn_angles()
    d = 1 + np.sin(t) ** 2
    return [loop(parametric(np.cos(t) / d, np.sin(t) * np.cos(t) / d))]


def cassini_oval() -> Strokes:
    """r^4 - 2 r^2 cos 2t = b^4 - 1 with b slightly above 1: one oval with a waist."""
    t = turn_angles()
    r = np.sqrt(np.cos(2 * t) + np.sqrt(1.04**4 - np.sin(2 * t) ** 2))
    return [loop(polar(r, t))]


def conchoid_of_nicomedes() -> Strokes:
    """r = a sec t + b with b > a: a bell above the asymptote, a loop below it."""
    upper, lower = np.linspace(-0.85, 0.85, 101), np.linspace(-1.3, 1.3, 241)
    return [polar(1 / np.cos(upper) + 2.8, upper + math.pi / 2), polar(1 / np.cos(lower) - 2.8, lower + math.pi / 2)]


def bicorn() -> Strokes:
    t = turn_angles()
    return [loop(parametric(np.sin(t), np.cos(t) ** 2 * (2 + np.cos(t)) / (3 + np.sin(t) ** 2)))]


def cruciform_curve() -> Strokes:
    """x = sec t, y = csc t: four branches between two pairs of asymptotes."""
    t = np.linspace(0.32, math.pi / 2 - 0.32, 61)
    branch = parametric(1 / np.cos(t), 1 / np.sin(t))
    return [branch * signs for signs in ((1, 1), (-1, 1), (-1, -1), (1, -1))]


def devils_curve() -> Strokes:
    """y^2 (y^2 - a^2) = x^2 (x^2 - b^2) with b > a: the hourglass between two arms."""
    a2, b2 = 0.66, 1.0
    t = np.linspace(0, TURN, 721)
    s, c = np.sin(t) ** 2, np.cos(t) ** 2
    r2 = (a2 * s - b2 * c) / (s - c + 1e-15)
    is_drawn = (r2 >= 0) & (r2 < 4.2)
    points = polar(np.sqrt(np.where(is_drawn, r2, 0)), t)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], is_drawn.astype(int), [0]])))
    strokes = []
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        strokes.append(points[start:end])
    return strokes


def bifolium() -> Strokes:
    t = np.linspace(0, math.pi, 241)
    return [loop(polar(4 * np.sin(t) ** 2 * np.cos(t), t)[:, ::-1])]


def limacon_of_pascal() -> Strokes:
    t = turn_angles()
    return [loop(polar(0.5 + np.cos(t), t))]


def butterfly_curve() -> Strokes:
    """r = e^sin t - 2 cos 4t + sin^5((2t - pi)/24): closes after twelve turns, of which two are drawn."""
    t = turn_angles(721, 2)
    return [polar(np.exp(np.sin(t)) - 2 * np.cos(4 * t) + np.sin((2 * t - math.pi) / 24) ** 5, t)]


# Roses


def rose(k: int, half: bool = False) -> Strokes:
    """r = cos kt. `half`: draw half a turn, after which a rose with odd k closes."""
    t = np.linspace(0, TURN / 2 if half else TURN, 361)
    return [loop(polar(np.cos(k * t), t + math.pi / 2))]


# Spirals


def archimedean_spiral() -> Strokes:
    t = turn_angles(241, 3.5)
    return [polar(t, t)]


def logarithmic_spiral() -> Strokes:
    t = turn_angles(241, 3.0)
    return [polar(np.exp(0.22 * t), t)]


def fermats_spiral() -> Strokes:
    t = turn_angles(161, 2.0)
    arm = polar(np.sqrt(t), t)
    return [np.vstack([-arm[::-1], arm[1:]])]


def hyperbolic_spiral() -> Strokes:
    t = np.linspace(0.62, 4.5 * TURN, 600)
    return [polar(1 / t, t)]


def lituus() -> Strokes:
    t = np.concatenate([np.geomspace(0.045, 0.6, 60)[:-1], np.linspace(0.6, 5 * TURN, 500)])
    return [polar(t**-0.5, t)]


def euler_spiral() -> Strokes:
    """The Fresnel integrals of both signs, computed by the midpoint rule."""
    step = 4.2 / 1600
    s = step * (np.arange(1600) + 0.5)
    half = np.cumsum(np.stack([np.cos(s**2), np.sin(s**2)], axis=1), axis=0)[::4] * step
    half = np.vstack([[(0, 0)], half])
    return [np.vstack([-half[::-1], half[1:]])]


def spiral_of_theodorus(triangles: int = 16) -> Strokes:
    """Right triangles with outer legs of length 1 and hypotenuses sqrt 2, sqrt 3, ..."""
    points = [np.array([1.0, 0.0])]
    for _ in range(triangles):
        x, y = points[-1]
        points.append(points[-1] + np.array([-y, x]) / math.hypot(x, y))
    strokes = [np.stack(points)]
    for point in points:
        strokes.append(np.stack([np.zeros(2), point]))
    return strokes


# Roulettes


def cycloid() -> Strokes:
    t = turn_angles(241, 3.0)
    return [parametric(t - np.sin(t), 1 - np.cos(t))]


def prolate_cycloid() -> Strokes:
    t = np.linspace(-math.pi, 5 * math.pi, 301)
    return [parametric(t - 2.6 * np.sin(t), 1 - 2.6 * np.cos(t))]


def epicycloid(cusps: int) -> Strokes:
    """The path of a point on a circle that rolls outside a circle `cusps` times as large."""
    t, k = turn_angles(60 * cusps + 61), cusps
    return [loop(parametric((k + 1) * np.cos(t) - np.cos((k + 1) * t), (k + 1) * np.sin(t) - np.sin((k + 1) * t)))]


def hypocycloid(cusps: int) -> Strokes:
    """The path of a point on a circle that rolls inside a circle `cusps` times as large."""
    t, k = turn_angles(60 * cusps + 1), cusps
    return [loop(parametric((k - 1) * np.cos(t) + np.cos((k - 1) * t), (k - 1) * np.sin(t) - np.sin((k - 1) * t)))]


def epitrochoid() -> Strokes:
    """R = 3, r = 1, d = 2: three small loops inside."""
    t = turn_angles(361)
    return [loop(parametric(4 * np.cos(t) - 2 * np.cos(4 * t), 4 * np.sin(t) - 2 * np.sin(4 * t)))]


def lissajous_curve() -> Strokes:
    t = turn_angles(361)
    return [loop(parametric(np.sin(3 * t), 0.9 * np.sin(2 * t)))]


def trefoil_knot() -> Strokes:
    """The plane projection (sin t + 2 sin 2t, cos t - 2 cos 2t), with gaps where the strand passes below."""
    t = turn_angles(721)[:-1]
    points = parametric(np.sin(t) + 2 * np.sin(2 * t), np.cos(t) - 2 * np.cos(2 * t))
    height = -np.sin(3 * t)
    is_near = np.hypot(points[:, None, 0] - points[None, :, 0], points[:, None, 1] - points[None, :, 1]) < 0.42
    steps_between = np.abs((np.arange(720)[:, None] - np.arange(720)[None, :] + 360) % 720 - 360)  # along the strand
    is_other_strand = steps_between > 90
    is_hidden = (is_near & is_other_strand & (height[:, None] < height[None, :])).any(axis=1)
    return visible_strokes(points, ~is_hidden)


# Waves and graphs of functions


def sine_wave() -> Strokes:
    x = np.linspace(0, 2.5 * TURN, 201)
    return [parametric(x, 2.6 * np.sin(x))]


def rectified_sine_wave() -> Strokes:
    x = np.linspace(0, 2 * TURN, 201)
    return [parametric(x, 4.2 * np.abs(np.sin(x)))]


def square_wave() -> Strokes:
    corners = []
    for x in range(6):
        corners += [(x, 0), (x, 2)] if x % 2 else [(x, 2), (x, 0)]
    return [np.array(corners[1:-1], dtype=float) * (1, 0.9)]


def triangle_wave() -> Strokes:
    return [np.array([(x, 1.7 * (x % 2)) for x in range(6)], dtype=float)]


def sawtooth_wave() -> Strokes:
    corners = []
    for x in range(4):
        corners += [(x, 0), (x + 1, 1.9)]
    return [np.array(corners, dtype=float)]


def sinc_function() -> Strokes:
    x = np.linspace(-4.2, 4.2, 241)
    return [parametric(x, 5 * np.sinc(x))]


def logistic_curve() -> Strokes:
    x = np.linspace(-5, 5, 121)
    return [parametric(x, 6 / (1 + np.exp(-1.6 * x)))]


def tractrix() -> Strokes:
    t = np.linspace(-2.3, 2.3, 201)
    return [parametric(t - np.tanh(t), 1 / np.cosh(t))]
