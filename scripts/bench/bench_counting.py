"""Benchmark the counting of class names in training texts against the reference's loop, and its memory.

    python scripts/bench/bench_counting.py
    python scripts/bench/bench_counting.py --sentences 20000 --megabytes 20 5

Generated sentences, one in three of which names one of ImageNet's 1,000 classes. The reference looks for every class in
every sentence, as the paper's code does; it runs a sample of the sentences, and its time is scaled. The last line is
one JSON object:
matching_vs_reference: CPU time of the reference's loop over that of the automaton, on tokenised sentences; both must
find the same names (but for those at the ends of sentences, which the reference misses). end_to_end_vs_reference:
tokenisation and the loop over the counting of a file with one process, the tokens not cached. scaling_two_processes:
wall-clock time of one process over that of two. peak_memory_mb: the largest memory of parent and workers
together (sum of proportional set sizes) while a generated conversation file of the first of --megabytes is counted by
two processes; memory_growth: over that of the second.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmclassifier import cli
from vlmclassifier.benchmarks import BENCHMARKS, class_names
from vlmclassifier.counting import ClassMatcher, count_stage, name_tokens, tokenise
from vlmclassifier.counting.matching import NAMED
from vlmclassifier.counting.tokens import joined
from vlmclassifier.records import UserError

WORDS = [
    "a", "the", "of", "in", "on", "with", "and", "near", "photo", "shows", "large", "small", "old", "red", "blue",
    "man", "woman", "table", "street", "water", "light", "tree", "two", "some", "standing", "holding", "next",
    "looking", "image", "features", "scene", "various", "left", "right", "background", "another", "which", "appears",
    "to", "be",
]  # fmt: skip
TURNS = 4  # of a conversation


@dataclass
class Args:
    sentences: int = 200_000
    """Sentences for the times."""
    sample: int = 2_000
    """Sentences that the reference's loop runs."""
    megabytes: tuple[int, ...] = (200, 50)
    """Sizes of the conversation files whose counting takes the memory; none: leave it out."""
    only_count: Path | None = None
    """Only count this file with two processes (used by the benchmark itself)."""


def main(args: Args) -> None:
    """Compare the times, then the memory."""
    cli.check_positive(sentences=args.sentences, sample=args.sample)
    names = class_names(BENCHMARKS["imagenet"])
    matcher = ClassMatcher({"imagenet": names})
    if args.only_count:
        with tempfile.TemporaryDirectory() as cache:
            counts = count_stage(matcher, args.only_count, Path(cache), processes=2)
        print(json.dumps({"sentences": counts.sentences}))
        return
    if args.sample > args.sentences:
        raise UserError(f"--sample {args.sample} is larger than --sentences {args.sentences}: give a smaller one.")
    results: dict[str, Any] = {"sentences": args.sentences, "names": len(names)}
    with tempfile.TemporaryDirectory() as folder:
        results |= times(args, matcher, names, Path(folder))
        print(results, flush=True)
        results |= memory(args.megabytes, names, Path(folder))
    print(json.dumps(results))


def sentence(rng: random.Random, names: tuple[str, ...]) -> str:
    """A sentence of 6 to 16 words; one in three has a class name."""
    words = rng.choices(WORDS, k=rng.randint(6, 16))
    if rng.random() < 1 / 3:
        words.insert(rng.randrange(len(words)), rng.choice(names))
    return " ".join(words).capitalize() + "."


def is_sublist(smaller: list[str], larger: list[str]) -> bool:
    """Whether the reference's code finds a name in a sentence: it joins both for every pair."""
    return "##" + "##".join(smaller) + "##" in "##".join(larger)


