"""Locate the class name in a vision-language model: logit lens, activation patching, attention heads.

    python feature_analysis/locate.py lens --model llava-1.5-7b --benchmark flowers --limit 500
    python feature_analysis/locate.py lens --model llava-1.5-7b --benchmark flowers --frequency counts.csv
    python feature_analysis/locate.py patch --model llava-1.5-7b --benchmark flowers --limit 120
    python feature_analysis/locate.py patch --model llava-1.5-7b --benchmark flowers --limit 120 --donor same
    python feature_analysis/locate.py heads --train DIR --test DIR --clip-train DIR --clip-test DIR --shots 20

lens: every layer's states of the ranking's pass are read through the final norm and the head, and the log-probabilities
of each name's tokens are summed: at which layer does the right name lead? patch: the states of a donor image at one
layer and one set of tokens (the last, the text behind the image, the image's, all) replace the recipient's: the share
of pairs whose top name becomes the donor's own. Pairs have equal prompt lengths and different own top names; --donor
same, of the same class, is the control. Donors are drawn among all evaluated images, so that another --limit is another
run. --frequency FILE.csv (columns class and count; of count_classes.py the total of all stages) splits the classes into
a frequent, a middle and a rare third. Both write outputs/feature_analysis/NAME-lens or NAME-patch/{run.json,
predictions.jsonl, values.safetensors} with lens.csv or patch.csv, the shares by layer. They can be stopped at any time:
the same command continues.

heads: the outputs of single attention heads at the last token (extract_features.py --heads) as few-shot classifiers, by
the nearest centroid of --shots images a class: the best 1, 4, 20 and all heads vote; beside them a probe on the last
token and, with the features of a CLIP model, Tip-Adapter, all with the same number of images, each a run of probe.py.
"""

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import probe
import tyro

from vlmclassifier import cli
from vlmclassifier.arguments import AdapterArgs, DataArgs, ModelArgs, RunArgs, run_config, run_name
from vlmclassifier.benchmarks import Evaluation
from vlmclassifier.identity import read_adapter
from vlmclassifier.images import open_image, prefetch
from vlmclassifier.models import checkpoint_folder, display_name, find_model, template_of
from vlmclassifier.prompts import WORDINGS
from vlmclassifier.records import Example, Prediction, UserError, images_named
from vlmclassifier.runs import Run, open_run
from vlmclassifier.runs.features import Features
from vlmclassifier.runs.provenance import ids_hash
from vlmclassifier.runs.vectors import ROWS, read_values
from vlmclassifier.scoring.intervals import wilson_interval
from vlmclassifier.tables import write_csv

if TYPE_CHECKING:
    from vlmclassifier.ranking import Ranker
    from vlmclassifier.vlm import VLM

THIRDS = ("frequent", "middle", "rare")
POSITIONS = ("last", "text", "image", "all")  # of ranking.patching, which imports torch


@dataclass
class Args(RunArgs, DataArgs, AdapterArgs, ModelArgs):
    """Arguments."""

    what: tyro.conf.Positional[Literal["lens", "patch", "heads"]] = "lens"
    """lens, patch or heads."""
    donor: Literal["other", "same"] = "other"
    """patch: the class of the donor, another than the recipient's or the same."""
    seed: int = 0
    """patch: seed of the drawn donors, which depend on (seed, image). heads: seed of the drawn train images."""
    wording: Literal[tuple(WORDINGS)] = "base"
    """Wording of the question (vlmclassifier/prompts.py)."""
    frequency: Path | None = None
    """CSV file with the columns class and count: lens.csv then has the frequent, middle and rare third too."""
    batch_size: int = 4
    """Images per forward pass; the numbers do not depend on it, except for rounding."""
    train: Path | None = None
    """heads: folder of the features of the train split, by extract_features.py --heads."""
    test: Path | None = None
    """heads: folder of the features to classify."""
    clip_train: Path | None = None
    """heads: folder of a CLIP model's features of the train split, for Tip-Adapter."""
    clip_test: Path | None = None
    """heads: folder of that model's features to classify."""
    shots: int = 20
    """heads: train images of every class."""


