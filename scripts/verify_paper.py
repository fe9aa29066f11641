"""Compare the released checkpoints with the paper: the first 1,000 test images of every cell of its tables.

    python scripts/verify_paper.py
    python scripts/verify_paper.py --table table2 table9 --model llava-1.5-7b --benchmark flowers
    python scripts/verify_paper.py --table table5 --questions imagewikiqa.jsonl --model llava-1.5-7b
    python scripts/verify_paper.py --model llava-1.5-7b clip-vit-l-336 --benchmark flowers caltech
    python scripts/verify_paper.py --list

Prints for every cell, for example, "paper 22.8, ours 23.1 [20.6, 25.8]: agrees". A cell agrees if the published number
is in our 95% interval, widened by 1.5 points, because the paper used all test images and other versions of libraries.
A cell is N/A if the prompt exceeds the model's context. Covered are the tables whose cells are one command each: 1, 2,
9 and 5 (all 2,000 questions); the others need training or several runs. The runs are in outputs/verify_paper/. The
script can be stopped at any time: the same command continues. Exit code 0: all cells agree or are N/A; 1: some cells do
not agree or could not be run.
"""

import csv
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlmclassifier import cli
from vlmclassifier.benchmarks import PAPER_BENCHMARKS
from vlmclassifier.models import MODELS, ModelSpec
from vlmclassifier.paths import OUTPUTS, PROJECT_ROOT
from vlmclassifier.records import Score, UserError
from vlmclassifier.scoring.runs import score_run

CLASSIFY, RANK, ANSWER = "classify", "inference_analysis/rank_labels.py", "imagewikiqa/answer.py"
ALL = ["--candidates", "all"]
# Table -> section, and of each setting the script, its options and the setting that its scores have.
TABLES: dict[str, tuple[str, dict[str, tuple[str, list[str], str]]]] = {
    "table1": ("main_results", {"open_world": (CLASSIFY, ["--candidates", "none"], "open_world"),
                                "closed_world": (CLASSIFY, ALL, "closed_world")}),
    "table2": ("inference_analysis", {
        "base_prompt": (CLASSIFY, [], "open_world"),
        "prompt_alternative_1": (CLASSIFY, ["--wording", "alternative_1"], "open_world-prompt_alternative_1"),
        "prompt_alternative_2": (CLASSIFY, ["--wording", "alternative_2"], "open_world-prompt_alternative_2"),
        "label_random_order": (CLASSIFY, ALL, "closed_world"),
        "label_fixed_order": (CLASSIFY, [*ALL, "--order", "fixed"], "closed_world-label_fixed_order"),
        "label_random_order_cot": (CLASSIFY, [*ALL, "--chain-of-thought"], "closed_world-cot"),
        **{name: (RANK, [], name) for name in ("prob_sum", "prob_avg", "prob_avg_cfg")},
    }),
    "table9": ("inference_analysis", {f"{count}_classes": (CLASSIFY, ["--candidates", str(count)], f"{count}_classes")
                                      for count in (2, 5, 20, 100)}),
    "table5": ("imagewikiqa", {"multiple_choice": (ANSWER, [], "multiple_choice")}),
}  # fmt: skip
GIVEN = {" w/ GT Class": "image+name"}  # end of a model's name in Table 5 -> what it is given
TOLERANCE = 1.5  # percentage points
# Billions of parameters, tokens of image and open-world prompt, KiB of KV cache per token in bfloat16.
SIZES = {
    "llava-1.5-7b": (7.1, 610, 512), "llava-1.5-13b": (13.4, 610, 800), "llava-next-vicuna-7b": (7.1, 2960, 512),
    "llava-next-mistral-7b": (7.6, 2910, 128), "blip2-2.7b": (3.7, 50, 320), "instructblip-7b": (7.9, 50, 512),
    "instructblip-13b": (14.2, 50, 800), "clip-vit-l-336": (0.4, 600, 0), "eva-clip-g": (1.4, 260, 0),
}  # fmt: skip
LIST_TOKENS = {"flowers": 600, "cars": 2700, "caltech": 460, "imagenet": 5500}  # of the list of all names
THOUGHT_TOKENS = 300  # of an answer with chain of thought, on average
# The GPU of the estimates.
OPERATIONS_PER_SECOND = 1.25e14
BYTES_PER_SECOND = 2e12


