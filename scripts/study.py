"""Run the whole small study on the embedded world PlaneFigures: pictures, trainings, every section, the findings.

    python scripts/study.py
    python scripts/study.py --seed 2 --seeds 3 --full
    python scripts/study.py --benchmark my.jsonl --classes my.json --preset photos

bash scripts/quickstart.sh sets up first and passes its arguments on. Everything is kept below
outputs/BENCHMARK/seed-SEED; what is there already is not done again. A changed recipe moves the old folder aside.
Writes outputs/BENCHMARK/findings.csv and findings.md.
"""

import hashlib
import json
import resource
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlmclassifier import cli
from vlmclassifier.benchmarks import load_evaluation
from vlmclassifier.findings import Finding, over_seeds, read_findings, readable, write_findings
from vlmclassifier.paths import PROJECT_ROOT
from vlmclassifier.records import UserError
from vlmclassifier.tables import OUTPUTS

# In the order of the paper; each has a study.py that takes --root and writes ROOT/SECTION/findings.csv. With --smoke:
SECTIONS = {"main_results": ["--candidates", 2, "all", "--train", 96], "inference_analysis": ["--train", 96]}
PACKAGE = PROJECT_ROOT / "vlmclassifier"
BY_CONSTRUCTION = (
    "By construction: in this world we set how often the training texts name each class. What F1 and F4 test here is "
    "whether withholding names is enough to cause the gap; the controls (--full) train with other frequencies."
)
PAPER_COLUMN = "paper: the number of LLaVA1.5-7B or CLIP-L on ImageNet beside ours; no other comparison is meant."


@dataclass
class Args:
    seed: int = 0
    """Seed of pictures, weights, frequencies and texts."""
    seeds: int = 1
    """So many seeds from --seed on, one after the other; the table then shows the spread."""
    full: bool = False
    """Also train the controls: a VLM with uniform and one with permuted naming frequencies."""
    smoke: bool = False
    """Everything at toy size, in its own folder: shows that it runs, not what it finds."""
    benchmark: str = "plane_figures"
    """plane_figures, or a manifest FILE.jsonl of your own with a train and a test split (with --classes)."""
    classes: Path | None = None
    """Class list of your own manifest: a JSON array of names."""
    data_root: Path | None = None
    """Folder that your manifest's image paths start from; without it the manifest's own. PlaneFigures is drawn."""
    preset: Literal["figures", "photos"] = "figures"
    """Training recipe: figures, or photos for photographs; --smoke has its own."""
    minutes: float | None = None
    """Train about so long; without it the preset's steps."""
    facts: Path | None = None
    """Facts about your own classes: JSON {class: [[question with {subject}, answer], ...]}."""


def main(args: Args) -> None:
    """One seed after the other, then the table."""
    cli.check_positive(seeds=args.seeds)
    if args.seed < 0:
        raise UserError(f"--seed {args.seed} is negative: give another number.")
    if args.benchmark != "plane_figures":  # no training before the manifest is known to be whole
        for split in ("train", None):
            load_evaluation(args.benchmark, args.classes, args.data_root, split)
    home = OUTPUTS / (f"{Path(args.benchmark).stem}-smoke" if args.smoke else Path(args.benchmark).stem)
    tables, times = [], {}
    for seed in range(args.seed, args.seed + args.seeds):
        tables.append(study(args, seed, claim(home / f"seed-{seed}", args, seed), times))
    rows = over_seeds(tables)
    write_findings(rows, home / "findings.csv")
    report(args, rows, times, home)


def claim(root: Path, args: Args, seed: int) -> Path:
    """The folder of one seed, for this recipe: an older recipe's is moved aside, and back when asked for."""
    key, record = recipe_key(args, seed), root / "recipe.json"
    if record.exists():  # without a record the folder's own scripts decide what fits
        old = json.loads(record.read_text(encoding="utf-8"))["recipe"]
        if old != key:
            aside = root.with_name(f"{root.name}.{old}")
            print(f"{root} belongs to another recipe: it is kept as {aside}", file=sys.stderr)
            root.rename(aside)
    kept = root.with_name(f"{root.name}.{key}")
    if not root.exists() and kept.exists():
        kept.rename(root)
    root.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps({"recipe": key}) + "\n", encoding="utf-8")
    return root


