"""Protects: the scripts that compare with the paper and check a GPU do their steps and tell the truth about them."""

import json
import sys

import pytest
from conftest import run_script, script

from vlmclassifier.models import MODELS
from vlmclassifier.records import Score, UserError


def score(value, low, high):
    return Score("main_results", "table1", "LLaVA1.5-7B", "open_world", "imagenet", "accuracy", value, low, high, 1000)


@pytest.mark.parametrize(
    ("published", "agrees"), [(22.8, True), (20.6, True), (19.2, True), (19.0, False), (27.2, True), (27.4, False)]
)
def test_a_cell_agrees_within_the_interval_and_the_tolerance(published, agrees):
    found, words = script("scripts/verify_paper.py").compare(published, score(23.1, 20.6, 25.8))
    assert found == agrees
    end = "agrees" if agrees else "does not agree"
    assert words == f"paper {published}, ours 23.1 [20.6, 25.8]: {end}"


def test_the_cells_are_those_of_table_1():
    module = script("scripts/verify_paper.py")
    cells = module.wanted(module.Args())
    open_models = {spec.key for spec in MODELS.values() if spec.paper_name and spec.kind != "api"}
    assert {cell.spec.key for cell in cells} == open_models == set(module.SIZES)
    assert len(cells) == len({cell.name for cell in cells}) > 50
    some = module.wanted(module.Args(model=("llava-1.5-7b",), benchmark=("flowers",)))
    assert {(cell.setting, cell.published) for cell in some} == {("open_world", 5.9), ("closed_world", 10.2)}
    with pytest.raises(UserError, match="'qwen3-vl-8b' is not in the paper's Table 1"):
        module.wanted(module.Args(model=("qwen3-vl-8b",)))


def test_a_miniature_is_run_and_never_said_to_agree(tiny, pictures, tmp_path):
    """The user's path: checkpoints and pictures from paths.toml."""
    manifest = pictures / "flowers.jsonl"
    rows = [json.loads(line) | {"split": "test"} for line in manifest.read_text().splitlines()[:6]]
    root = tmp_path / "flowers"
    root.mkdir()
    (root / "flowers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in rows:
        (root / row["image"]).parent.mkdir(parents=True, exist_ok=True)
        (root / row["image"]).write_bytes((pictures / row["image"]).read_bytes())
    paths = tmp_path / "paths.toml"
    paths.write_text(f'[models]\n"blip2-2.7b" = "{tiny / "blip2-2.7b"}"\n[benchmarks]\nflowers = "{root}"\n')
    words = ["scripts/verify_paper.sh", "--model", "blip2-2.7b", "--benchmark", "flowers", "--limit", "6",
             "--device", "cpu", "--out", str(tmp_path / "runs")]  # fmt: skip
    done = run_script("bash", *words, env={"VLMCLASSIFIER_PATHS": str(paths)}, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "blip2-2.7b-flowers-open_world: paper 27.0, ours" in done.stdout
    assert "is a miniature's: not compared" in done.stdout
    assert done.stderr.strip().endswith("2 of 2 cells do not agree with the paper or could not be run.")
    runs = [tmp_path / "runs" / f"blip2-2.7b-flowers-{world}_world" for world in ("open", "closed")]
    assert all(len((run / "predictions.jsonl").read_text().splitlines()) == 6 for run in runs)


def test_a_cell_that_does_not_fit_is_not_a_disagreement(tmp_path):
    """A run that ended with the exit code of a context that is too small; another code counts as a failure."""
    module = script("scripts/verify_paper.py")
    cell = module.wanted(module.Args(model=("instructblip-7b",), benchmark=("flowers",)))[0]
    stand_in = tmp_path / "python"
    for code, expected in ((3, None), (1, False)):
        stand_in.write_text(f"#!/bin/sh\nexit {code}\n")
        stand_in.chmod(0o755)
        module.sys = type("sys", (), {"executable": str(stand_in)})
        agrees, words = module.verdict(cell, module.Args(out=tmp_path))
        assert agrees is expected and ("N/A" in words) == (code == 3)
    module.sys = sys
    assert module.memory(cell, module.Args()) > 15.8  # its weights alone


def test_the_gpu_check_does_all_its_steps_on_a_cpu(tmp_path):
    out = tmp_path / "check.json"
    words = ["--smoke", "--pictures", "4", "--batch-sizes", "1", "3", "--new-tokens", "2", "--repeats", "1"]
    done = run_script("bash", "scripts/gpu_check.sh", *words, "--out", out)
    record = json.loads(done.stdout.strip().splitlines()[-1])
    assert record == json.loads(out.read_text()) and record["device"] == "cpu"
    assert record["answers"]["float32"] == 1.0  # the same device and number format
    assert all(record["throughput"][size]["pictures_per_second"] > 0 for size in ("1", "3"))


def test_the_gpu_check_wants_a_gpu():
    import torch

    if not torch.cuda.is_available():
        done = run_script("scripts/gpu_check.py", check=False)
        assert done.returncode == 1 and "sees no CUDA GPU" in done.stderr and "Traceback" not in done.stderr


def test_the_scaling_benchmark_prints_its_ratio():
    words = ["--pictures", "6", "--batch-size", "1", "--max-new-tokens", "2", "--repeats", "1"]
    last = json.loads(run_script("scripts/bench_scaling.py", *words).stdout.strip().splitlines()[-1])
    assert last["ratio"] > 0 and last["processes"] == 2 and last["ratios"] == [last["ratio"]]


def test_the_written_7b_checkpoint_is_llavas(tmp_path):
    """True shapes in true shards: transformers finds every weight in the index."""
    from safetensors import safe_open

    module = script("scripts/bench_loading.py")
    module.SHARD, shard = 2**28, module.SHARD
    try:
        total = module.write_checkpoint(tmp_path / "m", layers=1)
    finally:
        module.SHARD = shard
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total and len(set(index["weight_map"].values())) > 3
    found = 0
    for file in set(index["weight_map"].values()):
        with safe_open(tmp_path / "m" / file, "pt") as tensors:
            assert set(tensors.keys()) == {name for name, where in index["weight_map"].items() if where == file}
            found += sum(2 * tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118
    assert found == total
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["text_config"].get("hidden_size", 4096) == 4096 and config["vision_config"]["image_size"] == 336
