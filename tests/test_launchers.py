"""Protects: the launchers and notebooks, run as a user runs them."""

import os
import shutil

import nbformat
import pandas as pd
import pytest
from api_server import Server
from conftest import REALDATA, ROOT, run_script
from nbclient import NotebookClient

from vlmclassifier.benchmarks import BENCHMARKS, class_names
from vlmclassifier.questions.items import make_question


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, tiny, images):
    """An output folder with a paths.toml of two models and one benchmark; other models have no weights."""
    folder = tmp_path_factory.mktemp("outputs")
    lines = ["[models]"]
    lines += [f"'{key}' = '{tiny / key}'" for key in ("clip-vit-l-336", "blip2-2.7b")]
    lines += ["[benchmarks]", f"caltech = '{images}'"]
    (folder / "paths.toml").write_text("\n".join(lines))
    return folder


def launch(outputs, launcher="main_results/table1.sh", check=True, **settings):
    env = {"VLMCLASSIFIER_PATHS": str(outputs / "paths.toml"), "OUTPUTS": str(outputs), "HF_HOME": str(outputs / "hub")}
    env |= {"BENCHMARKS": "caltech", "SPLIT": "all", "LIMIT": "4", "WORLDS": "open"}
    return run_script("bash", launcher, env=env | settings, check=check)


def test_table1_runs_the_named_models_and_skips_finished_runs(outputs):
    first = launch(outputs, MODELS="clip-vit-l-336 blip2-2.7b")
    runs = {"clip-vit-l-336-caltech-split_all-closed_world", "blip2-2.7b-caltech-split_all-open_world"}
    assert {file.parent.name for file in outputs.glob("main_results/*/scores.csv")} == runs
    assert "| CLIP-L (miniature, split all)" in first.stdout and "0 of the paper's 79 cells are run" in first.stdout
    before = {file: file.stat().st_mtime_ns for file in outputs.glob("main_results/*/run.json")}
    again = launch(outputs, check=False, MODELS="clip-vit-l-336 llava-1.5-7b")
    assert {file: file.stat().st_mtime_ns for file in outputs.glob("main_results/*/run.json")} == before
    assert again.returncode == 1 and "1 runs failed (llava-1.5-7b/caltech/none)" in again.stderr
    assert "llava-1.5-7b could not be fetched from the hub" in again.stderr
    assert "| CLIP-L (miniature, split all)" in again.stdout  # the table is written in spite of one failure


def test_unknown_model_is_reported_before_any_run(outputs):
    result = launch(outputs, check=False, MODELS="clip-vit-l-336 llava-9")
    assert result.returncode == 1 and "error: MODELS: llava-9 is none of" in result.stderr and not result.stdout


def test_inference_launchers_fill_the_tables_of_the_section(outputs):
    """Label set sizes of a VLM and CLIP, prompts, rankings: the runs are written where the tables read them."""
    launch(outputs, "inference_analysis/label_set_size.sh", MODELS="clip-vit-l-336 blip2-2.7b", SIZES="2 20")
    ranked = launch(
        outputs, "inference_analysis/rank_labels.sh", MODELS="blip2-2.7b", TRAIN="3" if REALDATA else "0", SPLIT="test"
    )
    section = outputs / "inference_analysis"
    sizes, prompts = pd.read_csv(section / "table9.csv"), pd.read_csv(section / "table2.csv")
    ours = sizes[sizes["value"].notna() & (sizes["metric"] == "accuracy")]
    assert set(ours["model"]) == {"CLIP-L", "BLIP2-2.7B"} and set(ours["tags"]) == {"miniature, split all"}
    assert set(ours["setting"]) == {"2_classes", "20_classes"} | {"all_classes"} & set(ours["setting"])
    ours = prompts[prompts["value"].notna()].set_index("setting")
    assert {"prob_sum", "prob_avg_cfg", "prob_avg_cfg_held_out"} <= set(ours.index)
    assert set(ours.loc["prob_sum", "model"]) == {"BLIP2-2.7B"} and "cfg_held_out" in ranked.stdout
    assert set(ours.loc["prob_sum", "tags"]) == {"miniature, 120 of 4,331 images" if REALDATA else "miniature"}
    refused = launch(outputs, "inference_analysis/prompts.sh", check=False, MODELS="clip-vit-l-336")
    assert refused.returncode == 1 and "error: MODELS: clip-vit-l-336 is none of" in refused.stderr
    text = (ROOT / "inference_analysis" / "prompts.sh").read_text()
    assert '--wording "${WORDINGS[@]}"' in text and "--order random fixed" in text


