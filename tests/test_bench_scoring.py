"""Protects: the scoring's benchmark runs at toy size; its double loop and the automaton find the same names."""

import json

from conftest import run_script, script

from vlmclassifier.scoring import Mentions

NAMES = ("bee", "bumblebee", "crane", "crane, bird", "box", "boxes", "great white shark", "shark")


def test_the_benchmark_runs_and_both_ways_agree():
    done = run_script("scripts/bench_scoring.py", "--answers", "300", "--sample", "60", "--repeats", "1")
    last = json.loads(done.stdout.strip().splitlines()[-1])
    assert last["ratio_vs_naive"] > 0 and last["seconds"] > 0
    assert (last["answers"], last["names"], last["sample"]) == (600, 1000, 60)
    for metric in ("contains_synonym", "unique", "real", "make_model", "echo"):
        assert metric in done.stdout


def test_the_double_loop_is_the_same_search():
    slow, fast = script("scripts/bench_scoring.py").DoubleLoop(NAMES), Mentions(NAMES)
    for text in ("Bees, boxes and a great white shark", "crane, bird crane bird", "bumblebee", "", "box box"):
        assert sorted(slow.find(text), key=str) == sorted(fast.find(text), key=str)
    assert len(slow.find("a bee, a bee")) == 2
