"""This section's part of the small study: mini VLMs against the mini CLIP they look through (findings F1, F2, F4).

    python main_results/study.py --root outputs/plane_figures/seed-0
    python main_results/study.py --root outputs/my/seed-0 --benchmark my.jsonl --classes my.json

Classifies the test split with ROOT/checkpoints/clip and vlm, in the open world and with candidate lists, and with every
other ROOT/checkpoints/vlm-*, by classify_vlm.py and classify_clip.py. Writes ROOT/main_results/NAME/ for every run and
ROOT/main_results/findings.csv.
"""

import csv
import json
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import classify_clip
import classify_vlm

from vlmclassifier import cli
from vlmclassifier.benchmarks import class_names, find_benchmark
from vlmclassifier.findings import (
    Finding,
    error_ratio,
    independent_difference,
    paired_difference,
    proportion,
    readable,
    verdict,
    write_findings,
)
from vlmclassifier.runs import read_run
from vlmclassifier.scoring import METRICS, PAPER_METRIC

PAPER = Path(__file__).parent / "paper.csv"
GROUPS = ("frequent", "middle", "rare")
PROCESSES = 2
NEW_TOKENS = 16  # longer than any class name in words

Job = classify_vlm.Args | classify_clip.Args
Hits = dict[str, tuple[str, bool]]  # picture -> label, and whether the answer was right


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
    candidates: Sequence[str] = ("2", "5", "20", "all")
    """Lengths of the candidate lists; all names always, numbers above theirs never."""
    limit: int | None = None
    """Only the first N pictures of the evaluation order."""
    batch_size: int = 128
    """Pictures per forward pass."""


def main(args: Args) -> None:
    """Run every classification that is not there yet, then derive the findings from the saved answers."""
    cli.check_positive(limit=args.limit, batch_size=args.batch_size)
    names = set(class_names(find_benchmark(args.benchmark, args.classes)))
    counts = sorted({int(word) for word in args.candidates if word.isdecimal() and int(word) < len(names)})
    candidates = [*map(str, counts), "all"]
    out, checkpoints = args.root / "main_results", args.root / "checkpoints"
    args = replace(args, candidates=candidates)
    jobs = list(classifications(args, checkpoints, out))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, context, initializer=use_one_core) as pool:
        hits = dict(zip([key for key, _ in jobs], pool.map(classify, [job for _, job in jobs]), strict=True))
    common = set.intersection(*map(set, hits.values()))  # a smaller --limit leaves runs of different lengths
    hits = {key: {image: answers[image] for image in common} for key, answers in hits.items()}
    naming = {file.parent.name.removesuffix("-texts"): json.loads(file.read_text(encoding="utf-8"))
              for file in checkpoints.glob("vlm*-texts/naming.json")}  # fmt: skip
    findings = [*main_finding(hits), *lists(hits, args.candidates), *frequency(hits, naming), *controls(hits, naming)]
    write_findings(findings, out / "findings.csv")
    print(
        f"\n{readable(findings)}\n\nWritten: {out / 'findings.csv'}. Next: python main_results/table.py --outputs {out}"
    )


def classifications(args: Args, checkpoints: Path, out: Path) -> Iterator[tuple[tuple[str, str], Job]]:
    """Every run of the section: ((model, candidates), arguments of its script). The longest come first."""
    pictures = args.root / "pictures"
    common = {
        "benchmark": args.benchmark, "classes": args.classes, "limit": args.limit, "batch_size": args.batch_size,
        "data_root": args.data_root or (pictures if pictures.is_dir() else None),
    }  # fmt: skip
    worlds = [*reversed(args.candidates), "none"]
    for vlm in sorted(file.parent for file in checkpoints.glob("vlm*/config.json")):
        for candidates in worlds if vlm.name == "vlm" else ["none"]:
            run = out / f"mini-llava{vlm.name.removeprefix('vlm')}-{candidates}"
            yield (
                (vlm.name, candidates),
                classify_vlm.Args(
                    "mini-llava", vlm, candidates=candidates, max_new_tokens=NEW_TOKENS, out=run, **common
                ),
            )
    for candidates in args.candidates:
        run = out / f"mini-clip-{candidates}"
        yield (
            ("clip", candidates),
            classify_clip.Args("mini-clip", checkpoints / "clip", candidates=candidates, out=run, **common),
        )


def use_one_core() -> None:
    """Of two processes each is fastest on a core of its own."""
    cli.end_with_parent()
    import torch

    torch.set_num_threads(1)


def classify(job: Job) -> Hits:
    """One run by its script; where it is finished already, only its answers are read."""
    script = classify_clip if isinstance(job, classify_clip.Args) else classify_vlm
    script.main(job)
    return right(job.out)


def right(run: Path) -> Hits:
    """Of every picture of a run its label and whether the answer was right by the paper's metric."""
    record, predictions = read_run(run)
    metric = METRICS[PAPER_METRIC[record["config"]["kind"]]]
    return {p.example_id: (p.label, metric(p)) for p in predictions}


def values(answers: Hits) -> list[bool]:
    return [hit for _, (_, hit) in sorted(answers.items())]


