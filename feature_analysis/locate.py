"""Locate the class name in a vision-language model: logit lens and activation patching, layer by layer.

    python feature_analysis/locate.py lens --model llava-1.5-7b --benchmark flowers --limit 500
    python feature_analysis/locate.py lens --model llava-1.5-7b --benchmark flowers --frequency counts.csv
    python feature_analysis/locate.py patch --model llava-1.5-7b --benchmark flowers --limit 120
    python feature_analysis/locate.py patch --model llava-1.5-7b --benchmark flowers --limit 120 --donor same

lens: every layer's states of the ranking's pass are read through the final norm and the head, and the log-probabilities
of each name's tokens are summed: at which layer does the right name lead? patch: the states of a donor image at one
layer and one set of tokens (the last, the text behind the image, the image's, all) replace the recipient's: the share
of pairs whose top name becomes the donor's own. Pairs have different own top names; --donor same, of the same class, is
the control. --frequency FILE.csv (columns class and count) splits the classes into a frequent, a middle and a rare
third. Writes outputs/feature_analysis/NAME-lens or NAME-patch/{run.json, predictions.jsonl, values.safetensors} with
lens.csv or patch.csv, the shares by layer. It can be stopped at any time: the same command continues.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

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
    from vlmclassifier.ranking import Ranker
    from vlmclassifier.vlm import VLM

THIRDS = ("frequent", "middle", "rare")
POSITIONS = ("last", "text", "image", "all")  # of ranking.patching, which imports torch


@dataclass
class Args(RunArgs, DataArgs, ModelArgs):
    """Arguments."""

    what: tyro.conf.Positional[Literal["lens", "patch"]] = "lens"
    """lens or patch."""
    donor: Literal["other", "same"] = "other"
    """patch: the class of the donor, another than the recipient's or the same."""
    seed: int = 0
    """patch: seed of the drawn donors, which depend on (seed, image)."""
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
        "locate", args.what, spec, task, args.limit, checkpoint=checkpoint, default_dtype=resolve_dtype("auto", device),
        dtype=resolve_dtype(args.dtype, device), template=template_of(spec), wording=args.wording,
        **({"donor": args.donor, "seed": args.seed} if args.what == "patch" else {}),
    )  # fmt: skip
    setting = args.what if args.what == "lens" or args.donor == "other" else "patch-same_class"
    folder = args.run_folder("feature_analysis", run_name(spec, task, checkpoint), setting)
    vlm = load_vlm(args.model, checkpoint, args.device, args.dtype)
    ranker = build_ranker(args, task, vlm)
    layers = len(ranker.decoder.decoder.layers)

    # ---- compute
    if args.what == "lens":
        order, width, compute = task.order, layers, read_layers
    else:
        donor_of, tops = pairs(args, task, ranker)
        order = [example_id for example_id in task.order if example_id in donor_of]
        width = (layers + 1) * len(POSITIONS)
        compute = partial(patch_pairs, donor_of, tops)
    run = open_run(folder, config, order, width, labels=task.labels, batch_size=args.batch_size)
    if not run.complete:
        compute(args, task, ranker, run)
    rows = run.finish()
    if cli.is_main_process():
        common = {"model": display_name(spec.key), "tags": ", ".join(config["tags"]), "dataset": task.benchmark.key}
        write = write_lens if args.what == "lens" else write_patch
        print(f"Shares by layer: {write(folder, rows, common, task, group_of)}")


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


def build_ranker(args: Args, task: Evaluation, vlm: "VLM") -> "Ranker":
    """The ranker of all names. Raises UserError for a model that is not ranked with tree attention masks."""
    from vlmclassifier.ranking import Ranker

    names = list(dict.fromkeys(task.names))  # a name that two classes share stands for the first
    ranker, first = Ranker(vlm, names, WORDINGS[args.wording]), task.examples[0]
    with images_named([first.place]):
        remark = ranker.select_method(open_image(first.image, task.root, first.row))
    if remark:
        raise UserError(f"{remark}: its layers cannot be read.")
    return ranker


def load_images(task: Evaluation, ids: Sequence[str]) -> list:
    """The images of some examples."""
    examples = {example.id: example for example in task.examples}
    return [open_image(examples[i].image, task.root, examples[i].row) for i in ids]


def row_of(task: Evaluation, ranker: "Ranker", example_id: str, ranking: Sequence[int]) -> Prediction:
    """The row to record; `ranking`: places among the ranker's names."""
    e = next(example for example in task.examples if example.id == example_id)
    indices = tuple(task.names.index(ranker.names[place]) for place in ranking)
    return Prediction(e.id, e.label, e.class_index, ranker.prompt, None, ranker.names[ranking[0]], indices)


def read_layers(args: Args, task: Evaluation, ranker: "Ranker", run: Run) -> None:
    """Record for every pending image the rank of its true name at every layer."""
    import numpy as np

    from vlmclassifier.ranking.lens import lens_log_probs
    from vlmclassifier.scoring.guidance import ranks

    with cli.progress([run], f"{ranker.vlm.spec.key} on {task.benchmark.title}, lens") as update:
        for ids, images in prefetch(run.pending(args.batch_size), lambda ids: load_images(task, ids)):
            with images_named(ids):
                log_probs = lens_log_probs(ranker, images)  # [layers, images, names]
            truth = np.array([ranker.names.index(task.labels[i]) for i in ids])
            values = np.stack([ranks(layer, truth) for layer in log_probs], axis=1)  # [images, layers]
            tops = log_probs[-1].argmax(axis=1)  # [images]
            rows = [row_of(task, ranker, i, [top]) for i, top in zip(ids, tops, strict=True)]
            run.append(rows, values.astype(np.float32))
            update()


