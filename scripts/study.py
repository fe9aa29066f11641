"""Run the whole small study on the embedded data set PlaneFigures: images, training, every section, the findings.

    python scripts/study.py
    python scripts/study.py --seed 2 --seeds 3 --full
    python scripts/study.py --benchmark my.jsonl --classes my.json --preset photos

bash scripts/quickstart.sh installs everything first and passes its arguments on. All files are written below
outputs/BENCHMARK/seed-SEED, at last report/index.html, one page with everything; finished parts are not computed again.
If the recipe has changed, the folder of the old recipe is renamed and kept. Writes outputs/BENCHMARK/findings.csv and
findings.md.
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
from vlmclassifier.benchmarks import class_names, find_benchmark, load_evaluation
from vlmclassifier.mini.findings import Finding, over_seeds, read_findings, readable, write_findings
from vlmclassifier.paths import OUTPUTS, PROJECT_ROOT
from vlmclassifier.prompts import CAPTION, TEMPLATES, WORDINGS
from vlmclassifier.records import UserError

# In the order of the paper. Each section has a mini_study.py that takes --root and writes ROOT/SECTION/findings.csv.
# The values are its arguments with --smoke.
SECTIONS = {
    "main_results": ["--candidates", 2, "all", "--train", 96], "inference_analysis": ["--train", 96],
    "feature_analysis": ["--draws", 1], "data_analysis": [], "training_analysis": ["--train", 192, "--steps", 3],
    "imagewikiqa": ["--rows", 8, "--no-filter"],
}  # fmt: skip
BY_CONSTRUCTION = (
    "By construction: in this data set we set how often the training texts name each class. What F1 and F4 test here "
    "is whether withholding names is enough to cause the gap; the controls (--full) train with other frequencies."
)
PAPER_COLUMN = "paper: the number of LLaVA1.5-7B or CLIP-L on ImageNet beside ours; no other comparison is meant."


@dataclass
class Args:
    seed: int = 0
    """Seed of images, weights, frequencies and texts."""
    seeds: int = 1
    """Number of seeds, from --seed on, one after the other; for several the table shows the range of the values."""
    full: bool = False
    """Also train the controls: a VLM with uniform and one with permuted naming frequencies, a BLIP-2, 15 VLMs with
    designed frequencies (data_analysis/intervene.py), and more ways of fine-tuning; about three quarters of an hour."""
    smoke: bool = False
    """Run everything at toy size, in a folder of its own: a test that it runs, without meaningful numbers."""
    benchmark: str = "plane_figures"
    """plane_figures, or a manifest FILE.jsonl of your own with a train and a test split (with --classes)."""
    classes: Path | None = None
    """Class list of your own manifest: a JSON array of names."""
    data_root: Path | None = None
    """Folder that your manifest's image paths start from; default: the manifest's folder. Not used for plane_figures,
    whose images are drawn."""
    preset: Literal["figures", "photos"] = "figures"
    """Training recipe: figures for generated images, photos for real images; --smoke has a recipe of its own."""
    minutes: float | None = None
    """Approximate training time; default: the preset's number of steps."""
    facts: Path | None = None
    """Facts about your own classes: JSON {class: [[question with {subject}, answer], ...]}."""


def main(args: Args) -> None:
    """Run one seed after the other, then print and write the table."""
    cli.check_positive(seeds=args.seeds)
    if args.seed < 0:
        raise UserError(f"--seed {args.seed} is negative: give another number.")
    if args.benchmark != "plane_figures":  # errors in the manifest must appear before the training
        for split in ("train", None):
            load_evaluation(args.benchmark, args.classes, args.data_root, split)
    name = Path(args.benchmark).stem
    folder = OUTPUTS / (f"{name}-smoke" if args.smoke else name)
    tables: list[list[Finding]] = []
    times: dict[str, float] = {}
    for seed in range(args.seed, args.seed + args.seeds):
        root = prepare_seed_folder(folder / f"seed-{seed}", args, seed)
        tables.append(run_seed(args, seed, root, times))
    rows = over_seeds(tables)
    write_findings(rows, folder / "findings.csv")
    write_report(args, rows, times, folder)


