"""Protects: the benchmark of the scoring runs with few answers; its double loop and the automaton find equal names."""

import json

from conftest import run_script, script

from vlmclassifier.scoring import Mentions

NAMES = ("bee", "bumblebee", "crane", "crane, bird", "box", "boxes", "great white shark", "shark")


def test_the_benchmark_runs_and_both_searches_agree():
    done = run_script("scripts/bench/bench_scoring.py", "--answers", "300", "--sample", "60", "--repeats", "1")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["ratio_vs_naive"] > 0 and result["seconds"] > 0
    assert (result["answers"], result["names"], result["sample"]) == (600, 1000, 60)
    for metric in ("contains_synonym", "unique", "real", "make_model", "echo"):
        assert metric in done.stdout


def test_the_double_loop_is_the_same_search():
    double_loop, automaton = script("scripts/bench/bench_scoring.py").DoubleLoop(NAMES), Mentions(NAMES)
    for text in ("Bees, boxes and a great white shark", "crane, bird crane bird", "bumblebee", "", "box box"):
        assert sorted(double_loop.find(text), key=str) == sorted(automaton.find(text), key=str)
    assert len(double_loop.find("a bee, a bee")) == 2
