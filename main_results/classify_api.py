"""Ask a model behind an API what each picture of a benchmark shows (sections 1 and 2, Tables 1 and 12).

    export OPENAI_API_KEY=...  # or ANTHROPIC_API_KEY, GOOGLE_API_KEY
    python main_results/classify_api.py --model gpt-4-turbo --model-id gpt-4.1 --benchmark flowers --limit 100
    python main_results/classify_api.py --model anthropic/claude-sonnet-4-5 --benchmark flowers --candidates none all
    python main_results/classify_api.py --model Qwen/Qwen3-VL-8B-Instruct --base-url http://localhost:8000/v1
    python main_results/classify_api.py --model openai/gpt-4.1 --benchmark flowers --write-batch batches
    python main_results/classify_api.py --model openai/gpt-4.1 --benchmark flowers --read-batch batch_output.jsonl

Says what it will cost, roughly, before the first call, and what it has cost at the end. Writes
outputs/main_results/NAME/{run.json, predictions.jsonl, scores.csv, usage.json}. Every answer is recorded as it comes
and is never asked for again: the same command asks about those pictures that have none. Keys are read from the
environment and written nowhere.
"""

import hashlib
import json
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from vlmclassifier import cli
from vlmclassifier.benchmarks import Evaluation, load_evaluation
from vlmclassifier.images import image_sizes, open_image
from vlmclassifier.models import ModelSpec, find_api
from vlmclassifier.prompts import THOUGHT, Way, build_question, parse_candidates, ways
from vlmclassifier.records import Example, Prediction, Question, Reply, UserError
from vlmclassifier.runs import Run, open_run, recorded
from vlmclassifier.tables import run_folder, write_scores

if TYPE_CHECKING:
    from vlmclassifier.api import Api
    from vlmclassifier.api.asking import Patience

SAMPLE = 200  # pictures whose sizes are read for the estimate


@dataclass
class Args:
    model: str = "gpt-4-turbo"
    """gpt-4-turbo, gemini-pro-vision or claude-3-opus (the paper's), openai/ID, anthropic/ID or google/ID, or with
    --base-url any id that the server knows."""
    model_id: str | None = None
    """The id to ask for in place of the model's own: those of the paper are retired. Tables then say so."""
    base_url: str | None = None
    """Another server, such as vLLM, SGLang or transformers serve: http://HOST:PORT/v1. --model is then the id that it
    knows, whole."""
    provider: Literal["openai", "anthropic", "google"] | None = None
    """With --base-url: whose language the server speaks; without it OpenAI's, unless --model is one of the paper's."""
    key_variable: str | None = None
    """Environment variable with the key; without it the provider's own (OPENAI_API_KEY, ANTHROPIC_API_KEY,
    GOOGLE_API_KEY), and none for another server."""
    benchmark: str = "flowers"
    """imagenet, flowers, cars, caltech, plane_figures, or a manifest FILE.jsonl of your own (with --classes)."""
    classes: Path | None = None
    """Class list of your own manifest: a JSON array of names."""
    data_root: Path | None = None
    """Folder that the manifest's image paths start from; without it paths.toml, then the project."""
    split: str | None = None
    """Split to evaluate, or "all"; without it the benchmark's test split."""
    limit: int | None = None
    """Only the first N pictures of the evaluation order; a larger N later continues the same run."""
    candidates: tuple[str, ...] = ("none",)
    """The world: none (open), all (every class name listed), or K candidates, the true one among them. Several values,
    here and in the next two: a run for every combination."""
    order: tuple[Literal["random", "fixed"], ...] = ("random",)
    """Order of the candidates: random per picture, or that of the class list."""
    wording: tuple[Literal["base", "alternative_1", "alternative_2", "alternative_3"], ...] = ("base",)
    """Wording of the question (vlmclassifier/prompts.py)."""
    chain_of_thought: bool = False
    """End the question with "Let's think step by step."."""
    max_new_tokens: int | None = None
    """Longest answer in tokens; without it the server's own limit, at Anthropic 1024."""
    temperature: float | None = None
    """Sampling temperature; without it the server's own, as in the paper's code. Some models take no other."""
    max_side: int = 1024
    """Pictures are sent as JPEG with the longer side at most this many pixels."""
    seed: int = 0
    """Seed of the candidate lists; each is drawn from (seed, picture) alone."""
    concurrency: int = 16
    """Calls at a time, at most 256."""
    timeout: float = 120.0
    """Seconds after which an attempt is given up and repeated: for the body of a response as a whole."""
    retries: int = 5
    """Attempts after the first, for errors that may pass (429, 5xx, time-outs, lost connections)."""
    prices: tuple[float, float] | None = None
    """US dollars for a million tokens in and out, for the estimate; known for the paper's models only."""
    estimate_only: bool = False
    """Say what it will cost and stop; needs no key."""
    write_batch: Path | None = None
    """Write the pending questions as OpenAI batch files into this folder, in place of asking."""
    read_batch: tuple[Path, ...] = ()
    """Record the answers in these results files of OpenAI's batches."""
    out: Path | None = None
    """Run folder, with -SETTING behind it where there are several; without it outputs/main_results/MODEL-BENCHMARK."""


