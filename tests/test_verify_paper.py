"""Protects: the scripts that compare with the paper and check a GPU run all their steps and report them correctly."""

import json
import sys

import pytest
from conftest import run_script, script

from vlmclassifier.models import MODELS
from vlmclassifier.records import Score, UserError


def score(value, low, high):
    return Score("LLaVA1.5-7B", "open_world", "imagenet", "accuracy", value, low, high, 1000)


@pytest.mark.parametrize(
    ("published", "agrees"), [(22.8, True), (20.6, True), (19.2, True), (19.0, False), (27.2, True), (27.4, False)]
)
def test_a_cell_agrees_within_the_interval_and_the_tolerance(published, agrees):
    result, comparison = script("scripts/verify_paper.py").compare(published, score(23.1, 20.6, 25.8))
    assert result == agrees
    end = "agrees" if agrees else "does not agree"
    assert comparison == f"paper {published}, ours 23.1 [20.6, 25.8] of 1000 images: {end}"


def test_the_cells_are_those_of_table_1():
    module = script("scripts/verify_paper.py")
    cells = module.select_cells(module.Args())
    open_models = {spec.key for spec in MODELS.values() if spec.paper_name and spec.kind != "api"}
    assert {cell.spec.key for cell in cells} == open_models == set(module.SIZES)
    assert len(cells) == len({cell.name for cell in cells}) > 50
    selected = module.select_cells(module.Args(model=("llava-1.5-7b",), benchmark=("flowers",)))
    assert {(cell.setting, cell.published) for cell in selected} == {("open_world", 5.9), ("closed_world", 10.2)}
    with pytest.raises(UserError, match="'qwen3-vl-8b' is not in the paper's Table 1"):
        module.select_cells(module.Args(model=("qwen3-vl-8b",)))


def test_cells_of_other_tables_are_one_command_each(labels):
    """The scores that a command gives have the setting that is compared."""
    from vlmclassifier.prompts import PromptSetting

    module = script("scripts/verify_paper.py")
    questions = labels / "imagewikiqa.jsonl"
    cells = module.select_cells(module.Args(("table2", "table9", "table5"), questions, model=("llava-1.5-7b",)))
    assert {cell.table for cell in cells} == {"table2", "table9", "table5"} and len(cells) > 30
    names = ("a", "b", "c")
    settings = {PromptSetting(names).name, PromptSetting(names, "all").name, PromptSetting(names, "all", "fixed").name,
                PromptSetting(names, wording="alternative_1").name, PromptSetting(names, wording="alternative_2").name,
                PromptSetting(names, "all", chain_of_thought=True).name, PromptSetting(names, "2").name}  # fmt: skip
    settings |= {f"{count}_classes" for count in (5, 20, 100)}
    for _, of_setting in (module.TABLES[table] for table in ("table1", "table2", "table9")):
        assert {compared for one, _, compared in of_setting.values() if one == module.CLASSIFY} <= settings
    assert {cell.run_name for cell in cells if cell.setting.startswith("prob_")} == {
        f"llava-1.5-7b-{benchmark}-ranking" for benchmark in ("imagenet", "flowers", "cars", "caltech")
    }  # fmt: skip
    with pytest.raises(UserError, match="table5 needs --questions"):
        module.select_cells(module.Args(("table5",)))


