"""Protects: the benchmark of the ranking runs with a small model, and reports all its numbers."""

import json
import math

from conftest import run_script


def test_the_benchmark_runs_and_its_methods_agree():
    done = run_script("scripts/bench/bench_ranking.py", "--size", "tiny", "--repeats", "1", "--sample", "4")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    for key in ("speedup_vs_per_token_loop", "speedup_vs_full_forward", "fraction_of_gemm_bound",
                "peak_memory_ratio_10x_classes", "topk_nodes_fraction", "topk_speedup_vs_full"):  # fmt: skip
        assert math.isfinite(result[key])  # a ratio of times is noise at this size
    assert result["peak_memory_ratio_10x_classes"] > 0 and result["topk_nodes_fraction"] > 0
    assert result["max_abs_diff"] <= 2e-5 and result["topk_same"] and result["topk_nodes_fraction"] <= 1
    assert result["baselines"] == "scaled by token count" and result["names_per_turn_of_R"] == 1
    for flags, message in ((["--sample", "2000"], "outside 4 to"), (["--tokenizer", "none"], "none does not exist")):
        wrong = run_script("scripts/bench/bench_ranking.py", "--size", "tiny", *flags, check=False)
        assert wrong.returncode == 1 and message in wrong.stderr and "Traceback" not in wrong.stderr
