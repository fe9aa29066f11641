"""Compare the released checkpoints with the paper: the first 1,000 test pictures of every cell of Table 1.

    python scripts/verify_paper.py
    python scripts/verify_paper.py --model llava-1.5-7b clip-vit-l-336 --benchmark flowers caltech
    python scripts/verify_paper.py --list

Prints for every cell "paper 22.8, ours 23.1 [20.6, 25.8]: agrees" or not. A cell agrees when the published number lies
in our 95% interval, widened by 1.5 points, since the paper's is of all test pictures and of other library versions.
Where the question does not fit the model's context the cell is N/A. Runs lie in outputs/verify_paper/; stop whenever
you like, the same command goes on. Exit code 0: all cells agree or are N/A, 1: some do not agree or could not be run.
"""

import csv
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from vlmclassifier import cli
from vlmclassifier.benchmarks import PAPER_BENCHMARKS
from vlmclassifier.models import MODELS, ModelSpec
from vlmclassifier.paths import PROJECT_ROOT
from vlmclassifier.records import Score, UserError
from vlmclassifier.tables import OUTPUTS, run_scores

PAPER = PROJECT_ROOT / "main_results" / "paper.csv"
CANDIDATES = {"open_world": "none", "closed_world": "all"}
TOLERANCE = 1.5  # points
# Billions of parameters, tokens of picture and open-world prompt, KiB of cache per token in bfloat16.
SIZES = {
    "llava-1.5-7b": (7.1, 610, 512), "llava-1.5-13b": (13.4, 610, 800), "llava-next-vicuna-7b": (7.1, 2960, 512),
    "llava-next-mistral-7b": (7.6, 2910, 128), "blip2-2.7b": (3.7, 50, 320), "instructblip-7b": (7.9, 50, 512),
    "instructblip-13b": (14.2, 50, 800), "clip-vit-l-336": (0.4, 600, 0), "eva-clip-g": (1.4, 260, 0),
}  # fmt: skip
LIST_TOKENS = {"flowers": 600, "cars": 2700, "caltech": 460, "imagenet": 5500}  # of all names as candidates
OPERATIONS, BYTES = 1.25e14, 2e12  # per second of the GPU that the estimates are for


@dataclass
class Args:
    model: tuple[str, ...] = ()
    """Keys of vlmclassifier/models.py; without it every open model of the paper."""
    benchmark: tuple[str, ...] = ()
    """Some of imagenet, flowers, cars, caltech; without it all."""
    limit: int = 1000
    """Test pictures per cell, the head of the paper's order."""
    batch_size: int | None = None
    """Pictures per forward pass; without it the script's own."""
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
        return f"{self.spec.key}-{self.benchmark}-{self.setting}"


def main(args: Args) -> None:
    """Cell by cell; the verdicts at the end once more."""
    cli.check_positive(limit=args.limit, batch_size=args.batch_size)
    cells = wanted(args)
    print(
        f"{len(cells)} cells, {args.limit} pictures each. Time and memory are estimates, by arithmetic for a GPU that"
    )
    print("does 125 TFLOP/s and reads 2 TB/s in practice, without downloads, loading, and decoding the pictures:")
    for cell in cells:
        estimate = f"about {minutes(cell, args):.1f} min, {memory(cell, args):.0f} GB"
        print(f"  {cell.name}: paper {cell.published:.1f}, {estimate}")
    if args.list:
        return
    lines, verdicts = [], []
    for cell in cells:
        agrees, words = verdict(cell, args)
        verdicts.append(agrees)
        lines.append(f"{cell.name}: {words}")
        print(lines[-1], flush=True)
    agreeing, failed = verdicts.count(True), verdicts.count(False)
    count = f"{agreeing} of {len(cells)} cells agree, {verdicts.count(None)} are N/A; runs: {args.out}"
    print("\n".join(["", *lines, "", count]))
    if failed:
        raise UserError(f"{failed} of {len(cells)} cells do not agree with the paper or could not be run.")