def test_a_miniature_is_run_but_not_compared(tiny, images, tmp_path):
    """Like a user, with checkpoints and images from paths.toml."""
    manifest = images / "flowers.jsonl"
    rows = [json.loads(line) | {"split": "test"} for line in manifest.read_text().splitlines()[:6]]
    root = tmp_path / "flowers"
    root.mkdir()
    (root / "flowers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in rows:
        (root / row["image"]).parent.mkdir(parents=True, exist_ok=True)
        (root / row["image"]).write_bytes((images / row["image"]).read_bytes())
    paths = tmp_path / "paths.toml"
    paths.write_text(f'[models]\n"blip2-2.7b" = "{tiny / "blip2-2.7b"}"\n[benchmarks]\nflowers = "{root}"\n')
    flags = ["--model", "blip2-2.7b", "--benchmark", "flowers", "--limit", "6", "--device", "cpu",
             "--out", tmp_path / "runs"]  # fmt: skip
    environment = {"VLMCLASSIFIER_PATHS": str(paths)}
    done = run_script("scripts/verify_paper.py", *flags, env=environment, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "blip2-2.7b-flowers-open_world: paper 27.0, ours" in done.stdout
    assert "of 6 images is not comparable (miniature, 6 of 6,149 images)" in done.stdout
    last_line = done.stderr.strip().splitlines()[-1]
    assert last_line.startswith("error: 2 of 2 cells do not agree with the paper or could not be run")
    for setting in ("open_world", "closed_world"):
        rows = (tmp_path / "runs" / f"blip2-2.7b-flowers-{setting}" / "predictions.jsonl").read_text().splitlines()
        assert len(rows) == 6


def test_a_prompt_that_exceeds_the_context_is_not_a_disagreement(tmp_path):
    """A run that ends with the exit code of a ContextError is N/A; another exit code counts as a failure."""
    module = script("scripts/verify_paper.py")
    cell = module.select_cells(module.Args(model=("instructblip-7b",), benchmark=("flowers",)))[0]
    fake_python = tmp_path / "python"
    for code, expected in ((3, None), (1, False)):
        fake_python.write_text(f"#!/bin/sh\nexit {code}\n")
        fake_python.chmod(0o755)
        module.sys = type("sys", (), {"executable": str(fake_python)})
        agrees, comparison = module.verify_cell(cell, module.Args(out=tmp_path))
        assert agrees is expected and ("N/A" in comparison) == (code == 3)
    module.sys = sys
    assert module.estimated_memory(cell, module.Args()) > 15.8  # GB of its weights


def test_the_gpu_check_runs_all_steps_on_a_cpu(tmp_path):
    """The steps include the shares of equal answers between dtypes and batch sizes, by model family."""
    out = tmp_path / "check.json"
    flags = ["--smoke", "--models", "llava-1.5-7b", "qwen3-vl-8b", "--images", "4", "--batch-sizes", "1", "3",
             "--new-tokens", "2", "--repeats", "1", "--no-training"]  # fmt: skip
    done = run_script("bash", "scripts/gpu_check.sh", *flags, "--out", out)
    record = json.loads(done.stdout.strip().splitlines()[-1])
    assert record == json.loads(out.read_text()) and record["device"] == "cpu"
    assert set(record["answers"]) == {"llava-1.5-7b", "qwen3-vl-8b"}
    for shares in record["answers"].values():
        assert shares["float32"] == 1.0  # the same device and dtype
        assert all(0 <= share <= 1 for share in shares.values()) and len(shares) == 4
    assert all(record["throughput"][size]["images_per_second"] > 0 for size in ("1", "3"))


@pytest.mark.slow
def test_the_gpu_check_trains(tmp_path):
    from vlmclassifier.finetuning.gpu_check import check_training

    found = check_training(tmp_path, "cpu")
    assert found.pop("float32") == 0 and 0 < found.pop("bfloat16") < 0.01
    assert found == {"fsdp2": "not measured", "zero2": "not measured"}  # these need GPUs


def test_the_gpu_check_requires_a_gpu():
    import torch

    if not torch.cuda.is_available():
        done = run_script("scripts/gpu_check.py", check=False)
        assert done.returncode == 1 and "sees no CUDA GPU" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_scaling_benchmark_prints_its_ratio():
    flags = ["--images", "6", "--batch-size", "1", "--max-new-tokens", "2", "--repeats", "1"]
    result = json.loads(run_script("scripts/bench/bench_scaling.py", *flags).stdout.strip().splitlines()[-1])
    assert result["ratio"] > 0 and result["processes"] == 2 and result["ratios"] == [result["ratio"]]


def test_the_written_7b_checkpoint_has_the_shapes_and_the_index_of_llava(tmp_path, monkeypatch):
    from safetensors import safe_open

    module = script("scripts/bench/bench_loading.py")
    monkeypatch.setattr(module, "SHARD_BYTES", 2**28)
    total = module.write_checkpoint(tmp_path / "m", layers=1)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    weight_map = index["weight_map"]
    assert index["metadata"]["total_size"] == total and len(set(weight_map.values())) > 3
    tensor_bytes = 0
    for file in set(weight_map.values()):
        with safe_open(tmp_path / "m" / file, "pt") as tensors:
            names = set(tensors.keys())
            assert names == {name for name, name_file in weight_map.items() if name_file == file}
            tensor_bytes += sum(2 * tensors.get_tensor(name).numel() for name in names)
    assert tensor_bytes == total
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["text_config"].get("hidden_size", 4096) == 4096 and config["vision_config"]["image_size"] == 336