def main(args: Args) -> None:
    """Check everything, read every layer of the pending images, write the shares by layer."""
    cli.check_positive(limit=args.limit, batch_size=args.batch_size, shots=args.shots)
    if args.what == "heads":
        classify_by_heads(args)
        return
    # ---- check
    spec = find_model(args.model, "vlm")
    task = args.load_evaluation()
    group_of = thirds(args.frequency, task.names) if args.frequency else {}
    checkpoint = checkpoint_folder(spec, args.weights)
    adapter = read_adapter(args.adapter, spec, checkpoint)
    spec = adapter.spec(spec) if adapter else spec

    from vlmclassifier.devices import resolve_device, resolve_dtype  # seconds of torch
    from vlmclassifier.finetuning.weights import load_adapter
    from vlmclassifier.vlm import load_vlm

    # ---- open the run
    device = resolve_device(args.device)
    config = run_config(
        "locate", args.what, spec, task, args.limit, checkpoint=checkpoint, adapter=adapter,
        default_dtype=resolve_dtype("auto", device), dtype=resolve_dtype(args.dtype, device),
        template=template_of(spec), wording=args.wording,
        **({"donor": args.donor, "seed": args.seed, "donor_pool": ids_hash(task.order)}
           if args.what == "patch" else {}),
    )  # fmt: skip
    setting = args.what if args.what == "lens" or args.donor == "other" else "patch-same_class"
    folder = args.run_folder("feature_analysis", run_name(spec, task, checkpoint, adapter), setting)
    vlm = load_vlm(args.model, checkpoint, args.device, args.dtype)
    load_adapter(vlm, adapter)
    images = Images(task)
    ranker = build_ranker(args, task, vlm, images)
    layers = len(ranker.decoder.decoder.layers)

    # ---- compute
    if args.what == "lens":
        order, width, compute = task.order, layers, read_layers
    else:
        donor_of, tops = pairs(args, task, ranker, images)
        order = [example_id for example_id in task.order if example_id in donor_of]
        width = (layers + 1) * len(POSITIONS)
        compute = partial(patch_pairs, donor_of, tops)
    run = open_run(folder, config, order, width, labels=task.labels, batch_size=args.batch_size)
    if not run.complete:
        compute(args, ranker, images, run)
    rows = run.finish()[: len(order)]  # behind them are rows of images that the manifest has no longer
    if cli.is_main_process():
        common = {"model": display_name(spec.key), "tags": ", ".join(config["tags"]), "dataset": task.benchmark.key}
        write = write_lens if args.what == "lens" else write_patch
        print(f"Shares by layer: {write(folder, rows, common, task, group_of)}. Next: feature_analysis/plot.ipynb")


class Images:
    """The images of an evaluation by id, and the rows that are recorded of them."""

    def __init__(self, task: Evaluation) -> None:
        self.task = task
        self.examples: dict[str, Example] = {example.id: example for example in task.examples}
        self.place = {name: place for place, name in reversed(list(enumerate(task.names)))}  # the first of equal names

    def open(self, ids: Sequence[str]) -> list:
        """The images of some examples."""
        return [open_image(self.examples[i].image, self.task.root, self.examples[i].row) for i in ids]

    def row(self, ranker: "Ranker", example_id: str, ranking: Sequence[int]) -> Prediction:
        """The row to record; `ranking`: places among the ranker's names."""
        e = self.examples[example_id]
        indices = tuple(self.place[ranker.names[number]] for number in ranking)
        return Prediction(e.id, e.label, e.class_index, ranker.prompt, None, ranker.names[ranking[0]], indices)


