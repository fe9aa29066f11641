"""This section's part of the small study: is the class in the hidden states, and from training (finding F3)?

    python feature_analysis/mini_study.py --root outputs/plane_figures/seed-0
    python feature_analysis/mini_study.py --root outputs/my/seed-0 --benchmark my.jsonl --classes my.json

Probes (logistic regression) on the last token of ROOT/checkpoints/vlm, of the same model with an untrained language
model and projector, and on CLIP's image feature. The best training-free method comes from
inference_analysis/mini_study.py. Writes ROOT/feature_analysis/findings.csv beside its runs.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import extract_features
import probe

from vlmclassifier import cli
from vlmclassifier.mini.findings import (
    Finding,
    accuracy,
    finding,
    paper_number,
    read_findings,
    readable,
    verdict,
    without_paper,
    write_findings,
)
from vlmclassifier.mini.study import CLIP, VLM, Hits, StudyArgs, common_images, read_hits, values
from vlmclassifier.records import UserError
from vlmclassifier.scoring.statistics import paired_difference

paper = partial(paper_number, Path(__file__).parent / "paper.csv", "table3")
FEATURES = {"vlm": "last_token", "random": "last_token", "permuted": "last_token", "clip": "image"}
SETTINGS = {"vlm": "last_token", "random": "last_token", "permuted": "last_token", "clip": "linear"}
BEST_METHOD = "best training-free method, chosen on train images"  # a row of inference_analysis/findings.csv


@dataclass
class Args(StudyArgs):
    """Arguments."""

    train: int = 1920
    """Number of train images that the probes are trained on."""


def main(args: Args) -> None:
    """Extract and probe what is not there yet, then derive the findings from the saved answers."""
    cli.check_positive(limit=args.limit, train=args.train, batch_size=args.batch_size)
    out = args.root / "feature_analysis"
    best = best_training_free(args.root)
    hits: dict[str, Hits] = {}
    for name in FEATURES:
        folders = [extract(args, out, name, split) for split in ("train", "test")]
        probe.main(probe.Args(*folders, (FEATURES[name],), ("logistic",), out=out / f"{name}-probe"))
        hits[name] = read_hits(out / f"{name}-probe-{SETTINGS[name]}-logistic")
    findings = without_paper(probes(common_images(hits), best), args.benchmark)
    write_findings(findings, out / "findings.csv")
    print(f"\n{readable(findings)}\n\nWritten: {out / 'findings.csv'}. "
          f"Next: python feature_analysis/table.py --outputs {out}")  # fmt: skip


def best_training_free(root: Path) -> Finding:
    """The accuracy of the best training-free method. Raises UserError where that section has not run."""
    file = root / "inference_analysis" / "findings.csv"
    if not file.exists():
        raise UserError(f"{file} does not exist: run inference_analysis/mini_study.py first.")
    return next(row for row in read_findings(file) if row.metric == BEST_METHOD)


def extract(args: Args, out: Path, name: str, split: str) -> Path:
    """Extract the features of one model and split. Returns their folder."""
    folder, checkpoint = out / f"{name}-features-{split}", "clip" if name == "clip" else "vlm"
    extract_features.main(extract_features.Args(
        CLIP if name == "clip" else VLM, args.root / "checkpoints" / checkpoint, split=split, out=folder,
        limit=args.train if split == "train" else args.limit,
        control=name if name in ("random", "permuted") else None, **args.script_args(),
    ))  # fmt: skip
    return folder


def probes(hits: dict[str, Hits], best: Finding) -> list[Finding]:
    """F3: the probe is above the best training-free method, near CLIP's, and above an untrained control."""
    vlm, clip = values(hits["vlm"]), values(hits["clip"])
    row = accuracy("F3", "probe on the VLM's last token", vlm, paper("LLaVA1.5-7B", "last_token"))
    gap = paired_difference(clip, vlm)
    rows = [
        row,
        accuracy("F3", "probe on CLIP's image feature", clip, paper("CLIP-L", "linear")),
        finding("F3", "CLIP's probe minus the VLM's", gap, None, verdict(gap.value <= 10)),
        Finding("F3", "probe above the best training-free method", row.value - best.value, row.low - best.high,
                row.high - best.low, row.n, None, verdict(row.low > best.high)),
    ]  # fmt: skip
    for control in ("random", "permuted"):
        untrained = values(hits[control])
        gain = paired_difference(vlm, untrained)
        passed = "holds" if gain.low > 0 else "holds, but is passed through"
        rows.append(accuracy("F3", f"probe on an untrained control, {control}", untrained))
        rows.append(finding("F3", f"VLM's probe minus the untrained control, {control}", gain, None, passed))
    return rows


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