def test_launchers_run_api_models_that_models_names(outputs, tmp_path):
    """With another server and model id in API_ARGS, Tables 1, 9 and 12 show the runs with tags."""
    settings = {"MODELS": "gpt-4-turbo", "LIMIT": "3", "WORLDS": "closed", "SIZES": "2", "OUTPUTS": str(tmp_path)}
    with Server() as server:
        settings["API_ARGS"] = f"--base-url {server.url}/v1 --model-id some-model"
        for launcher in (
            "main_results/table1.sh",
            "inference_analysis/label_set_size.sh",
            "inference_analysis/prompts.sh",
        ):
            last = launch(outputs, launcher, **settings)
    assert len(server.calls) == 3  # the same three images in every setting
    assert len(list(tmp_path.glob("main_results/gpt-4-turbo-caltech-*/scores.csv"))) == 8
    table = pd.read_csv(tmp_path / "inference_analysis" / "table12.csv")
    ours = table[table["value"].notna() & (table["metric"] == "accuracy")]
    assert set(ours["setting"]) >= {"base_prompt", "label_fixed_order", "label_random_order", "label_random_order_cot"}
    assert set(ours["model"]) == {"GPT4"} and ours["paper"].isna().all()
    assert all(tags.startswith("split all, some-model, at 127.0.0.1") for tags in ours["tags"])
    assert "GPT4 (split all, some-model, at 127.0.0.1" in last.stdout


