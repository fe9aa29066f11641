"""Protects: the command line of every script, and killed, resumed and shared runs of the real scripts."""

import dataclasses
import re
import subprocess
import sys
import time

import pytest
from conftest import ROOT, kill_script, run_script, script, start_script, starting_line
from test_runs import needs_mount, part_bytes, small_disk  # noqa: F401 - a fixture

SCRIPTS = sorted(
    str(file.relative_to(ROOT))
    for folder in ("main_results", "inference_analysis", "feature_analysis", "training_analysis", "scripts")
    for file in (ROOT / folder).glob("*.py")
)  # fmt: skip
SHARED_FLAGS = ["--model", "--weights", "--benchmark", "--data-root", "--split", "--limit", "--seed", "--batch-size"]


@pytest.mark.parametrize("path", SCRIPTS)
def test_help_is_complete_and_loads_nothing_heavy(path):
    result = run_script("-X", "importtime", path, "--help")
    loaded = {line.split("|")[-1].strip() for line in result.stderr.splitlines() if line.startswith("import time")}
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
    assert f"python {path}" in result.stdout, "the docstring has the exact command"
    printed = " ".join(result.stdout.replace("│", " ").split())
    for field in dataclasses.fields(script(path).Args):
        positional = "Positional" in str(field.type) or "Positional" in str(getattr(field.type, "__metadata__", ""))
        flag = "--" + field.name.replace("_", "-")
        text = printed.split("positional arguments" if positional else f" {flag} ")[-1]
        assert positional or f" {flag} " in printed or f" {flag}," in printed, f"{path} has no {flag} in its help"
        assert re.match(r"[^(]*[A-Za-z]{3}", text), f"{path}: {flag} is not explained"


def test_classify_scripts_share_their_flags():
    for path in ("main_results/classify_vlm.py", "main_results/classify_clip.py"):
        printed = run_script(path, "--help").stdout
        for flag in [*SHARED_FLAGS, "--device", "--dtype", "--out", "--candidates"]:
            assert flag in printed


def test_user_error_is_one_line_without_a_traceback(own, tiny):
    own.write('{"image": "9.png", "label": "bird", "split": "test"}')
    result = run_script(
        "main_results/classify_clip.py", "--benchmark", own.manifest, "--classes", own.classes,
        "--weights", tiny / "clip-vit-l-336", check=False,
    )  # fmt: skip
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.strip().splitlines() == [
        "error: mine.jsonl row 4: the label 'bird' is not in the class list: fix the row, or add the class to the list."
    ]
    result = run_script("main_results/classify_clip.py", "--benchmark", "flowers", "--limit", "many", check=False)
    assert result.returncode == 2 and "limit" in result.stderr and "Traceback" not in result.stderr


def test_corrupt_image_stops_the_run_and_keeps_its_rows(own, tiny, tmp_path):
    """After the image is fixed, the same command finishes."""
    image = own.folder / "1.png"
    complete = image.read_bytes()
    image.write_bytes(complete[:-30])
    command = [
        "main_results/classify_clip.py", "--weights", tiny / "clip-vit-l-336", "--out", tmp_path / "run",
        "--benchmark", own.manifest, "--classes", own.classes, "--batch-size", 1,
    ]  # fmt: skip
    stopped = run_script(*command, check=False)
    assert stopped.returncode == 1 and "Traceback" not in stopped.stderr
    assert re.search(r"error: .*1\.png \(.*mine.jsonl row 2\) cannot be decoded", stopped.stderr)
    kept = (tmp_path / "run" / "part-0.jsonl").read_text()
    assert len(kept.splitlines()) == 2  # the corrupt image is the last in evaluation order
    image.write_bytes(complete)
    run_script(*command)
    text = (tmp_path / "run" / "predictions.jsonl").read_text()
    assert text.startswith(kept) and len(text.splitlines()) == 3


@pytest.mark.parametrize("disk", ["full", "read-only"])
def test_unwritable_output_is_reported_without_a_traceback(disk, needs_mount, images, tiny):  # noqa: F811
    command = (
        f"{sys.executable} main_results/classify_clip.py --weights {tiny / 'clip-vit-l-336'} --benchmark caltech "
        f"--data-root {images} --split all --limit 60 --batch-size 8 --out /mnt/run"
    )
    if disk == "full":
        result = small_disk(f"head -c 55000 /dev/zero > /mnt/ballast; {command}")
        message = "the disk is full: free some space; then run the same command again."
    else:
        result = small_disk(f"mount -o remount,ro /mnt; {command}")
        message = "the file system is read-only: choose another --out"
    assert result.returncode == 1 and message in result.stderr and "Traceback" not in result.stderr, result.stderr


def test_script_killed_and_resumed_gives_the_same_bytes(tiny, images, tmp_path):
    def command(out: str, batch: int) -> list[str]:
        flags = f"--benchmark caltech --split all --limit 40 --batch-size {batch} --out {tmp_path / out}"
        return [
            "main_results/classify_vlm.py", "--weights", str(tiny / "llava-1.5-7b"), "--data-root", str(images),
            *flags.split(),
        ]  # fmt: skip

    pid_file = tmp_path / "pid"
    killed = start_script(*command("killed", 2), env={"WARM_PID_FILE": str(pid_file)}, stderr=subprocess.DEVNULL)
    while killed.poll() is None and part_bytes(tmp_path / "killed") < 2000:
        time.sleep(0.005)
    kill_script(killed, pid_file)
    rows = sum(file.read_text().count("\n") for file in (tmp_path / "killed").glob("part-*"))
    assert 0 < rows < 40
    resumed = run_script(*command("killed", 3))
    assert f"{rows} of 40 images are done already" in resumed.stderr
    module = script("main_results/classify_vlm.py")
    module.main(
        module.Args(
            weights=tiny / "llava-1.5-7b", benchmark="caltech", split="all", limit=40, data_root=images,
            out=tmp_path / "whole",
        )
    )  # fmt: skip
    for name in ("predictions.jsonl", "scores.csv"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
def test_two_processes_under_accelerate_give_the_same_rows(tiny, images, tmp_path):
    command = [
        "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "main_results/classify_vlm.py", "--weights", tiny / "llava-1.5-7b", "--data-root", images,
        "--out", tmp_path / "two", "--benchmark", "flowers", "--split", "all", "--limit", "48",
        "--batch-size", "2", "--max-new-tokens", "128",
    ]  # fmt: skip
    with starting_line(tmp_path / "two", 2):
        launched = start_script(*command, env={"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    parts = set()
    while launched.poll() is None:
        parts |= {file.name for file in (tmp_path / "two").glob("part-*.jsonl")}
        time.sleep(0.02)
    assert launched.returncode == 0 and parts == {"part-0.jsonl", "part-1.jsonl"}  # both processes wrote rows
    module = script("main_results/classify_vlm.py")
    args = {"benchmark": "flowers", "split": "all", "limit": 48, "max_new_tokens": 128, "data_root": images}
    module.main(module.Args(weights=tiny / "llava-1.5-7b", out=tmp_path / "one", **args))
    one, two = (tmp_path / name / "predictions.jsonl" for name in ("one", "two"))
    assert two.read_bytes() == one.read_bytes()
    assert not list((tmp_path / "two").glob("part-*"))


def test_user_benchmark_runs(own, tiny, tmp_path, capsys):
    module = script("main_results/classify_vlm.py")
    module.main(module.Args(weights=tiny / "llava-1.5-7b", candidates="all", out=tmp_path / "run", **own.args))
    assert re.search(r"LLaVA1.5-7B \(miniature\), closed_world, mine: accuracy .* n=3", capsys.readouterr().out)
