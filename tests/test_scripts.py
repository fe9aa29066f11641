"""Protects: the command-line contract of every script, and the user's path through real processes."""

import ast
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, run_script, script, starting_line
from test_runs import needs_mount, part_bytes, small_disk  # noqa: F401 - a fixture

SCRIPTS = sorted(
    str(file.relative_to(ROOT))
    for folder in ("main_results", "inference_analysis", "training_analysis", "scripts")
    for file in (ROOT / folder).glob("*.py")
)  # fmt: skip
SHARED_FLAGS = ["--model", "--weights", "--benchmark", "--data-root", "--split", "--limit", "--seed", "--batch-size"]


@pytest.mark.parametrize("path", SCRIPTS)
def test_help_is_complete_and_loads_nothing_heavy(path):
    done = run_script("-X", "importtime", path, "--help")
    loaded = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert not loaded & {
        "torch",
        "transformers",
        "pandas",
        "datasets",
        "requests",
        "scipy",
        "matplotlib",
        "openai",
        "anthropic",
        "google.genai",
    }
    source = (ROOT / path).read_text(encoding="utf-8")
    assert f"python {path}" in done.stdout, "the docstring holds the exact command"
    arguments = next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == "Args")
    for field, text in zip(arguments.body[::2], arguments.body[1::2], strict=True):
        assert isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr), f"{path}: every argument has its text"
        positional = "Positional" in ast.unparse(field.annotation)
        assert ("positional arguments" if positional else f"--{field.target.id.replace('_', '-')}") in done.stdout
        assert " ".join(text.value.value.split())[:40] in " ".join(done.stdout.replace("│", " ").split())


def test_the_classify_scripts_share_their_flags():
    for path in ("main_results/classify_vlm.py", "main_results/classify_clip.py"):
        shown = run_script(path, "--help").stdout
        for flag in [*SHARED_FLAGS, "--device", "--dtype", "--out", "--candidates"]:
            assert flag in shown


def test_a_mistake_is_one_sentence_and_not_a_traceback(own, tiny):
    own.write('{"image": "9.png", "label": "bird", "split": "test"}')
    done = run_script(
        "main_results/classify_clip.py", "--benchmark", own.manifest, "--classes", own.classes,
        "--weights", tiny / "clip-vit-l-336", check=False,
    )  # fmt: skip
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.strip().splitlines() == [
        "error: mine.jsonl row 4: the label 'bird' is not in the class list: the nearest is 'dog'."
    ]
    wrong = run_script("main_results/classify_clip.py", "--benchmark", "flowers", "--limit", "many", check=False)
    assert wrong.returncode == 2 and "limit" in wrong.stderr and "Traceback" not in wrong.stderr


def test_a_spoilt_picture_stops_the_run_and_keeps_its_rows(own, tiny, tmp_path):
    """After the picture is mended, the same command finishes."""
    spoilt = own.folder / "1.png"
    whole = spoilt.read_bytes()
    spoilt.write_bytes(whole[:-30])
    command = [
        "main_results/classify_clip.py", "--weights", tiny / "clip-vit-l-336", "--out", tmp_path / "run",
        "--benchmark", own.manifest, "--classes", own.classes, "--batch-size", 1,
    ]  # fmt: skip
    stopped = run_script(*command, check=False)
    assert stopped.returncode == 1 and "Traceback" not in stopped.stderr
    assert re.search(r"error: .*1\.png \(.*mine.jsonl row 2\) cannot be decoded", stopped.stderr)
    kept = (tmp_path / "run" / "part-0.jsonl").read_text()
    assert len(kept.splitlines()) == 2  # in the evaluation order the spoilt picture is the last
    spoilt.write_bytes(whole)
    run_script(*command)
    text = (tmp_path / "run" / "predictions.jsonl").read_text()
    assert text.startswith(kept) and len(text.splitlines()) == 3