def paper(table: str, model: str, setting: str) -> float | None:
    """The paper's number on ImageNet, where it has one."""
    with open(PAPER, newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            if (row["table"], row["model"], row["setting"], row["dataset"]) == (table, model, setting, "imagenet"):
                return float(row["value"])
    return None


def main_finding(hits: dict) -> list[Finding]:
    """F1: every VLM is far below CLIP."""
    clip, open_world = values(hits["clip", "all"]), values(hits["vlm", "none"])
    papers = paper("table1", "CLIP-L", "closed_world"), paper("table1", "LLaVA1.5-7B", "open_world")
    best = max((values(hits[key]) for key in (("vlm", "none"), ("vlm", "all")) if key in hits), key=sum)
    gap = paired_difference("F1", "CLIP minus VLM, better of open world and all candidates", clip, best)
    return [
        proportion("F1", "CLIP zero-shot", clip, papers[0]),
        proportion("F1", "VLM, open world", open_world, papers[1]),
        paired_difference("F1", "CLIP minus VLM, open world", clip, open_world, papers[0] - papers[1]),
        replace(gap, holds=verdict(gap.low > 0, by_construction=True)),
    ]


def lists(hits: dict, candidates: Sequence[str]) -> list[Finding]:
    """F2, in part: the ratio of error rates, VLM to CLIP, does not fall with the number of candidates."""
    rows, ratios = [], []
    for count in candidates:
        setting = f"{count}_classes"
        vlm, clip = values(hits["vlm", count]), values(hits["clip", count])
        rows += [
            proportion("F2", f"VLM, {count} candidates", vlm, paper("table9", "LLaVA1.5-7B", setting)),
            proportion("F2", f"CLIP, {count} candidates", clip, paper("table9", "CLIP-L", setting)),
        ]
        if count in (candidates[0], candidates[-1]):
            ratios.append(error_ratio("F2", f"VLM errors per CLIP error, {count} candidates", vlm, clip))
    if len(ratios) == 2:
        ratios[1] = replace(ratios[1], holds=verdict(ratios[0].value >= ratios[1].value))
    return [*rows, *ratios]


def thirds(shares: dict[str, dict]) -> dict[str, str]:
    """The third of the classes, by naming share, that each class belongs to; ties in the order of the names' list."""
    order = sorted(shares, key=lambda name: -shares[name]["share"])
    return {name: GROUPS[len(GROUPS) * place // len(order)] for place, name in enumerate(order)}


def by_third(answers: Hits, group_of: dict[str, str]) -> dict[str, list[bool]]:
    """Hits of the pictures of each third."""
    hits = {group: [] for group in GROUPS}
    for _, (label, hit) in sorted(answers.items()):
        hits[group_of[label]].append(hit)
    return hits


def frequency(hits: dict, naming: dict) -> list[Finding]:
    """F4: classes that the training texts name often are classified well; not so for CLIP.

    Nothing where the thirds do not differ in frequency, or one of them has no picture.
    """
    group_of = thirds(naming["vlm"])
    vlm, clip = by_third(hits["vlm", "none"], group_of), by_third(hits["clip", "all"], group_of)
    shares = {group: [naming["vlm"][name]["share"] for name in group_of if group_of[name] == group] for group in GROUPS}
    if min(shares["frequent"], default=0) <= max(shares["rare"], default=1) or not all(vlm.values()):
        return []
    ends = {"frequent": "frequency_over_10000", "rare": "frequency_under_10"}
    papers = {group: paper("figure3", "LLaVA1.5-7B", setting) for group, setting in ends.items()}
    rows = [proportion("F4", f"VLM, {group} third of the classes", vlm[group], papers.get(group)) for group in GROUPS]
    gap = independent_difference(
        "F4", "VLM, frequent minus rare", vlm["frequent"], vlm["rare"], papers["frequent"] - papers["rare"]
    )
    rows.append(replace(gap, holds=verdict(gap.low > 0, by_construction=True)))
    rows += [proportion("F4", f"CLIP, {group} third of the classes", clip[group]) for group in GROUPS]
    return [*rows, independent_difference("F4", "CLIP, frequent minus rare", clip["frequent"], clip["rare"])]


def controls(hits: dict, naming: dict) -> list[Finding]:
    """The same training with other frequencies: if withholding names is the cause, the failures follow."""
    rows = []
    clip = values(hits["clip", "all"])
    if ("vlm-uniform", "none") in hits:
        gap = paired_difference("F1", "control: CLIP minus VLM, every class always named", clip,
                                values(hits["vlm-uniform", "none"]))  # fmt: skip
        rows.append(replace(gap, holds=verdict(gap.value <= 15)))
    if ("vlm-permuted", "none") in hits:
        now, before = thirds(naming["vlm-permuted"]), thirds(naming["vlm"])
        for text, group_of in (("its own", now), ("the first VLM's", before)):
            vlm = by_third(hits["vlm-permuted", "none"], group_of)
            if not all(vlm.values()):
                continue
            gap = independent_difference("F4", f"control: frequencies permuted, frequent minus rare by {text} thirds",
                                         vlm["frequent"], vlm["rare"])  # fmt: skip
            rows.append(replace(gap, holds=verdict(gap.low > 0 if group_of is now else gap.high < rows[-1].value)))
    return rows


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
