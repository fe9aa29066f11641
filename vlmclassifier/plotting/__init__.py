"""Every figure of the study, from the tables of the sections: the notebooks show them, the report collects them.

A function takes the folder of its section's tables and returns a figure, or None where nothing is there to draw.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from vlmclassifier.plotting import data, features, inference, main_results, questions, training
from vlmclassifier.plotting.style import save, to_svg

__all__ = [
    "FIGURES",
    "Plot",
    "data",
    "features",
    "inference",
    "main_results",
    "questions",
    "save",
    "to_svg",
    "training",
]


class Plot(NamedTuple):
    """A figure of a section."""

    name: str  # of its files
    title: str
    alt: str  # what it shows, for those who do not see it
    draw: Callable[[Path], Figure | None]


FIGURES: dict[str, list[Plot]] = {
    "main_results": [
        Plot("table1", "Table 1 as bars", "Horizontal bars: accuracy of every model that was run, open and closed "
             "world, with 95% intervals; diamonds are the paper's numbers.", main_results.table1),
    ],
    "inference_analysis": [
        Plot("figure2", "Figure 2: accuracy by number of candidates", "Lines: accuracy against the number of "
             "candidates K, one line per model, the paper's dashed.", inference.figure2),
        Plot("figure4", "Figure 4: errors of a VLM per error of CLIP", "Lines on logarithmic axes: the ratio of error "
             "counts against the number of candidates.", inference.figure4),
        Plot("figure6", "Figure 6: guidance", "Lines: top-1 accuracy against t of the guidance, by score and prior.",
             inference.figure6),
        Plot("reliability", "Reliability", "Accuracy against confidence before and after the temperature; the diagonal "
             "is perfect calibration; bars are the share of images.", inference.reliability),
        Plot("coverage", "Accuracy where the model may abstain", "Lines: accuracy of the answers against the share "
             "that is answered, the most confident first.", inference.coverage),
        Plot("hierarchy", "The deepest name with a given certainty", "Two panels: how often the name is right, and the "
             "mean number of classes below it, against the certainty asked for.", inference.hierarchy),
    ],
    "feature_analysis": [
        Plot("table10", "Table 10: probes on single tokens", "Lines: accuracy of a probe against the position of the "
             "token it reads.", features.positions),
        Plot("layers", "Layer map", "Maps of probe accuracy, layers across and kinds of tokens down, one for the "
             "trained model and one for each untrained control.", features.layer_map),
        Plot("lens", "Logit lens", "Lines: how often the right name leads at each layer, by class frequency.",
             features.lens),
        Plot("patch", "Activation patching", "Lines: how often the donor's name leads when its states replace the "
             "recipient's, by layer and tokens.", features.patching),
    ],
    "data_analysis": [
        Plot("bins", "Figures 3 and 7: accuracy by class frequency", "Lines: accuracy of classes against the number of "
             "sentences that name them, in the paper's bins.", data.by_count),
        Plot("classes", "Single classes", "Points: every class's accuracy against the logarithm of its count.",
             data.by_class),
        Plot("null", "Coefficients and their null", "Points with intervals beside grey bars for shuffled classes.",
             data.null),
        Plot("dose_response", "Dose and response", "Lines: accuracy against the share of a class's texts that name it, "
             "for designed frequencies.", data.dose_response),
    ],
    "training_analysis": [
        Plot("loss", "Figure 5: training loss and spikes", "Lines: loss per token and gradient norm by step; crosses "
             "are spikes.", training.loss),
        Plot("epochs", "Accuracy by epoch", "Lines: accuracy on held-out train images by epoch.", training.epochs),
        Plot("forgetting", "Forgetting", "Grids: right answers, and answers that are a class name, by fine-tuning, "
             "questions and images.", training.forgetting),
    ],
    "imagewikiqa": [
        Plot("table5", "Table 5: ImageWikiQA", "Points with intervals: accuracy by model and setting, the paper's "
             "numbers as diamonds.", questions.table5),
        Plot("causes", "What the errors are made of", "Stacked bars: errors of recognition, knowledge and joining.",
             questions.causes),
    ],
}  # fmt: skip
