"""Write the miniature of a registered model: real architecture and processor, random weights, a few hundred kilobytes.

    python scripts/make_tiny_model.py --model llava-1.5-7b --out checkpoints/tiny/llava-1.5-7b
    python main_results/classify_vlm.py --model llava-1.5-7b --weights checkpoints/tiny/llava-1.5-7b ...

The answers of a miniature are meaningless: it is for testing every code path offline. Its config marks it as a
miniature, and tables show that.
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
    """A key of vlmclassifier/models.py, or "all": one folder in --out for every model that has a miniature."""
    seed: int = 0
    """Seed of the random weights: the same seed gives the same bytes."""


def main(args: Args) -> None:
    """Write the miniature of one model or of all models."""
    if args.model != "all" and args.model not in MODELS:
        raise UserError(
            f"There is no miniature of {args.model!r}, only of registered models, whose architecture is known without "
            f"their weights: choose one of {', '.join(MODELS)}, or all."
        )
    from vlmclassifier.tiny import has_miniature, make_tiny

    if args.model == "all":
        folders = {spec: args.out / spec.key for spec in MODELS.values() if has_miniature(spec)}
    else:
        folders = {MODELS[args.model]: args.out}
    for spec, folder in folders.items():
        make_tiny(spec, folder, args.seed)
        print(f"{spec.key}: {folder}")
    print("Next: pass a folder with --weights, or add it to [models] in paths.toml.")


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
