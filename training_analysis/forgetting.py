"""What fine-tuning on classification rows destroys: trained or new images x trained or new questions.

    python training_analysis/forgetting.py --model llava-1.5-7b --benchmark flowers --adapters RUN_A/last RUN_B/last
    python training_analysis/forgetting.py --model mini-llava --weights ROOT/checkpoints/vlm --benchmark plane_figures \
        --data-root ROOT/images --adapters ROOT/training_analysis/*/last

Beyond the paper. Asks the model as it is and with every set of fine-tuned weights about images of the train split and
of the test split: the question that was trained, another wording of it, and questions about something else. The share
of answers that are a class name says how much of the model now answers every question with a name. Of PlaneFigures the
new questions are about facts, whose answers are known. Writes forgetting.csv, and every answer, in
outputs/training_analysis/forgetting; finished answers are not asked for again.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmclassifier import cli
from vlmclassifier.arguments import DataArgs, ModelArgs
from vlmclassifier.benchmarks import Evaluation
from vlmclassifier.identity import Adapter, read_adapter
from vlmclassifier.images import open_image
from vlmclassifier.models import ModelSpec, checkpoint_folder, find_model
from vlmclassifier.paths import OUTPUTS
from vlmclassifier.prompts import QUESTIONS
from vlmclassifier.records import Example, UserError
from vlmclassifier.runs.provenance import fingerprint
from vlmclassifier.runs.record import replace_file
from vlmclassifier.scoring import plain_words
from vlmclassifier.scoring.intervals import wilson_interval
from vlmclassifier.tables import markdown, write_csv

if TYPE_CHECKING:
    from vlmclassifier.vlm import VLM

BASE = "as it is"
NEW_QUESTIONS = (  # asked of photographs, about something else than the object's name
    "What colour is the background?", "How many objects are in this photo?", "Is this photo taken indoors or outdoors?",
    "What is the weather like in this photo?", "Where in the photo is the main object?",
)  # fmt: skip
NEW_TOKENS = 32


@dataclass
class Args(DataArgs, ModelArgs):
    """Arguments."""

    adapters: tuple[Path, ...] = ()
    """Fine-tuned weights: folders best or last of finetune_vlm.py."""
    images: int = 200
    """Images of each split."""
    batch_size: int = 8
    """Images per forward pass."""
    out: Path = OUTPUTS / "training_analysis" / "forgetting"
    """Folder of the answers and the table."""


@dataclass(frozen=True)
class Cell:
    """One question kind about one split, with what is asked of each image and the right answer where it is known."""

    images: str  # trained or new
    questions: str  # trained, another wording or new
    items: Sequence[tuple[Example, str, str]]  # example, question, answer or ""


def main(args: Args) -> None:
    """Ask every model every cell, write and print the grid."""
    cli.check_positive(images=args.images, batch_size=args.batch_size)
    spec = find_model(args.model, "vlm")
    checkpoint = checkpoint_folder(spec, args.weights)
    adapters: list[Adapter | None] = [None, *(read_adapter(folder, spec, checkpoint) for folder in args.adapters)]
    tasks = {"trained": trained_images(args, [adapter for adapter in adapters if adapter]),
             "new": replace(args, split=None, limit=args.images).load_evaluation()}  # fmt: skip
    wordings = {adapter.config["wording"] for adapter in adapters if adapter} or {"base"}
    if len(wordings) > 1:
        raise UserError(f"--adapters were trained on several questions ({', '.join(sorted(wordings))}): give one kind.")
    wording = wordings.pop()
    cells = [cell for name, task in tasks.items() for cell in cells_of(args, name, task, wording)]
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for adapter in adapters:
        name = f"{adapter.folder.parent.name}/{adapter.folder.name}" if adapter else BASE
        answers = ask_all(args, spec, checkpoint, adapter, tasks["trained"].root, cells)
        what = ", ".join(adapter.tags).removeprefix("fine-tuned: ") if adapter else ""
        rows += [{"model": name, "training": what} | row_of(cell, answers[number], tasks["trained"].names)
                 for number, cell in enumerate(cells)]  # fmt: skip
    file = write_csv(args.out / "forgetting.csv", rows)
    import pandas as pd

    shown = pd.DataFrame(rows)[["model", "images", "questions", "class_names", "right", "n"]]
    print("Percent of answers that are a class name, and that are right where the answer is known\n\n"
          f"{markdown(shown)}\n\nWritten: {file}. Next: training_analysis/plot.ipynb")  # fmt: skip


def trained_images(args: Args, adapters: Sequence[Adapter]) -> Evaluation:
    """The first images that were trained on. Raises UserError for weights that were trained on different images."""
    keys = ("benchmark", "manifest", "split", "limit", "held_out", "seed", "captions")
    for adapter in adapters:
        if missing := [key for key in keys if key not in adapter.record["config"]]:
            raise UserError(f"{adapter.folder} does not say what it was trained on ({', '.join(missing)}): train it by "
                            "finetune_vlm.py.")  # fmt: skip
    found = {json.dumps([adapter.record["config"][key] for key in keys]) for adapter in adapters}
    if len(found) > 1:
        raise UserError(f"--adapters were trained on different images ({', '.join(keys)} differ): give one kind.")
    trained = adapters[0].record["config"] if adapters else {}
    if trained.get("captions"):
        raise UserError("--adapters were trained on captions, which not every image has: give others.")
    task = replace(args, split=trained.get("split", "train"), limit=trained.get("limit")).load_evaluation()
    if trained and trained["manifest"] != task.manifest_hash:
        raise UserError(f"--adapters were trained on another manifest than --benchmark {args.benchmark}: give theirs.")
    examples = task.examples
    if trained.get("held_out"):
        from vlmclassifier.finetuning.data import held_out_examples  # seconds of torch

        is_held_out = held_out_examples(examples, task.names, trained["seed"], trained["held_out"])
        examples = [example for example, is_out in zip(examples, is_held_out, strict=True) if not is_out]
    return replace(task, examples=examples[: args.images])


def cells_of(args: Args, images: str, task: Evaluation, wording: str) -> list[Cell]:
    """The question kinds about the images of one split."""
    other = next(key for key in ("alternative_1", "base") if key != wording)
    cells = [
        Cell(images, "trained", [(example, QUESTIONS[wording], example.label) for example in task.examples]),
        Cell(images, "another wording", [(example, QUESTIONS[other], example.label) for example in task.examples]),
    ]
    if args.benchmark == "plane_figures":
        from vlmclassifier.plane_figures.facts import figure_facts

        facts = figure_facts()
        new = []
        for number, example in enumerate(task.examples):
            if of_class := facts.get(example.label):
                fact = of_class[number % len(of_class)]
                new.append((example, fact.question.format(subject="this object"), fact.answer))
    else:
        new = [
            (example, NEW_QUESTIONS[number % len(NEW_QUESTIONS)], "") for number, example in enumerate(task.examples)
        ]
    return [*cells, Cell(images, "new", new)]


def ask_all(
    args: Args, spec: ModelSpec, checkpoint: Path, adapter: Adapter | None, root: Path, cells: Sequence[Cell]
) -> list[list[str]]:  # fmt: skip
    """The answers to all cells by one set of weights, from the file of an earlier call where there is one."""
    key = fingerprint(adapter.folder)[:12] if adapter else "base"
    file = args.out / f"answers-{spec.key}-{key}.json"
    asked = [[[example.id, question] for example, question, _ in cell.items] for cell in cells]
    if file.exists():
        stored = json.loads(file.read_text(encoding="utf-8"))
        identity = (stored["asked"], stored["checkpoint"], stored["dtype"])
        if identity == (asked, fingerprint(checkpoint), args.dtype):
            return stored["answers"]
        raise UserError(
            f"{file} has answers to other images or questions, or of another --dtype: choose another --out."
        )
    from vlmclassifier.finetuning.weights import load_adapter
    from vlmclassifier.vlm import load_vlm

    vlm = load_vlm(args.model, checkpoint, args.device, args.dtype)
    load_adapter(vlm, adapter or read_adapter(None, spec, checkpoint))  # the template of a merged checkpoint
    answers = [ask(args, vlm, cell, root) for cell in cells]
    stored = {"checkpoint": fingerprint(checkpoint), "dtype": args.dtype, "asked": asked, "answers": answers}
    replace_file(file, json.dumps(stored, ensure_ascii=False) + "\n")
    return answers


def ask(args: Args, vlm: "VLM", cell: Cell, root: Path) -> list[str]:
    """The answers to one cell."""
    from tqdm import tqdm

    answers = []
    starts = range(0, len(cell.items), args.batch_size)
    for start in tqdm(starts, f"{cell.images} images, {cell.questions} questions", unit="batch"):
        part = cell.items[start : start + args.batch_size]
        images = [open_image(example.image, root, example.row) for example, _, _ in part]
        batch = vlm.prepare(images, [vlm.prompt(question) for _, question, _ in part])
        answers += [answer.strip() for answer in vlm.generate(batch, NEW_TOKENS)]
    return answers


def row_of(cell: Cell, answers: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """Share of answers that are a class name and nothing else, and of right ones, with Wilson intervals."""
    known = {" ".join(plain_words(name)) for name in names}
    are_names = [" ".join(plain_words(answer)) in known for answer in answers]
    low, high = wilson_interval(sum(are_names), len(are_names))
    row: dict[str, Any] = {
        "images": cell.images, "questions": cell.questions, "n": len(answers),
        "class_names": 100 * sum(are_names) / len(answers), "low": 100 * low, "high": 100 * high,
    }  # fmt: skip
    judged = [(answer, right) for answer, (_, _, right) in zip(answers, cell.items, strict=True) if right]
    is_right = [right.lower() in answer.lower() for answer, right in judged]
    low, high = wilson_interval(sum(is_right), len(is_right)) if is_right else (float("nan"),) * 2
    share = sum(is_right) / len(is_right) if is_right else float("nan")
    return row | {"right": 100 * share, "right_low": 100 * low, "right_high": 100 * high, "right_n": len(is_right)}


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
