"""This section's part of the small study: is the class in the hidden states, and from training (finding F3)?

    python feature_analysis/mini_study.py --root outputs/plane_figures/seed-0
    python feature_analysis/mini_study.py --root outputs/my/seed-0 --benchmark my.jsonl --classes my.json

Probes (logistic regression) on the last token of ROOT/checkpoints/vlm and on CLIP's image feature, and on the controls:
the VLM with language model and projector untrained (five draws) or permuted, the VLM with its language model before
visual training, and pixels. Beside them the map of every layer, by the nearest class mean, of the VLM and of one
untrained control. The best training-free method comes from inference_analysis/mini_study.py. Writes
ROOT/feature_analysis/findings.csv beside its runs.
"""

from collections.abc import Sequence
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
from vlmclassifier.mini.study import CLIP, VLM, Hits, StudyArgs, common_images, map_in_processes, read_hits, values
from vlmclassifier.records import UserError
from vlmclassifier.scoring.statistics import paired_difference

paper = partial(paper_number, Path(__file__).parent / "paper.csv", "table3")
MODELS = {"clip": CLIP, "pixels": extract_features.PIXELS}  # of a probe by its name; the others are the VLM
FEATURES = {"clip": "image", "pixels": "image"}  # the last token of the others
SETTINGS = {"clip": probe.PAPERS_CLIP_SETTING, "pixels": "image"}
MAPPED = ("vlm", "random_0")  # probes on every layer too
BEST_METHOD = "best training-free method, chosen on train images"  # a row of inference_analysis/findings.csv


@dataclass
class Args(StudyArgs):
    """Arguments."""

    train: int = 1920
    """Number of train images that the probes are trained on."""
    draws: int = 5
    """Random initialisations of the untrained control."""


def main(args: Args) -> None:
    """Extract and probe what is not there yet, then derive the findings from the saved answers."""
    cli.check_positive(limit=args.limit, train=args.train, batch_size=args.batch_size, draws=args.draws)
    best = best_training_free(args.root)
    names = ["vlm", *(f"random_{draw}" for draw in range(args.draws)), "permuted_0", "text_only", "clip", "pixels"]
    map_in_processes(extract_and_probe, [(args, name) for name in names])
    out = args.root / "feature_analysis"
    hits = {name: read_hits(out / f"{name}-probe-{SETTINGS.get(name, 'last_token')}-logistic") for name in names}
    findings = without_paper(probes(common_images(hits), best, args.draws), args.benchmark)
    write_findings(findings, out / "findings.csv")
    print(f"\n{readable(findings)}\n\nWritten: {out / 'findings.csv'}. "
          f"Next: python feature_analysis/table.py --outputs {out}")  # fmt: skip


def best_training_free(root: Path) -> Finding:
    """The accuracy of the best training-free method. Raises UserError where that section has not run."""
    file = root / "inference_analysis" / "findings.csv"
    found = [row for row in read_findings(file) if row.metric == BEST_METHOD] if file.exists() else []
    if not found:
        raise UserError(f"{file} has no {BEST_METHOD!r}: run inference_analysis/mini_study.py first.")
    return found[0]


def extract_and_probe(job: tuple[Args, str]) -> None:
    """Extract the features of both splits and probe them. `job`: the arguments, and the name of the probe."""
    args, name = job
    out = args.root / "feature_analysis"
    control, _, seed = name.partition("_") if name.startswith(("random", "permuted")) else (name, "", "0")
    is_control = control in ("random", "permuted", "text_only")
    folders = {split: out / f"{name}-features-{split}" for split in ("train", "test")}
    checkpoints = args.root / "checkpoints"
    for split, folder in folders.items():
        extract_features.main(extract_features.Args(
            MODELS.get(name, VLM), None if name == "pixels" else checkpoints / ("clip" if name == "clip" else "vlm"),
            split=split, out=folder, limit=args.train if split == "train" else args.limit,
            layers=("all",) if name in MAPPED else ("last",), control=control if is_control else None, seed=int(seed),
            language_model=checkpoints / "lm" if name == "text_only" else None, **args.script_args(),
        ))  # fmt: skip
    settings = probe.Args(folders["train"], folders["test"], (FEATURES.get(name, "last_token"),), ("logistic",),
                          out=out / f"{name}-probe")  # fmt: skip
    probe.main(settings)
    if name in MAPPED:
        settings.features, settings.method = ("layers",), ("centroid",)
        probe.main(settings)


def probes(hits: dict[str, Hits], best: Finding, draws: int) -> list[Finding]:
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
    random = mean([values(hits[f"random_{draw}"]) for draw in range(draws)])
    controls = {
        f"random, mean of {draws} draws": random, "permuted": mean([values(hits["permuted_0"])]),
    }  # fmt: skip
    for name, untrained in controls.items():
        gain = paired_difference(vlm, untrained)
        passed = "holds" if gain.low > 0 else "holds, but is passed through"
        rows.append(
            finding("F3", f"probe on an untrained control, {name}", paired_difference(untrained, [0] * len(vlm)))
        )
        rows.append(finding("F3", f"VLM's probe minus the untrained control, {name}", gain, None, passed))
    for name, words in (("text_only", "the language model before visual training"), ("pixels", "pixels, 16 x 16")):
        rows.append(accuracy("F3", f"probe on {words}", values(hits[name])))
        rows.append(finding("F3", f"VLM's probe minus {words}", paired_difference(vlm, values(hits[name]))))
    return rows


def mean(hits: Sequence[Sequence[bool]]) -> list[float]:
    """The share of draws that is right for each image."""
    return [sum(of_image) / len(hits) for of_image in zip(*hits, strict=True)]


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
