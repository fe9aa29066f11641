"""Rank the class names of a benchmark for each image by log p(name | image, prompt) (section 3.1, Table 2).

    python inference_analysis/rank_labels.py --model llava-1.5-7b --benchmark flowers
    python inference_analysis/rank_labels.py --model llava-1.5-7b --benchmark flowers --split train --limit 1000
    python inference_analysis/rank_labels.py --model blip2-2.7b --benchmark imagenet --top-k 5 --score mean

All names in one pass: exact, on the whole test set. Writes outputs/inference_analysis/NAME/{run.json,
predictions.jsonl, values.safetensors, scores.csv}; values.safetensors holds the summed log-probabilities of all names
[images, names], the names' token counts and the prior without the image, so that sum, mean and guidance are computed
afterwards, without a GPU. A run on the train split is where table.py chooses t for our numbers. With --top-k only the
names that can still be among the best are run, and the scores of the best are kept.

It can be stopped at any time: the same command continues. Start it several times, or under scripts/multi_gpu.sh, and
the processes share the work.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vlmclassifier import cli
from vlmclassifier.arguments import AdapterArgs, DataArgs, ModelArgs, RunArgs, run_config, run_name
from vlmclassifier.benchmarks import Evaluation
from vlmclassifier.class_lists import indistinct_warning, same_for_model
from vlmclassifier.identity import read_adapter
from vlmclassifier.images import image_sizes, open_image, prefetch
from vlmclassifier.models import checkpoint_folder, find_model, template_of
from vlmclassifier.prompts import WORDINGS
from vlmclassifier.records import ContextError, Prediction, UserError, images_named
from vlmclassifier.runs import Run, open_run
from vlmclassifier.scoring.runs import ScoredRun, score_run
from vlmclassifier.tables import label

if TYPE_CHECKING:
    from vlmclassifier.vlm import VLM, Batch

SEARCH_COST = ("search_nodes", "search_rounds")  # what is kept of a search behind its scores
BEST_NAMES = 5  # that a row of a full ranking names


@dataclass
class Args(RunArgs, DataArgs, AdapterArgs, ModelArgs):
    """Arguments."""

    wording: Literal[tuple(WORDINGS)] = "base"
    """Wording of the question (vlmclassifier/prompts.py)."""
    answer_prefix: str | None = None
    """How the answer begins before the name; default: the model's own (vlmclassifier/models.py)."""
    paper_tokenisation: bool = False
    """Read the tokens of the bare name, as the reference does, instead of those of the prompt's continuation."""
    top_k: int | None = None
    """Search only the K best names, exactly, instead of scoring all."""
    score: Literal["sum", "mean"] = "sum"
    """With --top-k: the sum or the mean of a name's token log-probabilities."""
    guidance: float = 1.0
    """With --top-k: t of t * log p(name | image, prompt) + (1 - t) * log p(name | prompt); 1 is no guidance."""
    chunk: int = 256
    """Tokens of the names, per image, in one forward pass; fewer need less memory, the numbers stay the same."""
    batch_size: int = 4
    """Images per forward pass; the numbers do not depend on it, except for rounding."""
    out: Path | None = None
    """Run folder; default: outputs/inference_analysis/MODEL-BENCHMARK-SETTING."""


def main(args: Args) -> None:
    """Check everything, rank what is pending, score."""
    # ---- check
    cli.check_positive(limit=args.limit, batch_size=args.batch_size, top_k=args.top_k, chunk=args.chunk)
    if args.top_k is None and (args.score != "sum" or args.guidance != 1):
        raise UserError("--score and --guidance go with --top-k: a full ranking keeps what all scores are made of.")
    if not 0 <= args.guidance < float("inf"):
        raise UserError(f"--guidance {args.guidance} is not a number from 0 on: give one.")
    spec = find_model(args.model, "vlm")
    task = args.load_evaluation()
    checkpoint = checkpoint_folder(spec, args.weights)
    adapter = read_adapter(args.adapter, spec, checkpoint)
    spec = adapter.spec(spec) if adapter else spec

    from vlmclassifier.devices import resolve_device, resolve_dtype  # seconds of torch

    # ---- open the run
    device = resolve_device(args.device)
    config = run_config(
        "rank_labels", "ranking", spec, task, args.limit, checkpoint=checkpoint, adapter=adapter,
        template=template_of(spec),
        default_dtype=resolve_dtype("auto", device), dtype=resolve_dtype(args.dtype, device), wording=args.wording,
        answer_prefix=spec.answer_prefix if args.answer_prefix is None else args.answer_prefix,
        paper_tokenisation=args.paper_tokenisation, top_k=args.top_k, score=args.score, guidance=args.guidance,
    )  # fmt: skip
    setting = setting_name(args, task)
    folder = args.run_folder("inference_analysis", run_name(spec, task, checkpoint, adapter), setting)
    distinct = len(set(task.names))
    width = distinct if args.top_k is None else min(args.top_k, distinct) + len(SEARCH_COST)
    run = open_run(folder, config, task.order, width, labels=task.labels, batch_size=args.batch_size)

    # ---- rank
    if not run.complete:
        from vlmclassifier.finetuning.weights import load_adapter
        from vlmclassifier.vlm import load_vlm

        vlm = load_vlm(args.model, checkpoint, args.device, args.dtype)
        load_adapter(vlm, adapter)
        try:
            rank(args, task, vlm, run, f"{spec.key} on {task.benchmark.title}, {setting}")
        except ContextError as error:
            run.not_applicable(str(error))  # for the tables
            raise

    # ---- score
    run.finish()
    if cli.is_main_process():
        report(score_run(folder))


