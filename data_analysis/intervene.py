"""Train the mini VLM again and again with designed naming frequencies: does frequency cause accuracy?

    python data_analysis/intervene.py --root outputs/plane_figures/seed-0
    python data_analysis/intervene.py --root outputs/my/seed-0 --benchmark my.jsonl --classes my.json --preset photos

Beyond the paper. A dose is the share of a class's images whose texts name it. In each of two arms every class is
trained on at every dose, by a balanced Latin square, so that the same class is compared with itself. Arm "constant":
unnamed images get a generic text, so that images seen and steps are the same at every dose; arm "dropped": most unnamed
images are left out, as in pretrain_mini.py's recipe. A third world, "confounded", names those classes often that are
easy for CLIP, as an observer may find it: there the naive slope and the slope given CLIP's accuracy stand beside the
slope of the designed doses.

Needs ROOT/checkpoints and ROOT/main_results, by scripts/study.py. Trains 15 VLMs, two at a time, each on one core, and
classifies the test split with each, in the open world and by ranking all names. Writes in
ROOT/data_analysis/intervention a folder per training, doses.csv (every class in every training), curve.csv, slopes.csv,
dose_response.png and findings.csv. It can be stopped at any time: the same command continues.
"""

import csv
import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlmclassifier import cli
from vlmclassifier.mini.findings import Finding, finding, readable, verdict, write_findings
from vlmclassifier.mini.study import CLIP, PROCESSES, VLM, StudyArgs, answers_run, run_logged, with_candidates
from vlmclassifier.records import UserError
from vlmclassifier.scoring.dose_response import (
    Observation,
    confounded_doses,
    designed_doses,
    dose_curve,
    slope_per_doubling,
)
from vlmclassifier.scoring.runs import score_run
from vlmclassifier.scoring.statistics import Estimate
from vlmclassifier.tables import write_csv

ARMS = {"constant": ["--keep-generic", 1], "dropped": []}  # options of pretrain_mini.py
OVER_CLASSES = "dropped, over classes"
CONFOUNDED, NOISE = "confounded", 0.2
EASE_IMAGES = 100  # train images of every class on which CLIP's ease is measured
SLOPE_COLUMNS = ["score", "analysis", "value", "low", "high", "n"]
SCORES = {"open world": "answers", "ranking": "ranking"}  # how a VLM is asked -> folder of its run


@dataclass
class Args(StudyArgs):
    """Arguments."""

    seed: int = 0
    """The study's seed, which checkpoints and doses depend on."""
    preset: Literal["figures", "photos", "smoke"] = "figures"
    """The study's training recipe."""
    doses: tuple[float, ...] = (0.0, 0.04, 0.1, 0.25, 0.5, 1.0)
    """Shares of a class's images that texts name; each arm has as many trainings. An even number is balanced."""
    confounded: int = 3
    """Trainings of the confounded world."""
    minutes: float | None = None
    """The study's training time, where it was given."""
    facts: Path | None = None
    """The study's facts about your own classes, where they were given."""


@dataclass(frozen=True)
class Trial:
    """One training: a folder, the doses of all classes, and the options of its arm."""

    folder: Path
    doses: dict[str, float]
    options: Sequence[str | float]

    @property
    def arm(self) -> str:
        """The arm, or CONFOUNDED."""
        return self.folder.name.rsplit("-", 1)[0]