def main(args: Args) -> None:
    """Check everything, say what it costs, ask what is pending, score."""
    from vlmclassifier.api import load_api
    from vlmclassifier.api.servers import Settings

    check(args)
    spec = find_api(args.model, args.model_id, args.base_url, args.provider)
    offline = args.write_batch is not None or bool(args.read_batch)
    if offline and spec.provider != "openai":
        raise UserError(f"Batch files are OpenAI's, {spec.key} is {spec.provider}'s: leave the option out.")
    settings = Settings(args.max_new_tokens, args.temperature, args.timeout, args.retries)
    if not args.estimate_only:  # a missing key is said before anything is written
        api = load_api(spec, settings, args.base_url, args.key_variable, keyless=offline)
    task = load_evaluation(args.benchmark, args.classes, args.data_root, args.split, args.limit)
    several = map(cli.several, (args.candidates, args.order, args.wording))
    asked = ways(*several, task.names, args.chain_of_thought, args.seed)
    questions = [Questions(args, spec, task, setting, way, len(asked) > 1) for setting, way in asked.items()]
    if args.estimate_only:
        return estimate(questions)
    if (pending := [way for way in questions if not way.run.complete]) and not args.read_batch:
        estimate(pending)
    if args.write_batch:
        for way in questions:
            way.write(api, args.write_batch)
        return
    if args.read_batch:
        read_results(api, questions, args.read_batch)
    ask_all(api, questions)


def ask_all(api: "Api", ways: "Sequence[Questions]") -> None:
    """Ask what is pending, unless results were read; merge and score every way, whatever happens to one of them.

    Raises UserError at the end when pictures got no answer.
    """
    troubles = []
    for way in ways:
        try:
            if not way.args.read_batch and not way.run.complete:
                troubles.append(way.call(api))
        finally:  # also after Ctrl-C and a refused key: what came is merged, and its cost is said
            finish(way)
        if troubles and troubles[-1].stop.is_set():
            break  # the server is down, or no picture would do better
    for trouble in troubles:
        trouble.check()


def read_results(api: "Api", ways: "Sequence[Questions]", files: tuple[Path, ...]) -> None:
    """Record the answers in the results of batches. Raises UserError where none is to one of these questions."""
    from vlmclassifier.api.batches import read_batch

    results = [result for file in files for result in read_batch(api, file)]
    known = {way.custom_id(example) for way in ways for example in way.task.examples}
    if not any(identity in known for identity, _, _ in results):
        raise UserError(f"{', '.join(map(str, files))} answers none of these questions, but those of another model, "
                        "data set or setting: give the options with which the batch was written.")  # fmt: skip
    for way in ways:
        way.read(results)