def setting_name(args: Args, task: Evaluation) -> str:
    """What the default folder of a run says about its settings."""
    parts = ["ranking"] if args.top_k is None else [f"top{args.top_k}", args.score]
    if args.guidance != 1:
        parts.append(f"t{args.guidance:g}")
    if args.wording != "base":
        parts.append(f"prompt_{args.wording}")
    if args.answer_prefix is not None:
        parts.append(f"answer_prefix_{slug(args.answer_prefix)}")
    if args.paper_tokenisation:
        parts.append("paper_tokenisation")
    return "-".join(parts)


def slug(text: str) -> str:
    """A text as a part of a folder's name."""
    return "".join(letter if letter.isalnum() else "_" for letter in text) or "none"


def rank(args: Args, task: Evaluation, vlm: "VLM", run: Run, title: str) -> None:
    """Rank the names for every pending image, batch by batch."""
    import numpy as np

    from vlmclassifier.ranking import Ranker
    from vlmclassifier.scoring.guidance import Scoring, best

    names = list(dict.fromkeys(task.names))  # a name that two classes share stands for the first
    ranker = Ranker(vlm, names, WORDINGS[args.wording], args.answer_prefix, args.paper_tokenisation, args.chunk)
    examples = {example.id: example for example in task.examples}
    sizes = image_sizes([e.image for e in task.examples]) if vlm.image_size_matters(ranker.prompt) else []
    ranker.check_context(sizes)

    first = examples[run.order[0]]
    with images_named([first.place]):
        remark = ranker.select_method(open_image(first.image, task.root, first.row))
    prior = ranker.prior()  # [names]
    if cli.is_main_process():
        trie = ranker.trie
        print(f"{len(names)} names, {trie.lengths.sum()} tokens: {trie.size} nodes, {len(trie.inner)} to run\n"
              f"{ranker.report}", file=sys.stderr)  # fmt: skip
        if groups := same_for_model(names, ranker.tokens.ids):
            print(indistinct_warning(groups, vlm.spec.key), file=sys.stderr)
    if remark:  # printed by every process: it is slow there
        print(remark, file=sys.stderr)
    run.keep({"prior": prior} | ({"lengths": ranker.trie.lengths} if args.top_k is None else {}))
    scoring = Scoring(args.score == "mean", args.guidance, prior)
    class_index = [task.names.index(name) for name in names]

    def load(ids: list[str]) -> "Batch":
        with images_named([examples[i].place for i in ids]):
            return ranker.prepare([open_image(examples[i].image, task.root, examples[i].row) for i in ids])

    with cli.progress([run], title) as update:
        for ids, batch in prefetch(run.pending(args.batch_size), load):
            if args.top_k is None:
                with images_named([examples[i].place for i in ids]):
                    vectors = ranker.log_probs(batch)  # [images, names]
                places = [best(row, BEST_NAMES) for row in vectors]
            else:
                with images_named([examples[i].place for i in ids]):
                    found = ranker.top_k(batch, args.top_k, scoring)
                places = [result.names for result in found]
                vectors = [[*result.scores, result.nodes, result.rounds] for result in found]
            rows = []
            for i, order in zip(ids, places, strict=True):
                e, ranking = examples[i], tuple(class_index[place] for place in order)
                rows.append(Prediction(e.id, e.label, e.class_index, ranker.prompt, None, names[order[0]], ranking))
            run.append(rows, np.array(vectors, dtype=np.float32))
            update()


def report(run: ScoredRun) -> None:
    """Print the scores of the run, where they are and what to run next."""
    from vlmclassifier.runs.vectors import ROWS, read_values

    for score in run.scores:
        if score.metric == "accuracy" and not score.setting.split("-")[0].endswith("held_out"):
            print(
                f"{label(score.model, ', '.join(score.tags))}, {score.setting}, {score.dataset}: accuracy "
                f"{score.value:.1f}% [{score.low:.1f}, {score.high:.1f}], n={score.n}"
            )
    if run.config["top_k"] is not None:
        nodes, rounds = read_values(run.folder)[1][ROWS][:, -len(SEARCH_COST) :].mean(axis=0)
        print(f"The search ran {nodes:.0f} nodes in {rounds:.1f} rounds per image")
    cli.report_rows_outside(run)
    print(f"Rows: {run.folder / 'predictions.jsonl'}; numbers: {run.folder / 'values.safetensors'}. "
          "Next: python inference_analysis/table.py")  # fmt: skip


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
