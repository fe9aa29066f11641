"""Protects: the facts of the figures agree with their geometry; images depend only on (seed, class, index)."""

import hashlib
import math

import numpy as np
import pytest
from conftest import run_script
from scipy.spatial import cKDTree

from vlmclassifier.plane_figures import FIGURES, fractals, render
from vlmclassifier.plane_figures.dataset import FIRST_INDEX, contact_sheet, image_path, manifest_rows
from vlmclassifier.plane_figures.facts import facts_of, with_article
from vlmclassifier.plane_figures.rendering import _unit_strokes


def figures_with(fact: str) -> list:
    return [pytest.param(f, id=f.name) for f in FIGURES.values() if getattr(f, fact) is not None]


def is_closed(stroke: np.ndarray) -> bool:
    return bool(np.allclose(stroke[0], stroke[-1], atol=1e-9 + 1e-6 * np.ptp(stroke, axis=0).max()))


def resample(strokes: list[np.ndarray], step: float) -> np.ndarray:
    """Points at distances of `step` along the strokes: [points, 2]."""
    points = []
    for stroke in strokes:
        length = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(stroke, axis=0).T))])
        positions = np.linspace(0, length[-1], int(length[-1] / step) + 2)
        x, y = np.interp(positions, length, stroke[:, 0]), np.interp(positions, length, stroke[:, 1])
        points.append(np.stack([x, y], axis=1))
    return np.concatenate(points)


def count_axes(strokes: list[np.ndarray]) -> int:
    """Number of lines through the centre in which the figure is its own mirror image, to 1.5% of its size."""
    points = resample(strokes, 0.004)
    points = points - points.mean(axis=0)
    tree, is_axis = cKDTree(points), []
    for angle in np.arange(0, math.pi, math.radians(0.25)):
        axis = np.array([math.cos(angle), math.sin(angle)])
        mirrored = 2 * (points @ axis)[:, None] * axis - points
        is_axis.append(tree.query(mirrored[::7])[0].max() < 0.015)
    is_axis = np.array(is_axis)
    return len(is_axis) if is_axis.all() else int((is_axis & ~np.roll(is_axis, 1)).sum())


def count_cusps(stroke: np.ndarray) -> int:
    """Number of points where the direction changes by about half a turn within three corners of the sampled curve."""
    steps = np.diff(stroke, axis=0)
    steps = steps[np.hypot(*steps.T) > 1e-9 * np.ptp(stroke, axis=0).max()]
    if is_closed(stroke):
        steps = np.concatenate([steps, steps[:4]])
    heading = np.arctan2(steps[:, 1], steps[:, 0])
    turns = (np.diff(heading) + math.pi) % (2 * math.pi) - math.pi
    sharp = np.abs(np.convolve(turns, np.ones(3), "valid")) > math.radians(140)
    starts = int((sharp[1:] & ~sharp[:-1]).sum() + sharp[0])
    if is_closed(stroke) and sharp[0] and sharp[-1]:
        starts -= 1
    return starts


def count_crossings(strokes: list[np.ndarray]) -> int:
    """Number of different points where segments meet that do not follow each other on a stroke."""
    first = np.concatenate([s[:-1] for s in strokes])
    last = np.concatenate([s[1:] for s in strokes])
    owner = np.concatenate([np.full(len(s) - 1, k) for k, s in enumerate(strokes)])
    number = np.concatenate([np.arange(len(s) - 1) for s in strokes])
    size = np.array([len(s) - 1 if is_closed(s) else 0 for s in strokes])[owner]
    direction = last - first
    i, j = np.triu_indices(len(first), 1)
    gap = number[j] - number[i]
    same = owner[i] == owner[j]
    wraps = same & (size[i] > 0) & (gap >= size[i] - 1)
    near = same & (gap <= 1) | wraps
    i, j = i[~near], j[~near]
    cross = direction[i, 0] * direction[j, 1] - direction[i, 1] * direction[j, 0]
    offset = first[j] - first[i]
    with np.errstate(divide="ignore", invalid="ignore"):
        s = (offset[:, 0] * direction[j, 1] - offset[:, 1] * direction[j, 0]) / cross
        t = (offset[:, 0] * direction[i, 1] - offset[:, 1] * direction[i, 0]) / cross
    slack = 1e-3
    parallel = np.abs(cross) < 1e-9 * np.hypot(*direction[i].T) * np.hypot(*direction[j].T)
    meets = ~parallel & (s > -slack) & (s < 1 + slack) & (t > -slack) & (t < 1 + slack)
    points = first[i[meets]] + s[meets][:, None] * direction[i[meets]]
    crossings: list[np.ndarray] = []
    for point in points:
        if all(np.hypot(*(point - other)) > 0.02 for other in crossings):
            crossings.append(point)
    return len(crossings)


def test_there_are_enough_classes_and_each_has_a_reference():
    assert len(FIGURES) >= 90 and len({name.lower() for name in FIGURES}) == len(FIGURES)
    for figure in FIGURES.values():
        assert figure.family and figure.reference.split()[0] in ("MW", "MT", "WP"), figure.name
        assert figure.century is None or figure.student is not None, f"{figure.name}: a century needs a student"
        assert figure.degree is None or figure.algebraic, figure.name


@pytest.mark.parametrize("figure", figures_with("closed"))
def test_closed_figures_end_where_they_begin(figure):
    ends = [is_closed(stroke) for stroke in figure.draw()]
    assert all(ends) if figure.closed else not ends[0]


