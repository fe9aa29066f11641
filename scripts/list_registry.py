"""List what is registered: models, benchmarks, wordings and metrics.

    python scripts/list_registry.py
    python scripts/list_registry.py --keys models --kind vlm --paper    # only the keys, as the launchers read them
    python scripts/list_registry.py --keys benchmarks --paper

Models and benchmarks that are not registered work too: hub ids, folders, manifests of your own.
"""

from dataclasses import dataclass
from typing import Literal

from vlmclassifier import cli
from vlmclassifier.benchmarks import BENCHMARKS
from vlmclassifier.models import MODELS
from vlmclassifier.prompts import WORDINGS
from vlmclassifier.records import UserError
from vlmclassifier.scoring.metrics import METRICS


@dataclass
class Args:
    keys: Literal["models", "benchmarks", "wordings"] | None = None
    """Print only the keys of one registry, on one line."""
    kind: Literal["vlm", "clip", "api"] | None = None
    """With --keys models: the models of one kind, except those that are trained here."""
    paper: bool = False
    """With --keys: only what is in the paper."""
    benchmark: str | None = None
    """With --keys models: only models that can classify this benchmark."""


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
    if args.keys == "benchmarks":
        return [key for key, benchmark in BENCHMARKS.items() if benchmark.paper_rows or not args.paper]
    return [
        key
        for key, spec in MODELS.items()
        if spec.source is not None
        and args.kind in (None, spec.kind)
        and (spec.paper_name is not None or not args.paper)
        and (args.benchmark is None or spec.benchmarks is None or args.benchmark in spec.benchmarks)
    ]


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