def main(args: Args) -> None:
    """Train and classify, two trainings at a time; then fit the slopes, draw, and say what they show."""
    # ---- check
    cli.check_positive(limit=args.limit, batch_size=args.batch_size, confounded=args.confounded)
    if len(set(args.doses)) < max(2, len(args.doses)) or not all(0 <= dose <= 1 for dose in args.doses):
        raise UserError("--doses must be two or more different shares from 0 to 1.")
    clip_run = answers_run(args.root, CLIP, with_candidates(args.names, "all"))
    for needed in (args.root / "checkpoints" / "clip", args.root / "checkpoints" / "lm", clip_run / "run.json"):
        if not needed.exists():
            raise UserError(f"{needed} does not exist: run scripts/study.py first.")
    home = args.root / "data_analysis" / "intervention"
    home.mkdir(parents=True, exist_ok=True)

    # ---- train and classify
    trials = [
        Trial(home / f"{arm}-{number}", doses, options)
        for arm, options in ARMS.items()
        for number, doses in enumerate(designed_doses(args.names, args.doses, args.seed), start=1)
    ]  # fmt: skip
    ease = class_accuracy(clip_on_train(args, home), args.names)
    trials += [
        Trial(home / f"{CONFOUNDED}-{number}", confounded_doses(ease, args.doses, NOISE, number), ARMS["dropped"])
        for number in range(1, args.confounded + 1)
    ]
    run_all(args, trials)

    # ---- read
    from vlmclassifier.plotting import save
    from vlmclassifier.plotting.data import dose_response

    observed = {name: [row for trial in trials for row in observations(trial, name)] for name in SCORES}
    arm_of = {trial.folder.name: trial.arm for trial in trials}
    clip = log_odds_by_class(clip_run)
    curves, slopes = [], []
    for score, rows in observed.items():
        by_arm = {arm: [row for row in rows if arm_of[row.training] == arm] for arm in (*ARMS, CONFOUNDED)}
        for arm, of_arm in by_arm.items():
            curves += [{"score": score, "arm": arm} | row for row in dose_curve(of_arm)]
        slopes += slope_rows(score, by_arm, clip)

    # ---- write
    table = [{"score": score} | row._asdict() for score, rows in observed.items() for row in rows]
    files = [
        write_csv(home / "doses.csv", table),
        write_csv(home / "curve.csv", curves),
        write_csv(home / "slopes.csv", slopes, SLOPE_COLUMNS),
    ]
    save(dose_response(home.parent), home, "dose_response")
    findings = findings_of(slopes)
    write_findings(findings, home / "findings.csv")
    print(f"\n{readable(findings)}\n\n{sentence(slopes)}\n\nWritten: {', '.join(map(str, files))}, "
          f"{home / 'dose_response.png'}, {home / 'findings.csv'}. Next: data_analysis/plot.ipynb")  # fmt: skip


def clip_on_train(args: Args, home: Path) -> Path:
    """The run of CLIP on train images, which says how easy a class is; it is computed where there is none."""
    folder = home / "clip-train"
    limit = EASE_IMAGES * len(set(args.names))
    run_logged(home / "clip-train.log", ["main_results/classify_clip.py", "--model", CLIP, "--weights",
               args.root.resolve() / "checkpoints" / "clip", "--split", "train", "--limit", limit, "--batch-size",
               args.batch_size, "--out", folder.resolve(), *args.data_options()])  # fmt: skip
    return folder


def run_all(args: Args, trials: Sequence[Trial]) -> None:
    """Train and classify all trials, PROCESSES at a time. Raises UserError, when all have ended, where one failed."""
    from tqdm import tqdm

    failures = []
    with ThreadPoolExecutor(PROCESSES) as pool, tqdm(total=len(trials), desc="trainings", unit="VLM") as bar:

        def work(trial: Trial) -> None:
            try:
                run_trial(args, trial)
            except UserError as error:
                failures.append(str(error))
            bar.update()

        list(pool.map(work, trials))
    if failures:
        raise UserError(failures[0])


