"""Make a caption with the class name for every train image, by an API model or a local VLM (section 4, Table 4).

    export OPENAI_API_KEY=...
    python training_analysis/make_captions.py --model openai/gpt-4.1 --benchmark flowers --out flowers-captions.jsonl
    python training_analysis/make_captions.py --model Qwen/Qwen3-VL-8B-Instruct --base-url http://localhost:8000/v1 \
        --benchmark flowers --out flowers-captions.jsonl
    python training_analysis/make_captions.py --local --model llava-1.5-7b --benchmark flowers --out captions.jsonl

Asks for a short caption that includes the label, checks that the answer does, and asks again in other words up to
--tries times. Writes a line {"id", "caption", "tries"} per image as it comes; caption is null where no answer had the
name, and such images are left out of the training. The same command continues, and asks again for images whose request
failed. FILE.jsonl.json beside it says what the captions are of. Use: finetune_vlm.py --captions FILE.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vlmclassifier import cli
from vlmclassifier.arguments import DataArgs, ModelArgs
from vlmclassifier.benchmarks import BENCHMARKS, Evaluation
from vlmclassifier.identity import read_adapter
from vlmclassifier.images import open_image
from vlmclassifier.models import checkpoint_folder, find_api, find_model
from vlmclassifier.records import Example, Prediction, UserError
from vlmclassifier.runs.provenance import fingerprint
from vlmclassifier.runs.record import replace_file
from vlmclassifier.scoring import contains

REQUESTS = (  # one per try
    "Generate a short caption for this image. The caption must include the name of its main object: {name}.",
    'Write one sentence that describes this image and contains the exact words "{name}".',
    'This image shows: {name}. Describe it in one short sentence, and write "{name}" in it word for word.',
)
NEW_TOKENS = 64


@dataclass
class Args(DataArgs, ModelArgs):
    """Arguments."""

    model: str = "gpt-4-turbo"
    """An API model as classify_api.py takes it; with --local a VLM as classify_vlm.py takes it."""
    local: bool = False
    """Use a local VLM."""
    model_id: str | None = None
    """The id to request in place of the model's own."""
    base_url: str | None = None
    """Another server with OpenAI's interface: http://HOST:PORT/v1."""
    provider: Literal["openai", "anthropic", "google"] | None = None
    """With --base-url: the interface of the server."""
    key_variable: str | None = None
    """Environment variable with the key; default: the provider's own."""
    tries: int = len(REQUESTS)
    """Answers to ask for until one has the name, at most three."""
    concurrency: int = 16
    """Calls at a time."""
    max_side: int = 1024
    """Images are sent with the longer side at most this many pixels."""
    batch_size: int = 8
    """Images per forward pass of a local VLM."""
    out: Path = Path("captions.jsonl")
    """File to write."""


def main(args: Args) -> None:
    """Check everything, ask for the pending captions, write them in order."""
    # ---- check
    cli.check_positive(limit=args.limit, tries=args.tries, concurrency=args.concurrency, batch_size=args.batch_size)
    if args.tries > len(REQUESTS):
        raise UserError(f"--tries {args.tries} is more than the {len(REQUESTS)} requests that there are.")
    task = load_task(args)
    ask = local_captioner(args) if args.local else api_captioner(args)
    begin(args, task, ask.source)
    done = read_captions(args.out)

    # ---- ask
    pending = [example for example in task.examples if example.id not in done]
    failures = []
    with open(args.out, "a", encoding="utf-8") as stream:
        from tqdm import tqdm

        for example, result in tqdm(ask(pending, task), "captions", len(pending), unit="img"):
            if isinstance(result, Exception):
                failures.append(result)
                continue
            done[example.id] = result
            stream.write(json.dumps(result, ensure_ascii=False) + "\n")
            stream.flush()

    # ---- write
    ordered = [done[example.id] for example in task.examples if example.id in done]
    rest = [row for row_id, row in done.items() if row_id not in {row["id"] for row in ordered}]
    replace_file(args.out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [*ordered, *rest]))
    named = sum(row["caption"] is not None for row in ordered)
    print(f"{named} of {len(task.examples)} images have a caption with their class name, {len(ordered) - named} got "
          f"none in {args.tries} tries: {args.out}. "
          f"Next: python training_analysis/finetune_vlm.py --captions {args.out}")  # fmt: skip
    if failures:
        raise UserError(
            f"{len(failures)} images got no answer, such as: {failures[0]}; the same command asks for them again."
        )


def load_task(args: Args) -> Evaluation:
    """The train split, or the one that is given."""
    from dataclasses import replace

    return replace(args, split=args.split or "train").load_evaluation()