@pytest.mark.parametrize("figure", figures_with("sides"))
def test_sides_are_the_corners_of_the_outline(figure):
    (stroke,) = figure.draw()
    steps = np.diff(np.concatenate([stroke, stroke[1:2]]), axis=0)
    turns = steps[:-1, 0] * steps[1:, 1] - steps[:-1, 1] * steps[1:, 0]
    assert (np.abs(turns) > 1e-6).all(), "no point of the outline is inside a straight side"
    assert len(turns) == figure.sides


@pytest.mark.parametrize("figure", figures_with("axes"))
def test_axes_of_symmetry(figure):
    count = count_axes(list(_unit_strokes(figure.name)))
    assert count > 100 if math.isinf(figure.axes) else count == figure.axes


@pytest.mark.parametrize("figure", figures_with("cusps"))
def test_cusps(figure):
    assert sum(count_cusps(stroke) for stroke in _unit_strokes(figure.name)) == figure.cusps


@pytest.mark.parametrize("figure", figures_with("crossings"))
def test_crossings(figure):
    assert count_crossings(list(_unit_strokes(figure.name))) == figure.crossings


def test_a_wrong_fact_would_be_found():
    """The counters distinguish similar figures."""
    unit = {name: list(_unit_strokes(name)) for name in ("deltoid", "astroid", "trifolium", "pentagram", "kite")}
    assert [count_cusps(unit[name][0]) for name in ("deltoid", "astroid")] == [3, 4]
    assert [count_axes(unit[name]) for name in ("trifolium", "pentagram", "kite")] == [3, 5, 1]
    assert [count_crossings(unit[name]) for name in ("trifolium", "pentagram", "kite")] == [1, 5, 0]


def test_fractal_dimensions_are_those_of_the_construction():
    """log(number of parts) / log(scale factor), the number of parts counted in drawings of two depths."""
    parts = {
        "Sierpiński triangle": (len(fractals.sierpinski_triangle(3)), len(fractals.sierpinski_triangle(2)), 2),
        "Vicsek fractal": (len(fractals.vicsek_fractal(2)), len(fractals.vicsek_fractal(1)), 3),
        "Koch curve": (len(fractals.koch_curve()[0]) - 1, 4**2, 3),
        "Minkowski sausage": (len(fractals.minkowski_sausage()[0]) - 1, 8, 4),
        "Sierpiński carpet": (len(fractals.sierpinski_carpet(3)) - len(fractals.sierpinski_carpet(2)), 8, 3),
    }
    for name, (many, few, scale_factor) in parts.items():
        assert math.log(many / few) / math.log(scale_factor) == pytest.approx(FIGURES[name].dimension), name


def test_questions_and_answers():
    facts = {fact.kind: fact.answer for fact in facts_of(FIGURES["astroid"])}
    assert facts["family"] == "a roulette" and facts["cusps"] == "4" and facts["century"] == "the 17th century"
    assert {f.kind: f.answer for f in facts_of(FIGURES["circle"])}["axes"] == "infinitely many"
    century = next(f for f in facts_of(FIGURES["lune"]) if f.kind == "century")
    assert (century.question.format(subject="the lune"), century.answer) == (
        "In which century did Hippocrates of Chios study the lune?",
        "the 5th century BC",
    )
    nouns = ["Euler spiral", "L-tetromino", "T-tetromino", "H-tree", "Hilbert curve", "astroid"]
    assert [with_article(noun).split()[0] for noun in nouns] == ["an", "an", "a", "an", "a", "an"]


def digest(name: str, seed: int, index: int, size: int = 48) -> str:
    return hashlib.sha256(render(name, seed, index, size).tobytes()).hexdigest()


def test_an_image_is_the_same_in_every_process_and_order():
    keys = [("astroid", 0, 3), ("Lévy C curve", 7, 2_000_000), ("trefoil knot", 1, 0)]
    code = (
        "import hashlib; from vlmclassifier.plane_figures import render\n"
        f"for key in {keys[::-1]!r}: print(hashlib.sha256(render(*key).tobytes()).hexdigest())"
    )
    assert run_script("-c", code).stdout.split() == [digest(*key) for key in keys[::-1]]
    assert len({digest("astroid", seed, index) for seed in (0, 1) for index in (0, 1)}) == 4


def test_every_class_is_drawn_inside_the_frame_at_any_size():
    for name in FIGURES:
        points = np.concatenate(_unit_strokes(name))
        assert np.abs(points).max() <= 0.5 + 1e-9 and np.hypot(*points.T).max() <= 0.6, name
    assert render("circle", 0, 0, 224).size == (224, 224) and render("circle", 0, 0).mode == "RGB"
    assert contact_sheet(0).width > 1000


def test_splits_share_no_image_and_no_file():
    rows = list(manifest_rows({"train": 2, "test": 2}, seed=0))
    assert len({row["image"] for row in rows}) == len(rows) == 4 * len(FIGURES)
    assert rows != list(manifest_rows({"train": 2, "test": 2}, seed=1))  # other images, another manifest
    assert all(row["image"].isascii() and row["label"] in FIGURES for row in rows)
    assert FIRST_INDEX["test"] - FIRST_INDEX["train"] > 10**5 and image_path("train", "devil's curve", 3) == (
        "train/0003/devil_s_curve.png"
    )


def test_unknown_names_raise_an_error():
    with pytest.raises(KeyError):
        render("gömböc", 0, 0)
