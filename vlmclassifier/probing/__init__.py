"""Probes on stored features: the paper's, a grid of learning rates, and classifiers without training (section 3.2).

Every probe is trained on the features of train rows alone. What is chosen (the epoch, the learning rate, the
regularisation, the number of neighbours) is chosen on a held-out part of the train rows, and the probe is then fitted
again on all of them.
"""

from vlmclassifier.probing.classifiers import (
    centroid_probe,
    fit_logistic,
    head_probe,
    logistic_probe,
    neighbour_probe,
    tip_adapter,
)
from vlmclassifier.probing.data import ProbeData, ProbeResult, few_shot_rows, held_out_rows
from vlmclassifier.probing.gradient import build_probe, grid_probes, groups_of, paper_probes, train_probes

__all__ = [
    "ProbeData",
    "ProbeResult",
    "build_probe",
    "centroid_probe",
    "few_shot_rows",
    "fit_logistic",
    "grid_probes",
    "groups_of",
    "head_probe",
    "held_out_rows",
    "logistic_probe",
    "neighbour_probe",
    "paper_probes",
    "tip_adapter",
    "train_probes",
]
