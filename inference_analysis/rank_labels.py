"""Rank the class names of a benchmark for each picture by log p(name | image, prompt) (section 3.1, Tables 2 and 12).

    python inference_analysis/rank_labels.py --model llava-1.5-7b --benchmark flowers
    python inference_analysis/rank_labels.py --model llava-1.5-7b --benchmark flowers --split train --limit 1000
    python inference_analysis/rank_labels.py --model blip2-2.7b --benchmark imagenet --top-k 5 --score mean

All names in one pass: exact, on the whole test set. Writes outputs/inference_analysis/NAME/{run.json,
predictions.jsonl, values.safetensors, scores.csv}; values.safetensors holds the summed log-probabilities of all names
[pictures, names], the names' token counts and the prior without the picture, so that sum, mean and guidance are
computed afterwards, without a GPU. A run on the train split is where table.py chooses t for our numbers. With --top-k
only the names that can still be among the best are run, and the scores of the best are kept.

Stop it whenever you like: the same command goes on where it stopped. Start it several times, or under
scripts/multi_gpu.sh, and the processes share the work.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vlmclassifier import cli
from vlmclassifier.benchmarks import Evaluation, load_evaluation
from vlmclassifier.images import image_sizes, open_image, prefetch
from vlmclassifier.models import checkpoint_folder, find_model, is_miniature, template_of
from vlmclassifier.prompts import WORDINGS
from vlmclassifier.provenance import fingerprint
from vlmclassifier.records import ContextError, Prediction, UserError
from vlmclassifier.runs import Run, open_run
from vlmclassifier.tables import OUTPUTS, save_scores

if TYPE_CHECKING:
    from numpy import ndarray
    from PIL.Image import Image

    from vlmclassifier.ranking import Ranker, Scoring

COST = ("search_nodes", "search_rounds")  # what is kept of a search behind its scores


@dataclass
class Args:
    model: str = "llava-1.5-7b"
    """A key of vlmclassifier/models.py, any other hub id OWNER/NAME, or a checkpoint folder."""
    weights: Path | None = None
    """Local checkpoint folder; without it paths.toml, then the hub."""
    benchmark: str = "flowers"
    """imagenet, flowers, cars, caltech, plane_figures, or a manifest FILE.jsonl of your own (with --classes)."""
    classes: Path | None = None
    """Class list of your own manifest: a JSON array of names."""
    data_root: Path | None = None
    """Folder that the manifest's image paths start from; without it paths.toml, then the project."""
    split: str | None = None
    """Split to rank, or "all"; without it the benchmark's test split. train: to choose t there."""
    limit: int | None = None
    """Only the first N pictures of the evaluation order; a larger N later continues the same run."""
    wording: Literal["base", "alternative_1", "alternative_2", "alternative_3"] = "base"
    """Wording of the question (vlmclassifier/prompts.py)."""
    opening: str | None = None
    """How the answer begins before the name; without it the model's own (vlmclassifier/models.py)."""
    paper_tokenisation: bool = False
    """Read the tokens of the bare name, as the reference does, instead of those of the prompt's continuation."""
    top_k: int | None = None
    """Search only the K best names, exactly, instead of scoring all."""
    score: Literal["sum", "mean"] = "sum"
    """With --top-k: the sum or the mean of a name's token log-probabilities."""
    guidance: float = 1.0
    """With --top-k: t of t * log p(name | image, prompt) + (1 - t) * log p(name | prompt); 1 is no guidance."""
    chunk: int = 256
    """Tokens of the names, per picture, in one forward pass; fewer need less memory, the numbers stay the same."""
    batch_size: int = 4
    """Pictures per forward pass; the numbers do not depend on it, but for rounding."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N. auto: this process's GPU, all GPUs where the model is larger than one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 on a GPU, float32 on the CPU."""
    out: Path | None = None
    """Run folder; without it outputs/inference_analysis/MODEL-BENCHMARK-SETTING."""


def main(args: Args) -> None:
    """Check everything, rank what is pending, score."""
    cli.check_positive(limit=args.limit, batch_size=args.batch_size, top_k=args.top_k, chunk=args.chunk)
    if args.top_k is None and (args.score != "sum" or args.guidance != 1):
        raise UserError("--score and --guidance go with --top-k: a full ranking keeps what all scores are made of.")
    if not 0 <= args.guidance < float("inf"):
        raise UserError(f"--guidance {args.guidance} is not a number from 0 on: give one.")
    spec = find_model(args.model, "vlm")
    task = load_evaluation(args.benchmark, args.classes, args.data_root, args.split, args.limit)
    folder = checkpoint_folder(spec, args.weights)

    from vlmclassifier.devices import resolve_device, resolve_dtype  # seconds of torch

    config = {
        "script": "rank_labels", "kind": "ranking", "model": spec.key, "miniature": is_miniature(folder),
        "checkpoint": fingerprint(folder), "dtype": resolve_dtype(args.dtype, resolve_device(args.device)),
        "benchmark": task.benchmark.key, "manifest": task.manifest_hash, "split": task.split, "limit": args.limit,
        "template": template_of(spec), "wording": args.wording,
        "opening": spec.opening if args.opening is None else args.opening,
        "paper_tokenisation": args.paper_tokenisation, "top_k": args.top_k, "score": args.score,
        "guidance": args.guidance, "classes": list(task.names),
        **task.marks,
    }  # fmt: skip
    setting = run_name(args, task)
    out = args.out or OUTPUTS / "inference_analysis" / f"{spec.key}-{task.benchmark.key}-{setting}"
    distinct = len(set(task.names))
    width = distinct if args.top_k is None else min(args.top_k, distinct) + len(COST)
    run = open_run(out, config, [example.id for example in task.examples], width)
    if not run.complete:
        try:
            rank(args, task, folder, run, f"{spec.key} on {task.benchmark.title}, {setting}")
        except ContextError as error:
            run.not_applicable(str(error))  # for the tables
            raise
    run.finish()
    if cli.is_main_process():
        report(out)


