"""This section's part of the small study: does the way of asking explain the mini VLM's failures (finding F2)?

    python inference_analysis/study.py --root outputs/plane_figures/seed-0
    python inference_analysis/study.py --root outputs/my/seed-0 --benchmark my.jsonl --classes my.json

Ranks all names with ROOT/checkpoints/vlm, on the test split and on pictures of the train split, where the best way and
t are chosen. The wordings and candidate lists have been asked by main_results/study.py, whose runs lie in
ROOT/main_results. Writes ROOT/inference_analysis/{findings.csv, guidance.csv} beside its runs.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import rank_labels

from vlmclassifier import cli
from vlmclassifier.findings import (
    Finding,
    Hits,
    paired_difference,
    paper_number,
    proportion,
    readable,
    right_answers,
    values,
    verdict,
    write_findings,
)
from vlmclassifier.prompts import WORDINGS, setting_name
from vlmclassifier.records import UserError

if TYPE_CHECKING:
    from vlmclassifier.ranking.results import Ranking

paper = partial(paper_number, Path(__file__).parent / "paper.csv", "table2", "LLaVA1.5-7B")
PROCESSES = 2
GUIDED = {"sum": False, "mean": True}
OPEN = {wording: setting_name("none", wording) for wording in WORDINGS}


@dataclass
class Args:
    root: Path
    """Folder of one study: its checkpoints are below it, its results go there."""
    benchmark: str = "plane_figures"
    """plane_figures, another benchmark, or a manifest FILE.jsonl of your own (with --classes)."""
    classes: Path | None = None
    """Class list of your own manifest: a JSON array of names."""
    data_root: Path | None = None
    """Folder that the manifest's image paths start from; without it ROOT/pictures where it exists."""
    train: int = 288
    """Pictures of the train split on which t is chosen."""
    limit: int | None = None
    """Only the first N pictures of the test split's evaluation order."""
    batch_size: int = 128
    """Pictures per forward pass."""


def main(args: Args) -> None:
    """Run what is not there yet, then derive the findings from the saved answers."""
    cli.check_positive(limit=args.limit, train=args.train, batch_size=args.batch_size)
    out = args.root / "inference_analysis"
    asked = args.root / "main_results"
    clip = asked / f"mini-clip-{setting_name('all')}"
    if not (clip / "predictions.jsonl").exists():
        raise UserError(f"{asked} holds no runs: run main_results/study.py --root {args.root} first.")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, context, initializer=cli.use_one_core) as pool:
        list(pool.map(rank_all, [jobs(args, out)] * PROCESSES))

    from vlmclassifier.ranking.results import read_ranking

    ranking, train = read_ranking(out / "ranking"), read_ranking(out / "ranking-train")
    ways, on_train = accuracies(asked, ranking, train), accuracies(asked / "train", train, train)
    clip = right_answers(clip)
    common = set(clip).intersection(*ways.values())  # a smaller --limit leaves runs of different lengths
    ways = {way: {i: hits[i] for i in common} for way, hits in ways.items()}
    alike = set.intersection(*map(set, on_train.values()))
    on_train = {way: {i: hits[i] for i in alike} for way, hits in on_train.items()}
    best = max(on_train, key=lambda way: sum(values(on_train[way])))
    findings = [*wordings(ways), *rankings(ways, ranking, train), *best_way(ways, best, {i: clip[i] for i in common})]
    write_findings(findings, out / "findings.csv")
    curves = guidance_curve(out, ranking)
    print(f"\n{readable(findings)}\n\nBest training-free way on {len(alike)} train pictures: {best}.\n"
          f"Written: {out / 'findings.csv'}, {curves}. Next: python inference_analysis/table.py --outputs {args.root}"
    )  # fmt: skip


def jobs(args: Args, out: Path) -> list[rank_labels.Args]:
    """The runs of this section: the test split, and the train pictures where t is chosen."""
    pictures = args.root / "pictures"
    rank = partial(
        rank_labels.Args, "mini-llava", args.root / "checkpoints" / "vlm", args.benchmark, args.classes,
        args.data_root or (pictures if pictures.is_dir() else None), batch_size=args.batch_size,
    )  # fmt: skip
    return [rank(limit=args.limit, out=out / "ranking"),
            rank(split="train", limit=args.train, out=out / "ranking-train")]  # fmt: skip


