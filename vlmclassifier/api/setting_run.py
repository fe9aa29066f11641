"""The run of one prompt setting with a model behind an API: requests, recorded answers, batch files, costs."""

import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmclassifier import cli
from vlmclassifier.api.client import Api, encode_image
from vlmclassifier.api.concurrency import FailureTracker, interruptible, run_in_threads
from vlmclassifier.api.costs import (
    ANSWER_TOKENS,
    THOUGHT_TOKENS,
    Usage,
    estimated_usage,
    recorded_usage,
    total_usage,
)
from vlmclassifier.benchmarks import Evaluation
from vlmclassifier.images import image_sizes, open_image
from vlmclassifier.prompts import THOUGHT, PromptSetting
from vlmclassifier.records import Example, Prediction, Reply, UserError
from vlmclassifier.runs import Run, open_run, recorded_rows
from vlmclassifier.runs.record import EXTENDABLE_KEYS

if TYPE_CHECKING:
    from vlmclassifier.api.providers import OpenAI

SAMPLE_SIZE = 200  # images whose sizes are read for an estimate


@dataclass
class SettingRun:
    """The run of one prompt setting."""

    setting: PromptSetting
    task: Evaluation
    config: dict[str, Any]
    folder: Path
    max_side: int  # the longer side in pixels to which images are shrunk
    image_format: str = "jpeg"

    @cached_property
    def run(self) -> Run:
        """The run, opened at the first access, so that an estimate does not create its folder."""
        return open_run(self.folder, self.config, self.task.order, labels=self.task.labels)

    @property
    def pending(self) -> list[Example]:
        """The images without an answer, in the evaluation order."""
        return [example for example in self.task.examples if example.id not in self.run.done]

    def prompt(self, example: Example) -> str:
        """The whole prompt for one image."""
        return self.setting.question(example).text + (THOUGHT if self.setting.chain_of_thought else "")

    def image(self, example: Example) -> bytes:
        """The encoded image that is sent. Raises UserError when it cannot be opened."""
        return encode_image(open_image(example.image, self.task.root, example.row), self.max_side, self.image_format)

    def prediction(self, example: Example, text: str, reply: Reply) -> Prediction:
        """The row to record for one image."""
        choices = self.setting.choices(example)
        return Prediction(
            example.id, example.label, example.class_index, self.prompt(example), choices, text, None, reply
        )  # fmt: skip

    @cached_property
    def config_hash(self) -> str:
        """A hash of the configuration without what may change within a run: it identifies the requests of this run."""
        identity = {key: value for key, value in self.config.items() if key not in EXTENDABLE_KEYS}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def custom_id(self, example: Example) -> str:
        """The id of the request for one image in a batch file."""
        from vlmclassifier.api.batches import custom_id

        return custom_id(self.config_hash, example.id)

    def send_pending(self, api: Api, concurrency: int, title: str) -> FailureTracker:
        """Send a request for every pending image and record every answer at once. Returns the failures of this call."""
        examples = {example.id: example for example in self.task.examples}

        def answer(example_id: str) -> Prediction:
            example = examples[example_id]
            text, reply = api.ask(self.image(example), self.prompt(example))
            return self.prediction(example, text, reply)

        return send_pending(self.run, api, answer, concurrency, title)

    def write_batches(self, api: "OpenAI", folder: Path) -> None:
        """Write the pending requests as batch files into `folder`.

        Raises UserError when batch files of this run exist there already, or when an image cannot be opened.
        """
        from tqdm import tqdm

        from vlmclassifier.api.batches import write_batches

        if not self.pending:
            print(f"{self.setting.name}: every image has an answer, there is nothing to write.")
            return
        pending = tqdm(self.pending, desc=f"{self.setting.name}, batch files", unit="img")
        requests = ((self.custom_id(example), self.image(example), self.prompt(example)) for example in pending)
        files = write_batches(api, requests, folder, f"{self.folder.name}-batch")
        print(
            f"Written: {', '.join(str(file) for file in files)}. Submit them to OpenAI (purpose batch, "
            "/v1/chat/completions); then run the same command with --read-batch RESULTS instead of --write-batch."
        )

    def record_results(self, results: Sequence[tuple[str, str, Reply | None]]) -> None:
        """Record the answers in the results of batches: (custom id, text, reply), as `read_batch` yields them.

        Answers that are already recorded are kept, and results of other runs are ignored.
        """
        pending = {self.custom_id(example): example for example in self.pending}
        failure_reasons, rows = [], []
        for request_id, text, reply in results:
            if request_id in pending and reply is None:
                failure_reasons.append(text)
            elif request_id in pending:
                rows.append(self.prediction(pending.pop(request_id), text, reply))
        if rows:
            self.run.append(rows)
        if failure_reasons:
            print(
                f"{self.setting.name}: {len(failure_reasons)} requests of the batch failed, the first with: "
                f"{failure_reasons[0]}"
            )

    def estimate(self, provider: str, sizes: Sequence[tuple[int, int]]) -> Usage:
        """The estimated usage of the pending requests, based on the recorded answers if there are any.

        `sizes`: widths and heights of a sample of the images in pixels.
        """
        rows = recorded_rows(self.folder, self.config)
        done = {row.example_id for row in rows}
        prompts = [self.prompt(example) for example in self.task.examples if example.id not in done]
        tokens = THOUGHT_TOKENS if self.setting.chain_of_thought else ANSWER_TOKENS
        return estimated_usage(provider, prompts, sizes, self.max_side, recorded_usage(rows), tokens)

    def finish(
        self, prices: Sequence[float] | None, accept_unanswered: bool = False
    ) -> tuple[list[Prediction], Usage]:  # fmt: skip
        """Merge the run and write its usage to usage.json. Returns the rows and the usage.

        `accept_unanswered`: the run ends with the images that have an answer. `prices`: US dollars per million input
        tokens and per million output tokens; None: unknown.
        """
        if accept_unanswered:
            self.run.accept_unanswered()
        rows = self.run.finish()
        usage = recorded_usage(rows)
        dollars = round(usage.cost(prices), 6) if prices else None
        text = json.dumps(asdict(usage) | {"prices": prices, "dollars": dollars}, indent=2)
        (self.folder / "usage.json").write_text(text + "\n", encoding="utf-8")
        return rows, usage