def prepare_seed_folder(root: Path, args: Args, seed: int) -> Path:
    """Return the folder of one seed, which contains results of the current recipe only.

    A folder of another recipe is renamed to ROOT.KEY; an earlier folder of the current recipe is renamed back.
    """
    key, record = recipe_key(args, seed), root / "recipe.json"
    if record.exists():  # without a record the scripts themselves refuse what does not fit
        old_key = json.loads(record.read_text(encoding="utf-8"))["recipe"]
        if old_key != key:
            old_folder = root.with_name(f"{root.name}.{old_key}")
            print(f"{root} belongs to another recipe: it is kept as {old_folder}", file=sys.stderr)
            root.rename(old_folder)
    earlier_folder = root.with_name(f"{root.name}.{key}")
    if not root.exists() and earlier_folder.exists():
        earlier_folder.rename(root)
    root.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps({"recipe": key}) + "\n", encoding="utf-8")
    return root


def recipe_key(args: Args, seed: int) -> str:
    """Return eight letters that identify the recipe: a hash of everything that decides images and weights.

    These are arguments, the user's files, hyperparameters, prompts, texts and figures. Source files are not hashed, so
    that a changed comment changes nothing. When the training code gives other weights, increase
    mini.recipes.TRAINING_VERSION.
    """
    from vlmclassifier.mini.corpus import class_list_spec, plane_figures_spec, sample_texts
    from vlmclassifier.mini.recipes import RECIPES, TRAINING_VERSION

    preset = "smoke" if args.smoke else args.preset
    benchmark = find_benchmark(args.benchmark, args.classes)
    is_embedded = args.benchmark == "plane_figures"
    corpus = plane_figures_spec() if is_embedded else class_list_spec(class_names(benchmark), args.facts)
    parts = [
        seed, args.smoke, args.preset, args.minutes, absolute_benchmark(args.benchmark), TRAINING_VERSION,
        RECIPES[preset], WORDINGS, TEMPLATES["llava-1.5"], CAPTION, corpus.names, sorted(corpus.facts.items()),
        sample_texts(corpus, seed),
    ]  # fmt: skip
    for file in (Path(args.benchmark), args.classes, args.facts):
        if file is not None and file.is_file():
            parts.append(file.read_bytes())
    if is_embedded:
        from vlmclassifier.plane_figures import FIGURES, render

        parts += [render(name, seed, 0).tobytes() for name in FIGURES]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:8]


def run_seed(args: Args, seed: int, root: Path, times: dict[str, float]) -> list[Finding]:
    """Draw the images, train, run every section for one seed, and return its findings.

    `times`: seconds of each stage; this seed's are added.
    """
    data = ["--benchmark", absolute_benchmark(args.benchmark)]
    if args.classes:
        data += ["--classes", args.classes.resolve()]
    images = args.data_root.resolve() if args.data_root else None
    if args.benchmark == "plane_figures":
        images = root / "images"
        draw = ["scripts/make_plane_figures.py", "--out", images, "--seed", seed]
        if args.smoke:
            draw += ["--train", 20, "--test", 1]
        with timed("images", times):
            run_script(draw)
    if images:
        data += ["--data-root", images]

    recipe = [*data, "--seed", seed, "--preset", "smoke" if args.smoke else args.preset]
    recipe += ["--minutes", args.minutes] if args.minutes else []
    recipe += ["--facts", args.facts.resolve()] if args.facts else []
    train = ["training_analysis/pretrain_mini.py", *recipe, "--out", root / "checkpoints", "--no-evaluate"]
    with timed("training: CLIP, language model, LLaVA", times):
        run_script(train)
    for stage in ("clip", "lm", "vlm"):  # recorded by the call that trained them; the first two ran in parallel
        seconds = float((root / "checkpoints" / stage / "training.seconds").read_text(encoding="utf-8"))
        times[f"  {stage}"] = times.get(f"  {stage}", 0.0) + seconds
    if args.full:
        controls = [[*train, "--stages", "vlm", "--frequency", frequency] for frequency in ("uniform", "permuted")]
        controls.append([*train, "--stages", "blip"])
        with timed("controls: two more LLaVAs, and a BLIP-2", times):
            run_in_parallel(controls)

    findings = []
    for section, smoke_arguments in SECTIONS.items():
        command = [f"{section}/mini_study.py", "--root", root, *data]
        if args.smoke:
            command += smoke_arguments
        if args.full and section == "training_analysis":
            command += ["--full"]
        if args.facts and section == "imagewikiqa":
            command += ["--facts", args.facts.resolve()]
        with timed(section, times):
            run_script(command)
        findings += read_findings(root / section / "findings.csv")
    if args.full:
        with timed("designed frequencies: more LLaVAs", times):
            toy = ["--doses", 0, 1, "--confounded", 1] if args.smoke else []
            run_script(["data_analysis/intervene.py", "--root", root, *recipe, *toy])
        findings += read_findings(root / "data_analysis" / "intervention" / "findings.csv")
    with timed("report", times):
        images = ["--data-root", args.data_root.resolve()] if args.data_root else []
        run_script(["scripts/report.py", "--outputs", root, *images])
    return findings


