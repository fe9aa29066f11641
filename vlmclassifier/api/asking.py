"""Many calls at a time: the pictures of a run are asked about in threads, each answer is recorded as it comes."""

import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TypeVar

from vlmclassifier.api.servers import NoAnswer
from vlmclassifier.records import UserError

PATIENCE = 20  # so many pictures in a row without an answer end the run: the server is down

T = TypeVar("T")
U = TypeVar("U")


def in_threads(
    items: Iterator[T], work: Callable[[T], U], threads: int, stop: threading.Event
) -> Iterator[tuple[T, U | Exception]]:
    """Yield (item, its result or exception) as they come, `threads` at work at a time.

    An item is taken from `items` when a thread is free for it, in that thread, so an iterator that waits holds nothing
    up. Once `stop` is set no more are taken, and those in hand are still yielded.
    """
    done: SimpleQueue = SimpleQueue()
    taking = threading.Lock()
    end = object()

    def labour() -> None:
        try:
            while True:
                with taking:
                    item = end if stop.is_set() else next(items, end)
                if item is end or stop.is_set():
                    break
                try:
                    done.put((item, work(item)))
                except Exception as error:
                    done.put((item, error))
        except BaseException as error:  # from `items`: raised again in the caller's thread
            done.put((end, error))
        finally:
            done.put((end, None))

    for _ in range(threads):
        threading.Thread(target=labour, daemon=True).start()
    working = threads
    while working:
        item, result = done.get()
        if item is not end:
            yield item, result
        elif isinstance(result, BaseException):
            raise result
        else:
            working -= 1


class Patience:
    """Which pictures got no answer and why; says when it is enough."""

    def __init__(self, stop: threading.Event) -> None:
        self.stop, self.reasons, self.in_a_row = stop, Counter(), 0
        self.fatal: Exception | None = None
        self.over = 0  # how many in a row ended the run

    def answered(self) -> None:
        """Note an answer."""
        self.in_a_row = 0

    def failed(self, error: Exception) -> None:
        """Note a picture without an answer; what no picture would survive, and too many in a row, end the run."""
        if not isinstance(error, NoAnswer):
            self.fatal = self.fatal or error
            self.stop.set()
            return
        self.reasons[str(error)] += 1
        self.in_a_row += 1
        if self.in_a_row >= PATIENCE:
            self.over = self.in_a_row
            self.stop.set()

    def check(self) -> None:
        """Raise UserError, or a bug's own error, when a picture got no answer."""
        if self.fatal is not None:
            raise self.fatal
        if self.reasons:
            (reason, _), count = self.reasons.most_common(1)[0], sum(self.reasons.values())
            enough = f" {self.over} in a row failed, so no more were asked." if self.over else ""
            raise UserError(
                f"{count} pictures got no answer, most often: {reason}.{enough} The answers that came are recorded; "
                "the same command asks about the others again."
            )


@contextmanager
def interruptible(stop: threading.Event) -> Iterator[None]:
    """On the first Ctrl-C take no new picture and record the answers under way: they are paid for. The second ends it.

    Raises KeyboardInterrupt at the end when there was one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, interrupted = signal.getsignal(signal.SIGINT), []

    def finish_first(number: int, frame: object) -> None:
        interrupted.append(number)
        stop.set()
        signal.signal(signal.SIGINT, before)
        print("\nwaiting for the calls under way, to record them (Ctrl-C again drops them)", file=sys.stderr)

    signal.signal(signal.SIGINT, finish_first)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupted:
        raise KeyboardInterrupt