def recipe_key(args: Args, seed: int) -> str:
    """Eight letters for everything that decides pictures and weights: arguments, their files, and our sources."""
    sources = [*sorted((PACKAGE / "plane_figures").glob("*.py")), PACKAGE / "prompts.py"]
    sources += [file for file in sorted((PACKAGE / "pretraining").glob("*.py")) if file.stem != "reports"]
    given = [Path(args.benchmark), args.classes, args.facts]
    files = [*sources, *(file for file in given if file is not None and file.is_file())]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files))
    digest.update(repr((seed, args.smoke, args.preset, args.minutes, absolute(args.benchmark))).encode())
    return digest.hexdigest()[:8]


def study(args: Args, seed: int, root: Path, times: dict[str, float]) -> list[Finding]:
    """Everything for one seed; returns its findings."""
    world, toy = ["--benchmark", absolute(args.benchmark)], args.smoke
    if args.classes:
        world += ["--classes", args.classes.resolve()]
    pictures = args.data_root.resolve() if args.data_root else None
    if args.benchmark == "plane_figures":
        pictures = root / "pictures"
        counts = ["--train", 20, "--test", 1] if toy else []
        with timed("pictures", times):
            run("scripts/make_plane_figures.py", "--out", pictures, "--seed", seed, *counts)
    world += ["--data-root", pictures] if pictures else []
    train = ["training_analysis/pretrain_mini.py", *world, "--out", root / "checkpoints", "--seed", seed,
             "--preset", "smoke" if toy else args.preset, "--no-evaluate"]  # fmt: skip
    train += ["--minutes", args.minutes] if args.minutes else []
    train += ["--facts", args.facts.resolve()] if args.facts else []
    with timed("training: CLIP, language model, LLaVA", times):
        run(*train)
    for stage in ("clip", "lm", "vlm"):  # the first two side by side; kept from the call that trained them
        seconds = float((root / "checkpoints" / stage / "training.seconds").read_text(encoding="utf-8"))
        times[f"  {stage}"] = times.get(f"  {stage}", 0.0) + seconds
    if args.full:
        with timed("controls: two more LLaVAs", times):
            together([[*train, "--stages", "vlm", "--frequency", kind] for kind in ("uniform", "permuted")])
    findings = []
    for section, smallest in SECTIONS.items():
        with timed(section, times):
            run(f"{section}/study.py", "--root", root, *world, *(smallest if toy else []))
        findings += read_findings(root / section / "findings.csv")
    return findings


def absolute(benchmark: str) -> str:
    """A manifest's full path; the scripts run in the project's folder, not in the user's."""
    return str(Path(benchmark).resolve()) if benchmark.endswith(".jsonl") else benchmark


@contextmanager
def timed(stage: str, times: dict[str, float]) -> object:
    """Add the seconds of a stage to the time table."""
    print(f"\n== {stage}", flush=True)
    start = time.monotonic()
    yield
    times[stage] = times.get(stage, 0.0) + time.monotonic() - start


def run(*command: object) -> None:
    """One script in a process of its own; a failure ends the study with its exit code."""
    together([command])


def together(commands: list) -> None:
    """Scripts side by side; the first failure ends the study."""
    started = [subprocess.Popen([sys.executable, *map(str, words)], cwd=PROJECT_ROOT) for words in commands]
    codes = [process.wait() for process in started]
    for words, code in zip(commands, codes, strict=True):
        if code:
            cli.fail(f"{words[0]} stopped (see above): mend it and run the same command again; it goes on there.", code)


def report(args: Args, rows: list[Finding], times: dict[str, float], home: Path) -> None:
    """Print and write the table, with what it can and cannot show, and where the time went."""
    text = [readable(rows, args.seeds), "", BY_CONSTRUCTION, PAPER_COLUMN]
    if args.smoke:
        text.append("Toy size: these numbers show that everything runs, nothing else.")
    (home / "findings.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    print("\n" + "\n".join(text) + "\n")
    for stage, seconds in times.items():
        print(f"{seconds:7.0f} s  {stage}")
    whole = sum(seconds for stage, seconds in times.items() if not stage.startswith(" "))
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"{whole:7.0f} s  in all; largest process {largest:.1f} GiB")
    print(f"\nWritten: {home / 'findings.csv'}, {home / 'findings.md'}; the runs and checkpoints: {home}/seed-*")
    print("There: checkpoints/curves.png, the training curves; for PlaneFigures pictures/contact_sheet.png")
    if not args.full:
        print("Next: the same command with --full adds the controls; bash main_results/table1.sh runs real checkpoints")


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
