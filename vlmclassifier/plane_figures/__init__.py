"""PlaneFigures: a small true world of named curves and figures, with pictures, facts and texts."""

from vlmclassifier.plane_figures.figures import FIGURES, Figure
from vlmclassifier.plane_figures.rendering import render

__all__ = ["FIGURES", "Figure", "render"]