class Captioner:
    """Captions of examples: `captioner(examples, task)` yields (example, row or exception) as they come."""

    def __init__(self, source: dict[str, Any], captions: Callable[..., Iterator]) -> None:
        self.source, self._captions = source, captions

    def __call__(self, examples: Sequence[Example], task: Evaluation) -> Iterator[tuple[Example, Any]]:
        """See the class."""
        return self._captions(examples, task)


def api_captioner(args: Args) -> Captioner:
    """Captions by an API. Raises UserError without a key."""
    from vlmclassifier.api import Settings, load_api
    from vlmclassifier.api.client import encode_image
    from vlmclassifier.api.concurrency import results_in_threads

    spec = find_api(args.model, args.model_id, args.base_url, args.provider)
    api = load_api(spec, Settings(), args.base_url, args.key_variable)

    def captions(examples: Sequence[Example], task: Evaluation) -> Iterator[tuple[Example, Any]]:
        def work(example: Example) -> dict[str, Any]:
            jpeg = encode_image(open_image(example.image, task.root, example.row), args.max_side)
            for number in range(args.tries):
                text, _ = api.ask(jpeg, REQUESTS[number].format(name=example.label))
                if has_name(text, example):
                    return row_of(example, text, number + 1)
            return row_of(example, None, args.tries)

        yield from results_in_threads(examples, work, args.concurrency)

    return Captioner({"model": spec.key, "model_id": spec.source, "base_url": args.base_url}, captions)


def local_captioner(args: Args) -> Captioner:
    """Captions by a local VLM, batch by batch; the images without the name are asked again in other words."""
    spec = find_model(args.model, "vlm")
    checkpoint = checkpoint_folder(spec, args.weights)

    def captions(examples: Sequence[Example], task: Evaluation) -> Iterator[tuple[Example, Any]]:
        from vlmclassifier.finetuning.weights import load_adapter
        from vlmclassifier.vlm import load_vlm

        vlm = load_vlm(args.model, checkpoint, args.device, args.dtype)
        load_adapter(vlm, read_adapter(None, spec, checkpoint))  # the template of a merged checkpoint
        for start in range(0, len(examples), args.batch_size):
            pending = list(examples[start : start + args.batch_size])
            for number in range(args.tries):
                images = [open_image(example.image, task.root, example.row) for example in pending]
                prompts = [vlm.prompt(REQUESTS[number].format(name=example.label)) for example in pending]
                answers = vlm.generate(vlm.prepare(images, prompts), NEW_TOKENS)
                for example, answer in zip(list(pending), answers, strict=True):
                    if has_name(answer, example):
                        pending.remove(example)
                        yield example, row_of(example, answer.strip(), number + 1)
                if not pending:
                    break
            for example in pending:
                yield example, row_of(example, None, args.tries)

    return Captioner({"model": spec.key, "checkpoint": fingerprint(checkpoint)}, captions)


def has_name(text: str, example: Example) -> bool:
    """Whether a caption contains the class name, by the paper's metric."""
    return contains(Prediction(example.id, example.label, example.class_index, "", None, text, None))


def row_of(example: Example, caption: str | None, tries: int) -> dict[str, Any]:
    """The line of one image."""
    return {"id": example.id, "caption": caption, "tries": tries}


def read_captions(file: Path) -> dict[str, dict[str, Any]]:
    """The captions that are there, by id; a line that was cut off is made again. Raises UserError for another file."""
    if not file.exists():
        return {}
    found = {}
    lines = file.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
            found[row["id"]] = {key: row[key] for key in ("id", "caption", "tries")}
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                raise UserError(f"{file} line {number} is no caption of this script: choose another --out.") from None
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found.values())
    replace_file(file, text)
    return found


def begin(args: Args, task: Evaluation, source: dict[str, Any]) -> None:
    """Record what the captions are of. Raises UserError where the file holds others."""
    record = args.out.with_name(f"{args.out.name}.json")
    config = source | {"benchmark": task.benchmark.key, "manifest": task.manifest_hash, "split": task.split,
                       "data_root": None if task.benchmark.key in BENCHMARKS else str(task.root.resolve()),
                       "requests": list(REQUESTS[: args.tries])}  # fmt: skip
    if record.exists():
        old = json.loads(record.read_text(encoding="utf-8"))
        if keys := [key for key in {**old, **config} if old.get(key) != config.get(key)]:
            raise UserError(f"{args.out} holds other captions ({', '.join(keys)}): choose another --out.")
    elif args.out.exists():
        raise UserError(f"{args.out} exists without {record.name}: choose another --out.")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(record, json.dumps(config, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