def thirds(file: Path, names: Sequence[str]) -> dict[str, str]:
    """The third of the classes, by the counts of a CSV file, that each class belongs to; ties in the order of the list.

    Raises UserError for a file that cannot be read and for a class that it does not have.
    """
    try:
        with open(file, newline="", encoding="utf-8-sig") as stream:
            rows = [row for row in csv.DictReader(stream) if row.get("stage") in (None, "total")]
        counts = {row["class"]: float(row["count"]) for row in rows}
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{file} is no CSV file with the columns class and count ({error!r}): fix it.") from None
    if len(counts) < len(rows):
        doubled = next(name for name, times in Counter(row["class"] for row in rows).items() if times > 1)
        raise UserError(f"{file} has {doubled!r} twice: leave one row per class.")
    if missing := [name for name in names if name not in counts]:
        raise UserError(f"{file} has no count of {missing[0]!r}, and of {len(missing) - 1} other classes: add them.")
    order = sorted(dict.fromkeys(names), key=lambda name: -counts[name])
    return {name: THIRDS[len(THIRDS) * place // len(order)] for place, name in enumerate(order)}


def build_ranker(args: Args, task: Evaluation, vlm: "VLM", images: Images) -> "Ranker":
    """The ranker of all names. Raises UserError for a model that is not ranked with tree attention masks."""
    from vlmclassifier.ranking import Ranker

    names = list(dict.fromkeys(task.names))  # a name that two classes share stands for the first
    ranker, first = Ranker(vlm, names, WORDINGS[args.wording]), task.examples[0]
    with images_named([first.place]):
        remark = ranker.select_method(images.open([first.id])[0])
    if remark:
        raise UserError(f"{remark}: its layers cannot be read.")
    return ranker


def read_layers(args: Args, ranker: "Ranker", images: Images, run: Run) -> None:
    """Record for every pending image the rank of its true name at every layer."""
    import numpy as np

    from vlmclassifier.ranking.lens import lens_log_probs
    from vlmclassifier.scoring.guidance import ranks

    task = images.task
    with cli.progress([run], f"{ranker.vlm.spec.key} on {task.benchmark.title}, lens") as update:
        for ids, opened in prefetch(run.pending(args.batch_size), images.open):
            with images_named(ids):
                log_probs = lens_log_probs(ranker, opened)  # [layers, images, names]
            truth = np.array([ranker.names.index(task.labels[i]) for i in ids])
            values = np.stack([ranks(layer, truth) for layer in log_probs], axis=1)  # [images, layers]
            tops = log_probs[-1].argmax(axis=1)  # [images]
            rows = [images.row(ranker, i, [top]) for i, top in zip(ids, tops, strict=True)]
            run.append(rows, values.astype(np.float32))
            update()


def pairs(args: Args, task: Evaluation, ranker: "Ranker", images: Images) -> tuple[dict[str, str], dict[str, int]]:
    """The donor of every image that has one, and every image's own top name, as its place among the names."""
    from tqdm import tqdm

    from vlmclassifier.ranking.patching import draw_donors, prompt_lengths

    tops: dict[str, int] = {}
    lengths: list[tuple[int, ...]] = []
    for start in tqdm(range(0, len(task.order), args.batch_size), "own top names", unit="batch"):
        ids = task.order[start : start + args.batch_size]
        with images_named(ids):
            batch = ranker.prepare(images.open(ids))
            log_probs = ranker.log_probs(batch)  # [images, names]
        lengths += prompt_lengths(batch)
        tops |= dict(zip(ids, log_probs.argmax(axis=1).tolist(), strict=True))
    labels = [task.labels[i] for i in task.order]
    donors = draw_donors(task.order, labels, list(tops.values()), lengths, args.donor == "same", args.seed)
    donor_of = {i: task.order[donor] for i, donor in zip(task.order, donors, strict=True) if donor is not None}
    if not donor_of:
        raise UserError("No image has a donor with another top name and as many tokens: evaluate more images.")
    return donor_of, tops


def patch_pairs(
    donor_of: dict[str, str], tops: dict[str, int], args: Args, ranker: "Ranker", images: Images, run: Run
) -> None:  # fmt: skip
    """Record for every pending pair at which layers and tokens the donor's states make its top name the recipient's."""
    import numpy as np

    from vlmclassifier.ranking.patching import patched_log_probs, run_donors

    layers = len(ranker.decoder.decoder.layers) + 1
    with cli.progress([run], f"{ranker.vlm.spec.key} on {images.task.benchmark.title}, patching") as update:
        for ids in run.pending(args.batch_size):
            donor_ids = [donor_of[i] for i in ids]
            recipients, donors = (ranker.prepare(images.open(group)) for group in (ids, donor_ids))
            donors = run_donors(ranker, donors)
            wanted = np.array([tops[donor] for donor in donor_ids])  # [pairs]
            values = np.zeros((len(ids), layers, len(POSITIONS)), dtype=np.float32)
            for layer in range(layers):
                for number, positions in enumerate(POSITIONS):
                    log_probs = patched_log_probs(ranker, recipients, donors, layer, positions)
                    values[:, layer, number] = log_probs.argmax(axis=1) == wanted
            rows = [images.row(ranker, i, [tops[i], tops[donor_of[i]]]) for i in ids]
            run.append(rows, values.reshape(len(ids), -1))
            update()


def write_lens(
    folder: Path, rows: Sequence[Prediction], common: dict[str, str], task: Evaluation, group_of: dict[str, str]
) -> Path:  # fmt: skip
    """lens.csv: for every layer the share of images whose true name leads."""
    ranks = read_values(folder)[1][ROWS][: len(rows)]  # [images, layers]
    table = []
    for group in ("all", *(THIRDS if group_of else ())):
        members = [number for number, row in enumerate(rows) if group in ("all", group_of.get(row.label))]
        for layer in range(ranks.shape[1]):
            hits = [bool(ranks[number, layer] == 0) for number in members]
            table.append(common | {"classes": group, "layer": layer + 1} | share(hits))
    return write_csv(folder / "lens.csv", table)


def write_patch(
    folder: Path, rows: Sequence[Prediction], common: dict[str, str], task: Evaluation, group_of: dict[str, str]
) -> Path:  # fmt: skip
    """patch.csv: for every layer and set of tokens the share of pairs whose top name becomes the donor's own.

    By thirds: those of the recipient's class and of the donor's own top name.
    """
    flags = read_values(folder)[1][ROWS][: len(rows)]
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
    return write_csv(folder / "patch.csv", table)


def share(hits: Sequence[bool]) -> dict[str, Any]:
    """The share of hits in percent with its 95% Wilson interval; empty numbers where there is nothing to share."""
    if not hits:
        return {"accuracy": "", "low": "", "high": "", "n": 0}
    low, high = wilson_interval(sum(hits), len(hits))
    numbers = {"accuracy": 100 * sum(hits) / len(hits), "low": 100 * low, "high": 100 * high}
    return {name: f"{value:.3f}" for name, value in numbers.items()} | {"n": len(hits)}


def classify_by_heads(args: Args) -> None:
    """Few-shot classifiers of attention heads, the probe and Tip-Adapter, each as a run of probe.py."""
    if args.train is None or args.test is None or (args.clip_train is None) != (args.clip_test is None):
        raise UserError(
            "locate.py heads needs --train and --test, and of a CLIP model both --clip-train and --clip-test."
        )
    from vlmclassifier.devices import resolve_device
    from vlmclassifier.probing import head_probe, logistic_probe, tip_adapter

    device, end = resolve_device(args.device), f"{args.shots}_shots{probe.seed_part(args.seed)}"

    def source_of(train: Path, test: Path) -> tuple[probe.Args, probe.Source]:
        train_features, test_features = Features(train), Features(test)
        probe.check_pair(train_features, test_features)
        rows = probe.train_rows(train_features, args.shots, args.seed)
        if not rows[2].any():
            raise UserError(f"With --shots {args.shots} nothing can be held out to choose by: use two or more.")
        out = args.out and args.out.with_name(f"{args.out.name}-{train_features.config['model']}")
        return probe.Args(train, test, out=out), probe.Source(train_features, test_features, rows, device)

    settings, source = source_of(args.train, args.test)
    shape = source.train.constant("head_shape")
    if shape is None:
        raise UserError(f"{args.train} has no attention heads: extract its features with --heads.")
    found = head_probe(source.data("heads"), int(shape.prod()))
    answers = [probe.Answer(f"heads_{name}-{end}", result) for name, result in found.items()]
    answers.append(probe.Answer(f"last_token-logistic-{end}", logistic_probe(source.data("last_token"))))
    for answer in answers:
        probe.write_run(settings, source.train, source.test, answer)
    if args.clip_train and args.clip_test:
        settings, source = source_of(args.clip_train, args.clip_test)
        text = source.test.constant("class_features")
        if text is None:
            raise UserError(f"{args.clip_test} has no class features: extract the features of a CLIP model.")
        answer = probe.Answer(f"image-tip_adapter-{end}", tip_adapter(source.data("image"), text))
        probe.write_run(settings, source.train, source.test, answer)


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
