"""Count how often class names occur in a VLM's training texts (section 3.3, Figures 3 and 7).

    python data_analysis/count_classes.py
    python data_analysis/count_classes.py --texts pretrain=blip_laion_cc_sbu_558k.json instruct=llava_v1_5_mix665k.json
    python data_analysis/count_classes.py --texts captions=captions_val2017.json.gz --benchmarks imagenet --plurals
    python data_analysis/count_classes.py --texts my=texts.jsonl --column text --benchmarks my.jsonl --classes my.json

A sentence counts once for every class whose tokens it has side by side: nltk's untrained Punkt splitter, lower case,
Penn-Treebank tokens. Files are streamed, tokenised in parallel, and their tokens are kept in OUT/tokens, so that a
later count of other classes reads them. Writes for every benchmark BENCHMARK.csv (class, stage, count, sentences, and
the sentences by the form of the name), BENCHMARK-examples.csv (sentences for the reader's own check) and
BENCHMARK-zero.csv (classes that are never named, and which forms of their names occur); the rules are in
BENCHMARK.json.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmclassifier import cli
from vlmclassifier.benchmarks import PAPER_BENCHMARKS, class_names, find_benchmark
from vlmclassifier.counting import ClassMatcher, Form, StageCounts, count_stage
from vlmclassifier.counting.matching import NAMED, reference_finds
from vlmclassifier.paths import OUTPUTS, local_path
from vlmclassifier.records import UserError
from vlmclassifier.scoring.class_facts import lemmas
from vlmclassifier.tables import write_csv

STAGES = ("pretrain", "instruct")  # of paths.toml, [texts]
TOTAL = "total"  # the stage that sums all stages


@dataclass
class Args:
    texts: tuple[str, ...] = ()
    """STAGE=FILE for each stage of training: .json (LLaVA's conversations, COCO's captions), .jsonl, plain text, each
    also as .gz, or the folder of a Hugging Face data set; default: pretrain and instruct in paths.toml, [texts]."""
    benchmarks: tuple[str, ...] = tuple(PAPER_BENCHMARKS)
    """Class lists to count: keys of benchmarks, or one manifest FILE.jsonl of your own (with --classes)."""
    classes: Path | None = None
    """Class list of your own manifest: a JSON array of names."""
    column: tuple[str, ...] = ()
    """Fields of a row that have texts; where it has none of them: conversations, text or caption."""
    plurals: bool = False
    """Count the plural of a name too."""
    hyphens: bool = False
    """Count a name that is written with hyphens, spaces or as one word instead, too."""
    synonyms: bool = False
    """Count the other WordNet lemmas of ImageNet's classes too."""
    longest: bool = False
    """Do not count a name within a longer one, such as "crane" in "whooping crane"."""
    reference_rules: bool = False
    """Count as the reference's code does, to match published correlations: a name at either end of a sentence is not
    found, names with punctuation get 0, and so does the total of a class that the first stage does not name."""
    processes: int = min(8, os.cpu_count() or 1)
    """Processes that tokenise and search."""
    out: Path = OUTPUTS / "data_analysis"
    """Folder of the results."""


def main(args: Args) -> None:
    """Check, count one stage after the other, write the tables."""
    # ---- check
    cli.check_positive(processes=args.processes)
    stages = find_stages(args.texts)
    if args.reference_rules and (args.plurals or args.hyphens or args.synonyms or args.longest):
        raise UserError(
            "--reference-rules knows names as they are: leave out --plurals, --hyphens, --synonyms, --longest."
        )
    lists: dict[str, Sequence[str]] = {}
    for key in args.benchmarks:
        benchmark = find_benchmark(key, args.classes)
        lists[benchmark.key] = class_names(benchmark)
    synonyms = {"imagenet": lemmas()} if "imagenet" in lists else {}
    matcher = ClassMatcher(lists, synonyms)

    # ---- count
    found = {stage: count_file(args, matcher, stage, file) for stage, file in stages.items()}

    # ---- write
    files = []
    for key in lists:
        files += write_counts(args, matcher, key, found)
    partial = [stage for stage, counts in found.items() if counts.partial]
    for stage in partial:
        print(f"Note: {stage} is partial: {found[stage].partial}")
    print("Written: " + ", ".join(str(file) for file in files) + ". Next: python data_analysis/correlate.py")


def find_stages(texts: Sequence[str]) -> dict[str, Path]:
    """The files of the stages. Raises UserError."""
    if not texts:
        found = {stage: local_path("texts", stage) for stage in STAGES}
        if missing := [stage for stage, file in found.items() if file is None]:
            raise UserError(
                f"paths.toml has no {missing[0]} in [texts]: write the file there, or use --texts STAGE=FILE."
            )
        return {stage: Path(file) for stage, file in found.items() if file}
    stages = {}
    for text in texts:
        stage, separator, file = text.partition("=")
        if not separator or not stage or not file or stage == TOTAL or stage in stages:
            raise UserError(f"--texts {text} is not STAGE=FILE with a stage of its own (and not {TOTAL!r}): fix it.")
        stages[stage] = Path(file)
    for file in stages.values():
        if not file.exists():
            raise UserError(f"{file} does not exist: fix --texts.")
    return stages