@pytest.mark.parametrize("disk", ["full", "read-only"])
def test_an_unwritable_output_is_one_sentence(disk, needs_mount, pictures, tiny):  # noqa: F811
    command = (
        f"{sys.executable} main_results/classify_clip.py --weights {tiny / 'clip-vit-l-336'} --benchmark caltech "
        f"--data-root {pictures} --split all --limit 60 --batch-size 8 --out /mnt/run"
    )
    if disk == "full":
        done = small_disk(f"head -c 55000 /dev/zero > /mnt/ballast; {command}")
        words = "the disk is full: free some space; then run the same command again."
    else:
        done = small_disk(f"mount -o remount,ro /mnt; {command}")
        words = "the file system is read-only: choose another --out"
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_the_real_script_killed_and_resumed_gives_the_same_bytes(tiny, pictures, tmp_path):
    def command(out: str, batch: int) -> list[str]:
        flags = f"--benchmark caltech --split all --limit 40 --batch-size {batch} --out {tmp_path / out}"
        return [
            sys.executable, "main_results/classify_vlm.py", "--weights", str(tiny / "llava-1.5-7b"),
            "--data-root", str(pictures), *flags.split(),
        ]  # fmt: skip

    killed = subprocess.Popen(command("killed", 2), cwd=ROOT, stderr=subprocess.DEVNULL)
    while killed.poll() is None and part_bytes(tmp_path / "killed") < 2000:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    rows = sum(file.read_text().count("\n") for file in (tmp_path / "killed").glob("part-*"))
    assert 0 < rows < 40
    resumed = run_script(*command("killed", 3)[1:])
    assert f"{rows} of 40 pictures are answered already" in resumed.stderr
    module = script("main_results/classify_vlm.py")
    module.main(
        module.Args(
            weights=tiny / "llava-1.5-7b", benchmark="caltech", split="all", limit=40, data_root=pictures,
            out=tmp_path / "whole",
        )
    )  # fmt: skip
    names = ["predictions.jsonl", "scores.csv"]
    assert all((tmp_path / "killed" / n).read_bytes() == (tmp_path / "whole" / n).read_bytes() for n in names)


def test_two_processes_under_accelerate_give_the_same_rows(tiny, pictures, tmp_path):
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "main_results/classify_vlm.py", "--weights", tiny / "llava-1.5-7b", "--data-root", pictures,
        "--out", tmp_path / "two", "--benchmark", "flowers", "--split", "all", "--limit", "60",
        "--batch-size", "2", "--max-new-tokens", "160",
    ]  # fmt: skip
    with starting_line(tmp_path / "two", 2):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        words = [str(word) for word in command]
        launched = subprocess.Popen(words, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    parts = set()
    while launched.poll() is None:
        parts |= {file.name for file in (tmp_path / "two").glob("part-*.jsonl")}
        time.sleep(0.02)
    assert launched.returncode == 0 and parts == {"part-0.jsonl", "part-1.jsonl"}  # both did some of the work
    module = script("main_results/classify_vlm.py")
    args = {"benchmark": "flowers", "split": "all", "limit": 60, "max_new_tokens": 160, "data_root": pictures}
    module.main(module.Args(weights=tiny / "llava-1.5-7b", out=tmp_path / "one", **args))
    assert (tmp_path / "two" / "predictions.jsonl").read_bytes() == (
        tmp_path / "one" / "predictions.jsonl"
    ).read_bytes()
    assert not list((tmp_path / "two").glob("part-*"))


def test_a_benchmark_of_ones_own_runs(own, tiny, tmp_path, capsys):
    module = script("main_results/classify_vlm.py")
    module.main(module.Args(weights=tiny / "llava-1.5-7b", candidates="all", out=tmp_path / "run", **own.args))
    assert re.search(r"LLaVA1.5-7B \(miniature\), closed_world, mine: accuracy .* n=3", capsys.readouterr().out)
