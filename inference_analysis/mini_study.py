"""This section's part of the small study: does the prompt setting explain the mini VLM's failures (finding F2)?

    python inference_analysis/mini_study.py --root outputs/plane_figures/seed-0
    python inference_analysis/mini_study.py --root outputs/my/seed-0 --benchmark my.jsonl --classes my.json

Ranks all names with ROOT/checkpoints/vlm, on the test split and on images of the train split, where the best setting
and t are chosen. The answers to the wordings and candidate lists come from main_results/mini_study.py. Writes
ROOT/inference_analysis/{findings.csv, guidance.csv} beside its runs.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import calibrate
import rank_labels
import table

from vlmclassifier import cli
from vlmclassifier.mini.findings import (
    Finding,
    accuracy,
    finding,
    paper_number,
    readable,
    verdict,
    without_paper,
    write_findings,
)
from vlmclassifier.mini.study import (
    CLIP,
    VLM,
    Hits,
    StudyArgs,
    answers_run,
    common_images,
    in_processes,
    open_world,
    ranking_run,
    read_hits,
    training_free_settings,
    values,
    with_candidates,
)
from vlmclassifier.prompts import WORDINGS
from vlmclassifier.records import UserError
from vlmclassifier.scoring.runs import score_run
from vlmclassifier.scoring.statistics import paired_difference

if TYPE_CHECKING:
    from vlmclassifier.scoring.rankings import Ranking

paper = partial(paper_number, Path(__file__).parent / "paper.csv", "table2", "LLaVA1.5-7B")
CALIBRATION = {
    "ece_before": "calibration error", "ece_after": "calibration error, temperature of train images",
    "coverage_90": "coverage at 90% accuracy",
}  # fmt: skip
PER_TOKEN = {"sum": False, "mean": True}


@dataclass
class Args(StudyArgs):
    """Arguments."""


def main(args: Args) -> None:
    """Run what is not there yet, then derive the findings from the saved answers."""
    cli.check_positive(limit=args.limit, train=args.train, batch_size=args.batch_size)
    names, out = args.names, args.root / "inference_analysis"
    clip = read_hits(answers_run(args.root, CLIP, with_candidates(names, "all")))
    in_processes(rank_all, jobs(args))

    from vlmclassifier.scoring.rankings import read_ranking

    ranking, train = read_ranking(ranking_run(args.root)), read_ranking(ranking_run(args.root, "train"))
    hits = common_images({CLIP: clip} | training_free_hits(args, "test", ranking, train))
    on_train = common_images(training_free_hits(args, "train", train, train))
    best = max(on_train, key=lambda method: sum(values(on_train[method])))
    findings = [*wordings(hits, args), *rankings(hits, train), *best_method(hits, args, best), *calibration(args)]
    findings = without_paper(findings, args.benchmark)
    write_findings(findings, out / "findings.csv")
    guidance = table.write_guidance(out, [score_run(ranking_run(args.root))])
    images = len(next(iter(on_train.values())))
    print(f"\n{readable(findings)}\n\nBest training-free method on {images} train images: {best}.\n"
          f"Written: {out / 'findings.csv'}, {guidance}. Next: python inference_analysis/table.py --outputs {args.root}"
    )  # fmt: skip


def jobs(args: Args) -> list[rank_labels.Args]:
    """The runs of this section: the test split, and the train images where t is chosen."""
    weights, shared = args.root / "checkpoints" / "vlm", args.script_args()
    return [
        rank_labels.Args(VLM, weights, limit=args.limit, out=ranking_run(args.root), **shared),
        rank_labels.Args(
            VLM, weights, split="train", limit=args.train, out=ranking_run(args.root, "train"), **shared
        ),
    ]  # fmt: skip


def rank_all(work: list[rank_labels.Args]) -> None:
    """One process's share of the runs."""
    for job in work:
        rank_labels.main(job)


