"""Protects: every family gives the same rows on one and two processes, and a killed process loses no row."""

import json
import signal
import subprocess
import time

import psutil
import pytest
from conftest import run_script, script, start_script
from test_runs import part_bytes

from vlmclassifier.runs import read_run


@pytest.mark.slow
def test_every_family_gives_the_same_rows_on_one_and_two_processes(tiny, images, tmp_path):
    """A plain process and two of accelerate over gloo, 40 images: the merged files have the same bytes."""
    for processes in ("1", "2"):
        (tmp_path / processes).mkdir()
    run_script("tests/every_family.py", tiny, images, tmp_path / "1", 40)
    # accelerate's flag for several processes is --multi_gpu, also on CPUs
    run_script("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--mixed_precision", "no",
               "--main_process_port", 0, "tests/every_family.py", tiny, images, tmp_path / "2", 40,
               env={"OMP_NUM_THREADS": "1"})  # fmt: skip
    records = [json.loads((tmp_path / "2" / f"rows-{rank}.json").read_text()) for rank in (0, 1)]
    assert all(record["processes"] == 2 and record["backend"] == "gloo" for record in records)
    keys = sorted(folder.name for folder in tiny.iterdir())
    for key in keys:
        one, two = (tmp_path / number / key for number in ("1", "2"))
        assert (one / "predictions.jsonl").read_bytes() == (two / "predictions.jsonl").read_bytes(), key
        assert len(read_run(two)[1]) == 40 and not list(two.glob("part-*"))
    rows = [sum(record["rows"].values()) for record in records]
    assert sum(rows) == 40 * len(keys)  # no row is computed twice
    assert min(rows) >= 0.15 * sum(rows)  # both processes did a part


@pytest.mark.slow
def test_killing_one_of_two_processes_loses_and_duplicates_no_row(tiny, images, tmp_path):
    """SIGKILL for one process of scripts/multi_gpu.sh in the middle of the run, then the same command again."""
    command = [
        "bash", "scripts/multi_gpu.sh", "main_results/classify_vlm.py", "--model", "qwen3-vl-8b",
        "--weights", tiny / "qwen3-vl-8b", "--benchmark", "caltech", "--split", "all", "--data-root", images,
        "--limit", "40", "--batch-size", "2", "--max-new-tokens", "64", "--out", tmp_path / "run",
    ]  # fmt: skip
    pid_file = tmp_path / "pid"
    environment = {"PROCESSES": "2", "WARM_PID_FILE": str(pid_file)}
    launched = start_script(*command, env=environment, stderr=subprocess.DEVNULL)
    while launched.poll() is None and part_bytes(tmp_path / "run") < 2000:
        time.sleep(0.005)
    workers = psutil.Process(int(pid_file.read_text())).children()
    assert len(workers) == 2
    workers[0].send_signal(signal.SIGKILL)
    assert launched.wait() != 0  # the launcher also ends the other process
    kept = set()
    for file in (tmp_path / "run").glob("part-*"):
        kept |= set(file.read_text().splitlines(keepends=True))
    assert 0 < len(kept) < 40
    again = run_script(*command, env={"PROCESSES": "2"})
    assert "images are done already" in again.stderr
    module = script("main_results/classify_vlm.py")
    module.main(module.Args("qwen3-vl-8b", tiny / "qwen3-vl-8b", benchmark="caltech", split="all", limit=40,
                            data_root=images, out=tmp_path / "whole"))  # fmt: skip
    rows = [(tmp_path / name / "predictions.jsonl").read_text() for name in ("run", "whole")]
    assert rows[0] == rows[1] and len(rows[0].splitlines()) == 40
    assert {row for row in kept if row.endswith("\n")} <= set(rows[0].splitlines(True))  # without a truncated last line


@pytest.mark.parametrize("processes", ["1", "2"])
def test_user_error_under_the_launcher_has_no_traceback(processes, own):
    flags = ["--model", "llava-9", "--benchmark", own.manifest, "--classes", own.classes]
    result = run_script(
        "bash", "scripts/multi_gpu.sh", "main_results/classify_vlm.py", *flags,
        env={"PROCESSES": processes}, check=False,
    )  # fmt: skip
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "error: Unknown model 'llava-9'" in result.stderr


def test_launcher_user_errors_have_no_traceback():
    cases = [
        ("nothing.py", {}, "nothing.py: name one such as"),
        ("main_results/classify_vlm.py", {"PROCESSES": "two"}, "PROCESSES=two is not"),
    ]
    for target, variables, message in cases:
        result = run_script("bash", "scripts/multi_gpu.sh", target, env=variables, check=False)
        assert result.returncode == 1 and message in result.stderr and "Traceback" not in result.stderr
