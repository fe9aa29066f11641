"""Protects: the launchers and notebooks, run as a user runs them."""

import shutil

import nbformat
import pandas as pd
import pytest
from api_server import Server
from conftest import REALDATA, ROOT, run_script
from nbclient import NotebookClient


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, tiny, pictures):
    """Table 1 by its launcher: two models from a paths.toml, one benchmark, and one model that has no weights."""
    folder = tmp_path_factory.mktemp("outputs")
    lines = ["[models]", *(f"'{key}' = '{tiny / key}'" for key in ("clip-vit-l-336", "blip2-2.7b"))]
    (folder / "paths.toml").write_text("\n".join([*lines, "[benchmarks]", f"caltech = '{pictures}'"]))
    return folder


def launch(outputs, launcher="main_results/table1.sh", check=True, **settings):
    env = {"VLMCLASSIFIER_PATHS": str(outputs / "paths.toml"), "OUTPUTS": str(outputs), "HF_HOME": str(outputs / "hub")}
    env |= {"BENCHMARKS": "caltech", "SPLIT": "all", "LIMIT": "4", "WORLDS": "open"}
    return run_script("bash", launcher, env=env | settings, check=check)


def test_table1_runs_what_is_named_and_skips_what_is_finished(outputs):
    first = launch(outputs, MODELS="clip-vit-l-336 blip2-2.7b")
    runs = {"clip-vit-l-336-caltech-closed_world", "blip2-2.7b-caltech-open_world"}
    assert {file.parent.name for file in outputs.glob("main_results/*/scores.csv")} == runs
    assert "| CLIP-L (miniature, split all)" in first.stdout and "missing (95.8)" in first.stdout
    before = {file: file.stat().st_mtime_ns for file in outputs.glob("main_results/*/run.json")}
    again = launch(outputs, check=False, MODELS="clip-vit-l-336 llava-1.5-7b")
    assert {file: file.stat().st_mtime_ns for file in outputs.glob("main_results/*/run.json")} == before
    assert again.returncode == 1 and "1 runs failed (llava-1.5-7b/caltech/none)" in again.stderr
    assert "llava-1.5-7b could not be fetched from the hub" in again.stderr
    assert "| CLIP-L (miniature, split all)" in again.stdout  # one failure does not cost the table


def test_an_unknown_model_is_said_before_anything_runs(outputs):
    done = launch(outputs, check=False, MODELS="clip-vit-l-336 llava-9")
    assert done.returncode == 1 and "error: MODELS: llava-9 is none of" in done.stderr and not done.stdout


def test_the_inference_launchers_fill_the_sections_tables(outputs):
    """Candidate lists of a VLM and CLIP, wordings, rankings: the runs lie where the tables look for them."""
    done = launch(outputs, "inference_analysis/label_set_size.sh", MODELS="clip-vit-l-336 blip2-2.7b", SIZES="2 20")
    done = launch(
        outputs, "inference_analysis/rank_labels.sh", MODELS="blip2-2.7b", TRAIN="3" if REALDATA else "0", SPLIT="test"
    )
    home = outputs / "inference_analysis"
    sizes, prompts = pd.read_csv(home / "table9.csv"), pd.read_csv(home / "table2.csv")
    mini = sizes[sizes["value"].notna() & (sizes["metric"] == "accuracy")]
    assert set(mini["model"]) == {"CLIP-L (miniature, split all)", "BLIP2-2.7B (miniature, split all)"}
    assert set(mini["setting"]) == {"2_classes", "20_classes"} | {"all_classes"} & set(mini["setting"])
    ours = prompts[prompts["value"].notna()].set_index("setting")
    assert {"prob_sum", "prob_avg_cfg", "prob_avg_cfg_held_out"} <= set(ours.index)
    assert set(ours.loc["prob_sum", "model"]) == {"BLIP2-2.7B (miniature)"} and "cfg_held_out" in done.stdout
    wrong = launch(outputs, "inference_analysis/prompts.sh", check=False, MODELS="clip-vit-l-336")
    assert wrong.returncode == 1 and "error: MODELS: clip-vit-l-336 is none of" in wrong.stderr
    script = (ROOT / "inference_analysis" / "prompts.sh").read_text()
    assert "--wording base alternative_1 alternative_2" in script and "--order random fixed" in script


def test_the_launchers_ask_apis_where_models_names_them(outputs, tmp_path):
    """Another server and id by API_ARGS: Tables 1, 9 and 12 show the runs under a marked name."""
    settings = {"MODELS": "gpt-4-turbo", "LIMIT": "3", "WORLDS": "closed", "SIZES": "2", "OUTPUTS": str(tmp_path)}
    with Server() as server:
        settings["API_ARGS"] = f"--base-url {server.url}/v1 --model-id some-model"
        for launcher in (
            "main_results/table1.sh",
            "inference_analysis/label_set_size.sh",
            "inference_analysis/prompts.sh",
        ):
            done = launch(outputs, launcher, **settings)
    assert len(server.calls) == 3  # the same three pictures in every way
    assert len(list(tmp_path.glob("main_results/gpt-4-turbo-caltech-*/scores.csv"))) == 8
    table = pd.read_csv(tmp_path / "inference_analysis" / "table12.csv")
    ours = table[table["value"].notna() & (table["metric"] == "accuracy")]
    assert set(ours["setting"]) >= {"base_prompt", "label_fixed_order", "label_random_order", "label_random_order_cot"}
    assert all(model.startswith("GPT4 (split all, some-model, at 127.0.0.1") for model in ours["model"])
    assert "GPT4" in done.stdout and ours["paper"].isna().all()


@pytest.mark.parametrize("path", sorted(ROOT.glob("*/plot.ipynb")), ids=lambda path: path.parent.name)
def test_notebooks_draw_from_the_tables(path, outputs, monkeypatch):
    if not (outputs / "main_results" / "table1.csv").exists():
        launch(outputs, MODELS="clip-vit-l-336")
    if not (outputs / "inference_analysis" / "table9.csv").exists():
        run_script("inference_analysis/table.py", "--outputs", outputs)
    monkeypatch.setenv("VLMCLASSIFIER_OUTPUTS", str(outputs))
    notebook = nbformat.read(path, as_version=4)
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in notebook.cells)
    assert not any("def " in cell.source for cell in notebook.cells if cell.cell_type == "code")
    done = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
    kinds = [output.output_type for cell in done.cells for output in cell.get("outputs", [])]
    assert "display_data" in kinds and "error" not in kinds
    pictures = list((outputs / path.parent.name).glob("*.png"))
    assert pictures and all(file.stat().st_size > 20_000 for file in pictures)
    assert len(pd.read_csv(outputs / "main_results" / "table1.csv")) > 79


def test_shell_scripts_parse_and_say_how_they_are_called():
    for file in [*ROOT.glob("*/*.sh"), ROOT / ".ci" / "run"]:
        assert run_script(shutil.which("bash"), "-n", file).returncode == 0
        first, second, *_ = file.read_text().splitlines()
        assert first == "#!/usr/bin/env bash" and second.startswith("# ")
    for file in ROOT.glob("*/*.sh"):
        shown = run_script("bash", file, "--help").stdout
        assert f"bash {file.relative_to(ROOT)}" in shown or "set up" in shown.lower()
        assert "#" not in shown.split("\n")[0]
    wrong = run_script("bash", "scripts/quickstart.sh", "--nonsense", check=False)
    assert wrong.returncode == 2 and "--nonsense" in wrong.stderr
