"""Counting one stage of training text: chunks of texts are tokenised and searched in parallel, the tokens are kept.

The texts are read in the parent, one chunk of CHUNK characters after the other; a worker tokenises a chunk, writes its
sentences into the cache and returns counts. A later count of other classes reads the sentences from there. The result
depends neither on the number of processes nor on what was cached.
"""

import hashlib
import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vlmclassifier.cli import end_with_parent
from vlmclassifier.counting import tokens
from vlmclassifier.counting.matching import ClassMatcher, Form
from vlmclassifier.counting.texts import PartialTextError, read_texts
from vlmclassifier.records import UserError

CHUNK = 500_000  # characters of texts that a worker tokenises at a time
IN_FLIGHT = 2  # chunks per worker that are read ahead
EXAMPLES = 5  # sentences of every class that are kept for the reader


@dataclass
class StageCounts:
    """What one stage of training text says: sentences by class and by the forms in which they name it."""

    sentences: int = 0
    texts: int = 0
    forms: Counter[tuple[int, int]] = field(default_factory=Counter)  # (class, Form) -> sentences
    examples: dict[int, list[str]] = field(default_factory=dict)  # class -> its first sentences
    partial: str = ""  # why the file was not read to its end

    def count(self, number: int, forms: Form) -> int:
        """How many sentences name a class in one of some forms; each counts once."""
        return sum(n for (which, mask), n in self.forms.items() if which == number and mask & forms)

    def counts(self, classes: int, forms: Form) -> list[int]:
        """The same for every class."""
        result = [0] * classes
        for (which, mask), n in self.forms.items():
            if mask & forms:
                result[which] += n
        return result

    def add(self, chunk: "StageCounts") -> None:
        """Add the counts of the next chunk."""
        self.sentences += chunk.sentences
        self.texts += chunk.texts
        self.forms.update(chunk.forms)
        for number, sentences in chunk.examples.items():
            known = self.examples.setdefault(number, [])
            known += sentences[: EXAMPLES - len(known)]


def count_stage(
    matcher: ClassMatcher, file: Path, cache: Path, columns: Sequence[str] = (), processes: int = 1,
    on_chunk: Callable[[int], None] = lambda characters: None,
) -> StageCounts:  # fmt: skip
    """Count the classes of a matcher in one file of texts.

    `cache`: folder where the tokens of the file are kept, in a folder of their own. `on_chunk` is called with the
    number of characters of each chunk. A file that breaks in the middle gives the counts before it and says so in
    `partial`. Raises UserError for a file without texts.
    """
    folder, result = cache / cache_key(file, columns), StageCounts()
    folder.mkdir(parents=True, exist_ok=True)
    done, waiting = folder / "texts.json", deque[tuple[Future, int]]()
    whole = json.loads(done.read_text(encoding="utf-8")) if done.exists() else None

    def collect(most: int) -> None:
        while len(waiting) > most:
            future, characters = waiting.popleft()
            result.add(future.result())
            on_chunk(characters)

    with _pool(matcher, processes) as submit:
        number = -1
        try:
            chunks = enumerate(_chunks(file, columns)) if whole is None else ((n, None) for n in range(whole["chunks"]))
            for number, texts in chunks:
                characters = 0 if texts is None else sum(map(len, texts))
                waiting.append((submit(_count_chunk, folder / f"{number:06}.txt", texts), characters))
                collect(IN_FLIGHT * processes)
        except PartialTextError as error:
            result.partial = str(error)
        collect(0)
    if result.sentences == 0 and not result.partial:
        raise UserError(f"{file} has no sentence: give a file with texts.")
    if whole is None and not result.partial:
        _write(done, json.dumps({"chunks": number + 1, "texts": result.texts}))
    return result


def cache_key(file: Path, columns: Sequence[str]) -> str:
    """The name of a file's folder in the cache: another size, time, columns or tokeniser is another folder."""
    parts = sorted(path for path in file.rglob("*") if path.is_file()) if file.is_dir() else [file]
    try:
        stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in parts]
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): fix the path.") from None
    text = json.dumps([stats, list(columns), CHUNK, tokens.VERSION])
    return f"{file.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _chunks(file: Path, columns: Sequence[str]) -> Iterator[list[str]]:
    """Lists of texts of about CHUNK characters. Where the file breaks, the texts before come first."""
    texts, size = [], 0
    try:
        for text in read_texts(file, columns):
            texts.append(text)
            size += len(text)
            if size >= CHUNK:
                yield texts
                texts, size = [], 0
    except PartialTextError:
        if texts:
            yield texts
        raise
    if texts:
        yield texts


_matcher: ClassMatcher | None = None  # of this process


@contextmanager
def _pool(matcher: ClassMatcher, processes: int) -> Iterator[Callable[..., Future]]:
    """A function that has chunks counted by worker processes, with one process by this one."""
    global _matcher
    if processes > 1:
        with ProcessPoolExecutor(processes, initializer=_start_worker, initargs=matcher.arguments) as pool:
            yield pool.submit
        return
    _matcher = matcher

    def here(work: Callable, *arguments: object) -> Future:
        future: Future = Future()
        future.set_result(work(*arguments))
        return future

    yield here


def _start_worker(*arguments: object) -> None:
    global _matcher
    end_with_parent()
    _matcher = ClassMatcher(*arguments)


def _count_chunk(stored: Path, texts: list[str] | None) -> StageCounts:
    """Tokenise a chunk, or read its sentences, and search them. `texts`: None where the chunk must be in the cache."""
    if stored.exists():
        first, *sentences = stored.read_text(encoding="utf-8").split("\n")
        count = int(first)
    elif texts is None:
        raise UserError(f"{stored} is gone: remove its folder, and the file is tokenised again.")
    else:
        sentences = [tokens.joined(words) for text in texts for words in tokens.tokenise(text)]
        count = len(texts)
        _write(stored, "\n".join([str(count), *sentences]))
    sentence, number, masks = _matcher.match(sentences)
    forms = Counter(zip(number.tolist(), masks.tolist(), strict=True))
    result = StageCounts(len(sentences), count, forms)
    is_named = (masks & ~int(Form.LAST_WORD | Form.REFERENCE)) > 0
    for place in np.flatnonzero(is_named):
        known = result.examples.setdefault(int(number[place]), [])
        if len(known) < EXAMPLES:
            known.append(sentences[sentence[place]].strip())
    return result


def _write(file: Path, text: str) -> None:
    new = file.with_name(f".{file.name}.{os.getpid()}")
    new.write_text(text, encoding="utf-8", newline="\n")
    os.replace(new, file)
