"""Compare the released checkpoints with the paper: the first 1,000 test images of every cell of Table 1.

    python scripts/verify_paper.py
    python scripts/verify_paper.py --model llava-1.5-7b clip-vit-l-336 --benchmark flowers caltech
    python scripts/verify_paper.py --list

Prints for every cell, for example, "paper 22.8, ours 23.1 [20.6, 25.8]: agrees". A cell agrees if the published number
is in our 95% interval, widened by 1.5 points, because the paper used all test images and other versions of libraries.
A cell is N/A if the prompt exceeds the model's context. The runs are in outputs/verify_paper/. The script can be
stopped at any time: the same command continues. Exit code 0: all cells agree or are N/A; 1: some cells do not agree or
could not be run.
"""

import csv
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from vlmclassifier import cli
from vlmclassifier.benchmarks import PAPER_BENCHMARKS
from vlmclassifier.models import MODELS, ModelSpec
from vlmclassifier.paths import OUTPUTS, PROJECT_ROOT
from vlmclassifier.records import Score, UserError
from vlmclassifier.scoring.runs import score_run

PAPER = PROJECT_ROOT / "main_results" / "paper.csv"
CANDIDATES = {"open_world": "none", "closed_world": "all"}
TOLERANCE = 1.5  # percentage points
# Billions of parameters, tokens of image and open-world prompt, KiB of KV cache per token in bfloat16.
SIZES = {
    "llava-1.5-7b": (7.1, 610, 512), "llava-1.5-13b": (13.4, 610, 800), "llava-next-vicuna-7b": (7.1, 2960, 512),
    "llava-next-mistral-7b": (7.6, 2910, 128), "blip2-2.7b": (3.7, 50, 320), "instructblip-7b": (7.9, 50, 512),
    "instructblip-13b": (14.2, 50, 800), "clip-vit-l-336": (0.4, 600, 0), "eva-clip-g": (1.4, 260, 0),
}  # fmt: skip
LIST_TOKENS = {"flowers": 600, "cars": 2700, "caltech": 460, "imagenet": 5500}  # of the list of all names
# The GPU of the estimates.
OPERATIONS_PER_SECOND = 1.25e14
BYTES_PER_SECOND = 2e12


@dataclass
class Args:
    model: tuple[str, ...] = ()
    """Keys of vlmclassifier/models.py; default: all open models of the paper."""
    benchmark: tuple[str, ...] = ()
    """One or more of imagenet, flowers, cars, caltech; default: all."""
    limit: int = 1000
    """Test images per cell, the first ones of the paper's order."""
    batch_size: int | None = None
    """Images per forward pass; default: that of the classify script."""
    device: str = "auto"
    """auto, cpu or cuda."""
    out: Path = OUTPUTS / "verify_paper"
    """Folder of the runs."""
    list: bool = False
    """Only list the cells, with the estimated time and memory of each."""


@dataclass(frozen=True)
class Cell:
    """One number of the paper's Table 1."""

    spec: ModelSpec
    benchmark: str
    setting: str
    published: float

    @property
    def name(self) -> str:
        """The name of the cell and of its run folder."""
        return f"{self.spec.key}-{self.benchmark}-{self.setting}"


def main(args: Args) -> None:
    """Run and compare the cells one by one, and print all results again at the end."""
    cli.check_positive(limit=args.limit, batch_size=args.batch_size)
    cells = select_cells(args)
    print(
        f"{len(cells)} cells, at most {args.limit} images each. Time and memory are estimates for a GPU with 125\n"
        "TFLOP/s and 2 TB/s in practice, without the time for downloading and loading models and decoding images:"
    )
    for cell in cells:
        estimate = f"about {estimated_minutes(cell, args):.1f} min, {estimated_memory(cell, args):.0f} GB"
        print(f"  {cell.name}: paper {cell.published:.1f}, {estimate}")
    if args.list:
        return
    lines, results = [], []
    for cell in cells:
        agrees, comparison = verify_cell(cell, args)
        results.append(agrees)
        lines.append(f"{cell.name}: {comparison}")
        print(lines[-1], flush=True)
    agreeing, not_applicable, failed = results.count(True), results.count(None), results.count(False)
    summary = f"{agreeing} of {len(cells)} cells agree, {not_applicable} are N/A; runs: {args.out}"
    print("\n".join(["", *lines, "", summary]))
    if failed:
        raise UserError(
            f"{failed} of {len(cells)} cells do not agree with the paper or could not be run: see the list above."
        )


