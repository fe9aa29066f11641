"""What a probe says of the test rows, as a run like every other."""

from pathlib import Path
from typing import Any

from torch import Tensor

from vlmclassifier.class_lists import first_index
from vlmclassifier.records import Prediction
from vlmclassifier.runs import open_run
from vlmclassifier.runs.features import Features


def save_predictions(folder: Path, config: dict[str, Any], test: Features, predictions: Tensor) -> None:
    """Write class indices [test rows] as a finished run."""
    names = config["classes"]
    first = first_index(names)  # equal names stand for the first, as in every accuracy by class index
    run = open_run(folder, config, [row.example_id for row in test.rows])
    run.append([
        Prediction(row.example_id, row.label, row.class_index, "", None, names[index], (first[names[index]],))
        for row, index in zip(test.rows, predictions.tolist(), strict=True)
    ])  # fmt: skip
    run.finish()
