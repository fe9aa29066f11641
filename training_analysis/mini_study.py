"""This section's part of the small study: does training on classification data teach the VLM to classify (F5)?

    python training_analysis/mini_study.py --root outputs/plane_figures/seed-0
    python training_analysis/mini_study.py --root outputs/my/seed-0 --benchmark my.jsonl --classes my.json

Fine-tunes ROOT/checkpoints/vlm by finetune_vlm.py: the projector; projector and LoRA; the projector on a mixture with
the instruction texts of its own training. Each then classifies the test split. CLIP's linear probe has the same train
images. With --full also the projector on captions and by the two objectives over the class names, BLIP-2's Q-Former
side (ROOT/checkpoints/blip), and lower learning rates; forgetting.py then asks all of them for the facts. Writes
ROOT/training_analysis/NAME for every training and findings.csv.
"""

import csv
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vlmclassifier import cli
from vlmclassifier.benchmarks import find_benchmark, load_evaluation
from vlmclassifier.mini.findings import (
    Finding,
    accuracy,
    finding,
    judged,
    paper_number,
    readable,
    verdict,
    without_paper,
    write_findings,
)
from vlmclassifier.mini.study import (
    BLIP,
    CLIP,
    PROCESSES,
    VLM,
    Hits,
    StudyArgs,
    answers_run,
    common_images,
    open_world,
    read_hits,
    run_logged,
    values,
    with_candidates,
)
from vlmclassifier.prompts import CAPTION
from vlmclassifier.records import UserError
from vlmclassifier.runs import read_record
from vlmclassifier.runs.features import Features
from vlmclassifier.runs.record import replace_file
from vlmclassifier.scoring.intervals import class_counts
from vlmclassifier.scoring.statistics import paired_difference

paper = partial(paper_number, Path(__file__).parent / "paper.csv")
# Set on seed 0 alone. The projector has AdamW at a high rate, since it is small and starts far from its goal.
COMMON = ["--lora-rank", 16, "--lora-alpha", 32, "--lora-dropout", 0, "--batch-size", 64, "--evaluated", 480]
RATE, LORA_RATE = 4e-3, 3e-3
STEPS = {"lora": 260, "blip": 400}  # of the others 200
MIXED_SHARE = 0.5  # of the rows of the mixture that are instruction texts
FACTS = 480  # images of each split that forgetting.py asks about
FULL = ("names", "expected", "blip", "captions")  # only with --full
OPTIONS = {
    "lora": ["--train", "projector+lora"], "names": ["--objective", "names"], "expected": ["--objective", "expected"],
    "blip": ["--train", "qformer", "--learning-rate", RATE / 2],
}  # fmt: skip
NAMES = {  # the longest first, so that two at a time end together
    "lora": "projector and LoRA", "projector": "projector", "mixture": "projector, mixture with instruction texts",
    "captions": "projector, captions", "names": "projector, cross-entropy over the class names",
    "expected": "projector, expected accuracy over the class names", "blip": "BLIP-2's Q-Former side",
}  # fmt: skip
PAPERS = {"projector": ("table3", "LLaVA1.5-7B", "projector"),
          "mixture": ("section4", "LLaVA1.5-7B Finetuned on ImageNet+LLaVA", "open_world"),
          "blip": ("table3", "BLIP2-2.7B", "projector")}  # fmt: skip
NEAR, CAPTIONS_NEAR, SPEARMAN_NEAR = 5, 3, 0.2  # F5: points to CLIP's probe, captions to rows; Spearman to CLIP's


@dataclass
class Args(StudyArgs):
    """Arguments."""

    train: int = 14_400
    """Number of train images that are trained on, a tenth of them held out."""
    steps: int | None = None
    """Steps of every fine-tuning; default: the study's."""
    full: bool = False
    """Also captions, the other objectives, BLIP-2, lower learning rates, and what each of them forgets."""
    rates: tuple[float, ...] = (0.25, 0.1)
    """With --full: the lower learning rates, as factors."""
    seed: int = 0
    """Seed of the order of the rows and of LoRA's start."""


