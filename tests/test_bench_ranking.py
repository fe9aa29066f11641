"""Protects: the ranking's benchmark runs at toy size, and says what its issue asks for."""

import json

from conftest import run_script


def test_the_benchmark_runs_and_its_ways_agree():
    done = run_script("scripts/bench_ranking.py", "--size", "tiny", "--repeats", "1", "--sample", "4")
    last = json.loads(done.stdout.strip().splitlines()[-1])
    for key in ("speedup_vs_per_token_loop", "speedup_vs_full_forward", "fraction_of_gemm_bound",
                "peak_memory_ratio_10x_classes", "topk_nodes_fraction", "topk_speedup_vs_full"):  # fmt: skip
        assert last[key] > 0
    assert last["max_abs_diff"] <= 2e-5 and last["topk_same"] and last["topk_nodes_fraction"] <= 1
    assert last["baselines"] == "scaled by token count" and last["names_per_turn_of_R"] == 1
    for words, sentence in ((["--sample", "2000"], "outside 4 to"), (["--tokenizer", "none"], "none does not exist")):
        wrong = run_script("scripts/bench_ranking.py", "--size", "tiny", *words, check=False)
        assert wrong.returncode == 1 and sentence in wrong.stderr and "Traceback" not in wrong.stderr