def count_file(args: Args, matcher: ClassMatcher, stage: str, file: Path) -> StageCounts:
    """Count one stage, with a progress bar over the characters of its texts."""
    from tqdm import tqdm

    with tqdm(desc=f"{stage}, {file.name}", unit="character", unit_scale=True) as bar:
        return count_stage(matcher, file, args.out / "tokens", args.column, args.processes, bar.update)


def wanted_forms(args: Args) -> Form:
    """The forms of names that count."""
    if args.reference_rules:
        return Form.REFERENCE
    forms = Form.ALONE if args.longest else NAMED
    for is_wanted, form in ((args.plurals, Form.PLURAL), (args.hyphens, Form.HYPHEN), (args.synonyms, Form.SYNONYM)):
        forms |= form if is_wanted else Form(0)
    return forms


def rules_name(args: Args) -> str:
    """What tables call the rules of a count."""
    flags = ("reference_rules", "plurals", "hyphens", "synonyms", "longest")
    return "+".join(flag for flag in flags if getattr(args, flag)) or "default"


def write_counts(args: Args, matcher: ClassMatcher, key: str, found: dict[str, StageCounts]) -> list[Path]:
    """The three tables of one class list. Prints the share of classes that are never named."""
    numbers = [number for number, (of_list, _) in enumerate(matcher.classes) if of_list == key]
    names = {number: matcher.classes[number][1] for number in numbers}
    columns = {form.name.lower(): form for form in Form if form is not Form.REFERENCE}
    rows, totals = [], dict.fromkeys(numbers, 0)
    for stage, counts in found.items():
        by_form = {name: counts.counts(len(matcher.classes), form) for name, form in columns.items()}
        by_class = counts.counts(len(matcher.classes), wanted_forms(args))
        for number in numbers:
            is_found = not args.reference_rules or reference_finds(names[number])
            count = by_class[number] if is_found else 0
            rows.append({"class": names[number], "stage": stage, "count": count, "sentences": counts.sentences,
                         "partial": bool(counts.partial)}
                        | {name: values[number] for name, values in by_form.items()})  # fmt: skip
            if stage != next(iter(found)) and args.reference_rules and totals[number] == 0:
                continue  # the reference sums over the classes of its first stage
            totals[number] += count
    sentences = sum(counts.sentences for counts in found.values())
    rows += [{"class": names[number], "stage": TOTAL, "count": totals[number], "sentences": sentences,
              "partial": any(counts.partial for counts in found.values())} for number in numbers]  # fmt: skip
    for stage in [*found, TOTAL]:
        of_stage = [row for row in rows if row["stage"] == stage]
        zeros = sum(row["count"] == 0 for row in of_stage)
        print(f"{key}, {stage}: {len(of_stage)} classes in {of_stage[0]['sentences']:,} sentences, "
              f"{zeros} ({100 * zeros / len(of_stage):.1f}%) never named")  # fmt: skip
    examples = [{"class": names[number], "stage": stage, "sentence": sentence} for number in numbers
                for stage, counts in found.items() for sentence in counts.examples.get(number, ())]  # fmt: skip
    zero = [zero_row(matcher, number, found) for number in numbers if totals[number] == 0]
    rules = {"rules": rules_name(args), "forms": str(wanted_forms(args))}
    (args.out / f"{key}.json").write_text(json.dumps(rules, indent=2) + "\n", encoding="utf-8")
    return [
        write_csv(args.out / f"{key}.csv", rows, ["class", "stage", "count", "sentences", "partial", *columns]),
        write_csv(args.out / f"{key}-examples.csv", examples, ["class", "stage", "sentence"]),
        write_csv(args.out / f"{key}-zero.csv", zero, ["class", "verdict", "forms"]),
    ]


def zero_row(matcher: ClassMatcher, number: int, found: dict[str, StageCounts]) -> dict[str, Any]:
    """Why a class may have no count: it is absent, or another form of its name occurs."""
    forms = {form.name.lower(): sum(counts.count(number, form) for counts in found.values()) for form in Form}
    others = {name: count for name, count in forms.items() if count and name not in ("last_word", "reference")}
    verdict = "absent"
    if others:
        verdict = "named in forms that do not count"
    elif forms["last_word"]:
        verdict = "absent; the last word of its name occurs alone"
    shown = {name: count for name, count in forms.items() if count and name != "reference"}
    return {"class": matcher.classes[number][1], "verdict": verdict,
            "forms": ", ".join(f"{name} {count}" for name, count in shown.items())}  # fmt: skip


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