def times(args: Args, matcher: ClassMatcher, names: tuple[str, ...], folder: Path) -> dict[str, float]:
    """Matching alone, and from the file to the counts, against the reference's loop."""
    rng = random.Random(0)
    texts = [sentence(rng, names) for _ in range(args.sentences)]
    start = time.process_time()
    tokenised = [tokens for text in texts for tokens in tokenise(text)]
    tokenising = time.process_time() - start
    start = time.process_time()
    which, number, masks = matcher.match([joined(tokens) for tokens in tokenised])
    matching = time.process_time() - start
    split = [name_tokens(name) for name in dict.fromkeys(names)]
    start = time.process_time()
    slow = {(place, which_name) for place, tokens in enumerate(tokenised[: args.sample])
            for which_name, words in enumerate(split) if is_sublist(words, tokens)}  # fmt: skip
    loop = (time.process_time() - start) * len(tokenised) / args.sample
    ours = {(int(place), int(name)) for place, name, mask in zip(which, number, masks, strict=True)
            if place < args.sample and mask & NAMED}  # fmt: skip
    ends = {pair for pair in ours - slow}  # names at either end of a sentence, which the reference does not find
    if not slow <= ours or any(not _at_an_end(tokenised[place], split[name]) for place, name in ends):
        raise AssertionError("the automaton and the reference's loop find other names")
    file = folder / "texts.txt"
    file.write_text("\n".join(texts), encoding="utf-8")
    walls = {}
    for processes in (1, 2):
        start, cpu = time.perf_counter(), time.process_time()
        count_stage(matcher, file, folder / f"cache-{processes}", processes=processes)
        walls[processes] = time.perf_counter() - start
        if processes == 1:
            end_to_end = time.process_time() - cpu
    return {
        "matching_vs_reference": round(loop / matching, 1), "matching_seconds": round(matching, 2),
        "tokenising_seconds": round(tokenising, 1), "reference_seconds": round(loop, 1),
        "end_to_end_vs_reference": round((tokenising + loop) / end_to_end, 2),
        "scaling_two_processes": round(walls[1] / walls[2], 2),
    }  # fmt: skip


def _at_an_end(tokens: list[str], words: list[str]) -> bool:
    return tokens[: len(words)] == words or tokens[-len(words) :] == words


def memory(megabytes: tuple[int, ...], names: tuple[str, ...], folder: Path) -> dict[str, float]:
    """The largest memory of parent and workers together for conversation files of some sizes."""
    import psutil

    peaks = []
    for size in megabytes:
        file = folder / f"{size}.json"
        write_conversations(file, size * 2**20, names)
        process = psutil.Popen([sys.executable, __file__, "--only-count", file], stdout=subprocess.DEVNULL)
        peak = 0
        while process.poll() is None:
            try:
                family = [process, *process.children(recursive=True)]
                peak = max(peak, sum(member.memory_full_info().pss for member in family))
            except psutil.NoSuchProcess:  # one that has just ended
                continue
            time.sleep(0.1)
        if process.returncode:
            raise UserError(f"Counting {file} failed: see above.")
        peaks.append(peak / 2**20)
        file.unlink()
        print(f"{size} MB: {peak / 2**20:.0f} MiB", flush=True)
    if not peaks:
        return {}
    result = {"peak_memory_mb": round(peaks[0])}
    return result | ({"memory_growth": round(peaks[0] / peaks[1], 3)} if len(peaks) > 1 else {})


def write_conversations(file: Path, size: int, names: tuple[str, ...]) -> None:
    """A JSON array of conversations of about `size` bytes."""
    rng, number, written = random.Random(1), 0, 0
    pool = [" ".join(sentence(rng, names) for _ in range(4)) for _ in range(2000)]
    with open(file, "w", encoding="utf-8") as stream:
        stream.write("[")
        while written < size:
            turns = [{"from": "human" if turn % 2 == 0 else "gpt", "value": rng.choice(pool)} for turn in range(TURNS)]
            row = {"id": f"{number:09}", "image": f"{number:09}.jpg", "conversations": turns}
            written += stream.write((",\n" if number else "") + json.dumps(row))
            number += 1
        stream.write("]")


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
