"""Classify one image with a vision-language model: the probability of every class name, from one pass.

    python -m vlmclassifier photo.jpg --names cat dog "sea lion" --model llava-1.5-7b
    python -m vlmclassifier photo.jpg --benchmark imagenet --model llava-1.5-7b
    python -m vlmclassifier photo.png --benchmark plane_figures --model mini-llava --weights ROOT/checkpoints/vlm

Prints the likeliest names with their probabilities, which sum to 1 over all names given, and the model's free answer to
the same question. The probabilities are the softmax of log p(name | image, prompt), the ranking of
inference_analysis/rank_labels.py; they are not calibrated. A name's end is not scored: one that begins another ("cat",
"cat food") is never less likely than it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vlmclassifier import cli
from vlmclassifier.arguments import AdapterArgs, ModelArgs
from vlmclassifier.benchmarks import BENCHMARKS, class_names
from vlmclassifier.identity import read_adapter
from vlmclassifier.images import open_image
from vlmclassifier.models import checkpoint_folder, find_model
from vlmclassifier.prompts import WORDINGS
from vlmclassifier.records import UserError

BAR = 30  # characters of a probability of 1


@dataclass
class Args(AdapterArgs, ModelArgs):
    """Arguments."""

    image: Annotated[Path, tyro.conf.Positional] = Path()
    """The image."""
    names: tuple[str, ...] = ()
    """The class names."""
    benchmark: Literal[tuple(BENCHMARKS)] | None = None
    """The class names of a benchmark instead."""
    wording: Literal[tuple(WORDINGS)] = "base"
    """Wording of the question (vlmclassifier/prompts.py)."""
    top: int = 5
    """How many of the likeliest names to print."""
    as_json: bool = False
    """Print one JSON object with the probabilities of all names instead."""


def main(args: Args) -> None:
    """Check, rank all names, print."""
    cli.check_positive(top=args.top)
    if bool(args.names) == bool(args.benchmark):
        raise UserError("Give either --names A B C or --benchmark NAME, behind the image.")
    names = args.names or class_names(BENCHMARKS[str(args.benchmark)])
    if len({name.strip() for name in names} - {""}) < 2:
        raise UserError("One name alone always has probability 1: give at least two different --names.")
    if args.image == Path():
        raise UserError("No image is given: put it before --names, python -m vlmclassifier IMAGE --names A B.")
    if not args.image.is_file():
        problem = "is a folder" if args.image.is_dir() else "does not exist"
        raise UserError(f"The image {args.image} {problem}: give the path of a file.")
    try:
        image = open_image(args.image)
    except UserError as error:  # its remedies are those for a manifest
        raise UserError(f"{str(error).split(': replace')[0]}: give another image.") from None
    spec = find_model(args.model, "vlm")
    checkpoint = checkpoint_folder(spec, args.weights)
    adapter = read_adapter(args.adapter, spec, checkpoint)

    from vlmclassifier.finetuning.weights import load_adapter  # seconds of torch
    from vlmclassifier.ranking import rank_names
    from vlmclassifier.vlm import load_vlm

    vlm = load_vlm(args.model, checkpoint, args.device, args.dtype)
    load_adapter(vlm, adapter)
    found = rank_names(vlm, image, names, args.wording)
    answer = vlm.ask(image, WORDINGS[args.wording])
    if args.as_json:
        print(json.dumps({"probabilities": found, "answer": answer}, ensure_ascii=False))
        return
    width = max(len(name) for name in list(found)[: args.top])
    for name, probability in list(found.items())[: args.top]:
        print(f"{name:{width}}  {100 * probability:5.1f}%  {'#' * round(BAR * probability)}")
    print(f"Free answer: {answer!r}")


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
