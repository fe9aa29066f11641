"""Locate where the class name appears in a vision-language model: the logit lens, layer by layer (beyond the paper).

    python feature_analysis/locate.py --model llava-1.5-7b --benchmark flowers --limit 500
    python feature_analysis/locate.py --model llava-1.5-7b --benchmark flowers --frequency counts.csv

Every layer's states of the ranking's pass are read through the final norm and the head, and the log-probabilities of
each name's tokens are summed: at which layer does the right name lead? --frequency FILE.csv (columns class and count)
splits the classes into a frequent, a middle and a rare third. Writes outputs/feature_analysis/NAME-lens/{run.json,
predictions.jsonl, values.safetensors: the rank of the true name at every layer, lens.csv: the accuracy by layer}. It
can be stopped at any time: the same command continues.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vlmclassifier import cli
from vlmclassifier.arguments import DataArgs, ModelArgs, RunArgs, run_config, run_name
from vlmclassifier.benchmarks import Evaluation
from vlmclassifier.images import open_image, prefetch
from vlmclassifier.models import checkpoint_folder, display_name, find_model, template_of
from vlmclassifier.prompts import WORDINGS
from vlmclassifier.records import Prediction, UserError, images_named
from vlmclassifier.runs import Run, open_run
from vlmclassifier.runs.vectors import ROWS, read_values
from vlmclassifier.scoring.intervals import wilson_interval

if TYPE_CHECKING:
    from vlmclassifier.vlm import VLM

THIRDS = ("frequent", "middle", "rare")


@dataclass
class Args(RunArgs, DataArgs, ModelArgs):
    """Arguments."""

    wording: Literal[tuple(WORDINGS)] = "base"
    """Wording of the question (vlmclassifier/prompts.py)."""
    frequency: Path | None = None
    """CSV file with the columns class and count: lens.csv then has the frequent, middle and rare third too."""
    batch_size: int = 4
    """Images per forward pass; the numbers do not depend on it, except for rounding."""


def main(args: Args) -> None:
    """Check everything, read every layer of the pending images, write the accuracy by layer."""
    # ---- check
    cli.check_positive(limit=args.limit, batch_size=args.batch_size)
    spec = find_model(args.model, "vlm")
    task = args.load_evaluation()
    group_of = thirds(args.frequency, task.names) if args.frequency else {}
    checkpoint = checkpoint_folder(spec, args.weights)

    from vlmclassifier.devices import resolve_device, resolve_dtype  # seconds of torch
    from vlmclassifier.vlm import load_vlm

    # ---- open the run
    device = resolve_device(args.device)
    config = run_config(
        "locate", "lens", spec, task, args.limit, checkpoint=checkpoint, default_dtype=resolve_dtype("auto", device),
        dtype=resolve_dtype(args.dtype, device), template=template_of(spec), wording=args.wording,
    )  # fmt: skip
    folder = args.run_folder("feature_analysis", run_name(spec, task, checkpoint), "lens")
    vlm = load_vlm(args.model, checkpoint, args.device, args.dtype)
    layers = vlm.model.config.get_text_config().num_hidden_layers
    run = open_run(folder, config, task.order, layers, labels=task.labels, batch_size=args.batch_size)

    # ---- read the layers
    if not run.complete:
        read_layers(args, task, vlm, run)
    rows = run.finish()
    if cli.is_main_process():
        file = write_lens(folder, rows, display_name(spec.key), ", ".join(config["tags"]), task, group_of)
        print(f"Accuracy by layer: {file}")


def thirds(file: Path, names: Sequence[str]) -> dict[str, str]:
    """The third of the classes, by the counts of a CSV file, that each class belongs to; ties in the order of the list.

    Raises UserError for a file that cannot be read and for a class that it does not have.
    """
    try:
        with open(file, newline="", encoding="utf-8-sig") as stream:
            counts = {row["class"]: float(row["count"]) for row in csv.DictReader(stream)}
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{file} is no CSV file with the columns class and count ({error!r}): fix it.") from None
    if missing := [name for name in names if name not in counts]:
        raise UserError(f"{file} has no count of {missing[0]!r}, and of {len(missing) - 1} other classes: add them.")
    order = sorted(dict.fromkeys(names), key=lambda name: -counts[name])
    return {name: THIRDS[len(THIRDS) * place // len(order)] for place, name in enumerate(order)}


def read_layers(args: Args, task: Evaluation, vlm: "VLM", run: Run) -> None:
    """Record for every pending image the rank of its true name at every layer."""
    import numpy as np

    from vlmclassifier.ranking import Ranker
    from vlmclassifier.ranking.lens import lens_log_probs
    from vlmclassifier.scoring.guidance import ranks

    names = list(dict.fromkeys(task.names))  # a name that two classes share stands for the first
    place, examples = {name: number for number, name in enumerate(names)}, {e.id: e for e in task.examples}
    ranker = Ranker(vlm, names, WORDINGS[args.wording])
    first = examples[run.order[0]]
    with images_named([first.place]):
        remark = ranker.select_method(open_image(first.image, task.root, first.row))
    if remark:
        raise UserError(f"{remark}, so it has no lens.")

    def load(ids: list[str]) -> list:
        return [open_image(examples[i].image, task.root, examples[i].row) for i in ids]

    with cli.progress([run], f"{vlm.spec.key} on {task.benchmark.title}, lens") as update:
        for ids, images in prefetch(run.pending(args.batch_size), load):
            with images_named([examples[i].place for i in ids]):
                log_probs = lens_log_probs(ranker, images)  # [layers, images, names]
            truth = np.array([place[examples[i].label] for i in ids])
            values = np.stack([ranks(layer, truth) for layer in log_probs], axis=1)  # [images, layers]
            rows = []
            for i, best in zip(ids, log_probs[-1].argmax(axis=1), strict=True):
                e, index = examples[i], task.names.index(names[best])
                rows.append(Prediction(e.id, e.label, e.class_index, ranker.prompt, None, names[best], (index,)))
            run.append(rows, values.astype(np.float32))
            update()


def write_lens(
    folder: Path, rows: Sequence[Prediction], model: str, tags: str, task: Evaluation, group_of: dict[str, str]
) -> Path:  # fmt: skip
    """lens.csv: for every layer the share of images whose true name leads, with a 95% Wilson interval, in percent."""
    ranks = read_values(folder)[1][ROWS]  # [images, layers]
    groups = {"all": list(range(len(rows)))}
    for third in THIRDS if group_of else ():
        groups[third] = [number for number, row in enumerate(rows) if group_of[row.label] == third]
    file = folder / "lens.csv"
    with open(file, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["model", "tags", "dataset", "classes", "layer", "accuracy", "low", "high", "n"])
        for group, members in groups.items():
            for layer in range(ranks.shape[1] if members else 0):
                hits = int((ranks[members, layer] == 0).sum())
                numbers = [100 * value for value in (hits / len(members), *wilson_interval(hits, len(members)))]
                printed = [f"{number:.3f}" for number in numbers]
                writer.writerow([model, tags, task.benchmark.key, group, layer + 1, *printed, len(members)])
    return file


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
