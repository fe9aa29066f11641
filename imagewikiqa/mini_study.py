"""This section's part of the small study: what does fine-tuning do to questions that need the class (F6)?

    python imagewikiqa/mini_study.py --root outputs/plane_figures/seed-0
    python imagewikiqa/mini_study.py --root outputs/my/seed-0 --benchmark my.jsonl --classes my.json --facts facts.json

Builds questions about the test images from the facts of the data set (build_questions.py): kept are those that the
study's text-only language model answers rightly with the class name and wrongly without it. Then the VLM as it is, and
after every fine-tuning of training_analysis/mini_study.py, answers them (answer.py): freely, and by the log-probability
of the option text and of the letter. The mini models have not learnt to answer with letters, so that free answers are
those that F6 is judged by. Writes ROOT/imagewikiqa/NAME for every run and findings.csv.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from vlmclassifier import cli
from vlmclassifier.mini.findings import Finding, finding, readable, verdict, write_findings
from vlmclassifier.mini.study import PROCESSES, VLM, StudyArgs, run_logged
from vlmclassifier.records import Prediction, UserError
from vlmclassifier.runs import read_record, read_run
from vlmclassifier.scoring.questions import Answers, grouped_difference, grouped_proportion, paired_tests

NAME = "wikiqa"
TRAININGS = {"projector": "projector", "lora": "projector and LoRA", "mixture": "projector, mixture"}
RANKED = ["--form", "rank_options", "rank_letters"]
# Run -> options of answer.py; two calls for what is asked most, so that two processes are busy to the end.
CALLS: dict[str, list[str]] = {
    "base": ["--form", "free", "--given", "image", "text", "text+name", "text+own"],
    "base-ranked": [*RANKED, "--given", "image", "text"],
    "projector": ["--form", "free", "--given", "image", "text+name", "text+own"],
    "projector-ranked": RANKED, "lora": ["--form", "free", "rank_options", "rank_letters"],
    "mixture": ["--form", "free", "rank_options", "rank_letters"],
}  # fmt: skip
FREE, OPTIONS, LETTER = "free_answer", "options_log_prob", "letters_log_prob"
BELOW, ABOVE, LEVEL = 20, 5, 0.05  # aims in points; the level of the tests


@dataclass
class Args(StudyArgs):
    """Arguments."""

    facts: Path | None = None
    """Facts about your own classes, as pretrain_mini.py takes them; without them the section has no questions."""
    rows: int = 400
    """Largest number of rows."""
    filter: bool = True
    """Keep only questions that the language model answers rightly with the class name and wrongly without it."""


def main(args: Args) -> None:
    """Build the questions, answer what is not answered yet, two calls at a time; derive the findings."""
    cli.check_positive(limit=args.limit, batch_size=args.batch_size, rows=args.rows)
    out = args.root / "imagewikiqa"
    out.mkdir(parents=True, exist_ok=True)
    if args.benchmark != "plane_figures" and args.facts is None:
        write_findings([], out / "findings.csv")
        print("No --facts about the classes: there are no questions, and F6 is not run.")
        return
    try:
        questions = build(args, out)
    except UserError as error:
        if "No question is left" not in str(error):
            raise
        write_findings([], out / "findings.csv")
        print(f"{error} F6 is not run.")
        return
    with ThreadPoolExecutor(PROCESSES) as pool:
        for job in [pool.submit(answer, args, name, questions) for name in CALLS]:
            job.result()
    findings = derive(out)
    write_findings(findings, out / "findings.csv")
    print(f"\n{readable(findings)}\n\nWritten: {out / 'findings.csv'}. "
          f"Next: python imagewikiqa/table.py --outputs {out}")  # fmt: skip


def build(args: Args, out: Path) -> Path:
    """The file of the questions."""
    facts = args.facts.resolve() if args.facts else "plane_figures"
    folder = (out / "questions").resolve()
    run_logged(out / "questions.log", [
        "imagewikiqa/build_questions.py", *args.data_options(), "--facts", facts, "--rows", args.rows, "--name", NAME,
        *(["--language-model", (args.root / "checkpoints" / "lm").resolve()] if args.filter else []), "--out", folder,
        *(["--limit", args.limit] if args.limit else []),
    ])  # fmt: skip
    return folder / f"{NAME}.jsonl"


def answer(args: Args, name: str, questions: Path) -> None:
    """The runs of one call; what is finished is left alone."""
    training = name.removesuffix("-ranked")
    adapter = []
    if training != "base":
        folder = args.root / "training_analysis" / training / "best"
        if not folder.exists():
            raise UserError(f"{folder} does not exist: run training_analysis/mini_study.py first.")
        adapter = ["--adapter", folder.resolve()]
    options = args.data_options()
    root = options[options.index("--data-root") + 1] if "--data-root" in options else Path(args.benchmark).parent
    run_logged(args.root / "imagewikiqa" / f"{name}.log", [
        "imagewikiqa/answer.py", "--model", VLM, "--weights", (args.root / "checkpoints" / "vlm").resolve(), *adapter,
        "--questions", questions, "--image-root", Path(root).resolve(), "--group", "class", "--batch-size",
        args.batch_size, "--max-new-tokens", 16, "--out", (args.root / "imagewikiqa" / training).resolve(),
        *CALLS[name],
    ])  # fmt: skip


def derive(out: Path) -> list[Finding]:
    """The findings of all runs."""
    base = read(out, "base", FREE)
    rows = [
        proportion("VLM as it is", base), proportion("VLM as it is, text only", read(out, "base", f"{FREE}-text_only")),
        proportion("VLM as it is, text with the class name", read(out, "base", f"{FREE}-text_only-with_name")),
    ]  # fmt: skip
    rows += [proportion(f"fine-tuned: {words}", read(out, name, FREE)) for name, words in TRAININGS.items()]
    rows += [
        difference("VLM as it is minus classification-only (projector)", base, read(out, "projector", FREE), BELOW),
        difference("VLM as it is minus classification-only (projector and LoRA)", base, read(out, "lora", FREE)),
        difference("mixture minus VLM as it is", read(out, "mixture", FREE), base, ABOVE),
    ]
    for form, words in ((OPTIONS, "option text"), (LETTER, "letter")):
        of_base = read(out, "base", form)
        rows.append(proportion(f"VLM as it is, likeliest {words}", of_base))
        rows.append(proportion(f"VLM as it is, text only, likeliest {words}", read(out, "base", f"{form}-text_only")))
        for name, training in TRAININGS.items():
            rows.append(difference(f"{training} minus VLM as it is, likeliest {words}", read(out, name, form), of_base))
    return rows


def read(out: Path, name: str, setting: str) -> Answers:
    """The answers of a run, in the order of the question ids. Raises UserError where it is not finished."""
    folder = out / f"{name}-{setting}"
    if not (folder / "run.json").exists() or not read_record(folder)["finished"]:
        raise UserError(f"{folder} is not finished: run this again.")
    rows: Sequence[Prediction] = sorted(read_run(folder)[1], key=lambda row: row.example_id)
    return Answers(rows, read_record(folder)["config"]["form"])


def proportion(words: str, answers: Answers) -> Finding:
    """The row of an accuracy, with an interval over classes."""
    return finding("F6", f"questions: {words}", grouped_proportion(answers.right, answers.groups))


def difference(words: str, first: Answers, second: Answers, aim: int | None = None) -> Finding:
    """A paired difference with its tests; with an aim it is to be above 0, and by as many points."""
    values = (first.right, second.right, first.groups)
    estimate, test = grouped_difference(*values), paired_tests(*values)
    p = f"p = {test.sign_flip:.4f}, McNemar {test.mcnemar:.4f}"
    if aim is None:
        return finding("F6", f"questions: {words}", estimate, None, p)
    holds = verdict(estimate.low > 0 and test.sign_flip < LEVEL)  # the bootstrap's interval, and the test
    if holds == "holds" and estimate.value < aim:
        holds += f", but below {aim} points"
    return finding("F6", f"questions: {words}", estimate, None, f"{holds}, {p}")


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
