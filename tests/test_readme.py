"""Protects: the README's program runs as printed, its commands and links exist."""

import re
import shutil

import pytest
from conftest import ROOT
from PIL import Image

README = (ROOT / "README.md").read_text()
PAGES = ["README.md", "main_results/README.md", "data/README.md", "docs/adding_a_model.md", "docs/measurements.md"]


def test_the_three_lines_run_as_printed(tiny, tmp_path, monkeypatch, capsys):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    shutil.copytree(tiny, tmp_path / "outputs" / "quickstart" / "checkpoints")
    Image.new("RGB", (80, 60), "orange").save(tmp_path / "outputs" / "quickstart" / "picture.jpg")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    answer, winner = capsys.readouterr().out.rsplit("CLIP says ", 1)
    assert answer.strip() and winner.strip() in ("tulip", "rose", "daisy")


def test_the_quickstart_leaves_what_the_program_opens():
    text = (ROOT / "scripts" / "quickstart.sh").read_text()
    assert "outputs/quickstart/checkpoints/$model" in text and "outputs/quickstart/picture.jpg" in text


@pytest.mark.parametrize("page", PAGES)
def test_named_files_and_flags_exist(page):
    text = (ROOT / page).read_text()
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (folder / link).exists(), link
    for name in re.findall(r"(?:bash|python) ((?:scripts|main_results)/[\w./]+)", text):
        assert (ROOT / name).exists(), name
    for path, rest in re.findall(r"python ((?:scripts|main_results)/\w+\.py)([^\n`]*)", text):
        source = (ROOT / path).read_text()
        for flag in re.findall(r"--([a-z-]+)", rest):
            assert re.search(rf"^    {flag.replace('-', '_')}:", source, re.MULTILINE), f"{path} has no --{flag}"
