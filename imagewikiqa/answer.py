"""Answer multiple-choice questions about images that need the class (section 4, Table 5).

    python imagewikiqa/answer.py --model llava-1.5-7b --questions imagewikiqa.jsonl --image-root data/imagenet
    python imagewikiqa/answer.py --model llava-1.5-7b --questions imagewikiqa.jsonl --given image+name
    python imagewikiqa/answer.py --questions imagewikiqa.jsonl --given image text text+name text+own
    python imagewikiqa/answer.py --model llava-1.5-7b --adapter RUN/best --questions imagewikiqa.jsonl
    python imagewikiqa/answer.py --model llava-1.5-7b --questions imagewikiqa.jsonl --form rank_letters rank_options
    python imagewikiqa/answer.py --model openai/gpt-4.1 --questions imagewikiqa.jsonl --limit 100
    python imagewikiqa/answer.py --base-url http://localhost:8000/v1 --model Qwen/Qwen3-VL-8B-Instruct \
        --questions imagewikiqa.jsonl

As the paper: the options are in the prompt, the answer begins with "Let's think step by step." and has up to 1,024
tokens; a letter is read from it by the paper's rule, and where it finds none a random one counts. Several --form and
--given make one run each. Writes outputs/imagewikiqa/NAME-SETTING/{run.json, predictions.jsonl, scores.csv}; intervals
are over different questions. It can be stopped at any time: the same command continues.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlmclassifier import cli
from vlmclassifier.arguments import RunArgs, values_of
from vlmclassifier.asking import AnswerArgs, Asking, load_model
from vlmclassifier.benchmarks import Benchmark, Evaluation
from vlmclassifier.class_lists import JsonList
from vlmclassifier.paths import PROJECT_ROOT, local_path
from vlmclassifier.questions.items import ChoiceQuestion, image_file, read_questions
from vlmclassifier.questions.settings import FORMS, INPUTS, QuestionSetting, check_question_settings
from vlmclassifier.records import Prediction
from vlmclassifier.runs import open_run
from vlmclassifier.scoring.runs import score_run
from vlmclassifier.tables import label
from vlmclassifier.thoughts import final_answer

RELEASED = "imagewikiqa"  # the dataset column of paper.csv
RELEASED_ROWS = 2_000
RELEASED_SHA256 = "b53ab522230eb1b27c4806b96b310b45a7f37a127857ba26eaf536fe05ad22ea"  # of the sorted ids and letters


@dataclass
class Args(RunArgs, AnswerArgs):
    """Arguments."""

    questions: Path = PROJECT_ROOT / "data" / "imagewikiqa.jsonl"
    """File of questions: the released one, or of build_questions.py."""
    image_root: Path | None = None
    """Folder of the images; default: the entry imagenet of paths.toml, else the folder of the questions."""
    form: tuple[Literal[tuple(form for form in FORMS if form != "naming")], ...] = ("letters",)
    """letters: the options are in the prompt, and a letter is read from the answer; free: the question alone; or the
    letter or option text of the highest log-probability (local models)."""
    given: tuple[Literal[tuple(INPUTS)], ...] = ("image",)
    """What the model is given; name: the true class name in place of "this object"; own: its own name of the image,
    for which it is asked first."""
    limit: int | None = None
    """Only the first N questions; a larger N later continues the same run."""
    group: Literal["question", "class"] = "question"
    """Rows that are not independent: those of one question, or of one class."""


def main(args: Args) -> None:
    """Check everything, answer what is pending in every setting, score."""
    # ---- check
    cli.check_positive(limit=args.limit, batch_size=args.batch_size, max_new_tokens=args.max_new_tokens,
                       concurrency=args.concurrency, max_side=args.max_side)  # fmt: skip
    questions = read_questions(args.questions, args.limit)
    root = args.image_root or local_path("benchmarks", "imagenet") or args.questions.parent
    settings = check_question_settings(values_of(args.form), values_of(args.given), args.chain_of_thought)
    if any(setting.given == "text+own" for setting in settings):
        settings.insert(0, QuestionSetting("naming"))
    if any(setting.has_image for setting in settings):
        for question in questions:
            image_file(root, question)
    model = load_model(args)
    task = evaluation(args, questions, root)
    groups = group_numbers(args, questions)

    # ---- answer and score
    own_name = None
    for setting in settings:
        folder = args.run_folder("imagewikiqa", model.name(task), setting.name, len(settings) > 1)
        config = model.config(task, setting, limit=args.limit, group=args.group)
        labels = {question.id: setting.label(question) for question in questions}
        run = open_run(folder, config, list(labels), labels=labels)
        if not run.complete:
            model.answer(run, Asking(setting, questions, groups, root, own_name), args.batch_size)
        rows = run.finish()
        if setting.form == "naming":
            own_name = names_of(rows)
        if cli.is_main_process():
            report(folder, rows, setting)


def evaluation(args: Args, questions: Sequence[ChoiceQuestion], root: Path) -> Evaluation:
    """The questions as what a run evaluates: their file, its hash, and tags for what differs from the paper's."""
    everything = read_questions(args.questions)
    digest = hashlib.sha256("".join(sorted(question.id + question.letter for question in everything)).encode())
    tags = []
    if args.questions.stem == RELEASED:
        if digest.hexdigest() != RELEASED_SHA256:
            tags.append("other questions than the released")
        elif len(questions) < RELEASED_ROWS:
            tags.append(f"{len(questions):,} of {RELEASED_ROWS:,} questions")
    benchmark = Benchmark(args.questions.stem, args.questions.stem, JsonList(args.questions))
    return Evaluation(benchmark, (), root, "test", digest.hexdigest(), [], tuple(tags))


def group_numbers(args: Args, questions: Sequence[ChoiceQuestion]) -> dict[str, int]:
    """Question id -> the number of its group."""
    keys = [question.question if args.group == "question" else question.class_name for question in questions]
    number = {key: int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) for key in set(keys)}  # whatever the order
    return {question.id: number[key] for question, key in zip(questions, keys, strict=True)}


def names_of(rows: Sequence[Prediction]) -> Callable[[ChoiceQuestion], str]:
    """The model's own names of the images: its answers without outer white space and a final full stop."""
    answers = {row.example_id: final_answer(row.output, row.prompt)[0] for row in rows}
    names = {key: answer.strip().removesuffix(".") or "object" for key, answer in answers.items()}
    return lambda question: names[question.id]


def report(folder: Path, rows: Sequence[Prediction], setting: QuestionSetting) -> None:
    """Print the scores and what comes next."""
    scored = score_run(folder, rows)
    values = {score.metric: score for score in scored.scores}
    accuracy = values["accuracy"]
    model = label(accuracy.model, ", ".join(accuracy.tags))
    print(f"{model}, {setting.name}: accuracy {accuracy.value:.1f}% [{accuracy.low:.1f}, {accuracy.high:.1f}], "
          f"n={accuracy.n}")  # fmt: skip
    if "failures" in values:
        number = {metric: f"{score.value:.1f}%" for metric, score in values.items()}
        print(f"No letter found in {number['failures']} (random guesses; counted wrong, the accuracy is "
              f"{number['accuracy_failures_wrong']}); by the strict rule {number['strict']}, no letter found in "
              f"{number['strict_failures']}; the rules disagree in {number['rules_disagree']}")  # fmt: skip
    print(f"Rows: {folder / 'predictions.jsonl'}. Next: python imagewikiqa/table.py")


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
