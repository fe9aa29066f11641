"""Protects: every family under accelerate gives the rows of one process; a process killed half-way loses nothing."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT, run_script, script
from test_runs import part_bytes

from vlmclassifier.runs import read_run

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]


def test_every_family_gives_the_same_rows_on_one_and_two_processes(tiny, pictures, tmp_path):
    """Real processes of accelerate, gloo between them, 40 pictures: the merged files are equal to the byte."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        out.mkdir()
        kind = "--multi_gpu" if processes > 1 else "--cpu"  # accelerate's word for several processes, on CPUs too
        words = [*LAUNCH, kind, "--num_processes", processes, "--mixed_precision", "no",
                 "--main_process_port", 0, "tests/every_family.py", tiny, pictures, out, 40]  # fmt: skip
        done = subprocess.run(list(map(str, words)), cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    records = [json.loads((tmp_path / "2" / f"rows-{rank}.json").read_text()) for rank in (0, 1)]
    assert all(record["processes"] == 2 and record["backend"] == "gloo" for record in records)
    keys = sorted(folder.name for folder in tiny.iterdir())
    for key in keys:
        one, two = (tmp_path / number / key for number in ("1", "2"))
        assert (one / "predictions.jsonl").read_bytes() == (two / "predictions.jsonl").read_bytes(), key
        assert len(read_run(two)[1]) == 40 and not list(two.glob("part-*"))
    done_by = [sum(record["rows"].values()) for record in records]
    assert sum(done_by) == 40 * len(keys) and min(done_by) >= 0.15 * sum(done_by)  # none doubled; both took part


def test_one_of_two_killed_loses_and_doubles_nothing(tiny, pictures, tmp_path):
    """scripts/multi_gpu.sh, -9 for one of its processes in the middle, then the same command again."""
    command = [
        "/usr/bin/env", "bash", "scripts/multi_gpu.sh", "main_results/classify_vlm.py", "--model", "qwen3-vl-8b",
        "--weights", tiny / "qwen3-vl-8b", "--benchmark", "caltech", "--split", "all", "--data-root", pictures,
        "--limit", "40", "--batch-size", "2", "--max-new-tokens", "64", "--out", tmp_path / "run",
    ]  # fmt: skip
    environment = {**os.environ, "PROCESSES": "2", "PYTHON": sys.executable}
    launched = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    while launched.poll() is None and part_bytes(tmp_path / "run") < 2000:
        time.sleep(0.005)
    workers = [child for child in psutil.Process(launched.pid).children() if child.pid != launched.pid]
    assert len(workers) == 2
    workers[0].send_signal(signal.SIGKILL)
    assert launched.wait() != 0  # the launcher ends the other one, too
    kept = {row for file in (tmp_path / "run").glob("part-*") for row in file.read_text().splitlines(True)}
    assert 0 < len(kept) < 40
    again = run_script(*command[1:], env=environment)
    assert "pictures are answered already" in again.stderr
    module = script("main_results/classify_vlm.py")
    module.main(module.Args("qwen3-vl-8b", tiny / "qwen3-vl-8b", benchmark="caltech", split="all", limit=40,
                            data_root=pictures, out=tmp_path / "whole"))  # fmt: skip
    rows = [(tmp_path / name / "predictions.jsonl").read_text() for name in ("run", "whole")]
    assert rows[0] == rows[1] and len(rows[0].splitlines()) == 40
    assert {row for row in kept if row.endswith("\n")} <= set(rows[0].splitlines(True))  # all but a torn last line


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_users_mistake_is_one_sentence_under_the_launcher_too(processes, own):
    words = ["--model", "llava-9", "--benchmark", own.manifest, "--classes", own.classes]
    done = run_script(
        "bash", "scripts/multi_gpu.sh", "main_results/classify_vlm.py", *words,
        env={"PROCESSES": processes}, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: Unknown model 'llava-9': the nearest is" in done.stderr


def test_the_launchers_mistakes_are_one_sentence():
    for setting, words in (({}, "nothing.py: name one such as"), ({"PROCESSES": "two"}, "PROCESSES=two is not")):
        target = "nothing.py" if not setting else "main_results/classify_vlm.py"
        done = run_script("bash", "scripts/multi_gpu.sh", target, env=setting, check=False)
        assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr
