"""Make a run of an output file of the paper's own code, so that its answers are scored like ours.

    python main_results/import_outputs.py flowers_llava7b.jsonl --model llava-1.5-7b --benchmark flowers
    python main_results/import_outputs.py cars_gpt4.jsonl --model gpt-4-turbo --benchmark cars --candidates all

Reads the files of its local models and of its three API scripts. The run is tagged as imported, and the paper's number
is put beside it. A line needs an answer (pred, output or OpenAI's choices) and a label (label, or the third part of
custom_id), and should name its image:
{"image": "./data/Flowers102/jpg/image_00001.jpg", "label": "passion flower", "split": "test", "pred": "A flower."}
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from vlmclassifier import cli
from vlmclassifier.arguments import BenchmarkName
from vlmclassifier.benchmarks import class_names, find_benchmark
from vlmclassifier.importing import find_imported_model, import_run
from vlmclassifier.paths import OUTPUTS
from vlmclassifier.prompts import ORDERS, WORDINGS, PromptSetting
from vlmclassifier.records import UserError
from vlmclassifier.scoring.runs import score_run


@dataclass
class Args:
    file: tyro.conf.Positional[Path]
    """The output file: JSON lines."""
    model: str
    """What answered: a key of vlmclassifier/models.py, or OWNER/NAME for any other VLM."""
    benchmark: BenchmarkName
    classes: Path | None = None
    """Class list of your own manifest: a JSON array of names."""
    candidates: str = "none"
    """none, all or K: the candidates that were listed, which a line does not say."""
    order: Literal[ORDERS] = "random"
    """Order of the candidates."""
    wording: Literal[tuple(WORDINGS)] = "base"
    """Wording of the question."""
    chain_of_thought: bool = False
    """Whether the prompt asked for a chain of thought."""
    outputs: Path = OUTPUTS / "main_results"
    """Folder of the run folders."""


def main(args: Args) -> None:
    """Check the file, write the run, score it."""
    task = find_benchmark(args.benchmark, args.classes)
    spec = find_imported_model(args.model)
    if spec.kind == "clip" and args.candidates == "none":
        raise UserError("CLIP always chooses among class names: give --candidates all or a number.")
    setting = PromptSetting(
        class_names(task), args.candidates, args.order, args.wording, args.chain_of_thought
    )  # fmt: skip
    model = args.model.replace("/", "-")
    folder = args.outputs / f"{model}-{task.key}-{setting.name}-imported-{args.file.stem}"
    remarks = import_run(args.file, folder, spec, task, setting)
    print(f"{args.file} is now the run {folder}: {'; '.join(remarks)}.")
    cli.report(score_run(folder))


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