def main(args: Args) -> None:
    """Train and classify what is not there yet, two at a time; derive the findings from the saved answers."""
    cli.check_positive(limit=args.limit, train=args.train, batch_size=args.batch_size, steps=args.steps)
    out = args.root / "training_analysis"
    out.mkdir(parents=True, exist_ok=True)
    names = [name for name in NAMES if args.full or name not in FULL]
    lower = {f"{name}-rate_{rate:g}": (name, rate) for name in ("lora", "projector") for rate in args.rates}
    with ThreadPoolExecutor(PROCESSES) as pool:
        jobs = [pool.submit(train_and_classify, args, name) for name in names]
        jobs.append(pool.submit(linear_probe, args))
        if args.full:
            jobs += [pool.submit(train, args, folder, *of) for folder, of in lower.items()]
            jobs.append(pool.submit(classify, args, "blip-base", None))
        for job in jobs:
            job.result()
    hits = {name: read_hits(answers_folder(args, name)) for name in names}
    if args.full:
        hits["blip-base"] = read_hits(answers_folder(args, "blip-base"))
    hits["linear"] = read_hits(out / "clip-linear-held_out")
    hits["base"] = read_hits(answers_run(args.root, VLM, open_world(args.names)))
    hits["clip"] = read_hits(answers_run(args.root, CLIP, with_candidates(args.names, "all")))
    hits = common_images(hits)
    findings = [*accuracies(args, hits), *frequencies(args, hits)]
    if args.full:
        findings += forgetting(args, [name for name in names if name not in ("captions", "blip")], lower)
    findings = without_paper(findings, args.benchmark)
    write_findings(findings, out / "findings.csv")
    print(f"\n{readable(findings)}\n\nWritten: {out / 'findings.csv'}. "
          f"Next: python training_analysis/table.py --outputs {out}")  # fmt: skip


def train_and_classify(args: Args, name: str) -> None:
    """One fine-tuning and the answers of its best weights; what is finished is left alone."""
    train(args, name, name)
    classify(args, name, args.root / "training_analysis" / name / "best")


def model_options(args: Args, name: str) -> list:
    """The model that a training is of, and the data."""
    key, stage = (BLIP, "blip") if name.startswith("blip") else (VLM, "vlm")
    return ["--model", key, "--weights", (args.root / "checkpoints" / stage).resolve(), *args.data_options()]


def train(args: Args, folder: str, name: str, rate: float = 1.0) -> None:
    """One fine-tuning into a folder; `rate`: factor of its learning rates."""
    out = args.root / "training_analysis"
    options = ["--learning-rate", rate * RATE, "--lora-rate", rate * LORA_RATE, *OPTIONS.get(name, [])]
    if name == "captions":
        options += ["--captions", write_captions(args, out / "captions.jsonl").resolve()]
    if name == "mixture":
        texts = args.root / "checkpoints" / "vlm-texts" / "instruct.json"
        rows = len(json.loads(texts.read_text(encoding="utf-8")))
        own = 0.9 * len(load_split(args, "train").examples)
        weight = own / rows * MIXED_SHARE / (1 - MIXED_SHARE)
        root = load_split(args, "train").root.resolve()
        options += ["--mix", f"{texts.resolve()}={weight:.4f}", "--image-root", root]
    run_logged(out / f"{folder}.log", ["training_analysis/finetune_vlm.py", *model_options(args, name), *COMMON,
                                       *options, "--limit", args.train, "--steps", args.steps or STEPS.get(name, 200),
                                       "--seed", args.seed, "--out", (out / folder).resolve()])  # fmt: skip


