"""Protects: the README's program runs as printed; the files and flags that the pages name exist."""

import dataclasses
import re
import shutil

import pytest
from conftest import ROOT, script

from vlmclassifier.plane_figures import FIGURES

README = (ROOT / "README.md").read_text()
PAGES = sorted(str(file.relative_to(ROOT)) for file in [ROOT / "README.md", *ROOT.glob("*/README.md"),
                                                        *ROOT.glob("docs/*.md")])  # fmt: skip
FOLDERS = "(?:scripts|main_results|inference_analysis|feature_analysis|data_analysis|training_analysis|imagewikiqa)"


def test_readme_program_runs(trained, tmp_path, monkeypatch, capsys):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    shutil.copytree(trained, tmp_path / "outputs" / "plane_figures" / "seed-0" / "checkpoints")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    answer, winner = capsys.readouterr().out.rsplit("CLIP says ", 1)
    assert answer.endswith("\n") and winner.strip() in FIGURES  # after a few training steps the answer may be empty


@pytest.mark.parametrize("page", PAGES)
def test_named_files_and_flags_exist(page):
    text = (ROOT / page).read_text()
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (folder / link).exists(), link
    for name in re.findall(rf"(?:bash|python) ({FOLDERS}/[\w./]+)", text):
        assert (ROOT / name).exists(), name
    for path, rest in re.findall(rf"python ({FOLDERS}/[\w/]+\.py)([^\n`]*)", text):
        known = {field.name.replace("_", "-") for field in dataclasses.fields(script(path).Args)}
        for flag in re.findall(r"--([a-z-]+)", rest):
            assert flag in known or flag.removeprefix("no-") in known, f"{path} has no --{flag}"
