"""PlaneFigures, the embedded data set: 96 named figures of plane geometry with their facts, and images of them."""

from vlmclassifier.plane_figures.figures import FIGURES, Figure
from vlmclassifier.plane_figures.rendering import render

__all__ = ["FIGURES", "Figure", "render"]