@pytest.mark.parametrize("path", sorted(ROOT.glob("*/plot.ipynb")), ids=lambda path: path.parent.name)
def test_notebooks_plot_the_tables(path, outputs, tiny, images, monkeypatch):
    if not (outputs / "main_results" / "table1.csv").exists():
        launch(outputs, MODELS="clip-vit-l-336")
    if not (outputs / "inference_analysis" / "table9.csv").exists():
        run_script("inference_analysis/table.py", "--outputs", outputs)
    if path.parent.name == "feature_analysis":
        if not REALDATA:
            pytest.skip("the generated images have no train split")
        paths = f"[models]\n'llava-1.5-7b' = '{tiny / 'llava-1.5-7b'}'\n[benchmarks]\ncaltech = '{images}'\n"
        (outputs / "llava.toml").write_text(paths)
        common = {"MODELS": "llava-1.5-7b", "EPOCHS": "2", "SPLIT": "test", "LIMIT": "40",
                  "VLMCLASSIFIER_PATHS": str(outputs / "llava.toml")}  # fmt: skip
        launch(outputs, "feature_analysis/positions.sh", POSITIONS="0 -2 -1", **common)
        launch(outputs, "feature_analysis/layers.sh", METHOD="centroid", **common)
    if path.parent.name == "data_analysis":
        names = class_names(BENCHMARKS["caltech"])
        texts = [f"There is a {name} here, and another {name}.\n" * (n % 7) for n, name in enumerate(names)]
        (outputs / "texts.txt").write_text("".join(texts))
        common = {"BENCHMARKS": "caltech", "TEXTS": f"pretrain={outputs / 'texts.txt'}", "PROCESSES": "1"}
        counted = launch(outputs, "data_analysis/count.sh", **common)
        assert "caltech, pretrain: 100 classes in 295 sentences, " in counted.stdout
        reference = pd.read_csv(outputs / "data_analysis" / "reference" / "caltech.csv")
        assert (reference["count"] <= pd.read_csv(outputs / "data_analysis" / "caltech.csv")["count"]).all()
        printed = launch(outputs, "data_analysis/correlate.sh", BENCHMARKS="caltech").stdout
        assert "| CLIP-L (" in printed and "missing (-0.03)" not in printed
    if path.parent.name == "training_analysis":
        if not REALDATA:
            pytest.skip("the generated images have no train split")
        paths = f"[models]\n'llava-1.5-7b' = '{tiny / 'llava-1.5-7b'}'\n[benchmarks]\ncaltech = '{images}'\n"
        (outputs / "llava.toml").write_text(paths)
        launch(outputs, "training_analysis/finetune_llava.sh", MODELS="llava-1.5-7b", BENCHMARKS="caltech", ROWS="16",
               TRAIN="projector", EPOCHS="2", LIMIT="8", MORE="--effective-batch 8 --evaluated 4",
               VLMCLASSIFIER_PATHS=str(outputs / "llava.toml"))  # fmt: skip
    if path.parent.name == "imagewikiqa":
        found = sorted(file for file in images.rglob("*") if file.suffix in (".jpg", ".png"))[:6]
        names = [str(file.relative_to(images)) for file in found]
        questions = [make_question(name, "How old is this object?", ("1", "2"), 0, "newt") for name in names]
        (outputs / "mine.jsonl").write_text("".join(question.to_line() for question in questions))
        (outputs / "llava.toml").write_text(f"[models]\n'llava-1.5-7b' = '{tiny / 'llava-1.5-7b'}'\n")
        printed = launch(outputs, "imagewikiqa/answer.sh", MODELS="llava-1.5-7b", QUESTIONS=str(outputs / "mine.jsonl"),
                         MORE=f"--image-root {images} --max-new-tokens 4", LIMIT="6", GIVEN="image text",
                         VLMCLASSIFIER_PATHS=str(outputs / "llava.toml")).stdout  # fmt: skip
        assert "LLaVA1.5-7B (miniature, 4 tokens)" in printed and "missing (38.0)" not in printed
    monkeypatch.setenv("VLMCLASSIFIER_OUTPUTS", str(outputs))
    notebook = nbformat.read(path, as_version=4)
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in notebook.cells)
    assert not any("def " in cell.source for cell in notebook.cells if cell.cell_type == "code")
    executed = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
    kinds = [output.output_type for cell in executed.cells for output in cell.get("outputs", [])]
    assert "display_data" in kinds and "error" not in kinds
    plots = list((outputs / path.parent.name).glob("*.png"))
    assert plots and all(file.stat().st_size > 20_000 for file in plots)
    assert len(pd.read_csv(outputs / "main_results" / "table1.csv")) > 79


def test_shell_scripts_parse_and_print_their_usage():
    for file in [*ROOT.glob("*/*.sh"), ROOT / ".ci" / "run"]:
        assert run_script(shutil.which("bash"), "-n", file).returncode == 0
        first, second, *_ = file.read_text().splitlines()
        assert first == "#!/usr/bin/env bash" and second.startswith("# ")
    for file in ROOT.glob("*/*.sh"):
        printed = run_script("bash", file, "--help").stdout
        assert f"bash {file.relative_to(ROOT)}" in printed or "set up" in printed.lower()
        assert "#" not in printed.split("\n")[0]
    refused = run_script("bash", "scripts/quickstart.sh", "--nonsense", check=False)
    assert refused.returncode == 2 and "--nonsense" in refused.stderr


