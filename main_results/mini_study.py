"""This section's part of the small study: mini VLMs against the CLIP whose vision encoder they use (F1, F2, F4).

    python main_results/mini_study.py --root outputs/plane_figures/seed-0
    python main_results/mini_study.py --root outputs/my/seed-0 --benchmark my.jsonl --classes my.json

Classifies the test split with ROOT/checkpoints/clip and vlm, in the open world and with candidate lists, and with
every other ROOT/checkpoints/vlm-*, by classify_vlm.py and classify_clip.py; for inference_analysis/mini_study.py also
in other wordings, and on train images. Writes ROOT/main_results/NAME/ for every run and ROOT/main_results/findings.csv.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import classify_clip
import classify_vlm

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
    answers_folder,
    answers_run,
    common_images,
    control_run,
    in_processes,
    open_world,
    read_hits,
    values,
    with_candidates,
)
from vlmclassifier.paths import PROJECT_ROOT
from vlmclassifier.prompts import WORDINGS
from vlmclassifier.scoring.statistics import (
    MIN_ERRORS,
    error_ratio,
    error_ratio_slope,
    independent_difference,
    paired_difference,
)

GROUPS = ("frequent", "middle", "rare")
NEW_TOKENS = 16  # longer than any class name in words
OTHER_WORDINGS = tuple(wording for wording in WORDINGS if wording != "base")

paper = partial(paper_number, Path(__file__).parent / "paper.csv")
papers_lists = partial(paper_number, PROJECT_ROOT / "inference_analysis" / "paper.csv", "table9")
papers_thirds = partial(paper_number, PROJECT_ROOT / "data_analysis" / "paper.csv", "figure3")
Job = classify_vlm.Args | classify_clip.Args


@dataclass
class Args(StudyArgs):
    """Arguments."""

    candidates: Sequence[str] = ("2", "5", "20", "all")
    """Lengths of the candidate lists; all names are always one of them, larger numbers are left out."""


def main(args: Args) -> None:
    """Run every classification that is not there yet, then derive the findings from the saved answers."""
    cli.check_positive(limit=args.limit, train=args.train, batch_size=args.batch_size)
    names, out = args.names, args.root / "main_results"
    counts = {int(word) for word in args.candidates if word.isdecimal() and int(word) < len(set(names))}
    candidates = (*(str(count) for count in sorted(counts)), "all")
    in_processes(classify_all, jobs(replace(args, candidates=candidates)))

    hits: dict[tuple[str, str], Hits] = {("vlm", "none"): read_hits(answers_run(args.root, VLM, open_world(names)))}
    for count in candidates:
        setting = with_candidates(names, count)
        hits["clip", count] = read_hits(answers_run(args.root, CLIP, setting))
        hits["vlm", count] = read_hits(answers_run(args.root, VLM, setting))
    for control in controls_of(args.root):
        hits[control.name, "none"] = read_hits(control_run(args.root, control.name, open_world(names)))
    hits = common_images(hits)
    naming = {
        file.parent.name.removesuffix("-texts"): json.loads(file.read_text(encoding="utf-8"))
        for file in (args.root / "checkpoints").glob("vlm*-texts/naming.json")
    }
    findings = [*main_finding(hits), *lists(hits, candidates, len(set(names)))]
    findings = without_paper([*findings, *frequency(hits, naming), *controls(hits, naming)], args.benchmark)
    write_findings(findings, out / "findings.csv")
    print(
        f"\n{readable(findings)}\n\nWritten: {out / 'findings.csv'}. Next: python main_results/table.py --outputs {out}"
    )


def jobs(args: Args) -> list[Job]:
    """Every run, as its script's arguments: candidate lists and wordings, also on the train images."""
    names, vlm = args.names, args.root / "checkpoints" / "vlm"
    out = answers_folder(args.root) / VLM
    train: dict[str, Any] = {"split": "train", "limit": args.train, "out": answers_folder(args.root, "train") / VLM}
    # With several settings in one call, the scripts append -SETTING to the folder's name.
    several = len(args.candidates) > 1
    clip_out = answers_folder(args.root) / CLIP
    if not several:
        clip_out = answers_run(args.root, CLIP, with_candidates(names, args.candidates[0]))
    return [
        vlm_args(args, vlm, candidates=(*reversed(args.candidates), "none"), out=out),
        vlm_args(args, vlm, wording=OTHER_WORDINGS, out=out),
        vlm_args(args, vlm, candidates=("all", "none"), **train),
        vlm_args(args, vlm, wording=OTHER_WORDINGS, **train),
        classify_clip.Args(
            CLIP, args.root / "checkpoints" / "clip", candidates=tuple(args.candidates), limit=args.limit,
            save_scores=True, out=clip_out, **args.script_args(),
        ),
        classify_clip.Args(
            CLIP, args.root / "checkpoints" / "clip", split="train", limit=args.train, save_scores=True,
            out=answers_run(args.root, CLIP, with_candidates(names, "all"), "train"), **args.script_args(),
        ),
        *(
            vlm_args(args, control, out=control_run(args.root, control.name, open_world(names)))
            for control in controls_of(args.root)
        ),
    ]  # fmt: skip