def classify(args: Args, name: str, adapter: Path | None) -> None:
    """The answers about the test split."""
    log = args.root / "training_analysis" / f"{name}.log"
    command = ["main_results/classify_vlm.py", *model_options(args, name), "--max-new-tokens", 16, "--batch-size",
               args.batch_size, "--out", answers_folder(args, name).resolve()]  # fmt: skip
    command += ["--adapter", adapter.resolve()] if adapter else []
    command += ["--limit", args.limit] if args.limit else []
    command += ["--wording", "caption"] if name == "captions" else []
    run_logged(log, command)


def load_split(args: Args, split: str):  # noqa: ANN201 - an Evaluation
    """The images of one split, as finetune_vlm.py reads them."""
    return load_evaluation(
        args.benchmark, args.classes, args.script_args()["data_root"], split, args.train if split == "train" else None
    )


def answers_folder(args: Args, name: str) -> Path:
    """The run of the answers of a fine-tuned model."""
    return args.root / "training_analysis" / f"{name}-answers"


def write_captions(args: Args, file: Path) -> Path:
    """A caption with the class name for every train image: no API writes them here, so that all have one form."""
    lines = [json.dumps({"id": example.id, "caption": CAPTION.format(example.label), "tries": 1})
             for example in load_split(args, "train").examples]  # fmt: skip
    replace_file(file, "\n".join(lines) + "\n")
    return file


def linear_probe(args: Args) -> None:
    """CLIP's linear probe on the train images that the VLM is fine-tuned on."""
    out, log = args.root / "training_analysis", args.root / "training_analysis" / "clip.log"
    folders = {split: (out / f"clip-features-{split}").resolve() for split in ("train", "test")}
    for split, folder in folders.items():
        limit = args.train if split == "train" else args.limit
        run_logged(log, ["feature_analysis/extract_features.py", "--model", CLIP, "--weights",
                         (args.root / "checkpoints" / "clip").resolve(), "--split", split, "--batch-size",
                         args.batch_size, "--out", folder, *args.data_options(),
                         *(["--limit", limit] if limit else [])])  # fmt: skip
    run = out / "clip-linear-held_out"
    if (
        not (run / "scores.csv").exists()
        or read_record(run)["config"]["train_rows"] != Features(folders["train"]).rows_hash
    ):
        run_logged(log, ["training_analysis/finetune_clip.py", "--features", folders["train"], "--test-features",
                         folders["test"], "--out", (out / "clip").resolve()])  # fmt: skip


def accuracies(args: Args, hits: dict[str, Hits]) -> list[Finding]:
    """F5, accuracy: the best fine-tuning by held-out train rows is near CLIP's linear probe, captions near rows."""
    linear = values(hits["linear"])
    rows = [
        accuracy("F5", "VLM, zero-shot", values(hits["base"])),
        accuracy("F5", "CLIP, linear probe on the same train images", linear, 85.2),
    ]
    for name, words in NAMES.items():
        if name not in hits:
            continue
        number = paper(*PAPERS[name]) if name in PAPERS else None
        rows.append(accuracy("F5", f"VLM fine-tuned: {words}", values(hits[name]), number))
    if "blip-base" in hits:
        rows.append(accuracy("F5", "BLIP-2, zero-shot", values(hits["blip-base"])))
    rows.append(near("CLIP's linear probe minus the best fine-tuning, chosen on train images", linear,
                     values(hits[chosen(args)]), NEAR))  # fmt: skip
    projector = values(hits["projector"])
    if "captions" in hits:
        rows.append(near("classification rows minus captions", projector, values(hits["captions"]), CAPTIONS_NEAR))
    if "names" in hits:
        rows.append(near("cross-entropy over the names minus generation", values(hits["names"]), projector, NEAR))
    return rows


def near(what: str, one: Sequence[bool], other: Sequence[bool], points: float) -> Finding:
    """A difference that is to be at most some points."""
    gap = paired_difference(one, other)
    return finding("F5", what, gap, None, verdict(gap.value <= points))


