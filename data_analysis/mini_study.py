"""This section's part of the small study: does the number of naming texts decide the accuracy (finding F4)?

    python data_analysis/mini_study.py --root outputs/plane_figures/seed-0
    python data_analysis/mini_study.py --root outputs/my/seed-0 --benchmark my.jsonl --classes my.json

Counts the class names in the texts that ROOT/checkpoints/vlm was trained on, and correlates the counts with the
accuracy of the saved answers of VLM and CLIP over classes; also of the VLMs that were trained with uniform and permuted
frequencies, where they are. Writes ROOT/data_analysis/findings.csv beside counts and correlations.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import correlate
import count_classes

from vlmclassifier import cli
from vlmclassifier.benchmarks import find_benchmark
from vlmclassifier.mini.findings import Finding, judged, readable, without_paper, write_findings
from vlmclassifier.mini.study import (
    CLIP,
    PROCESSES,
    VLM,
    StudyArgs,
    answers_run,
    control_run,
    open_world,
    with_candidates,
)
from vlmclassifier.records import UserError

SUFFICIENT = 0.3  # F4: the lower end of the interval of Spearman's coefficient is above it
STAGES = ("pretrain", "instruct")


@dataclass
class Args(StudyArgs):
    """Arguments."""


def main(args: Args) -> None:
    """Count, correlate, derive the findings."""
    out = args.root / "data_analysis"
    counts = count(args, "vlm", out)
    clip = answers_run(args.root, CLIP, with_candidates(args.names, "all"))
    correlate.main(correlate.Args(counts, clip, out=out / CLIP))
    vlm = answers_run(args.root, VLM, open_world(args.names))
    correlate.main(correlate.Args(counts, vlm, reference=clip, out=out / VLM))
    findings = without_paper([*frequency(out), *controls(args, counts, out)], args.benchmark)
    write_findings(findings, out / "findings.csv")
    print(f"\n{readable(findings)}\n\nWritten: {out / 'findings.csv'}. "
          f"Next: python data_analysis/table.py --outputs {out}")  # fmt: skip


def count(args: Args, checkpoint: str, out: Path) -> Path:
    """Count the class names in the texts that a VLM was trained on. Returns the table; raises UserError."""
    texts = args.root / "checkpoints" / f"{checkpoint}-texts"
    if missing := [stage for stage in STAGES if not (texts / f"{stage}.json").exists()]:
        raise UserError(
            f"{texts / missing[0]}.json does not exist: train with training_analysis/pretrain_mini.py first."
        )
    count_classes.main(count_classes.Args(
        tuple(f"{stage}={texts / stage}.json" for stage in STAGES), (args.benchmark,), args.classes,
        processes=PROCESSES, out=out,
    ))  # fmt: skip
    return out / f"{find_benchmark(args.benchmark, args.classes).key}.csv"


def controls(args: Args, counts: Path, out: Path) -> list[Finding]:
    """The same training with other frequencies, where it was run: accuracy follows the texts that were trained on."""
    rows = []
    for frequency, own in (("uniform", False), ("permuted", False), ("permuted", True)):
        name = f"vlm-{frequency}"
        answers = control_run(args.root, name, open_world(args.names))
        if not (args.root / "checkpoints" / name).exists() or not answers.exists():
            continue
        folder = out / (f"{frequency}-own_counts" if own else frequency)
        table = count(args, name, folder) if own else counts
        correlate.main(correlate.Args(table, answers, out=folder))
        found = coefficient(folder, "spearman")
        whose = "its own" if own else "the first VLM's"
        metric = f"Spearman, control: frequencies {frequency}, {whose} texts"
        follows = found.low > SUFFICIENT if own else found.low <= SUFFICIENT
        holds = judged(follows, found.low, by_construction=True)
        rows.append(Finding("F4", metric, found.value, found.low, found.high, int(found.n), None, holds))
    return rows


def coefficient(folder: Path, statistic: str) -> Any:
    """One row of the correlations of all classes and the total of all stages; None where it was not computed."""
    import pandas as pd

    table = pd.read_csv(folder / "correlations.csv")
    is_row = (table["source"] == "total") & (table["classes"] == "all") & (table["statistic"] == statistic)
    return table[is_row].iloc[0] if is_row.any() else None


def frequency(out: Path) -> list[Finding]:
    """F4: Spearman's coefficient of counts and accuracy is above 0.3 for the VLM, and above CLIP's own."""
    vlm, clip = coefficient(out / VLM, "spearman"), coefficient(out / CLIP, "spearman")
    given_clip = coefficient(out / VLM, "spearman_given_reference")

    def row(metric: str, values: object, model: str | None = None, holds: str = "") -> Finding:
        number = paper_number_of(model) if model else None
        return Finding("F4", f"Spearman, {metric}", values.value, values.low, values.high, int(values.n), number, holds)

    rows = [
        row(
            "naming texts and VLM's accuracy",
            vlm,
            "LLaVA1.5-7B",
            judged(vlm.low > max(SUFFICIENT, clip.high), vlm.low, clip.high, by_construction=True),
        ),
        row("naming texts and CLIP's accuracy", clip, "CLIP-L"),
    ]
    if given_clip is not None:
        rows.append(row("naming texts and VLM's accuracy, given CLIP's", given_clip))
    return rows


def paper_number_of(model: str) -> float | None:
    """The paper's coefficient on ImageNet."""
    import pandas as pd

    papers = pd.read_csv(Path(__file__).parent / "paper.csv")
    is_row = (papers["table"] == "table11") & (papers["dataset"] == "imagenet") & (papers["metric"] == "spearman")
    found = papers.loc[is_row & (papers["model"] == model), "value"]
    return float(found.iloc[0]) if len(found) else None


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
