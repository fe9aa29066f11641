"""Benchmark the scoring of recorded answers: all metrics and intervals, and the search for class names in the answers.

    python scripts/bench/bench_scoring.py
    python scripts/bench/bench_scoring.py --answers 5000 --sample 200

The answers are synthetic: different sentences with one to three class names, some of them in the plural. For half of
the answers the prompt has a candidate list of all names in a random order; one in ten of these answers repeats twenty
candidates, and one in a hundred the whole list. The last line is one JSON object:
seconds: CPU time on one core of all metrics (except "semantic", which needs a model) on all answers: those about
ImageNet's 1,000 names, and the same number about the 196 cars, for "make_model". The sum of the two medians.
ratio_vs_naive: the time of all metrics on a sample of ImageNet's answers if names are searched by a double loop over
answers and names, over the time with the automaton. Both must find the same names.
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
from vlmclassifier.scoring import METRICS, Answers, Mentions, metric_hits
from vlmclassifier.scoring.mentions import plain_words, plural

SENTENCES = (
    "The object in this photo is a {}.", "{}", "A {} and {}, photographed at {} o'clock.", "I see two {}: it is {}.",
    "This looks like a {}, though it might be a {} or a {}; the image has {} shades.", "An old thing, number {}.",
)  # fmt: skip
LISTS = 99  # different candidate lists; each is shared by several prompts, to save memory


@dataclass
class Args:
    answers: int = 50_000
    """Answers per class list."""
    sample: int = 5_000
    """Answers that are also scored with the double loop."""
    repeats: int = 3
    """Measurements; the medians are printed."""
    seed: int = 0
    """Seed of the answers."""


class DoubleLoop(Mentions):
    """The same search by a loop over the names."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__(names)
        singulars = {plain_words(name) for name in names}
        self.forms = []  # pairs of a form of a name and the name
        for name in dict.fromkeys(names):
            singular, plural_form = plain_words(name), plural(plain_words(name))
            self.forms.append((f" {singular} ", name))
            if plural_form not in singulars:  # otherwise it is a mention of another name
                self.forms.append((f" {plural_form} ", name))

    def find(self, text: str) -> list[tuple[int, int, frozenset[str]]]:
        """The same result as `Mentions.find`."""
        words, mentions = f" {plain_words(text)} ", {}
        for form, name in self.forms:
            start = words.find(form)
            while start >= 0:
                mentions.setdefault((start, start + len(form)), set()).add(name)
                start = words.find(form, start + 1)
        return [(start, end, frozenset(names)) for (start, end), names in mentions.items()]


def synthetic_answers(names: tuple[str, ...], count: int, seed: int) -> list[Prediction]:
    """Synthetic answers for files of ImageNet's validation split; answer i depends only on (seed, i)."""
    candidate_lists = []
    for number in range(LISTS):
        order = random.Random(f"{seed}:list {number}").sample(names, len(names))
        candidate_lists.append(tuple(dict.fromkeys(order)))
    predictions = []
    for number in range(count):
        rng = random.Random(f"{seed}:{number}")
        index = rng.randrange(len(names))
        words = [rng.choice([names[index], rng.choice(names), plural(rng.choice(names))]) for _ in range(3)]
        output = rng.choice(SENTENCES).format(*words, number)
        choices = candidate_lists[number % LISTS] if number % 2 else None
        if choices and number % 20 == 1:
            output = ", ".join(choices if number % 200 == 1 else choices[:20])
        file = f"ILSVRC2012_val_{number % 50_000 + 1:08}.JPEG"
        predictions.append(Prediction(file, names[index], index, "Q", choices, output, None))
    return predictions


def score(names: tuple[str, ...], mentions: Mentions, predictions: list[Prediction]) -> tuple[float, dict]:
    """Compute all metrics and their intervals. Returns the CPU time in seconds, and the hits of each metric."""
    answers = Answers(predictions, names, "vlm", mentions=mentions)
    start = time.process_time()
    hits = metric_hits(answers)
    for metric, values in hits.items():
        METRICS[metric].summary(answers, values)
    return time.process_time() - start, hits


def main(args: Args) -> None:
    """Score all answers, and the sample also with the double loop."""
    cli.check_positive(answers=args.answers, sample=args.sample, repeats=args.repeats)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    medians = {}
    for key in ("cars", "imagenet"):
        names = class_names(BENCHMARKS[key])
        predictions, automaton = synthetic_answers(names, args.answers, args.seed), Mentions(names)
        score(names, automaton, predictions[:1])  # warm-up: reads lemmas and ReaL labels, imports scipy
        times = []
        for _ in range(args.repeats):
            seconds, hits = score(names, automaton, predictions)
            times.append(seconds)
        medians[key] = statistics.median(times)
        print(f"{medians[key]:.2f} s, {len(predictions):,} answers, {len(names):,} names of {key}: {', '.join(hits)}")
    double_loop, sample, ratios = DoubleLoop(names), predictions[: args.sample], []
    for _ in range(args.repeats):
        seconds, hits = score(names, automaton, sample)
        naive_seconds, naive_hits = score(names, double_loop, sample)
        ratios.append(naive_seconds / seconds)
        if hits != naive_hits:
            raise RuntimeError("the double loop and the automaton find different names: one of them is wrong")
    result = {"seconds": round(sum(medians.values()), 2), "ratio_vs_naive": round(statistics.median(ratios), 1)}
    print(json.dumps(result | {"answers": 2 * args.answers, "names": len(names), "sample": len(sample)}))


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
