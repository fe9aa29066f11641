"""Write one static page over all runs: findings, the paper's tables beside ours, figures, and a browser of examples.

    python scripts/report.py
    python scripts/report.py --outputs outputs/plane_figures/seed-0
    python scripts/report.py --outputs outputs/my/seed-0 --data-root my_images --examples 2000

Reads whatever runs are below OUTPUTS; what is missing, unfinished or cannot be read is listed on the page. The tables
of the sections are written anew first. Open the page in a browser: it needs no server and no network.
"""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from vlmclassifier import cli
from vlmclassifier.paths import OUTPUTS, PROJECT_ROOT
from vlmclassifier.records import UserError

SECTIONS = (
    "main_results",
    "inference_analysis",
    "feature_analysis",
    "data_analysis",
    "training_analysis",
    "imagewikiqa",
)
OF_SEVERAL = ("inference_analysis",)  # whose table reads runs of other sections: it takes the folder above


@dataclass
class Args:
    outputs: Path = OUTPUTS
    """Folder with the folders of the sections."""
    data_root: Path | None = None
    """Folder that image paths start from; default: the study's images, paths.toml, or what the runs say."""
    examples: int = 10_000
    """Largest number of examples per data set in the browser."""
    tables: bool = True
    """Write the tables of the sections anew."""
    title: str | None = None
    """Heading of the page."""
    out: Path | None = None
    """Folder of the page; default: OUTPUTS/report."""


def main(args: Args) -> None:
    """Write the tables, then the page."""
    cli.check_positive(examples=args.examples)
    if not args.outputs.is_dir():
        raise UserError(f"{args.outputs} does not exist: run a section first, or bash scripts/quickstart.sh.")
    if args.data_root and not args.data_root.is_dir():
        raise UserError(f"--data-root {args.data_root} is not a folder: give the one that image paths start from.")
    if not any((args.outputs / section).is_dir() for section in SECTIONS):
        seeds = sorted(folder.name for folder in args.outputs.glob("**/seed-*") if folder.is_dir())
        hint = f" Its studies are in {', '.join(seeds[:3])}: give one of them." if seeds else ""
        print(f"{args.outputs} has no folder of a section.{hint}", file=sys.stderr)
    notes: list[str] = []
    if args.tables:
        with ThreadPoolExecutor(2) as pool:
            notes = list(filter(None, pool.map(lambda section: write_tables(args.outputs, section), SECTIONS)))

    from vlmclassifier.reporting.write import write_report

    title = args.title or f"Image classification by vision-language models: {args.outputs.resolve().name}"
    written = write_report(
        args.outputs, args.out or args.outputs / "report", title, args.data_root, args.examples, notes
    )
    print(f"Written: {written.page} ({written.megabytes:.1f} MB, {written.examples:,} examples, "
          f"notes on what is missing: {len(written.notes)}). Open it in a browser.")  # fmt: skip


def write_tables(outputs: Path, section: str) -> str:
    """Run a section's table.py; returns what it says where it cannot write its tables, "" where it can."""
    if not (outputs / section).is_dir():
        return ""
    folder = outputs if section in OF_SEVERAL else outputs / section
    command = [sys.executable, f"{section}/table.py", "--outputs", str(folder.resolve())]
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True)
    if not done.returncode:
        return ""
    problem = f"{section}/table.py: {(done.stderr.strip().splitlines() or ['it stopped'])[-1]}"
    print(problem, file=sys.stderr)
    return f"{problem} Tables of this section are older than this page."


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