def select_cells(args: Args) -> list[Cell]:
    """The cells of Table 1 for the chosen models and benchmarks. Raises UserError if there is none."""
    specs = {spec.paper_name: spec for spec in MODELS.values() if spec.paper_name and spec.kind != "api"}
    keys = {spec.key for spec in specs.values()}
    for names, allowed in ((args.model, keys), (args.benchmark, set(PAPER_BENCHMARKS))):
        unknown = [name for name in names if name not in allowed]
        if unknown:
            raise UserError(f"{unknown[0]!r} is not in the paper's Table 1: choose among {', '.join(sorted(allowed))}.")
    cells = []
    with open(PAPER, newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            spec = specs.get(row["model"])
            if row["table"] != "table1" or row["metric"] != "accuracy" or spec is None:
                continue
            if (not args.model or spec.key in args.model) and (not args.benchmark or row["dataset"] in args.benchmark):
                cells.append(Cell(spec, row["dataset"], row["setting"], float(row["value"])))
    if not cells:
        raise UserError("The paper's Table 1 has no number for this choice: remove --model or --benchmark.")
    return cells


def estimated_minutes(cell: Cell, args: Args) -> float:
    """Estimated minutes: two operations per weight and token, and all weights are read for every new token of a batch.

    The weights are bfloat16, so that they have two bytes each.
    """
    billions, new_tokens = SIZES[cell.spec.key][0], 64 if cell.spec.kind == "vlm" else 0
    computing = 2e9 * billions * (prompt_tokens(cell) + new_tokens) / OPERATIONS_PER_SECOND  # seconds per image
    reading = new_tokens * 2e9 * billions / BYTES_PER_SECOND / (args.batch_size or 8)  # seconds per image
    return args.limit * (computing + reading) / 60


def estimated_memory(cell: Cell, args: Args) -> float:
    """Estimated gigabytes on the GPU: bfloat16 weights, the KV cache of a batch, and 1 GB for activations."""
    billions, _, cache_kib = SIZES[cell.spec.key]
    return 1 + 2 * billions + (args.batch_size or 8) * (prompt_tokens(cell) + 64) * cache_kib * 1024 / 1e9


def prompt_tokens(cell: Cell) -> int:
    """Estimated number of tokens of image and prompt."""
    tokens = SIZES[cell.spec.key][1]
    if cell.setting == "closed_world" and cell.spec.kind == "vlm":
        tokens += LIST_TOKENS[cell.benchmark]
    return tokens


def verify_cell(cell: Cell, args: Args) -> tuple[bool | None, str]:
    """Run the cell if it is not finished, and compare it with the paper.

    Returns whether it agrees (None: N/A, because the prompt exceeds the context), and the comparison as text.
    """
    out = args.out / cell.name
    command = [sys.executable, f"main_results/classify_{cell.spec.kind}.py", "--model", cell.spec.key,
               "--benchmark", cell.benchmark, "--candidates", CANDIDATES[cell.setting], "--limit", args.limit,
               "--device", args.device, "--out", out.resolve()]  # fmt: skip
    if args.batch_size:
        command += ["--batch-size", args.batch_size]
    code = subprocess.run([str(argument) for argument in command], cwd=PROJECT_ROOT).returncode
    if code == 130:  # the run was interrupted with Ctrl-C
        raise KeyboardInterrupt
    if code == 3:
        return None, f"paper {cell.published:.1f}, ours N/A: the prompt exceeds the model's context (see above)"
    if code != 0:
        return False, f"paper {cell.published:.1f}, ours missing: the run ended with exit code {code} (see above)"
    score = next(score for score in score_run(out).scores if score.metric == "accuracy")
    if score.tags:
        what = f"ours {score.value:.1f} of {score.n} images is not comparable ({', '.join(score.tags)})"
        return False, f"paper {cell.published:.1f}, {what}"
    return compare(cell.published, score)


def compare(published: float, score: Score) -> tuple[bool, str]:
    """Whether the published number is in our interval, widened by the tolerance, and the comparison as text."""
    agrees = score.low - TOLERANCE <= published <= score.high + TOLERANCE
    ours = f"paper {published:.1f}, ours {score.value:.1f} [{score.low:.1f}, {score.high:.1f}] of {score.n} images"
    return agrees, f"{ours}: {'agrees' if agrees else 'does not agree'}"


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