def training_free_hits(args: Args, split: str, ranking: "Ranking", train: "Ranking") -> dict[str, Hits]:
    """Hits of every training-free method on one split; t of the guidance is always that of the train images."""
    from vlmclassifier.scoring.guidance import GRID, Scoring, best_t

    hits = {
        setting.name: read_hits(answers_run(args.root, VLM, setting, split))
        for setting in training_free_settings(args.names)
    }
    for score, per_token in PER_TOKEN.items():
        hits[f"ranking by the {score}"] = ranking_hits(ranking, Scoring(per_token))
        for prior in ("no_image", "mean"):
            t = GRID[best_t(train.curve(per_token, prior))]
            guided = Scoring(per_token, t, ranking.prior(prior))
            hits[f"ranking by the {score}, guided, {prior.replace('_', ' ')} prior"] = ranking_hits(ranking, guided)
    return hits


def ranking_hits(ranking: "Ranking", scoring: Any) -> Hits:
    """Whether the true name of every image is ranked first; labels are not needed here."""
    return {i: ("", bool(hit)) for i, hit in zip(ranking.ids, ranking.ranks(scoring) == 0, strict=True)}


def wordings(hits: dict[str, Hits], args: Args) -> list[Finding]:
    """F2, first part: no wording moves the accuracy by more than 5 points."""
    base = values(hits[open_world(args.names).name])
    rows, moves = [], []
    for number, wording in enumerate(list(WORDINGS)[1:], start=1):
        own = values(hits[open_world(args.names, wording).name])
        rows.append(accuracy("F2", f"VLM, open world, wording {number}", own, paper(f"prompt_{wording}")))
        moves.append(finding("F2", "largest change by a wording", paired_difference(own, base)))
    largest = max(moves, key=lambda row: abs(row.value))
    if not any([*base, *(hit for wording in WORDINGS for hit in values(hits[open_world(args.names, wording).name]))]):
        return [*rows, replace(largest, holds="cannot be judged: no answer is right")]
    return [*rows, replace(largest, holds=verdict(abs(largest.value) <= 5))]


def rankings(hits: dict[str, Hits], train: "Ranking") -> list[Finding]:
    """F2, second part: all names ranked by log-probability, and guided."""
    from vlmclassifier.scoring.guidance import GRID, best_t

    rows = []
    for score, per_token in PER_TOKEN.items():
        plain, guided = f"ranking by the {score}", f"ranking by the {score}, guided, no image prior"
        column = "prob_avg" if per_token else "prob_sum"
        rows.append(accuracy("F2", f"VLM, {plain}", values(hits[plain]), paper(column)))
        rows.append(accuracy("F2", f"VLM, {guided}", values(hits[guided]), paper(f"{column}_cfg")))
        t = float(GRID[best_t(train.curve(per_token))])
        rows.append(Finding("F2", f"t of the guided {score}, chosen on train images", t, t, t, len(train.ids)))
        gain = paired_difference(values(hits[guided]), values(hits[plain]))
        rows.append(finding("F2", f"guidance's gain over the {score}", gain, None, verdict(gain.low > 0)))
    return rows


def best_method(hits: dict[str, Hits], args: Args, best: str) -> list[Finding]:
    """F2, third part: the best training-free method is above the open world and below CLIP, intervals apart."""
    own, base, clip = values(hits[best]), values(hits[open_world(args.names).name]), values(hits[CLIP])
    row = accuracy("F2", "best training-free method, chosen on train images", own, paper("prob_avg_cfg"))
    below, above = accuracy("", "", base), accuracy("", "", clip)
    return [
        row,
        finding("F2", "best training-free method minus open world", paired_difference(own, base), 47.6 - 22.8,
                verdict(row.low > below.high)),
        finding("F2", "CLIP minus best training-free method", paired_difference(clip, own), 74.8 - 47.6,
                verdict(row.high < above.low)),
    ]  # fmt: skip


def calibration(args: Args) -> list[Finding]:
    """Reported beside F2: how far the scores are from probabilities, and how much can be answered at 90% accuracy."""
    try:
        rows = calibrate.calibrate(args.root)[0]["calibration"]
    except UserError as error:
        print(f"{error} Calibration is not reported.")
        return []
    found = []
    for row in rows:
        model, n = ("VLM's ranking" if row["setting"] == "prob_sum" else "CLIP"), row["n"]
        for key, words in CALIBRATION.items():
            found.append(Finding("", f"{model}: {words}", row[key], row[f"{key}_low"], row[f"{key}_high"], n))
    return found


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