def check(args: Args) -> None:
    """Raise UserError for numbers that make no sense and for an address that is none."""
    cli.check_positive(limit=args.limit, max_new_tokens=args.max_new_tokens, max_side=args.max_side,
                       concurrency=args.concurrency)  # fmt: skip
    if not 0 < args.timeout < float("inf") or args.retries < 0:
        raise UserError("--timeout must be above 0 and --retries at least 0.")
    if args.concurrency > 256:
        raise UserError(f"--concurrency {args.concurrency} is more than one process does: give at most 256.")
    if not all(0 <= number < float("inf") for number in (args.temperature or 0, *(args.prices or ()))):
        raise UserError("--temperature and --prices must be numbers from 0 on.")
    try:
        address = urlsplit(args.base_url or "https://none")
        address.port  # noqa: B018 - raises for one that is none
    except ValueError as error:
        raise UserError(
            f"--base-url {args.base_url} is no address ({error}): write it as http://HOST:PORT/v1."
        ) from None
    if address.scheme not in ("http", "https") or not address.netloc:
        raise UserError(f"--base-url {args.base_url} is no address: write it as http://HOST:PORT/v1.")
    if "@" in address.netloc or address.query:
        raise UserError("--base-url holds a name, a key or a query, which would be written down: put the key into an "
                        "environment variable and name that with --key-variable.")  # fmt: skip


class Questions:
    """One way of asking about the pictures of a benchmark, and its run."""

    def __init__(self, args: Args, spec: ModelSpec, task: Evaluation, setting: str, way: Way, several: bool) -> None:
        self.args, self.spec, self.task, self.setting, self.way = args, spec, task, setting, way
        self.folder = run_folder(args.out, "main_results", f"{spec.key}-{task.benchmark.key}", setting, several)
        self.examples = {example.id: example for example in task.examples}

    @cached_property
    def run(self) -> Run:
        """The run, opened or continued: an estimate alone does not make its folder."""
        return open_run(self.folder, self.config, list(self.examples))

    @property
    def config(self) -> dict:
        """The run's configuration."""
        args, spec, task = self.args, self.spec, self.task
        return {
            "script": "classify_api", "kind": "api", "model": spec.key, "miniature": False, "provider": spec.provider,
            "model_id": spec.source, "base_url": args.base_url, "benchmark": task.benchmark.key,
            "manifest": task.manifest_hash, "split": task.split, "limit": args.limit, **asdict(self.way),
            "seed": args.seed, "chain_of_thought": args.chain_of_thought, "max_new_tokens": args.max_new_tokens,
            "temperature": args.temperature, "max_side": args.max_side, "classes": list(task.names),
            **task.marks,
        }  # fmt: skip

    @property
    def pending(self) -> list[Example]:
        """The pictures without an answer, in the evaluation order."""
        return [example for example in self.task.examples if example.id not in self.run.done]

    def ask(self, example: Example) -> tuple[Question, str]:
        """The question about one picture, and the whole prompt."""
        count = parse_candidates(self.way.candidates, self.task.names)
        way, names = self.way, self.task.names
        question = build_question(example, names, count, way.wording, way.order, self.args.seed)
        return question, question.text + (THOUGHT if self.args.chain_of_thought else "")

    def picture(self, example: Example) -> bytes:
        """A picture as it is sent."""
        from vlmclassifier.api import encode_picture

        return encode_picture(open_image(example.image, self.task.root, example.row), self.args.max_side)

    def predict(self, example: Example, text: str, reply: Reply) -> Prediction:
        """The record of an answer."""
        question, prompt = self.ask(example)
        index, choices = example.class_index, question.choices
        return Prediction(example.id, example.label, index, prompt, choices, text, None, None, reply)

    @cached_property
    def identity(self) -> str:
        """What tells this run's requests from others: the whole configuration, but for the number of pictures."""
        return hashlib.sha256(json.dumps(self.config | {"limit": None}, sort_keys=True).encode()).hexdigest()

    def custom_id(self, example: Example) -> str:
        """The name of a question in a batch."""
        from vlmclassifier.api.batches import custom_id

        return custom_id(self.identity, example.id)

    def call(self, api: "Api") -> "Patience":
        """Ask about every pending picture, several at a time; record every answer as it comes.

        Pictures that got no answer the last time come last. Returns what got none this time.
        """
        from vlmclassifier.api.asking import Patience, in_threads, interruptible

        def work(ids: list[str]) -> Prediction:
            example = self.examples[ids[0]]
            return self.predict(example, *api.ask(self.picture(example), self.ask(example)[1]))

        stop, noted = threading.Event(), self.folder / "unanswered.json"
        patience, title = Patience(stop), f"{self.spec.key} on {self.task.benchmark.title}, {self.setting}"
        failed = read_json(noted)
        pending = self.run.pending(1, last=set(failed))
        with cli.progress([self.run], title) as advance, interruptible(stop):
            for ids, result in in_threads(pending, work, self.args.concurrency, stop):
                if isinstance(result, Exception):
                    patience.failed(result)
                    failed[ids[0]] = str(result)
                    write_json(noted, failed)
                    continue
                patience.answered()
                self.run.append([result])
                failed.pop(ids[0], None)
                advance()
        write_json(noted, failed)
        return patience

    def write(self, api: "Api", folder: Path) -> None:
        """Write the pending questions as batch files."""
        from tqdm import tqdm

        from vlmclassifier.api.batches import write_batches

        if not self.pending:
            print(f"{self.setting}: every picture has its answer, there is nothing to write.")
            return
        pending = tqdm(self.pending, desc=f"{self.setting}, batch files", unit="pic")
        asked = ((self.custom_id(e), self.picture(e), self.ask(e)[1]) for e in pending)
        files = write_batches(api, asked, folder, f"{self.run.folder.name}-batch")
        print(f"Written: {', '.join(map(str, files))}. Hand them in at OpenAI (purpose batch, /v1/chat/completions); "
              "then the same command with --read-batch RESULTS in place of --write-batch.")  # fmt: skip

    def read(self, results: Sequence[tuple[str, str, Reply | None]]) -> None:
        """Record the answers in the results of batches; what has one keeps it."""
        pending = {self.custom_id(example): example for example in self.pending}
        failed, rows = [], []
        for identity, text, reply in results:
            if identity in pending and reply is None:
                failed.append(text)
            elif identity in pending:
                rows.append(self.predict(pending.pop(identity), text, reply))
        if rows:
            self.run.append(rows)
        if failed:
            print(f"{self.setting}: {len(failed)} requests of the batch failed, the first with: {failed[0]}")