def absolute_benchmark(benchmark: str) -> str:
    """Return the absolute path of a manifest, since the scripts run in the project's folder; keep other names."""
    return str(Path(benchmark).resolve()) if benchmark.endswith(".jsonl") else benchmark


@contextmanager
def timed(stage: str, times: dict[str, float]) -> object:
    """Print a heading and add the seconds of a stage to `times`."""
    print(f"\n== {stage}", flush=True)
    start = time.monotonic()
    yield
    times[stage] = times.get(stage, 0.0) + time.monotonic() - start


def run_script(command: list) -> None:
    """Run one script in a new process; if it fails, end the study with its exit code."""
    run_in_parallel([command])


def run_in_parallel(commands: list[list]) -> None:
    """Run scripts in parallel; if one fails, end the study with its exit code after all have ended."""
    processes = []
    for command in commands:
        words = [str(word) for word in command]
        processes.append(subprocess.Popen([sys.executable, *words], cwd=PROJECT_ROOT))
    codes = [process.wait() for process in processes]
    for command, code in zip(commands, codes, strict=True):
        if code:
            cli.fail(
                f"{command[0]} stopped (its message is above): fix the cause and run the same command again; it "
                "continues from there.", code,
            )  # fmt: skip


def write_report(args: Args, rows: list[Finding], times: dict[str, float], folder: Path) -> None:
    """Write and print the table with notes on how to read it; print the times and the paths of all results."""
    lines = [readable(rows, args.seeds), "", BY_CONSTRUCTION]
    if any(row.paper is not None for row in rows):
        lines.append(PAPER_COLUMN)
    if args.smoke:
        lines.append("Toy size: these numbers show that everything runs, nothing else.")
    text = "\n".join(lines) + "\n"
    (folder / "findings.md").write_text(text, encoding="utf-8")
    print(f"\n{text}")
    total = 0.0
    for stage, seconds in times.items():
        print(f"{seconds:7.0f} s  {stage}")
        if not stage.startswith(" "):  # indented stages are parts of the one above them
            total += seconds
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"{total:7.0f} s  in total; peak memory of the largest process {peak:.1f} GiB")
    print(f"\nWritten: {folder / 'findings.csv'}, {folder / 'findings.md'}; runs and checkpoints: {folder}/seed-*")
    print(f"In each: report/index.html, all of it on one page for a browser, such as {folder}/seed-{args.seed}/report/"
          "index.html")  # fmt: skip
    print("In each: checkpoints/curves.png, the training curves; for PlaneFigures also images/contact_sheet.png")
    if not args.full:
        print("Next: the same command with --full adds the controls; bash main_results/table1.sh runs real checkpoints")


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