def pairs(args: Args, task: Evaluation, ranker: "Ranker") -> tuple[dict[str, str], dict[str, int]]:
    """The donor of every image that has one, and every image's own top name, as its place among the names."""
    from tqdm import tqdm

    from vlmclassifier.ranking.patching import draw_donors

    tops: dict[str, int] = {}
    for start in tqdm(range(0, len(task.order), args.batch_size), "own top names", unit="batch"):
        ids = task.order[start : start + args.batch_size]
        with images_named(ids):
            log_probs = ranker.log_probs(load_images(task, ids))  # [images, names]
        tops |= dict(zip(ids, log_probs.argmax(axis=1).tolist(), strict=True))
    labels = [task.labels[i] for i in task.order]
    donors = draw_donors(task.order, labels, list(tops.values()), args.donor == "same", args.seed)
    donor_of = {i: task.order[donor] for i, donor in zip(task.order, donors, strict=True) if donor is not None}
    if not donor_of:
        raise UserError("No image has a donor with another top name: evaluate more images.")
    return donor_of, tops


def patch_pairs(
    donor_of: dict[str, str], tops: dict[str, int], args: Args, task: Evaluation, ranker: "Ranker", run: Run
) -> None:  # fmt: skip
    """Record for every pending pair at which layers and tokens the donor's states make its top name the recipient's."""
    import numpy as np

    from vlmclassifier.ranking.patching import patched_log_probs

    layers = len(ranker.decoder.decoder.layers) + 1
    with cli.progress([run], f"{ranker.vlm.spec.key} on {task.benchmark.title}, patching") as update:
        for ids in run.pending(args.batch_size):
            donors = [donor_of[i] for i in ids]
            recipient_batch, donor_batch = (ranker.prepare(load_images(task, group)) for group in (ids, donors))
            wanted = np.array([tops[donor] for donor in donors])  # [pairs]
            values = np.zeros((len(ids), layers, len(POSITIONS)), dtype=np.float32)
            for layer in range(layers):
                for number, positions in enumerate(POSITIONS):
                    log_probs = patched_log_probs(ranker, recipient_batch, donor_batch, layer, positions)
                    values[:, layer, number] = log_probs.argmax(axis=1) == wanted
            rows = [row_of(task, ranker, i, [tops[i], tops[donor_of[i]]]) for i in ids]
            run.append(rows, values.reshape(len(ids), -1))
            update()


def write_lens(
    folder: Path, rows: Sequence[Prediction], common: dict[str, str], task: Evaluation, group_of: dict[str, str]
) -> Path:  # fmt: skip
    """lens.csv: for every layer the share of images whose true name leads."""
    ranks = read_values(folder)[1][ROWS]  # [images, layers]
    table = []
    for group in ("all", *(THIRDS if group_of else ())):
        members = [number for number, row in enumerate(rows) if group in ("all", group_of.get(row.label))]
        for layer in range(ranks.shape[1]):
            hits = [bool(ranks[number, layer] == 0) for number in members]
            table.append(common | {"classes": group, "layer": layer + 1} | share(hits))
    return write_table(folder / "lens.csv", table)


def write_patch(
    folder: Path, rows: Sequence[Prediction], common: dict[str, str], task: Evaluation, group_of: dict[str, str]
) -> Path:  # fmt: skip
    """patch.csv: for every layer and set of tokens the share of pairs whose top name becomes the donor's own.

    By thirds: those of the recipient's class and of the donor's own top name.
    """
    flags = read_values(folder)[1][ROWS]
    flags = flags.reshape(len(rows), -1, len(POSITIONS))  # [pairs, layers, positions]
    groups = {"all": list(range(len(rows)))}
    for number, row in enumerate(rows if group_of else ()):
        name = f"{group_of[row.label]} from {group_of[task.names[row.ranking[1]]]}"
        groups.setdefault(name, []).append(number)
    table = []
    for group, members in groups.items():
        for place, positions in enumerate(POSITIONS):
            for layer in range(flags.shape[1]):
                hits = [bool(flags[number, layer, place]) for number in members]
                table.append(common | {"classes": group, "positions": positions, "layer": layer} | share(hits))
    return write_table(folder / "patch.csv", table)


def share(hits: Sequence[bool]) -> dict[str, Any]:
    """The share of hits in percent with its 95% Wilson interval; empty numbers where there is nothing to share."""
    if not hits:
        return {"accuracy": "", "low": "", "high": "", "n": 0}
    low, high = wilson_interval(sum(hits), len(hits))
    numbers = {"accuracy": 100 * sum(hits) / len(hits), "low": 100 * low, "high": 100 * high}
    return {name: f"{value:.3f}" for name, value in numbers.items()} | {"n": len(hits)}


def write_table(file: Path, table: Sequence[dict[str, Any]]) -> Path:
    """Write rows of equal keys as CSV, and return the file."""
    with open(file, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    return file


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
