"""Protects: the benchmark of the probes runs, and its baseline is the trajectory of the product's probe."""

import json

from conftest import run_script, script


def test_the_benchmark_runs():
    done = run_script("scripts/bench/bench_probing.py", "--rows", 120, "--width", 32, "--classes", 6, "--epochs", 4,
                      "--turns", 1, "--memory-rows", 300)  # fmt: skip
    result = json.loads(done.stdout.strip().splitlines()[-1])
    for key in ("batched_vs_reference_loop", "batched_with_train_accuracy", "lbfgs_vs_reference_loop"):
        assert result[key] > 0
    assert result["rss_anon_probing_mib"] >= 0 and result["memory_rows"] == 300
    assert 0 < result["logistic_accuracy"] <= 1


def test_the_reference_loop_is_the_papers_probe():
    from vlmclassifier.probing import paper_probes

    module = script("scripts/bench/bench_probing.py")
    data, truth = module.made_up(module.Args(rows=120, width=32, classes=6))
    accuracies = module.reference_loop(data, 30, seed=0)
    (result,) = paper_probes([data], truth, 30)[0]
    for found, expected in ((result.last, accuracies[-1]), (result.papers, max(accuracies))):
        assert abs(float((found.predictions == truth).float().mean()) - expected) < 1e-6