def run_name(args: Args, task: Evaluation) -> str:
    """What the default folder of a run says of its way of ranking."""
    parts = ["ranking"] if args.top_k is None else [f"top{args.top_k}", args.score]
    parts += [f"t{args.guidance:g}"] * (args.guidance != 1) + [f"prompt_{args.wording}"] * (args.wording != "base")
    parts += [f"opening_{slug(args.opening)}"] if args.opening is not None else []
    parts += ["paper_tokenisation"] * args.paper_tokenisation
    return "-".join(parts + [f"split_{task.split}"] * (task.split != task.benchmark.test_split))


def slug(text: str) -> str:
    """A text as a part of a folder's name."""
    return "".join(letter if letter.isalnum() else "_" for letter in text) or "none"


def rank(args: Args, task: Evaluation, folder: Path, run: Run, title: str) -> None:
    """Rank the names for every pending picture, batch by batch."""
    from vlmclassifier.devices import Halving
    from vlmclassifier.ranking import Ranker, Scoring
    from vlmclassifier.vlm import load_vlm

    vlm = load_vlm(args.model, folder, args.device, args.dtype)
    names = list(dict.fromkeys(task.names))  # a name that two classes share stands for the first
    ranker = Ranker(vlm, names, WORDINGS[args.wording], args.opening, args.paper_tokenisation, args.chunk)
    examples = {example.id: example for example in task.examples}
    sizes = image_sizes([e.image for e in task.examples]) if vlm.image_size_matters(ranker.prompt) else []
    ranker.check_context(sizes)

    def load(ids: list[str]) -> tuple:
        images = [open_image(examples[i].image, task.root, examples[i].row) for i in ids]
        return images, ranker.prepare(images)

    halving = Halving()
    (note,) = halving(lambda images: [ranker.settle(images[0])], load([run.order[0]])[0])
    (prior,) = halving(lambda _: [ranker.prior()], [None])
    if cli.is_main_process():
        trie = ranker.trie
        print(f"{len(names)} names, {trie.lengths.sum()} tokens: {trie.size} nodes, {len(trie.inner)} to run\n"
              f"{ranker.report}", file=sys.stderr)  # fmt: skip
    if note:  # from every process: it is slow there
        print(note, file=sys.stderr)
    run.keep({"prior": prior} | ({"lengths": ranker.trie.lengths} if args.top_k is None else {}))
    scoring = Scoring(args.score == "mean", args.guidance, prior)
    numbers = partial(full, ranker) if args.top_k is None else partial(searched, ranker, args.top_k, scoring)
    class_index = [task.names.index(name) for name in names]

    def row(i: str, places: "ndarray") -> Prediction:
        e, name, order = examples[i], names[places[0]], tuple(class_index[place] for place in places)
        return Prediction(e.id, e.label, e.class_index, ranker.prompt, None, name, name, order)

    with cli.progress([run], title) as advance:
        for ids, (images, inputs) in prefetch(run.pending(args.batch_size), load):
            places, vectors = zip(*halving(partial(numbers, inputs, len(ids)), images), strict=True)
            run.append([row(i, order) for i, order in zip(ids, places, strict=True)], stacked(vectors))
            advance()


def full(ranker: "Ranker", inputs: dict, count: int, images: Sequence["Image"]) -> "list[tuple[ndarray, ndarray]]":
    """Of every picture the five best names by the sum, and the log-probabilities of all."""
    from vlmclassifier.ranking import best

    sums = ranker.log_probs(images, inputs if len(images) == count else None)  # [pictures, names]
    return [(best(row, 5), row) for row in sums]


def searched(
    ranker: "Ranker", k: int, scoring: "Scoring", inputs: dict, count: int, images: Sequence["Image"]
) -> "list[tuple[ndarray, list[float]]]":
    """Of every picture the k best names, and their scores with what the search has cost."""
    found = ranker.top_k(images, k, scoring, inputs if len(images) == count else None)
    return [(one.names, [*one.scores, one.nodes, one.rounds]) for one in found]


def stacked(vectors: Sequence) -> "ndarray":
    """Vectors of several pictures as one float32 array [pictures, width]."""
    import numpy as np

    return np.array(vectors, dtype=np.float32)


def report(out: Path) -> None:
    """Say what came out of the run and where it lies; write its scores.csv."""
    from vlmclassifier.ranking.results import scores_of
    from vlmclassifier.values import ROWS, read_values

    scores = scores_of(out, "inference_analysis", "table2")
    save_scores(out, scores)
    for score in scores:
        if score.metric == "accuracy" and not score.setting.split("-")[0].endswith("held_out"):
            print(
                f"{score.model}, {score.setting}, {score.dataset}: accuracy {score.value:.1f}% [{score.low:.1f}, "
                f"{score.high:.1f}], n={score.n}"
            )
    tensors = read_values(out)[1]
    if "lengths" not in tensors:
        nodes, rounds = tensors[ROWS][:, -len(COST) :].mean(axis=0)
        print(f"The search ran {nodes:.0f} nodes in {rounds:.1f} rounds per picture")
    print(f"Rows: {out / 'predictions.jsonl'}; numbers: {out / 'values.safetensors'}. "
          "Next: python inference_analysis/table.py")  # fmt: skip


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