def rank_all(work: list[rank_labels.Args]) -> None:
    """One process's share: the runs are shared through their folders."""
    for job in work:
        rank_labels.main(job)


def accuracies(folder: Path, ranking: "Ranking", train: "Ranking") -> dict[str, Hits]:
    """Hits of every training-free way on some pictures; t of the guidance is always that of the train pictures."""
    from vlmclassifier.ranking import GRID, Scoring, choose

    ways = {way: right_answers(folder / f"mini-llava-{way}") for way in (*OPEN.values(), setting_name("all"))}
    for score, per_token in GUIDED.items():
        ways[f"ranking by the {score}"] = hits_of(ranking, Scoring(per_token))
        for prior in ("no_image", "mean"):
            t = GRID[choose(train.curve(per_token, prior))]
            ways[f"ranking by the {score}, guided, {prior.replace('_', ' ')} prior"] = hits_of(
                ranking, Scoring(per_token, t, ranking.prior(prior))
            )
    return ways


def hits_of(ranking: "Ranking", scoring: object) -> Hits:
    """Of every picture whether its true name is ranked first; labels are not needed here."""
    return {i: ("", bool(hit)) for i, hit in zip(ranking.ids, ranking.ranks(scoring) == 0, strict=True)}


def wordings(ways: dict[str, Hits]) -> list[Finding]:
    """F2, first part: no wording moves the accuracy by more than 5 points."""
    base, rows, moves = values(ways[OPEN["base"]]), [], []
    for number, wording in enumerate(list(WORDINGS)[1:], start=1):
        hits = values(ways[OPEN[wording]])
        rows.append(proportion("F2", f"VLM, open world, wording {number}", hits, paper(f"prompt_{wording}")))
        moves.append(paired_difference("F2", "largest change by a wording", hits, base))
    largest = max(moves, key=lambda row: abs(row.value))
    return [*rows, replace(largest, holds=verdict(abs(largest.value) <= 5))]


def rankings(ways: dict[str, Hits], ranking: "Ranking", train: "Ranking") -> list[Finding]:
    """F2, second part: all names ranked by log-probability, and guided."""
    from vlmclassifier.ranking import GRID, choose

    rows = []
    for score, per_token in GUIDED.items():
        name, guided = f"ranking by the {score}", f"ranking by the {score}, guided, no image prior"
        column = "prob_avg" if per_token else "prob_sum"
        rows.append(proportion("F2", f"VLM, {name}", values(ways[name]), paper(column)))
        rows.append(proportion("F2", f"VLM, {guided}", values(ways[guided]), paper(f"{column}_cfg")))
        t = float(GRID[choose(train.curve(per_token))])
        rows.append(Finding("F2", f"t of the guided {score}, chosen on train pictures", t, t, t, len(train.ids)))
        gain = paired_difference("F2", f"guidance's gain over the {score}", values(ways[guided]), values(ways[name]))
        rows.append(replace(gain, holds=verdict(gain.low > 0)))
    return rows


def best_way(ways: dict[str, Hits], best: str, clip: Hits) -> list[Finding]:
    """F2, third part: the best training-free way is above the open world and below CLIP."""
    hits, open_world = values(ways[best]), values(ways[OPEN["base"]])
    gain = paired_difference("F2", "best training-free way minus open world", hits, open_world, 47.6 - 22.8)
    gap = paired_difference("F2", "CLIP minus best training-free way", values(clip), hits, 74.8 - 47.6)
    own = proportion("F2", "best training-free way, chosen on train pictures", hits, paper("prob_avg_cfg"))
    below, above = proportion("", "", open_world), proportion("", "", values(clip))
    return [
        own,
        replace(gain, holds=verdict(own.low > below.high)),  # intervals apart
        replace(gap, holds=verdict(own.high < above.low)),
    ]


def guidance_curve(out: Path, ranking: "Ranking") -> Path:
    """guidance.csv of the test pictures, by the section's own table script."""
    import table

    return table.write_guidance(out, {out / "ranking": ranking})


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
