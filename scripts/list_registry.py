"""List what is registered: models, benchmarks, wordings and metrics.

    python scripts/list_registry.py
    python scripts/list_registry.py --keys models --kind vlm --paper    # only the keys, as the launchers read them
    python scripts/list_registry.py --keys benchmarks --paper

Models and benchmarks that are not registered work too: hub ids, folders, manifests of your own.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlmclassifier import cli
from vlmclassifier.benchmarks import BENCHMARKS, data_root, find_benchmark, find_manifest
from vlmclassifier.models import MODELS, kind_of
from vlmclassifier.prompts import WORDINGS
from vlmclassifier.records import UserError
from vlmclassifier.scoring.metrics import METRICS


@dataclass
class Args:
    keys: Literal["models", "benchmarks", "wordings", "data"] | None = None
    """Print only the keys of one registry, on one line; data: those of --benchmarks whose manifest is here."""
    kind: Literal["vlm", "clip", "api"] | None = None
    """With --keys models: the models of one kind, except those that are trained here."""
    paper: bool = False
    """With --keys: only what is in the paper."""
    benchmark: str | None = None
    """With --keys models: only models that can classify this benchmark."""
    also: tuple[str, ...] = ()
    """With --keys models: further models (hub ids, folders), of which those of this kind are printed too."""
    benchmarks: tuple[str, ...] = ()
    """With --keys data: benchmarks, or manifests of your own."""
    classes: Path | None = None
    """With --keys data: the class list of your own manifests."""
    data_root: Path | None = None
    """With --keys data: the folder that their image paths start from."""


def main(args: Args) -> None:
    """Print the keys, or everything as tables."""
    if args.keys is None:
        if args.kind or args.benchmark or args.paper:
            raise UserError("--kind, --paper and --benchmark go with --keys: name a registry with it.")
        print(tables())
        return
    print(" ".join(keys(args)))


def keys(args: Args) -> list[str]:
    """The keys of one registry that the arguments ask for."""
    if args.keys == "wordings":
        return list(WORDINGS)
    if args.keys == "data":
        return present(args)
    if args.keys == "benchmarks":
        return [key for key, benchmark in BENCHMARKS.items() if benchmark.paper_rows or not args.paper]
    others = [key for key in args.also if key not in MODELS and (is_hub_id(key) or Path(key).is_dir())]
    more = [key for key in others if args.kind in (None, kind_of(key))]
    return more + [
        key
        for key, spec in MODELS.items()
        if spec.source is not None
        and args.kind in (None, spec.kind)
        and (spec.paper_name is not None or not args.paper)
        and (args.benchmark is None or spec.benchmarks is None or args.benchmark in spec.benchmarks)
    ]


def is_hub_id(key: str) -> bool:
    """Whether a name looks like OWNER/NAME; a path begins with a dot, a slash or a tilde."""
    return key.count("/") == 1 and all(key.split("/")) and not key.startswith((".", "/", "~"))


def present(args: Args) -> list[str]:
    """The benchmarks whose manifests are here; each of the others is reported once. Raises UserError for none."""
    found, problems = [], []
    for name in args.benchmarks:
        classes = None if name in BENCHMARKS else args.classes
        benchmark = find_benchmark(name, classes)  # an unknown name is a mistake, not missing data
        try:
            find_manifest(benchmark, data_root(benchmark, args.data_root))
            found.append(name)
        except UserError as error:
            problems.append(f"{name} is left out: {error}")
    if not found:
        raise UserError("\n".join(["There are no images of any benchmark:", *problems]))
    for problem in problems:
        print(problem, file=sys.stderr)
    return found


def tables() -> str:
    """All registries as Markdown tables."""
    from tabulate import tabulate

    models = [(key, spec.kind, spec.paper_name or "", spec.source or "trained here") for key, spec in MODELS.items()]
    benchmarks = [(key, one.title, one.test_split, "yes" if one.paper_rows else "") for key, one in BENCHMARKS.items()]
    parts = [
        ("Models", tabulate(models, ["--model", "kind", "in the paper", "source"], "pipe")),
        ("Benchmarks", tabulate(benchmarks, ["--benchmark", "title", "evaluated split", "in the paper"], "pipe")),
        ("Wordings", tabulate(list(WORDINGS.items()), ["--wording", "question"], "pipe")),
        ("Metrics", tabulate([(m.name, m.definition) for m in METRICS.values()], ["metric", "definition"], "pipe")),
    ]
    return "\n\n".join(f"{title}\n\n{table}" for title, table in parts)


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