def run_trial(args: Args, trial: Trial) -> None:
    """Train one VLM on the study's CLIP and language model, and classify with it; what is finished is left alone."""
    trial.folder.mkdir(exist_ok=True)
    doses = trial.folder.resolve() / "doses.json"
    doses.write_text(json.dumps(trial.doses, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
    for part in ("clip", "lm", "cache", "fitted.json"):  # which pretrain_mini.py looks for in the folder of its output
        source, link = args.root / "checkpoints" / part, trial.folder / part
        if not link.is_symlink() and source.exists():
            link.symlink_to(source.resolve(), target_is_directory=source.is_dir())
    log, vlm = trial.folder / "log.txt", checkpoint(trial)
    train = ["training_analysis/pretrain_mini.py", *args.data_options(), "--stages", "vlm", "--seed", args.seed,
             "--preset", args.preset, "--frequency", doses, "--no-evaluate", "--out", trial.folder.resolve(),
             *trial.options]  # fmt: skip
    train += ["--minutes", args.minutes] if args.minutes else []
    train += ["--facts", args.facts.resolve()] if args.facts else []
    run_logged(log, train)
    common = ["--model", VLM, "--weights", vlm, "--batch-size", args.batch_size, *args.data_options()]
    common += ["--limit", args.limit] if args.limit else []
    run_logged(log, ["main_results/classify_vlm.py", *common, "--max-new-tokens", 16, "--out",
                     trial.folder.resolve() / SCORES["open world"]])  # fmt: skip
    run_logged(log, ["inference_analysis/rank_labels.py", *common, "--out",
                     trial.folder.resolve() / SCORES["ranking"]])  # fmt: skip


def checkpoint(trial: Trial) -> Path:
    """The VLM of a training, as pretrain_mini.py names it after its table of doses."""
    return trial.folder.resolve() / "vlm-table-doses"


def class_accuracy(run: Path, names: Sequence[str]) -> dict[str, float]:
    """The accuracy of every class of a run, in percent; that of all images for a class without images in it."""
    hits = class_hits(run)
    overall = sum(right for right, _ in hits.values()) / sum(n for _, n in hits.values())
    return {name: 100 * (hits[name][0] / hits[name][1] if name in hits else overall) for name in dict.fromkeys(names)}


def class_hits(run: Path) -> dict[str, tuple[int, int]]:
    """Right answers and test images of every class of a run."""
    score_run(run)
    with open(run / "classes.csv", newline="", encoding="utf-8") as stream:
        return {row["class"]: (int(row["right"]), int(row["n"])) for row in csv.DictReader(stream)}


def log_odds_by_class(run: Path) -> dict[str, float]:
    """The log-odds of the accuracy of every class."""
    import numpy as np

    from vlmclassifier.scoring.correlation import log_odds

    hits = class_hits(run)
    right, n = (np.array(values, dtype=float) for values in zip(*hits.values(), strict=True))
    return dict(zip(hits, log_odds(right / n, n).tolist(), strict=True))


def observations(trial: Trial, score: str) -> list[Observation]:
    """Every class of one training, with the texts that have named it."""
    naming = json.loads((checkpoint(trial).with_name("vlm-table-doses-texts") / "naming.json").read_text("utf-8"))
    rows = []
    for name, (right, n) in class_hits(trial.folder / SCORES[score]).items():
        texts = naming[name]["texts_pretrain"] + naming[name]["texts_instruct"]
        rows.append(Observation(trial.folder.name, name, trial.doses[name], texts, right, n))
    return rows


def slope_rows(
    score: str, by_arm: dict[str, list[Observation]], clip: dict[str, float]
) -> list[dict[str, str | float]]:  # fmt: skip
    """The slopes of both arms with class fixed effects, and the two that an observer of the confounded world finds.

    Beside those stands the slope of the arm of the same recipe without class effects: a slope within classes is steeper
    than one over classes wherever classes differ, so that only the latter compares with an observer's.
    """
    analyses = {arm: (by_arm[arm], {"fixed_effects": True}) for arm in ARMS}
    analyses[OVER_CLASSES] = (by_arm["dropped"], {})
    analyses["confounded, naive"] = (by_arm[CONFOUNDED], {})
    analyses["confounded, given CLIP's accuracy"] = (by_arm[CONFOUNDED], {"given": clip})
    rows = []
    for name, (observed, options) in analyses.items():
        try:
            rows.append({"score": score, "analysis": name} | slope_per_doubling(observed, **options)._asdict())
        except ValueError as error:
            print(f"Note: no slope of {score}, {name}: {error}")
    return rows


def findings_of(slopes: Sequence[dict]) -> list[Finding]:
    """F4, caused: the slopes of the designed doses are above 0."""
    rows = []
    for row in slopes:
        is_designed = row["analysis"] in (*ARMS, OVER_CLASSES)
        name = f"doses designed, arm {row['analysis']}" if is_designed else row["analysis"]
        estimate = Estimate(row["value"], row["low"], row["high"], row["n"])
        holds = verdict(row["low"] > 0) if row["analysis"] in ARMS else ""
        rows.append(finding("F4", f"slope per doubling of naming texts, {row['score']}: {name}", estimate, None, holds))
    return rows


def sentence(slopes: Sequence[dict]) -> str:
    """What the slopes show, in plain words."""
    found = {(row["score"], row["analysis"]): row for row in slopes}
    parts = []
    for score in SCORES:
        dropped, naive = found.get((score, "dropped")), found.get((score, "confounded, naive"))
        constant = found.get((score, "constant"))
        for arm, row in (
            ("most unnamed images left out", dropped),
            ("unnamed images kept with generic words", constant),
        ):
            if row:
                factor, low, high = (math.exp(row[key]) for key in ("value", "low", "high"))
                effect = "raises" if row["low"] > 0 else "lowers" if row["high"] < 0 else "does not measurably change"
                parts.append(
                    f"With {arm}, naming the same class in twice as many texts {effect} the odds of a right answer "
                    f"({score}; factor {factor:.2f} [{low:.2f}, {high:.2f}])."
                )
        adjusted, over = found.get((score, "confounded, given CLIP's accuracy")), found.get((score, OVER_CLASSES))
        if over and naive and adjusted:
            parts.append(
                f"Where frequent classes are the easy ones, an observer finds a slope over classes of "
                f"{naive['value']:.2f}, and of {adjusted['value']:.2f} given CLIP's accuracy; the designed doses give "
                f"{over['value']:.2f} [{over['low']:.2f}, {over['high']:.2f}]."
            )
    return "\n".join(parts)


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
