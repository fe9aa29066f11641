"""The classes of PlaneFigures: 96 named figures of plane geometry and the facts about each.

`reference` is the source of a figure's facts: MW is Wolfram MathWorld, MT the MacTutor Famous Curves Index, WP
Wikipedia, each followed by the title of the entry. A fact is None if the references do not give it or if it depends on
a parameter. The tests check against the geometry what can be computed: closure, sides, cusps, axes, crossings.

Some classes include others. The label of an image is always the narrowest name: a square is a rectangle, a rhombus, a
kite and a parallelogram, but the drawn rectangle has unequal sides, the drawn rhombus unequal diagonals, and so on. A
circle is an ellipse; deltoid and astroid are hypocycloids; cardioid, nephroid and ranunculoid are epicycloids; the
cardioid is a limaçon of Pascal (the drawn limaçon has a loop); a Koch snowflake consists of Koch curves; the hexagram
contains triangles; the drawing of the Petersen graph contains a pentagram.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import inf, log

from vlmclassifier.plane_figures import curves, fractals, shapes
from vlmclassifier.plane_figures.shapes import Strokes

INFINITE = inf


@dataclass(frozen=True)
class Figure:
    """One class: its name, geometry and facts. None: the fact does not apply to this figure or is uncertain."""

    name: str
    family: str  # its generic word
    reference: str
    draw: Callable[[], Strokes]
    closed: bool | None = None  # whether every stroke ends where it begins; False for unbounded curves
    sides: int | None = None  # of polygons; ambiguous for stars
    cusps: int | None = None  # points where the curve reverses its direction
    axes: float | None = None  # lines of mirror symmetry
    crossings: int | None = None  # points where the line crosses itself
    algebraic: bool | None = None  # False: transcendental
    degree: int | None = None  # of the polynomial equation
    dimension: float | None = None  # of a fractal
    namesake: str | None = None  # the person it is named after
    student: str | None = None  # the person who studied or described it
    century: int | None = None  # of that study; negative: BC


def _polygon(name: str, reference: str, draw: Callable[[], Strokes], sides: int, axes: int | None) -> Figure:
    return Figure(name, "polygon", reference, draw, closed=True, sides=sides, axes=axes, crossings=0)


def _star(name: str, reference: str, n: int, step: int, crossings: int | None, **facts: object) -> Figure:
    draw = partial(shapes.star_polygon, n, step)
    return Figure(name, "star", reference, draw, closed=True, axes=n, crossings=crossings, **facts)


def _algebraic(name: str, family: str, reference: str, draw: Callable[[], Strokes], degree: int, **facts) -> Figure:  # noqa: ANN003
    return Figure(name, family, reference, draw, algebraic=True, degree=degree, **facts)


def _spiral(name: str, reference: str, draw: Callable[[], Strokes], **facts) -> Figure:  # noqa: ANN003
    facts = {"algebraic": False} | facts
    return Figure(name, "spiral", reference, draw, closed=False, **facts)


def _fractal(name: str, reference: str, draw: Callable[[], Strokes], dimension: float | None, **facts) -> Figure:  # noqa: ANN003
    return Figure(name, "fractal", reference, draw, dimension=dimension, **facts)


_FIGURES = (
    # Polygons
    _polygon("equilateral triangle", "MW Equilateral Triangle", partial(shapes.regular_polygon, 3), 3, 3),
    _polygon("right triangle", "MW Right Triangle", partial(shapes.polygon, (0, 0), (2, 0), (0, 1.2)), 3, None),
    _polygon("square", "MW Square", partial(shapes.polygon, (0, 0), (1, 0), (1, 1), (0, 1)), 4, 4),
    _polygon("rectangle", "MW Rectangle", partial(shapes.polygon, (0, 0), (2, 0), (2, 1), (0, 1)), 4, 2),
    _polygon("rhombus", "MW Rhombus", shapes.rhombus, 4, 2),
    _polygon("parallelogram", "MW Parallelogram", partial(shapes.polygon, (0, 0), (2, 0), (2.9, 1), (0.9, 1)), 4, 0),
    _polygon("isosceles trapezoid", "MW Isosceles Trapezoid",
             partial(shapes.polygon, (-1.1, 0), (1.1, 0), (0.5, 1.1), (-0.5, 1.1)), 4, 1),
    _polygon("kite", "MW Kite", shapes.kite, 4, 1),
    _polygon("dart", "WP Kite (geometry)", shapes.dart, 4, 1),
    _polygon("regular pentagon", "MW Regular Pentagon", partial(shapes.regular_polygon, 5), 5, 5),
    _polygon("regular hexagon", "MW Regular Hexagon", partial(shapes.regular_polygon, 6), 6, 6),
    _polygon("regular octagon", "MW Regular Octagon", partial(shapes.regular_polygon, 8), 8, 8),
    _polygon("Greek cross", "MW Greek Cross", shapes.greek_cross, 12, 4),
    _polygon("T-tetromino", "MW Tetromino", shapes.t_tetromino, 8, 1),
    _polygon("L-tetromino", "MW Tetromino", shapes.l_tetromino, 6, 0),
    # Stars
    _star("pentagram", "MW Pentagram", 5, 2, 5),
    _star("hexagram", "MW Hexagram", 6, 2, 6),
    _star("heptagram", "WP Heptagram", 7, 3, None),
    _star("octagram", "MW Octagram", 8, 3, 16),
    _star("star of Lakshmi", "MW Star of Lakshmi", 8, 2, 8, namesake="Lakshmi"),
    # Conics
    _algebraic("circle", "conic", "MW Circle", shapes.circle, 2, closed=True, cusps=0, crossings=0, axes=INFINITE),
    _algebraic("ellipse", "conic", "MT Ellipse", shapes.ellipse, 2, closed=True, cusps=0, crossings=0, axes=2,
               student="Apollonius of Perga"),
    _algebraic("parabola", "conic", "MT Parabola", curves.parabola, 2, closed=False, cusps=0, crossings=0, axes=1,
               student="Apollonius of Perga"),
    _algebraic("hyperbola", "conic", "MT Hyperbola", curves.hyperbola, 2, closed=False, cusps=0, crossings=0, axes=2,
               student="Apollonius of Perga"),
    # Arcs
    Figure("semicircle", "figure of arcs", "MW Semicircle", shapes.semicircle, axes=1, crossings=0),
    Figure("circular sector", "figure of arcs", "MW Circular Sector", shapes.circular_sector, closed=True, axes=1,
           crossings=0),
    Figure("vesica piscis", "figure of arcs", "MW Vesica Piscis", shapes.vesica_piscis, closed=True, axes=2,
           crossings=0),
    Figure("lune", "figure of arcs", "MW Lune", shapes.lune, closed=True, axes=1, crossings=0,
           student="Hippocrates of Chios", century=-5),
    Figure("annulus", "figure of arcs", "MW Annulus", shapes.annulus, axes=INFINITE, crossings=0),
    Figure("Reuleaux triangle", "figure of arcs", "MW Reuleaux Triangle", shapes.reuleaux_triangle, closed=True, axes=3,
           crossings=0, namesake="Franz Reuleaux", student="Franz Reuleaux", century=19),
    Figure("arbelos", "figure of arcs", "MW Arbelos", shapes.arbelos, closed=True, crossings=0),
    # Cubics
    _algebraic("folium of Descartes", "cubic curve", "MT Folium of Descartes", curves.folium_of_descartes, 3,
               closed=False, cusps=0, crossings=1, axes=1, namesake="René Descartes", student="René Descartes",
               century=17),
    _algebraic("cissoid of Diocles", "cubic curve", "MT Cissoid of Diocles", curves.cissoid_of_diocles, 3,
               closed=False, cusps=1, crossings=0, axes=1, namesake="Diocles", student="Diocles", century=-2),
    _algebraic("right strophoid", "cubic curve", "MT Right Strophoid", curves.right_strophoid, 3, closed=False, cusps=0,
               crossings=1, axes=1, student="Isaac Barrow", century=17),
    _algebraic("witch of Agnesi", "cubic curve", "MT Witch of Agnesi", curves.witch_of_agnesi, 3, closed=False, cusps=0,
               crossings=0, axes=1, namesake="Maria Gaetana Agnesi", student="Maria Gaetana Agnesi", century=18),
    _algebraic("Tschirnhausen cubic", "cubic curve", "MT Tschirnhaus's Cubic", curves.tschirnhausen_cubic, 3,
               closed=False, cusps=0, crossings=1, axes=1, namesake="Ehrenfried Walther von Tschirnhaus"),
    _algebraic("semicubical parabola", "cubic curve", "MT Neile's Semi-cubical Parabola", curves.semicubical_parabola,
               3, closed=False, cusps=1, crossings=0, axes=1, student="William Neile", century=17),
    _algebraic("trident of Newton", "cubic curve", "MT Trident of Newton", curves.trident_of_newton, 3, closed=False,
               cusps=0, crossings=0, namesake="Isaac Newton", student="Isaac Newton"),
    # Quartics
    _algebraic("lemniscate of Bernoulli", "quartic curve", "MT Lemniscate of Bernoulli", curves.lemniscate_of_bernoulli,
               4, closed=True, cusps=0, crossings=1, axes=2, namesake="Jacob Bernoulli", student="Jacob Bernoulli",
               century=17),
    _algebraic("Cassini oval", "quartic curve", "MT Cassinian Ovals", curves.cassini_oval, 4, closed=True, cusps=0,
               axes=2, namesake="Giovanni Domenico Cassini", student="Giovanni Domenico Cassini", century=17),
    _algebraic("conchoid of Nicomedes", "quartic curve", "MT Conchoid", curves.conchoid_of_nicomedes, 4, closed=False,
               axes=1, namesake="Nicomedes", student="Nicomedes"),
    _algebraic("bicorn", "quartic curve", "MW Bicorn", curves.bicorn, 4, closed=True, cusps=2, crossings=0, axes=1,
               student="James Joseph Sylvester", century=19),
    _algebraic("cruciform curve", "quartic curve", "MW Cruciform", curves.cruciform_curve, 4, closed=False),
    _algebraic("devil's curve", "quartic curve", "MT Devil's Curve", curves.devils_curve, 4, closed=False, axes=2,
               student="Gabriel Cramer", century=18),
    _algebraic("bifolium", "quartic curve", "MW Bifolium", curves.bifolium, 4, closed=True, axes=1),
    _algebraic("limaçon of Pascal", "quartic curve", "MT Limacon of Pascal", curves.limacon_of_pascal, 4, closed=True,
               axes=1, namesake="Étienne Pascal", student="Étienne Pascal", century=17),
    # Roses
    _algebraic("trifolium", "rose", "MW Trifolium", partial(curves.rose, 3, half=True), 4, closed=True, cusps=0,
               crossings=1, axes=3),
    _algebraic("quadrifolium", "rose", "MW Quadrifolium", partial(curves.rose, 2), 6, closed=True, cusps=0,
               crossings=1, axes=4, student="Guido Grandi", century=18),
    _algebraic("eight-petaled rose", "rose", "MW Rose Curve", partial(curves.rose, 4), 10, closed=True, cusps=0,
               crossings=1, axes=8, student="Guido Grandi", century=18),
    # Spirals
    _spiral("Archimedean spiral", "MT Spiral of Archimedes", curves.archimedean_spiral, namesake="Archimedes",
            student="Archimedes", century=-3),
    _spiral("logarithmic spiral", "MT Equiangular Spiral", curves.logarithmic_spiral, student="Jacob Bernoulli",
            century=17, axes=0, crossings=0),
    _spiral("Fermat's spiral", "MT Fermat's Spiral", curves.fermats_spiral, namesake="Pierre de Fermat",
            student="Pierre de Fermat", century=17, axes=0, crossings=0),
    _spiral("hyperbolic spiral", "MT Hyperbolic Spiral", curves.hyperbolic_spiral, student="Pierre Varignon",
            century=18),
    _spiral("lituus", "MT Lituus", curves.lituus, student="Roger Cotes", century=18, axes=0, crossings=0),
    _spiral("Euler spiral", "WP Euler spiral", curves.euler_spiral, namesake="Leonhard Euler",
            student="Leonhard Euler", century=18, axes=0, crossings=0),
    _spiral("spiral of Theodorus", "WP Spiral of Theodorus", curves.spiral_of_theodorus, algebraic=None,
            namesake="Theodorus of Cyrene"),
    # Roulettes
    Figure("cycloid", "roulette", "MT Cycloid", curves.cycloid, closed=False, algebraic=False, crossings=0,
           student="Galileo Galilei"),
    Figure("prolate cycloid", "roulette", "MW Prolate Cycloid", curves.prolate_cycloid, closed=False, algebraic=False,
           cusps=0),
    _algebraic("cardioid", "roulette", "MT Cardioid", partial(curves.epicycloid, 1), 4, closed=True, cusps=1,
               crossings=0, axes=1, student="Giovanni Salvemini", century=18),
    _algebraic("nephroid", "roulette", "MT Nephroid", partial(curves.epicycloid, 2), 6, closed=True, cusps=2,
               crossings=0, axes=2, student="Christiaan Huygens", century=17),
    _algebraic("ranunculoid", "roulette", "MW Ranunculoid", partial(curves.epicycloid, 5), 12, closed=True, cusps=5,
               crossings=0, axes=5),
    _algebraic("deltoid", "roulette", "MW Deltoid", partial(curves.hypocycloid, 3), 4, closed=True, cusps=3,
               crossings=0, axes=3, student="Leonhard Euler", century=18),
    _algebraic("astroid", "roulette", "MT Astroid", partial(curves.hypocycloid, 4), 6, closed=True, cusps=4,
               crossings=0, axes=4, student="Johann Bernoulli", century=17),
    Figure("epitrochoid", "roulette", "MT Epitrochoid", curves.epitrochoid, student="Albrecht Dürer",
           century=16),
    # Waves and graphs of functions
    Figure("sine wave", "wave", "WP Sine wave", curves.sine_wave, closed=False, algebraic=False, cusps=0, crossings=0),
    Figure("square wave", "wave", "MW Square Wave", curves.square_wave, closed=False, crossings=0),
    Figure("triangle wave", "wave", "MW Triangle Wave", curves.triangle_wave, closed=False, crossings=0),
    Figure("sawtooth wave", "wave", "MW Sawtooth Wave", curves.sawtooth_wave, closed=False, crossings=0),
    Figure("rectified sine wave", "wave", "WP Rectifier", curves.rectified_sine_wave, closed=False, crossings=0),
    Figure("sinc function", "graph of a function", "WP Sinc function", curves.sinc_function, closed=False,
           algebraic=False, cusps=0, crossings=0, axes=1, student="Philip Woodward", century=20),
    Figure("logistic curve", "graph of a function", "WP Logistic function", curves.logistic_curve, closed=False,
           algebraic=False, cusps=0, crossings=0, axes=0, student="Pierre François Verhulst", century=19),
    Figure("tractrix", "graph of a function", "MT Tractrix", curves.tractrix, closed=False, algebraic=False, cusps=1,
           crossings=0, axes=1, student="Christiaan Huygens", century=17),
    Figure("Lissajous curve", "oscillation curve", "MT Lissajous Curves", curves.lissajous_curve,
           namesake="Jules Antoine Lissajous", student="Jules Antoine Lissajous", century=19),
    Figure("butterfly curve", "polar curve", "WP Butterfly curve (transcendental)", curves.butterfly_curve,
           algebraic=False, student="Temple Fay", century=20),
    # Fractals
    _fractal("Koch snowflake", "MW Koch Snowflake", fractals.koch_snowflake, log(4) / log(3), closed=True, axes=6,
             crossings=0, namesake="Helge von Koch", student="Helge von Koch", century=20),
    _fractal("Koch curve", "WP Koch snowflake", fractals.koch_curve, log(4) / log(3), closed=False, axes=1,
             crossings=0, namesake="Helge von Koch", student="Helge von Koch", century=20),
    _fractal("Minkowski sausage", "WP Minkowski sausage", fractals.minkowski_sausage, 1.5,
             namesake="Hermann Minkowski"),
    _fractal("Lévy C curve", "WP Lévy C curve", fractals.levy_c_curve, 2.0, closed=False, axes=1,
             namesake="Paul Lévy", student="Paul Lévy", century=20),
    _fractal("dragon curve", "WP Dragon curve", fractals.dragon_curve, 2.0, closed=False, student="John Heighway",
             century=20),
    _fractal("Hilbert curve", "MW Hilbert Curve", fractals.hilbert_curve, 2.0, closed=False,
             namesake="David Hilbert", student="David Hilbert", century=19),
    _fractal("Gosper curve", "WP Gosper curve", fractals.gosper_curve, 2.0, closed=False,
             namesake="Bill Gosper", student="Bill Gosper", century=20),
    _fractal("Sierpiński triangle", "MW Sierpinski Sieve", fractals.sierpinski_triangle, log(3) / log(2), axes=3,
             namesake="Wacław Sierpiński", student="Wacław Sierpiński", century=20),
    _fractal("Sierpiński carpet", "MW Sierpinski Carpet", fractals.sierpinski_carpet, log(8) / log(3), axes=4,
             namesake="Wacław Sierpiński", student="Wacław Sierpiński", century=20),
    _fractal("Vicsek fractal", "WP Vicsek fractal", fractals.vicsek_fractal, log(5) / log(3), axes=4,
             namesake="Tamás Vicsek"),
    _fractal("T-square fractal", "WP T-square (fractal)", fractals.t_square_fractal, None, axes=4),
    _fractal("Cantor set", "WP Cantor set", fractals.cantor_set, log(2) / log(3), namesake="Georg Cantor",
             student="Georg Cantor", century=19),
    _fractal("Pythagoras tree", "WP Pythagoras tree (fractal)", fractals.pythagoras_tree, 2.0,
             namesake="Pythagoras", student="Albert Bosman", century=20),
    _fractal("H-tree", "WP H tree", fractals.h_tree, 2.0, axes=2),
    _fractal("Apollonian gasket", "MW Apollonian Gasket", fractals.apollonian_gasket, 1.30568,
             namesake="Apollonius of Perga"),
    # Links, diagrams, illusions
    Figure("trefoil knot", "link", "MW Trefoil Knot", curves.trefoil_knot),
    Figure("Hopf link", "link", "MW Hopf Link", shapes.hopf_link, namesake="Heinz Hopf"),
    Figure("Borromean link", "link", "WP Borromean rings", shapes.borromean_link, namesake="the Borromeo family"),
    Figure("Petersen graph", "diagram", "MW Petersen Graph", shapes.petersen_graph,
           namesake="Julius Petersen", student="Julius Petersen", century=19),
    Figure("Fano plane", "diagram", "WP Fano plane", shapes.fano_plane, namesake="Gino Fano",
           student="Gino Fano", century=19),
    Figure("Necker cube", "optical illusion", "WP Necker cube", shapes.necker_cube,
           namesake="Louis Albert Necker", student="Louis Albert Necker", century=19),
    Figure("Penrose triangle", "optical illusion", "MW Penrose Triangle", shapes.penrose_triangle,
           namesake="Lionel and Roger Penrose", student="Lionel and Roger Penrose", century=20),
)  # fmt: skip

FIGURES: dict[str, Figure] = {figure.name: figure for figure in _FIGURES}