@dataclass
class Args:
    table: tuple[Literal[tuple(TABLES)], ...] = ("table1",)
    """Tables of the paper."""
    questions: Path | None = None
    """The released questions of ImageWikiQA, for table5."""
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
    """One number of a table of the paper."""

    spec: ModelSpec
    benchmark: str
    setting: str
    published: float
    table: str = "table1"
    given: str = "image"  # Table 5

    @property
    def name(self) -> str:
        """The name of the cell."""
        return f"{self.spec.key}-{self.benchmark}-{self.setting}" + ("" if self.given == "image" else "-with_name")

    @property
    def run_name(self) -> str:
        """The name of its run folder: all scores of a ranking are of one run."""
        script = TABLES[self.table][1][self.setting][0]
        return f"{self.spec.key}-{self.benchmark}-ranking" if script == RANK else self.name


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
    """The cells for the chosen tables, models and benchmarks. Raises UserError if there is none."""
    specs = {spec.paper_name: spec for spec in MODELS.values() if spec.paper_name and spec.kind != "api"}
    keys = {spec.key for spec in specs.values()}
    for names, allowed in ((args.model, keys), (args.benchmark, set(PAPER_BENCHMARKS))):
        unknown = [name for name in names if name not in allowed]
        if unknown:
            raise UserError(f"{unknown[0]!r} is not in the paper's Table 1: choose among {', '.join(sorted(allowed))}.")
    if "table5" in args.table and args.questions is None:
        raise UserError("table5 needs --questions, the file of ImageWikiQA.")
    cells = []
    for table in args.table:
        section, settings = TABLES[table]
        with open(PROJECT_ROOT / section / "paper.csv", newline="", encoding="utf-8") as stream:
            rows = [row for row in csv.DictReader(stream) if row["table"] == table and row["metric"] == "accuracy"]
        for row in rows:
            end = next((end for end in GIVEN if row["model"].endswith(end)), "")
            spec = specs.get(row["model"].removesuffix(end))
            if spec is None or row["setting"] not in settings or (args.model and spec.key not in args.model):
                continue
            if args.benchmark and row["dataset"] not in (*args.benchmark, "imagewikiqa"):
                continue
            cells.append(
                Cell(spec, row["dataset"], row["setting"], float(row["value"]), table, GIVEN.get(end, "image"))
            )
    if not cells:
        raise UserError("The paper's tables have no number for this choice: remove --model or --benchmark.")
    return cells


def estimated_minutes(cell: Cell, args: Args) -> float:
    """Estimated minutes: two operations per weight and token, and all weights are read for every new token of a batch.

    The weights are bfloat16, so that they have two bytes each.
    """
    billions, new_tokens = SIZES[cell.spec.key][0], 64 if cell.spec.kind == "vlm" else 0
    if cell.table == "table5" or "--chain-of-thought" in TABLES[cell.table][1][cell.setting][1]:
        new_tokens = THOUGHT_TOKENS
    computing = 2e9 * billions * (prompt_tokens(cell) + new_tokens) / OPERATIONS_PER_SECOND  # seconds per image
    reading = new_tokens * 2e9 * billions / BYTES_PER_SECOND / (args.batch_size or 8)  # seconds per image
    return (2_000 if cell.table == "table5" else args.limit) * (computing + reading) / 60


def estimated_memory(cell: Cell, args: Args) -> float:
    """Estimated gigabytes on the GPU: bfloat16 weights, the KV cache of a batch, and 1 GB for activations."""
    billions, _, cache_kib = SIZES[cell.spec.key]
    return 1 + 2 * billions + (args.batch_size or 8) * (prompt_tokens(cell) + 64) * cache_kib * 1024 / 1e9


def prompt_tokens(cell: Cell) -> int:
    """Estimated number of tokens of image and prompt."""
    tokens = SIZES[cell.spec.key][1]
    if "all" in TABLES[cell.table][1][cell.setting][1] and cell.spec.kind == "vlm":
        tokens += LIST_TOKENS[cell.benchmark]
    return tokens


def verify_cell(cell: Cell, args: Args) -> tuple[bool | None, str]:
    """Run the cell if it is not finished, and compare it with the paper.

    Returns whether it agrees (None: N/A, because the prompt exceeds the context), and the comparison as text.
    """
    out = args.out / cell.run_name
    script, options, setting = TABLES[cell.table][1][cell.setting]
    script = f"main_results/classify_{cell.spec.kind}.py" if script == CLASSIFY else script
    command = [sys.executable, script, "--model", cell.spec.key, *options, "--device", args.device, "--out",
               out.resolve()]  # fmt: skip
    if cell.table == "table5":
        command += ["--questions", Path(str(args.questions)).resolve(), "--given", cell.given]
        setting += "" if cell.given == "image" else "-with_name"
    else:
        command += ["--benchmark", cell.benchmark, "--limit", args.limit]
    if args.batch_size:
        command += ["--batch-size", args.batch_size]
    code = subprocess.run([str(argument) for argument in command], cwd=PROJECT_ROOT).returncode
    if code == 130:  # the run was interrupted with Ctrl-C
        raise KeyboardInterrupt
    if code == 3:
        return None, f"paper {cell.published:.1f}, ours N/A: the prompt exceeds the model's context (see above)"
    if code != 0:
        return False, f"paper {cell.published:.1f}, ours missing: the run ended with exit code {code} (see above)"
    scores = [score for score in score_run(out).scores if score.metric == "accuracy"]
    score = next((score for score in scores if score.setting == setting), None)
    if score is None:
        return False, f"paper {cell.published:.1f}, ours missing: {out} has no {setting}"
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