def forgetting(args: Args, names: Sequence[str], lower: dict[str, tuple[str, float]]) -> list[Finding]:
    """Right answers to questions about facts, of the model as it is and after every fine-tuning of it."""
    out = (args.root / "training_analysis").resolve()
    folders = {name: NAMES[name] for name in names}
    folders |= {folder: f"{NAMES[name]}, {rate:g} of the learning rate" for folder, (name, rate) in lower.items()}
    adapters = [out / folder / "last" for folder in folders]
    run_logged(out / "forgetting.log", ["training_analysis/forgetting.py", *model_options(args, "vlm"), "--adapters",
                                        *adapters, "--images", args.limit or FACTS, "--batch-size", args.batch_size,
                                        "--out", out / "forgetting"])  # fmt: skip
    with open(out / "forgetting" / "forgetting.csv", newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if (row["images"], row["questions"]) == ("new", "new")]
    words = {"as it is": "before fine-tuning"} | {f"{folder}/last": text for folder, text in folders.items()}
    return [
        Finding("F5", f"facts of new images, right: {words[row['model']]}", float(row["right"]),
                float(row["right_low"]), float(row["right_high"]), int(row["right_n"]), None, "")
        for row in rows if row["right_n"] != "0"
    ]  # fmt: skip


def chosen(args: Args) -> str:
    """The fine-tuning on classification rows that is best on held-out train images. Raises UserError."""
    found = {}
    for name in ("projector", "lora", "mixture"):
        file = args.root / "training_analysis" / name / "epochs.csv"
        if not file.exists():
            raise UserError(f"{file} does not exist: remove {file.parent} and run this again.")
        with open(file, newline="", encoding="utf-8") as stream:
            found[name] = max(float(row["held_out"]) for row in csv.DictReader(stream))
    return max(found, key=found.get)


def frequencies(args: Args, hits: dict[str, Hits]) -> list[Finding]:
    """F5, frequency: after fine-tuning the accuracy follows the naming texts no more than CLIP's does."""
    counts = naming_counts(args)
    before, after, clip = (spearman_row(hits[name], counts) for name in ("base", chosen(args), "clip"))
    holds = judged(after.value <= clip.value + SPEARMAN_NEAR, after.value, clip.value)

    def row(what: str, found, holds: str = "") -> Finding:  # noqa: ANN001 - a Correlation
        return Finding(
            "F5", f"Spearman, naming texts and {what}", found.value, found.low, found.high, found.n, None, holds
        )

    return [
        row("VLM's accuracy before fine-tuning", before),
        row("VLM's accuracy after the best fine-tuning", after, holds),
        row("CLIP's accuracy", clip),
    ]


def naming_counts(args: Args) -> dict[str, float]:
    """Class -> texts that name it, by data_analysis/mini_study.py. Raises UserError where that has not run."""
    file = args.root / "data_analysis" / f"{find_benchmark(args.benchmark, args.classes).key}.csv"
    if not file.exists():
        raise UserError(f"{file} does not exist: run data_analysis/mini_study.py first.")
    with open(file, newline="", encoding="utf-8") as stream:
        return {row["class"]: float(row["count"]) for row in csv.DictReader(stream) if row["stage"] == "total"}


def spearman_row(hits: Hits, counts: dict[str, float]):  # noqa: ANN201 - a Correlation
    """Spearman's coefficient of counts and accuracy over classes."""
    import numpy as np

    from vlmclassifier.scoring.correlation import correlate, spearman

    names: Sequence[str] = sorted(counts)
    place = {name: number for number, name in enumerate(names)}
    found = class_counts([place[label] for label, _ in hits.values()], [hit for _, hit in hits.values()])
    rows = [(counts[names[number]], right / n) for number, (right, n) in sorted(found.items())]
    x, y = (np.array(column) for column in zip(*rows, strict=True))
    return correlate(x, y, spearman)


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
