"""Several requests at a time: worker threads, failures, interrupts."""

import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TypeVar

from vlmclassifier.api.client import TransientError
from vlmclassifier.records import UserError

MAX_CONSECUTIVE_FAILURES = 20  # images in a row without an answer that end the run, because the server seems down

T = TypeVar("T")
U = TypeVar("U")


def run_in_threads(
    items: Iterator[T], work: Callable[[T], U], threads: int, stop: threading.Event
) -> Iterator[tuple[T, U | Exception]]:
    """Yield (item, result or exception of `work(item)`) in the order of completion, with `threads` threads at a time.

    Each thread takes its next item from `items` when it is free, so an iterator that blocks does not delay the other
    threads. Once `stop` is set, no more items are taken, and the items in progress are still yielded. Exceptions of
    `items` are raised in the caller's thread.
    """
    done: SimpleQueue = SimpleQueue()
    items_lock = threading.Lock()
    end = object()

    def worker() -> None:
        try:
            while True:
                with items_lock:
                    item = end if stop.is_set() else next(items, end)
                if item is end or stop.is_set():
                    break
                try:
                    done.put((item, work(item)))
                except Exception as error:
                    done.put((item, error))
        except BaseException as error:
            done.put((end, error))
        finally:
            done.put((end, None))

    for _ in range(threads):
        threading.Thread(target=worker, daemon=True).start()
    running = threads
    while running:
        item, result = done.get()
        if item is not end:
            yield item, result
        elif isinstance(result, BaseException):
            raise result
        else:
            running -= 1


def results_in_threads(
    items: Sequence[T], work: Callable[[T], U], threads: int
) -> Iterator[tuple[T, U | Exception]]:  # fmt: skip
    """As `run_in_threads`, until Ctrl-C or an error that every item would get, which is raised at the end."""
    stop = threading.Event()
    tracker = FailureTracker(stop)
    with interruptible(stop):
        try:
            for item, result in run_in_threads(iter(items), work, threads, stop):
                if isinstance(result, Exception):
                    tracker.add_failure(result)
                else:
                    tracker.add_success()
                yield item, result
        finally:  # also where the caller stops: nothing more is requested
            stop.set()
    if tracker.fatal_error is not None:
        raise tracker.fatal_error


class FailureTracker:
    """Counts the images without an answer and the reasons; sets `stop` when the run should end."""

    def __init__(self, stop: threading.Event) -> None:
        self.stop = stop
        self.reasons: Counter[str] = Counter()
        self.consecutive_failures = 0
        self.fatal_error: Exception | None = None
        self.failures_at_stop = 0  # consecutive failures when they ended the run; 0: they did not

    def add_success(self) -> None:
        """Count an answer."""
        self.consecutive_failures = 0

    def add_failure(self, error: Exception) -> None:
        """Count an image without an answer.

        The run ends on an error that every image would get, and after too many consecutive failures.
        """
        if not isinstance(error, TransientError):
            self.fatal_error = self.fatal_error or error
            self.stop.set()
            return
        self.reasons[str(error)] += 1
        self.consecutive_failures += 1
        if self.consecutive_failures >= MAX_CONSECUTIVE_FAILURES:
            self.failures_at_stop = self.consecutive_failures
            self.stop.set()

    def check(self) -> None:
        """Raise UserError when an image got no answer, or the exception that ended the run."""
        if self.fatal_error is not None:
            raise self.fatal_error
        if self.reasons:
            reason, _ = self.reasons.most_common(1)[0]
            count = sum(self.reasons.values())
            stop_note = ""
            if self.failures_at_stop:
                stop_note = f" {self.failures_at_stop} images in a row failed, so no more requests were sent."
            raise UserError(
                f"{count} images got no answer, most often: {reason}.{stop_note} All received answers are recorded; "
                "run the same command again to send the others."
            )


@contextmanager
def interruptible(stop: threading.Event) -> Iterator[None]:
    """On the first Ctrl-C, send no new requests, but record the answers in progress, because they are paid for.

    A second Ctrl-C interrupts at once. Raises KeyboardInterrupt at the end if there was a Ctrl-C.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous_handler, received = signal.getsignal(signal.SIGINT), []

    def stop_sending(number: int, frame: object) -> None:
        received.append(number)
        stop.set()
        signal.signal(signal.SIGINT, previous_handler)
        print("\nwaiting for the requests in progress, to record their answers (Ctrl-C drops them)", file=sys.stderr)

    signal.signal(signal.SIGINT, stop_sending)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous_handler)
    if received:
        raise KeyboardInterrupt