def vlm_args(args: Args, weights: Path, **more: Any) -> classify_vlm.Args:
    """Arguments of one call of classify_vlm.py."""
    settings = {"limit": args.limit, "max_new_tokens": NEW_TOKENS} | args.script_args() | more
    return classify_vlm.Args(VLM, weights, **settings)


def controls_of(root: Path) -> list[Path]:
    """The checkpoints of the VLMs that were trained with other frequencies."""
    return sorted(file.parent for file in (root / "checkpoints").glob("vlm-*/config.json"))


def classify_all(work: list[Job]) -> None:
    """One process's share of all runs; what is finished is left alone."""
    for job in work:
        (classify_clip if isinstance(job, classify_clip.Args) else classify_vlm).main(job)


def main_finding(hits: dict) -> list[Finding]:
    """F1: every VLM is far below CLIP."""
    clip, vlm = values(hits["clip", "all"]), values(hits["vlm", "none"])
    papers = paper("table1", "CLIP-L", "closed_world"), paper("table1", "LLaVA1.5-7B", "open_world")
    best = max((values(hits[key]) for key in (("vlm", "none"), ("vlm", "all")) if key in hits), key=sum)
    gap = paired_difference(clip, best)
    return [
        accuracy("F1", "CLIP zero-shot", clip, papers[0]),
        accuracy("F1", "VLM, open world", vlm, papers[1]),
        finding("F1", "CLIP minus VLM, open world", paired_difference(clip, vlm), papers[0] - papers[1]),
        finding("F1", "CLIP minus VLM, better of open world and all candidates", gap, None,
                verdict(gap.low > 0, by_construction=True)),
    ]  # fmt: skip


def lists(hits: dict, candidates: Sequence[str], total: int) -> list[Finding]:
    """F2, in part: the ratio of error rates, VLM to CLIP, does not fall with the number of candidates.

    Judged by the slope of its logarithm over all numbers of candidates at which CLIP makes errors enough. `total`: the
    number of class names, which the list "all" has.
    """
    rows, ratios, lengths, judged = [], [], [], []
    for count in candidates:
        setting = f"{count}_classes"
        vlm, clip = values(hits["vlm", count]), values(hits["clip", count])
        rows += [
            accuracy("F2", f"VLM, {count} candidates", vlm, papers_lists("LLaVA1.5-7B", setting)),
            accuracy("F2", f"CLIP, {count} candidates", clip, papers_lists("CLIP-L", setting)),
        ]
        is_judged = clip.count(False) >= MIN_ERRORS
        lengths.append((total if count == "all" else int(count), vlm, clip))
        judged += lengths[-1:] if is_judged else []
        if count in (candidates[0], candidates[-1]):
            note = "" if is_judged else f"cannot be judged: CLIP errs {clip.count(False)} times"
            ratios.append(
                finding("F2", f"VLM errors per CLIP error, {count} candidates", error_ratio(vlm, clip), None, note)
            )
    if len(lengths) >= 2:
        is_judged = len(judged) >= 2
        slope = error_ratio_slope(*zip(*(judged if is_judged else lengths), strict=True))
        if not is_judged:
            holds = f"cannot be judged: CLIP errs {MIN_ERRORS} times or more at fewer than two list lengths"
        elif slope.low <= 0 < slope.high:
            holds = "cannot be judged: the interval includes 0"
        else:
            holds = verdict(slope.high <= 0)
        ratios.append(finding("F2", "slope of the log error ratio on the log number of candidates", slope, None, holds))
    return [*rows, *ratios]


