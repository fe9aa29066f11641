"""The command-line contract of every script: typed arguments, one sentence for a mistake, a non-zero exit."""

import dataclasses
import errno
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlmclassifier.records import ContextError, Score, UserError
from vlmclassifier.runs import Run

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
        fail(str(error), 3 if isinstance(error, ContextError) else 1)
    except KeyboardInterrupt:
        fail("interrupted: what is recorded stays; the same command goes on from there.", 130)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        fail(f"{error.filename or 'writing a file'}: {DISK_ERRORS[error.errno]}; then run the same command again.")


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


def is_main_process() -> bool:
    """Whether this process does the talking among those of one launcher."""
    return os.environ.get("RANK", "0") == "0"


def end_with_parent() -> None:
    """Let this worker process end when the one that started it is killed: a pool's workers would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def use_one_core() -> None:
    """Begin a worker process: of several, each is fastest on a core of its own."""
    end_with_parent()
    import torch

    torch.set_num_threads(1)


@contextmanager
def progress(runs: Sequence[Run], title: str) -> Iterator[Callable[[], None]]:
    """A bar over all rows of some runs, also those of other processes; call what it yields after each `append`."""
    from tqdm import tqdm

    total, done = sum(len(run.order) for run in runs), sum(i in run.done for run in runs for i in run.order)
    if is_main_process() and done:
        print(f"{title}: {done} of {total} pictures are answered already", file=sys.stderr)
    with tqdm(total=total, initial=done, desc=title, unit="pic", disable=not is_main_process()) as bar:
        yield lambda: bar.update(sum(min(len(run.done), len(run.order)) for run in runs) - bar.n)


def several(words: str | Sequence[str]) -> tuple[str, ...]:
    """The values of an argument that takes one or several; a single one may come without a list."""
    return (words,) if isinstance(words, str) else tuple(dict.fromkeys(words))


def report(folder: Path, scores: Sequence[Score], following: str) -> None:
    """Say what came out of a run, where it lies and what to run next."""
    values = {score.metric: score for score in scores}
    best = values["accuracy"]
    print(
        f"{best.model}, {best.setting}, {best.dataset}: accuracy {best.value:.1f}% [{best.low:.1f}, {best.high:.1f}], "
        f"n={best.n}, exact {values['exact'].value:.1f}%, empty answers {values['empty'].value:.1f}%"
    )
    print(f"Rows: {folder / 'predictions.jsonl'}; scores: {folder / 'scores.csv'}. Next: {following}")