def wanted(args: Args) -> list[Cell]:
    """The cells of Table 1 that the chosen models and benchmarks fill. Raises UserError where there is none."""
    specs = {spec.paper_name: spec for spec in MODELS.values() if spec.paper_name and spec.kind != "api"}
    known = {spec.key for spec in specs.values()}
    for given, allowed in ((args.model, known), (args.benchmark, set(PAPER_BENCHMARKS))):
        strange = [name for name in given if name not in allowed]
        if strange:
            raise UserError(f"{strange[0]!r} is not in the paper's Table 1: choose among {', '.join(sorted(allowed))}.")
    cells = []
    with open(PAPER, newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            spec = specs.get(row["model"])
            if row["table"] != "table1" or row["metric"] != "accuracy" or spec is None:
                continue
            if (not args.model or spec.key in args.model) and (not args.benchmark or row["dataset"] in args.benchmark):
                cells.append(Cell(spec, row["dataset"], row["setting"], float(row["value"])))
    if not cells:
        raise UserError("The paper's Table 1 has no number for this choice: leave --model or --benchmark out.")
    return cells


def minutes(cell: Cell, args: Args) -> float:
    """Estimated minutes: two operations per weight and token, and every weight read once per new token of a batch."""
    weights, new = SIZES[cell.spec.key][0], 64 if cell.spec.kind == "vlm" else 0
    tokens = prompt_tokens(cell)
    seconds = 2e9 * weights * (tokens + new) / OPERATIONS + new * 2e9 * weights / BYTES / (args.batch_size or 8)
    return args.limit * seconds / 60


def memory(cell: Cell, args: Args) -> float:
    """Estimated gigabytes on the GPU: bfloat16 weights, the cache of a batch, and 1 GB for activations."""
    weights, _, cache = SIZES[cell.spec.key]
    return 1 + 2 * weights + (args.batch_size or 8) * (prompt_tokens(cell) + 64) * cache * 1024 / 1e9


def prompt_tokens(cell: Cell) -> int:
    """Estimated tokens of picture and question."""
    listed = cell.setting == "closed_world" and cell.spec.kind == "vlm"
    return SIZES[cell.spec.key][1] + (LIST_TOKENS[cell.benchmark] if listed else 0)


def verdict(cell: Cell, args: Args) -> tuple[bool | None, str]:
    """Run the cell where it is not finished; whether it agrees (None where it does not fit), and that in words."""
    out = args.out / cell.name
    command = [sys.executable, f"main_results/classify_{cell.spec.kind}.py", "--model", cell.spec.key,
               "--benchmark", cell.benchmark, "--candidates", CANDIDATES[cell.setting], "--limit", args.limit,
               "--device", args.device, "--out", out.resolve()]  # fmt: skip
    command += ["--batch-size", args.batch_size] if args.batch_size else []
    code = subprocess.run([str(word) for word in command], cwd=PROJECT_ROOT).returncode
    if code == 130:
        raise KeyboardInterrupt
    if code == 3:
        return None, f"paper {cell.published:.1f}, ours N/A: the question does not fit the model's context (see above)"
    if code:
        return False, f"paper {cell.published:.1f}, ours not there: the run ended with code {code} (see above)"
    config = json.loads((out / "run.json").read_text(encoding="utf-8"))["config"]
    score = next(s for s in run_scores(out, "main_results", "table1") if s.metric == "accuracy")
    if config["miniature"]:
        return False, f"paper {cell.published:.1f}, ours {score.value:.1f} is a miniature's: not compared"
    return compare(cell.published, score)


def compare(published: float, score: Score) -> tuple[bool, str]:
    """Whether the published number lies in our interval, widened by the tolerance, and the sentence about it."""
    agrees = score.low - TOLERANCE <= published <= score.high + TOLERANCE
    ours = f"paper {published:.1f}, ours {score.value:.1f} [{score.low:.1f}, {score.high:.1f}]"
    return agrees, f"{ours}: {'agrees' if agrees else 'does not agree'}"


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