def thirds(shares: dict[str, dict]) -> dict[str, str]:
    """The third of the classes, by naming share, that each class belongs to; ties in the order of the class list."""
    order = sorted(shares, key=lambda name: -shares[name]["share"])
    return {name: GROUPS[len(GROUPS) * place // len(order)] for place, name in enumerate(order)}


def by_third(answers: Hits, group_of: dict[str, str]) -> dict[str, list[bool]]:
    """Hits of the images of each third."""
    hits: dict[str, list[bool]] = {group: [] for group in GROUPS}
    for _, (label, hit) in sorted(answers.items()):
        hits[group_of[label]].append(hit)
    return hits


def frequency(hits: dict, naming: dict) -> list[Finding]:
    """F4: classes that the training texts name often are classified well; not so for CLIP.

    Nothing where the thirds do not differ in frequency, or one of them has no image.
    """
    group_of = thirds(naming["vlm"])
    vlm, clip = by_third(hits["vlm", "none"], group_of), by_third(hits["clip", "all"], group_of)
    shares = {group: [naming["vlm"][name]["share"] for name in group_of if group_of[name] == group] for group in GROUPS}
    if min(shares["frequent"], default=0) <= max(shares["rare"], default=1) or not all(vlm.values()):
        return []
    ends = {"frequent": "frequency_over_10000", "rare": "frequency_under_10"}
    papers = {group: papers_thirds("LLaVA1.5-7B", setting) for group, setting in ends.items()}
    rows = [accuracy("F4", f"VLM, {group} third of the classes", vlm[group], papers.get(group)) for group in GROUPS]
    gap = independent_difference(vlm["frequent"], vlm["rare"])
    rows.append(
        finding("F4", "VLM, frequent minus rare", gap, papers["frequent"] - papers["rare"],
                verdict(gap.low > 0, by_construction=True))
    )  # fmt: skip
    rows += [accuracy("F4", f"CLIP, {group} third of the classes", clip[group]) for group in GROUPS]
    clip_gap = independent_difference(clip["frequent"], clip["rare"])
    return [*rows, finding("F4", "CLIP, frequent minus rare", clip_gap)]


def controls(hits: dict, naming: dict) -> list[Finding]:
    """The same training with other frequencies: if withholding names is the cause, the failures follow."""
    rows: list[Finding] = []
    if ("vlm-uniform", "none") in hits:
        gap = paired_difference(values(hits["clip", "all"]), values(hits["vlm-uniform", "none"]))
        metric = "control: CLIP minus VLM, every class always named"
        rows.append(finding("F1", metric, gap, None, verdict(gap.value <= 15)))
    if ("vlm-permuted", "none") in hits:
        now, before = thirds(naming["vlm-permuted"]), thirds(naming["vlm"])
        for text, group_of in (("its own", now), ("the first VLM's", before)):
            vlm = by_third(hits["vlm-permuted", "none"], group_of)
            if not all(vlm.values()):
                continue
            gap = independent_difference(vlm["frequent"], vlm["rare"])
            holds = gap.low > 0 if group_of is now else gap.high < rows[-1].value
            metric = f"control: frequencies permuted, frequent minus rare by {text} thirds"
            rows.append(finding("F4", metric, gap, None, verdict(holds)))
    return rows


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
