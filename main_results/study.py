"""This section's part of the small study: mini VLMs against the mini CLIP they look through (findings F1, F2, F4).

    python main_results/study.py --root outputs/plane_figures/seed-0
    python main_results/study.py --root outputs/my/seed-0 --benchmark my.jsonl --classes my.json

Classifies the test split with ROOT/checkpoints/clip and vlm, in the open world and with candidate lists, and with every
other ROOT/checkpoints/vlm-*, by classify_vlm.py and classify_clip.py; for inference_analysis/study.py also in other
wordings, and on train pictures. Writes ROOT/main_results/NAME/ for every run and ROOT/main_results/findings.csv.
"""

import json
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import classify_clip
import classify_vlm

from vlmclassifier import cli
from vlmclassifier.benchmarks import class_names, find_benchmark
from vlmclassifier.findings import (
    Finding,
    Hits,
    error_ratio,
    independent_difference,
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

PAPER = Path(__file__).parent / "paper.csv"
GROUPS = ("frequent", "middle", "rare")
PROCESSES = 2
NEW_TOKENS = 16  # longer than any class name in words

Job = classify_vlm.Args | classify_clip.Args


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
    train: int = 288
    """Pictures of the train split that the best way of asking is chosen on."""
    limit: int | None = None
    """Only the first N pictures of the test split's evaluation order."""
    batch_size: int = 128
    """Pictures per forward pass."""


def main(args: Args) -> None:
    """Run every classification that is not there yet, then derive the findings from the saved answers."""
    cli.check_positive(limit=args.limit, train=args.train, batch_size=args.batch_size)
    names = set(class_names(find_benchmark(args.benchmark, args.classes)))
    counts = sorted({int(word) for word in args.candidates if word.isdecimal() and int(word) < len(names)})
    candidates = [*map(str, counts), "all"]
    out, checkpoints = args.root / "main_results", args.root / "checkpoints"
    args = replace(args, candidates=candidates)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, context, initializer=cli.use_one_core) as pool:
        list(pool.map(classify_all, [jobs(args, checkpoints, out)] * PROCESSES))
    hits = {("clip", word): right_answers(out / f"mini-clip-{setting_name(word)}") for word in candidates}
    hits |= {("vlm", word): right_answers(out / f"mini-llava-{setting_name(word)}") for word in [*candidates, "none"]}
    hits |= {(vlm.name, "none"): right_answers(out / run_of(vlm)) for vlm in controls_of(checkpoints)}
    common = set.intersection(*map(set, hits.values()))  # a smaller --limit leaves runs of different lengths
    hits = {key: {image: answers[image] for image in common} for key, answers in hits.items()}
    naming = {file.parent.name.removesuffix("-texts"): json.loads(file.read_text(encoding="utf-8"))
              for file in checkpoints.glob("vlm*-texts/naming.json")}  # fmt: skip
    findings = [*main_finding(hits), *lists(hits, args.candidates), *frequency(hits, naming), *controls(hits, naming)]
    write_findings(findings, out / "findings.csv")
    print(
        f"\n{readable(findings)}\n\nWritten: {out / 'findings.csv'}. Next: python main_results/table.py --outputs {out}"
    )


def shared(args: Args) -> dict:
    """The arguments that every script is given."""
    pictures = args.root / "pictures"
    return {
        "benchmark": args.benchmark, "classes": args.classes, "batch_size": args.batch_size,
        "data_root": args.data_root or (pictures if pictures.is_dir() else None),
    }  # fmt: skip


def jobs(args: Args, checkpoints: Path, out: Path) -> list[Job]:
    """Every run, by its script's arguments: candidate lists and wordings, also on train pictures for the inference."""
    others = tuple(wording for wording in WORDINGS if wording != "base")
    vlm, names = partial(ask, args, checkpoints / "vlm"), tuple(args.candidates)
    train = {"split": "train", "limit": args.train, "out": out / "train" / "mini-llava"}
    return [
        vlm(candidates=(*reversed(names), "none"), out=out / "mini-llava"),
        vlm(wording=others, out=out / "mini-llava"),
        vlm(candidates=("all", "none"), **train),
        vlm(wording=others, **train),
        classify_clip.Args("mini-clip", checkpoints / "clip", candidates=names, limit=args.limit,
                           out=out / ("mini-clip" if len(names) > 1 else f"mini-clip-{setting_name(names[0])}"),
                           **shared(args)),
        *(ask(args, control, out=out / run_of(control)) for control in controls_of(checkpoints)),
    ]  # fmt: skip


def ask(args: Args, vlm: Path, **more: object) -> classify_vlm.Args:
    """Arguments of one call of classify_vlm.py."""
    settings = {"limit": args.limit, "max_new_tokens": NEW_TOKENS} | shared(args) | more
    return classify_vlm.Args("mini-llava", vlm, **settings)


def controls_of(checkpoints: Path) -> list[Path]:
    """The VLMs that were trained with other frequencies."""
    return sorted(file.parent for file in checkpoints.glob("vlm-*/config.json"))


def run_of(control: Path) -> str:
    """The run folder of a control."""
    return f"mini-llava-{setting_name('none')}-{control.name.removeprefix('vlm-')}"


def classify_all(work: list[Job]) -> None:
    """One process's share of all runs: their folders share the work; what is finished is left alone."""
    for job in work:
        (classify_clip if isinstance(job, classify_clip.Args) else classify_vlm).main(job)


paper = partial(paper_number, PAPER)


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
