"""Write the miniature of a registered model: true architecture and processor, random weights, a few hundred kilobytes.

    python scripts/make_tiny_model.py --model llava-1.5-7b --out checkpoints/tiny/llava-1.5-7b
    python main_results/classify_vlm.py --model llava-1.5-7b --weights checkpoints/tiny/llava-1.5-7b ...

A miniature classifies nothing: it is for trying every path offline. Its config marks it and tables show the mark.
"""

from dataclasses import dataclass
from pathlib import Path

from vlmclassifier import cli
from vlmclassifier.models import MODELS
from vlmclassifier.records import UserError


@dataclass
class Args:
    out: Path
    """The folder to write, an ordinary checkpoint folder."""
    model: str = "llava-1.5-7b"
    """A key of vlmclassifier/models.py, or "all": one folder below --out for every model that has a miniature."""
    seed: int = 0
    """Seed of the random weights: the same seed gives the same bytes."""


def main(args: Args) -> None:
    if args.model != "all" and args.model not in MODELS:
        raise UserError(
            f"There is no miniature of {args.model!r}, only of registered models, whose architecture is known without "
            f"their weights: choose one of {', '.join(MODELS)} or all."
        )
    from vlmclassifier.tiny import has_miniature, make_tiny

    specs = list(filter(has_miniature, MODELS.values())) if args.model == "all" else [MODELS[args.model]]
    for spec in specs:
        folder = make_tiny(spec, args.out / spec.key if args.model == "all" else args.out, args.seed)
        print(f"{spec.key}: {folder}")
    print("Next: pass a folder with --weights, or name it in paths.toml.")


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
