"""Measure the scoring of saved answers: all metrics and intervals, and the search for class names in the answers.

    python scripts/bench_scoring.py
    python scripts/bench_scoring.py --answers 5000 --sample 200

The answers are made up: one to three class names, some in the plural, in sentences that differ. Half of them answer a
question that lists all names in an order of its own; of these one in ten repeats twenty of them, one in a hundred the
whole list. The last line is one JSON object:
seconds: processor time of all metrics (but "semantic", which is a model's) on all answers, on one core: those about
ImageNet's 1,000 names, and as many about the 196 cars, for "make_model"; medians over the repeats.
ratio_vs_naive: all metrics on a sample of ImageNet's answers with a double loop over answers and names, over the same
with the automaton; both must find the same.
"""

import json
import os
import random
import statistics
import time
from dataclasses import dataclass

from vlmclassifier import cli
from vlmclassifier.benchmarks import BENCHMARKS, class_names
from vlmclassifier.records import Prediction
from vlmclassifier.scoring import Mentions, Scorer, summarise
from vlmclassifier.scoring.mentions import plain_words, plural

SENTENCES = (
    "The object in this photo is a {}.", "{}", "A {} and {}, photographed at {} o'clock.", "I see two {}: it is {}.",
    "This looks like a {}, though it might be a {} or a {}; the picture has {} shades.", "An old thing, number {}.",
)  # fmt: skip
LISTS = 99  # orders of the candidates; each is shared by some questions, to save memory


@dataclass
class Args:
    answers: int = 50_000
    """Answers that are scored, about each of the two class lists."""
    sample: int = 5_000
    """Answers that the double loop is given."""
    repeats: int = 3
    """Measurements; the medians are printed."""
    seed: int = 0
    """Seed of the answers."""


class DoubleLoop(Mentions):
    """The same search, name after name."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__(names)
        own = {plain_words(name) for name in names}
        self.pairs = [(f" {words} ", {name}) for name in dict.fromkeys(names)
                      for words in {plain_words(name), plural(plain_words(name))}
                      if words == plain_words(name) or words not in own]  # fmt: skip

    def find(self, text: str) -> list[tuple[int, int, frozenset[str]]]:
        """As Mentions.find."""
        words, found = f" {plain_words(text)} ", {}
        for form, names in self.pairs:
            start = words.find(form)
            while start >= 0:
                found.setdefault((start, start + len(form)), set()).update(names)
                start = words.find(form, start + 1)
        return [(*place, frozenset(names)) for place, names in found.items()]


def made_up(names: tuple[str, ...], count: int, seed: int) -> list[Prediction]:
    """Answers about ImageNet's validation files; answer i depends on (seed, i) alone."""
    rows, lists = [], [tuple(random.Random(f"{seed}:list {i}").sample(names, len(names))) for i in range(LISTS)]
    lists = [tuple(dict.fromkeys(some)) for some in lists]
    for number in range(count):
        rng = random.Random(f"{seed}:{number}")
        index = rng.randrange(len(names))
        words = [rng.choice([names[index], rng.choice(names), plural(rng.choice(names))]) for _ in range(3)]
        output = rng.choice(SENTENCES).format(*words, number)
        choices = lists[number % LISTS] if number % 2 else None
        if choices and number % 20 == 1:
            output = ", ".join(choices if number % 200 == 1 else choices[:20])
        file = f"ILSVRC2012_val_{number % 50_000 + 1:08}.JPEG"
        rows.append(Prediction(file, names[index], index, "Q", choices, output, None, None))
    return rows


def seconds(scorer: Scorer, rows: list[Prediction]) -> tuple[float, dict]:
    """Processor time of all metrics and their intervals, and what they say."""
    scorer._found.clear()  # nothing is remembered from one repeat to the next
    start = time.process_time()
    hits = scorer.hits(rows)
    summarise(rows, hits)
    return time.process_time() - start, hits


def main(args: Args) -> None:
    """Score the answers, and the sample both ways."""
    cli.check_positive(answers=args.answers, sample=args.sample, repeats=args.repeats)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    whole = {}
    for key in ("cars", "imagenet"):
        names = class_names(BENCHMARKS[key])
        rows, fast = made_up(names, args.answers, args.seed), Scorer(names, "vlm")
        seconds(fast, rows[:1])  # lists of lemmas and ReaL labels are read, scipy is imported
        times, hits = zip(*(seconds(fast, rows) for _ in range(args.repeats)), strict=True)
        whole[key] = statistics.median(times)
        print(f"{whole[key]:.2f} s, {len(rows):,} answers, {len(names):,} names of {key}: {', '.join(hits[0])}")
    slow, sample, ratios = Scorer(names, "vlm"), rows[: args.sample], []
    slow.mentions = DoubleLoop(names)
    for _ in range(args.repeats):
        (mine, found), (naive, others) = seconds(fast, sample), seconds(slow, sample)
        ratios.append(naive / mine)
        if found != others:
            raise RuntimeError("the double loop finds other names: one of the two is wrong")
    result = {"seconds": round(sum(whole.values()), 2), "ratio_vs_naive": round(statistics.median(ratios), 1)}
    print(json.dumps(result | {"answers": 2 * args.answers, "names": len(names), "sample": len(sample)}))


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