def read_json(file: Path) -> dict[str, str]:
    """What a small file of ours holds; nothing where it is absent or spoilt."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def write_json(file: Path, values: dict[str, str]) -> None:
    """Keep these values in a small file; none leave no file."""
    if values:
        file.write_text(json.dumps(values, indent=2, ensure_ascii=True) + "\n", encoding="utf-8")
    else:
        file.unlink(missing_ok=True)


def estimate(ways: Sequence[Questions]) -> None:
    """Say what the pending questions will take, from what the recorded answers took where there are some."""
    from vlmclassifier.api.costs import Usage, expected, used

    args, spec, task = ways[0].args, ways[0].spec, ways[0].task
    sizes, parts = image_sizes([example.image for example in task.examples[:SAMPLE]]), []
    for way in ways:
        rows = recorded(way.folder, way.config)
        done = {row.example_id for row in rows}
        questions = [way.ask(example)[1] for example in task.examples if example.id not in done]
        parts.append(expected(str(spec.provider), questions, sizes, args.max_side, used(rows)))
    whole = Usage(*(sum(getattr(part, name) for part in parts) for name in ("calls", "input_tokens", "output_tokens")))
    print(f"Estimate, {spec.source}: {whole.sentence(args.prices or spec.prices)}", flush=True)


def finish(way: Questions) -> None:
    """Merge the run; say and keep what its answers took; score it when it is whole."""
    from vlmclassifier.api.costs import used

    predictions, prices = way.run.finish(), way.args.prices or way.spec.prices
    usage = used(predictions)
    dollars = round(usage.cost(prices), 6) if prices else None
    text = json.dumps(asdict(usage) | {"prices": prices, "dollars": dollars}, indent=2)
    (way.run.folder / "usage.json").write_text(text + "\n", encoding="utf-8")
    if way.run.complete:
        scores = write_scores(way.run.folder, "main_results", "table1")
        cli.report(way.run.folder, scores, "python main_results/table.py")
    else:
        without = "without --read-batch " if way.args.read_batch else ""
        print(f"{way.setting}: {len(predictions)} of {len(way.run.order)} pictures have an answer; {without}the same "
              "command asks about the others.")  # fmt: skip
    print(f"Used: {usage.sentence(prices)}")


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
