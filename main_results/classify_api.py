"""Classify a benchmark with a model behind an API by asking what each image shows (sections 2 and 3.1, Tables 1, 12).

    export OPENAI_API_KEY=...  # or ANTHROPIC_API_KEY, GOOGLE_API_KEY
    python main_results/classify_api.py --model gpt-4-turbo --model-id gpt-4.1 --benchmark flowers --limit 100
    python main_results/classify_api.py --model anthropic/claude-sonnet-4-5 --benchmark flowers --candidates none all
    python main_results/classify_api.py --model Qwen/Qwen3-VL-8B-Instruct --base-url http://localhost:8000/v1
    python main_results/classify_api.py --model openai/gpt-4.1 --benchmark flowers --write-batch batches
    python main_results/classify_api.py --model openai/gpt-4.1 --benchmark flowers --read-batch batch_output.jsonl

Prints an estimate of the cost before the first call, and what was used at the end. Writes
outputs/main_results/NAME/{run.json, predictions.jsonl, scores.csv, usage.json}. Every answer is recorded as it comes
and never requested again: the same command sends those images that have none. Keys are read from the environment and
written nowhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from vlmclassifier import cli
from vlmclassifier.arguments import DataArgs, PromptArgs, run_config, run_name
from vlmclassifier.benchmarks import Evaluation
from vlmclassifier.models import ModelSpec, find_api
from vlmclassifier.paths import run_folder
from vlmclassifier.prompts import PromptSetting
from vlmclassifier.records import UserError
from vlmclassifier.scoring.runs import score_run

if TYPE_CHECKING:
    from vlmclassifier.api.setting_run import SettingRun


@dataclass
class Args(PromptArgs, DataArgs):
    """Arguments."""

    model: str = "gpt-4-turbo"
    """gpt-4-turbo, gemini-pro-vision or claude-3-opus (the paper's), openai/ID, anthropic/ID or google/ID, or with
    --base-url any id that the server knows."""
    model_id: str | None = None
    """The id to request in place of the model's own: those of the paper are retired. Tables then say so."""
    base_url: str | None = None
    """Another server, such as vLLM, SGLang or transformers serve: http://HOST:PORT/v1. --model is then the id that it
    knows, whole."""
    provider: Literal["openai", "anthropic", "google"] | None = None
    """With --base-url: the interface of the server; default: OpenAI's, unless --model is one of the paper's."""
    key_variable: str | None = None
    """Environment variable with the key; default: the provider's own (OPENAI_API_KEY, ANTHROPIC_API_KEY,
    GOOGLE_API_KEY), and none for another server."""
    temperature: float | None = None
    """Sampling temperature; default: the server's own, as in the paper's code. Some models take no other."""
    max_side: int = 1024
    """Images are sent with the longer side at most this many pixels."""
    image_format: Literal["jpeg", "png"] = "jpeg"
    """png: without loss, several times larger."""
    image_first: bool = False
    """Send the image before the question, as classify_vlm.py asks: for servers of open models."""
    concurrency: int = 16
    """Calls at a time, at most 256."""
    timeout: float = 120.0
    """Seconds after which an attempt is given up and repeated: for the body of a response as a whole."""
    retries: int = 5
    """Attempts after the first, for errors that may pass (429, 5xx, time-outs, lost connections)."""
    prices: tuple[float, float] | None = None
    """US dollars for a million tokens in and out, for the estimate; known for the paper's models only."""
    reasoning_effort: str | None = None
    """How much a reasoning model thinks, such as none, minimal, low, medium or high; for OpenAI's interface."""
    accept_unanswered: bool = False
    """End the run with the images that have an answer, after sending the others once more; the table says how many."""
    estimate_only: bool = False
    """Print the estimate and stop; needs no key."""
    write_batch: Path | None = None
    """Write the pending requests as OpenAI batch files into this folder, instead of sending them."""
    read_batch: tuple[Path, ...] = ()
    """Record the answers in these results files of OpenAI's batches."""
    name: str | None = None
    """Name of the run: its folder is outputs/main_results/NAME-SETTING."""
    out: Path | None = None
    """Run folder, with -SETTING appended where there are several; default:
    outputs/main_results/MODEL-BENCHMARK-SETTING."""


def main(args: Args) -> None:
    """Check everything, print the estimate, send what is pending, score."""
    from vlmclassifier.api import Settings, load_api
    from vlmclassifier.api.setting_run import estimate_all, record_batches

    # ---- check
    check(args)
    spec = find_api(args.model, args.model_id, args.base_url, args.provider)
    offline = args.write_batch is not None or bool(args.read_batch)
    if offline and spec.provider != "openai":
        raise UserError(f"Batch files are OpenAI's, {spec.key} is {spec.provider}'s: leave the option out.")
    if args.reasoning_effort and spec.provider != "openai":
        raise UserError(f"--reasoning-effort is of OpenAI's interface, {spec.key} is {spec.provider}'s: leave it out.")
    settings = Settings(args.max_new_tokens, args.temperature, args.timeout, args.retries, args.reasoning_effort,
                        args.image_first)  # fmt: skip
    if not args.estimate_only:  # a missing key is reported before anything is written
        api = load_api(spec, settings, args.base_url, args.key_variable, keyless=offline)
    task = args.load_evaluation()
    prompt_settings = args.prompt_settings(task.names)
    cli.warn_of_equal_names(task.names)
    runs = [setting_run(args, spec, task, setting, len(prompt_settings) > 1) for setting in prompt_settings]

    # ---- estimate
    prices = args.prices or spec.prices
    if args.estimate_only:
        print(f"Estimate, {spec.source}: {estimate_all(runs, spec.provider).sentence(prices)}")
        return
    pending = [run for run in runs if not run.run.complete]
    if pending and not args.read_batch:
        print(f"Estimate, {spec.source}: {estimate_all(pending, spec.provider).sentence(prices)}", flush=True)

    # ---- send, or write and read batch files
    if args.write_batch:
        for run in runs:
            run.write_batches(api, args.write_batch)
        return
    if args.read_batch:
        record_batches(api, runs, args.read_batch)
    failures = []
    for run in runs:
        accept = False
        try:
            if not args.read_batch and not run.run.complete:
                title = f"{spec.key} on {task.benchmark.title}, {run.setting.name}"
                failures.append(run.send_pending(api, args.concurrency, title))
            # Only after every image was tried: a server that is down is no reason to end a run.
            accept = args.accept_unanswered and not (failures and failures[-1].stop.is_set())
        finally:  # also after Ctrl-C and a refused key: what came is merged, and its cost is printed
            finish(run, prices, bool(args.read_batch), accept)
        if failures and failures[-1].stop.is_set():
            break  # the server is down, or every image would get the same error
    for tracker in failures:
        if tracker.stop.is_set() or not args.accept_unanswered:
            tracker.check()


def check(args: Args) -> None:
    """Raise UserError for numbers out of range and for an invalid address."""
    from vlmclassifier.api import check_base_url

    cli.check_positive(limit=args.limit, max_new_tokens=args.max_new_tokens, max_side=args.max_side,
                       concurrency=args.concurrency)  # fmt: skip
    if not 0 < args.timeout < float("inf") or args.retries < 0:
        raise UserError("--timeout must be above 0 and --retries at least 0.")
    if args.concurrency > 256:
        raise UserError(f"--concurrency {args.concurrency} is more than one process does: give at most 256.")
    if not all(0 <= number < float("inf") for number in (args.temperature or 0, *(args.prices or ()))):
        raise UserError("--temperature and --prices must be numbers from 0 on.")
    if args.base_url:
        check_base_url(args.base_url)


def setting_run(args: Args, spec: ModelSpec, task: Evaluation, setting: PromptSetting, several: bool) -> "SettingRun":
    """The run of one setting. Another id or server than the registered one is a tag: it is not the paper's model."""
    from vlmclassifier.api.setting_run import SettingRun
    from vlmclassifier.models import MODELS

    registered = MODELS.get(spec.key)
    tags = [str(spec.source)] if registered and spec.source != registered.source else []
    tags += [f"at {urlsplit(args.base_url).netloc}"] if args.base_url else []
    config = run_config(
        "classify_api", "api", spec, task, args.limit, setting=setting, tags=tags, provider=spec.provider,
        model_id=spec.source, base_url=args.base_url, max_new_tokens=args.max_new_tokens,
        temperature=args.temperature, max_side=args.max_side, reasoning_effort=args.reasoning_effort,
        **({} if args.image_format == "jpeg" else {"image_format": args.image_format}),
        **({"image_first": True} if args.image_first else {}),
    )  # fmt: skip
    folder = run_folder(args.out, "main_results", args.name or run_name(spec, task), setting.name, several)
    return SettingRun(setting, task, config, folder, args.max_side, args.image_format)


def finish(run: "SettingRun", prices: Sequence[float] | None, from_batch: bool, accept_unanswered: bool) -> None:
    """Merge the run, print what its answers took, score it when it is complete."""
    rows, usage = run.finish(prices, accept_unanswered)
    if run.run.complete:
        cli.report(score_run(run.folder, rows))
    else:
        without = "without --read-batch " if from_batch else ""
        print(f"{run.setting.name}: {len(rows)} of {len(run.run.order)} images have an answer; {without}the same "
              "command sends the others, and --accept-unanswered ends the run without them.")  # fmt: skip
    print(f"Used: {usage.sentence(prices)}")


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