def send_pending(
    run: Run, api: Api, answer: Callable[[str], Prediction], concurrency: int, title: str
) -> FailureTracker:  # fmt: skip
    """Call `answer(example id)` for every pending row, `concurrency` at a time, and record every answer at once.

    Rows whose last request failed come last. Returns the failures of this call.
    """
    api.has_answered |= bool(run.done)
    stop = threading.Event()
    tracker, failed_file = FailureTracker(stop), run.folder / "unanswered.json"
    failed = _read_failed(failed_file)  # example id -> reason
    pending = run.pending(1, last=set(failed))
    with cli.progress([run], title) as update, interruptible(stop):
        for lease, result in run_in_threads(pending, lambda lease: answer(lease[0]), concurrency, stop):
            if isinstance(result, Exception):
                tracker.add_failure(result)
                failed[lease[0]] = str(result)
                _write_failed(failed_file, failed)
                continue
            tracker.add_success()
            run.append([result])
            failed.pop(lease[0], None)
            update()
    _write_failed(failed_file, failed)
    return tracker


def estimate_all(runs: Sequence[SettingRun], provider: str) -> Usage:
    """The estimated usage of the pending requests of several settings."""
    task = runs[0].task
    sizes = image_sizes([example.image for example in task.examples[:SAMPLE_SIZE]])
    return total_usage([run.estimate(provider, sizes) for run in runs])


def record_batches(api: "OpenAI", runs: Sequence[SettingRun], files: tuple[Path, ...]) -> None:
    """Record the answers in the results of batches. Raises UserError where none belongs to one of these runs."""
    from vlmclassifier.api.batches import read_batch

    results = [result for file in files for result in read_batch(api, file)]
    known = {run.custom_id(example) for run in runs for example in run.task.examples}
    if not any(identity in known for identity, _, _ in results):
        raise UserError(f"{', '.join(map(str, files))} answers none of these questions, but those of another model, "
                        "data set or setting: give the options with which the batch was written.")  # fmt: skip
    for run in runs:
        run.record_results(results)


def _read_failed(file: Path) -> dict[str, str]:
    """The images whose last request failed, with the reason; empty if the file is missing or malformed."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _write_failed(file: Path, failed: dict[str, str]) -> None:
    if failed:
        file.write_text(json.dumps(failed, indent=2, ensure_ascii=True) + "\n", encoding="utf-8")
    else:
        file.unlink(missing_ok=True)