def test_launchers_take_own_data_and_models(own, tiny, tmp_path):
    """A manifest with its class list, models by folder; wrong settings are refused, and missing data once, at first."""
    (tmp_path / "my_vlm").symlink_to(tiny / "qwen3-vl-8b")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "paths.toml").write_text("")
    settings = {"BENCHMARKS": str(own.manifest), "CLASSES": str(own.classes), "OUTPUTS": str(tmp_path / "out"),
                "MODELS": f"{tmp_path / 'my_vlm'} {tiny / 'clip-vit-l-336'}", "WORLDS": "open"}  # fmt: skip
    launch(tmp_path / "out", "main_results/table1.sh", **settings)
    table = pd.read_csv(tmp_path / "out" / "main_results" / "table1.csv").dropna(subset="value")
    assert set(table["dataset"]) == {"mine"} and set(table["model"]) == {"my_vlm", "CLIP-L"}
    for change, message in (
        ({"WORLDS": "opn"}, "error: WORLDS: opn is none of open closed"),
        ({"MODELS": "llava-9"}, "error: MODELS: llava-9 is none of"),
        ({"LIMIT": "ten"}, "error: LIMIT=ten is no whole number from 1 on"),
        ({"SPLIT": "val"}, "error: SPLIT=val is none of train valid test all"),
        ({"MODELS": str(tmp_path / "absent")}, "absent is no folder, and no hub id"),
        ({"BENCHMARKS": "flowrs"}, "error: Unknown benchmark 'flowrs': did you mean 'flowers'?"),
        (
            {"BENCHMARKS": "cars flowers", "CLASSES": ""},
            "error: There are no images of any benchmark:\ncars is left out:",
        ),
    ):
        refused = launch(tmp_path / "out", "main_results/table1.sh", check=False, **settings | change)
        assert refused.returncode == 1 and message in refused.stderr and refused.stderr.count("error:") == 1
    unknown = run_script("bash", "main_results/table1.sh", "--hlep", check=False)
    assert unknown.returncode == 1 and "takes no arguments (--hlep), only settings" in unknown.stderr
    elsewhere = own.manifest.rename(tmp_path / "out" / "mine.jsonl")
    launch(tmp_path / "out", "main_results/table1.sh",
           **settings | {"BENCHMARKS": str(elsewhere), "DATA_ROOT": str(own.folder), "SPLIT": "test"})  # fmt: skip
    own.manifest.write_bytes(elsewhere.read_bytes())
    partly = launch(tmp_path / "out", "main_results/table1.sh", **settings | {"BENCHMARKS": f"{own.manifest} cars"})
    assert partly.stderr.count("cars is left out: The manifest ") == 1


def test_the_kind_of_any_model():
    from vlmclassifier.models import kind_of

    kinds = {"llava-1.5-7b": "vlm", "ViT-B-32/laion2b_s34b_b79k": "clip", "openai/gpt-4.1": "api", "Qwen/X": "vlm",
             "google/gemma-3-4b-it": "vlm", "google/gemini-2.5-pro": "api"}  # fmt: skip
    for key, kind in kinds.items():
        assert kind_of(key) == kind, key


@pytest.mark.slow
def test_the_slurm_template_runs_under_stand_ins_of_slurm(own, tiny, tmp_path):
    """srun and scontrol are stand-ins: one node of two processes, which share a run."""
    for name, text in (("srun", 'shift\nSLURM_NODEID=0 exec "$@"'), ("scontrol", "echo localhost")):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_NUM_NODES": "1",
           "SLURM_SUBMIT_DIR": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    done = run_script("bash", "scripts/slurm.sh", "main_results/classify_clip.py", "--model", "clip-vit-l-336",
                      "--weights", tiny / "clip-vit-l-336", "--benchmark", own.manifest, "--classes", own.classes,
                      "--batch-size", 1, "--out", tmp_path / "run", env=env)  # fmt: skip
    assert "CLIP-L (miniature), closed_world, mine: accuracy" in done.stdout
    assert len((tmp_path / "run" / "predictions.jsonl").read_text().splitlines()) == 3
