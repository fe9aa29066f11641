"""The command-line contract of every script: typed arguments, one sentence for a mistake, a non-zero exit code."""

import dataclasses
import errno
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vlmclassifier import paths
from vlmclassifier.class_lists import indistinct_warning, same_for_model
from vlmclassifier.records import ContextError, UserError
from vlmclassifier.runs import Run, read_record
from vlmclassifier.scoring.metrics import TEXT_KINDS
from vlmclassifier.scoring.runs import ScoredRun
from vlmclassifier.tables import label

DISK_ERRORS = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the disk quota is used up: free some space",
    errno.EROFS: "the file system is read-only: choose another --out",
    errno.EACCES: "permission denied: choose another --out or change the permissions",
    errno.EPERM: "operation not permitted: choose another --out or change the permissions",
    errno.ENOTDIR: "a part of the path is a file, not a folder: choose another path",
    errno.EISDIR: "the path is a folder, not a file: choose another path",
    errno.EIO: "input/output error: check the disk",
}


def run(main: Callable[[Any], None], arguments: type, description: str | None) -> None:
    """Parse `arguments` (a dataclass) and call `main` with them.

    A user's mistake ends with one sentence and exit code 1, a wrong argument with tyro's message and 2, a question that
    does not fit the model's context with 3, an interrupt with 130; what is recorded stays in every case. Anything else
    is a bug and keeps its traceback.
    """
    try:
        import tyro
    except ImportError:  # where only torch and transformers are installed: scripts/gpu_check.sh on a bare machine
        from transformers import HfArgumentParser

        if any(str(field.type).startswith("tuple") for field in dataclasses.fields(arguments)):
            fail("tyro is not installed, which reads this script's arguments: run bash scripts/setup.sh.")
        parsed = HfArgumentParser(arguments, description=description).parse_args_into_dataclasses()[0]
    else:
        parsed = tyro.cli(arguments, description=description)
    try:
        main(parsed)
    except UserError as error:
        fail(sentence_of(error), 3 if isinstance(error, ContextError) else 1)
    except KeyboardInterrupt:
        fail("interrupted: what is recorded stays; the same command continues from there.", 130)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        fail(f"{error.filename or 'writing a file'}: {DISK_ERRORS[error.errno]}; then run the same command again.")


def sentence_of(error: UserError) -> str:
    """The sentence of an error; torch puts the traceback of a worker that loads data before it."""
    text = str(error)
    return text.strip().rpartition("UserError: ")[2] if "Original Traceback" in text else text


def fail(sentence: str, code: int = 1) -> None:
    """Print the sentence and end the process at once, threads and torn buffers included."""
    print(f"\nerror: {sentence}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


def check_positive(**values: int | None) -> None:
    """Raise UserError for a number below 1; None stands for a default."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} is below 1: give a larger number.")


def warn_of_equal_names(names: Sequence[str]) -> None:
    """Warn of different class names that answers in words cannot tell apart: those that differ in letter case alone."""
    if (groups := same_for_model(names, [name.lower() for name in names])) and is_main_process():
        print(indistinct_warning(groups, "an answer in words"), file=sys.stderr)


def is_main_process() -> bool:
    """Whether this process prints and writes scores, among those of one launcher."""
    return os.environ.get("RANK", "0") == "0"


def end_with_parent() -> None:
    """Let this worker process end when the one that started it is killed: a pool's workers would wait forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def worker_context(*modules: str) -> multiprocessing.context.BaseContext:
    """Return the multiprocessing context for workers that import the heavy `modules`.

    On Linux one server imports them, once, and every worker is forked from it; elsewhere each worker imports them.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    return context


def use_one_core() -> None:
    """Set up a worker process: several are fastest with one core each."""
    end_with_parent()
    import torch

    torch.set_num_threads(1)


@contextmanager
def progress(runs: Sequence[Run], title: str) -> Iterator[Callable[[], None]]:
    """A progress bar over all rows of some runs, also those of other processes; call the yielded function to update it.

    Call it after each `append`.
    """
    from tqdm import tqdm

    total = sum(len(run.order) for run in runs)
    done = sum(example_id in run.done for run in runs for example_id in run.order)
    if is_main_process() and done:
        print(f"{title}: {done} of {total} images are done already", file=sys.stderr)
    with tqdm(total=total, initial=done, desc=title, unit="img", disable=not is_main_process()) as bar:

        def update() -> None:
            bar.update(sum(min(len(run.done), len(run.order)) for run in runs) - bar.n)

        yield update


def report(run: ScoredRun) -> None:
    """Print the scores of a classification run, where they are and what to run next."""
    values = {score.metric: score for score in run.scores}
    accuracy = values["accuracy"]
    model = label(accuracy.model, ", ".join(accuracy.tags))
    more = ""
    if run.config["kind"] in TEXT_KINDS:  # CLIP has no answers in words
        more = f", exact {values['exact'].value:.1f}%, empty answers {values['empty'].value:.1f}%"
    print(
        f"{model}, {accuracy.setting}, {accuracy.dataset}: accuracy {accuracy.value:.1f}% [{accuracy.low:.1f}, "
        f"{accuracy.high:.1f}], n={accuracy.n}{more}"
    )
    if "cut" in values:
        print(
            f"{values['cut'].value:.1f}% of the answers are missing, because the model's thought was cut off at the "
            "token limit: they count as wrong; raise --max-new-tokens"
        )
    report_rows_outside(run)
    elsewhere = run.folder.parent.resolve() != (paths.PROJECT_ROOT / "outputs" / "main_results").resolve()
    flag = f" --outputs {run.folder.parent}" if elsewhere else ""
    print(
        f"Rows: {run.folder / 'predictions.jsonl'}; scores: {run.folder / 'scores.csv'}. "
        f"Next: python main_results/table.py{flag}"
    )


def report_rows_outside(run: ScoredRun) -> None:
    """Say how many recorded rows of a run are not evaluated any more, after a change of the manifest."""
    record = read_record(run.folder)
    if (outside := record["rows"] - record["target"]) > 0:
        print(f"{outside} recorded answers are kept and not scored: the manifest no longer has their images here.")
