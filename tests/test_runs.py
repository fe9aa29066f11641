"""Protects: nothing recorded is ever lost, doubled or reordered, whatever is killed, torn, full or shared."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import starting_line
from stub_run import CONFIG, answer, order, work

from vlmclassifier import runs
from vlmclassifier.provenance import fingerprint
from vlmclassifier.records import UserError, to_line
from vlmclassifier.runs import open_run, read_run, recorded

STUB = Path(__file__).parent / "stub_run.py"


def expected(count: int) -> bytes:
    return "".join(to_line(answer(i)) for i in order(count)).encode()


def start(folder: Path, rows: int, batch: int, seconds: float, *width: int) -> subprocess.Popen:
    command = [sys.executable, STUB, folder, rows, batch, seconds, *width]
    words = [str(word) for word in command]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def part_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("part-*.jsonl"))


def tidy(folder: Path) -> None:
    assert {file.name for file in folder.iterdir()} == {".lock", "run.json", "predictions.jsonl"}


def test_a_whole_run(tmp_path):
    work(open_run(tmp_path, CONFIG, order(10)), 3, 0)
    assert (tmp_path / "predictions.jsonl").read_bytes() == expected(10)
    tidy(tmp_path)
    record, rows = read_run(tmp_path)
    assert record["config"] == CONFIG and record["rows"] == len(rows) == 10
    assert record["started"] <= record["finished"] and record["sessions"][0]["versions"]["torch"]


def test_some_ids_can_be_left_to_the_end(tmp_path):
    run, ids = open_run(tmp_path, CONFIG, order(6)), order(6)
    taken = []
    for batch in run.pending(1, last=set(ids[:2])):
        taken += batch
        run.append([answer(i) for i in batch])
    assert taken == [*ids[2:], *ids[:2]] and [row.example_id for row in run.finish()] == ids


def test_looking_at_what_is_recorded_changes_nothing(tmp_path):
    assert recorded(tmp_path / "none", CONFIG) == [] and not (tmp_path / "none").exists()
    run = open_run(tmp_path, CONFIG, order(10))
    run.append([answer(i) for i in order(10)[:3]])  # in a part file that this process still holds
    files = {file: file.read_bytes() for file in tmp_path.iterdir()}
    assert recorded(tmp_path, CONFIG) == [answer(i) for i in order(10)[:3]]
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == files
    with pytest.raises(UserError, match="another configuration"):
        recorded(tmp_path, CONFIG | {"model": "other"})
    run.finish()
    assert len(recorded(tmp_path, CONFIG)) == 3


def test_a_command_that_failed_gives_way_to_the_corrected_one(tmp_path):
    """Without a row there is nothing to lose; but not while its process lives, which may write one soon."""
    other = CONFIG | {"model": "other"}
    child = start(tmp_path, 10, 5, 3)  # holds the run, and has no row yet
    while not (tmp_path / "run.json").exists() or not read_run(tmp_path)[0].get("config"):
        time.sleep(0.01)
    assert recorded(tmp_path, other) == []
    with pytest.raises(UserError, match="another configuration"):
        open_run(tmp_path, other, order(10))._locks.close()
    child.kill()
    child.communicate()
    work(open_run(tmp_path, other, order(10)), 3, 0)
    record, _ = read_run(tmp_path)
    assert record["config"] == other and len(record["sessions"]) == 1
    tidy(tmp_path)
    with pytest.raises(UserError, match="another configuration"):
        open_run(tmp_path, CONFIG, order(10))


def test_what_gives_way_and_what_does_not(tmp_path):
    open_run(tmp_path / "a", CONFIG, order(10))._locks.close()  # the whole benchmark by mistake
    work(open_run(tmp_path / "a", CONFIG | {"limit": 2}, order(2)), 1, 0)
    record, rows = read_run(tmp_path / "a")
    assert record["finished"] and record["target"] == len(rows) == 2
    run = open_run(tmp_path / "b", CONFIG, order(10))
    run.not_applicable("too long")  # a result, though it has no row
    run._locks.close()
    with pytest.raises(UserError, match="another configuration"):
        open_run(tmp_path / "b", CONFIG | {"model": "other"}, order(10))
    assert read_run(tmp_path / "b")[0]["not_applicable"] == "too long"


def test_a_record_from_before_templates_were_recorded_goes_on(tmp_path):
    run = open_run(tmp_path, CONFIG, order(4))
    run.append([answer(order(4)[0])])
    run.finish()
    work(open_run(tmp_path, CONFIG | {"template": "USER: {question}"}, order(4)), 2, 0)
    assert read_run(tmp_path)[0]["config"]["template"] == "USER: {question}"
    with pytest.raises(UserError, match="another configuration .template"):
        open_run(tmp_path, CONFIG | {"template": "other"}, order(4))


def test_killed_twenty_times_and_resumed_gives_the_same_bytes(tmp_path):
    rows, rng, in_the_middle = 120, random.Random(0), 0
    whole = expected(rows)
    for attempt in range(20):
        folder = tmp_path / str(attempt)
        child, limit = start(folder, rows, 4, 0.01), rng.randrange(len(whole))
        while child.poll() is None and part_bytes(folder) < limit:
            time.sleep(0.0005)
        child.kill()
        child.communicate()
        in_the_middle += child.returncode == -signal.SIGKILL and 0 < part_bytes(folder) < len(whole)
        work(open_run(folder, CONFIG, order(rows)), rng.choice([1, 3, 8]), 0)
        assert (folder / "predictions.jsonl").read_bytes() == whole
        tidy(folder)
    assert in_the_middle >= 15


def test_a_torn_last_line_is_dropped(tmp_path):
    run = open_run(tmp_path, CONFIG, order(6))
    for ids, _ in zip(run.pending(2), range(2), strict=False):
        run.append([answer(i) for i in ids])
    run._wait_for_disk()
    run._part.close()
    run._locks.close()
    data = (tmp_path / "part-0.jsonl").read_bytes()
    for torn in (1, 20, len(to_line(answer("picture-3.jpg")).encode()) - 1):
        (tmp_path / "part-0.jsonl").write_bytes(data[:-torn])
        again = open_run(tmp_path, CONFIG, order(6))
        assert again.done == {"picture-0.jpg", "picture-1.jpg", "picture-2.jpg"}
        again._locks.close()
    work(open_run(tmp_path, CONFIG, order(6)), 2, 0)
    assert (tmp_path / "predictions.jsonl").read_bytes() == expected(6)


def test_a_spoilt_line_is_named(tmp_path):
    work(open_run(tmp_path, CONFIG, order(4)), 2, 0)
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "predictions.jsonl").write_text(lines[0] + "spoilt\n" + "".join(lines[2:]))
    with pytest.raises(UserError, match=r"predictions.jsonl row 2 is not a prediction"):
        open_run(tmp_path, CONFIG, order(4))


def test_another_configuration_is_refused_with_the_difference(tmp_path):
    work(open_run(tmp_path, CONFIG, order(4)), 2, 0)
    before = (tmp_path / "predictions.jsonl").read_bytes()
    with pytest.raises(UserError, match='model: "stub" there, "other" now; seed: null there, 3 now'):
        open_run(tmp_path, CONFIG | {"model": "other", "seed": 3}, order(4))
    assert (tmp_path / "predictions.jsonl").read_bytes() == before
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match="run.json cannot be read"):
        open_run(tmp_path, CONFIG, order(4))


def test_a_larger_limit_goes_on_and_a_smaller_one_loses_nothing(tmp_path):
    work(open_run(tmp_path, CONFIG | {"limit": 4}, order(4)), 2, 0)
    run = open_run(tmp_path, CONFIG | {"limit": 10}, order(10))
    assert [ids for ids in run.pending(4)][0] == ["picture-4.jpg", "picture-5.jpg", "picture-6.jpg", "picture-7.jpg"]
    run._locks.close()
    work(open_run(tmp_path, CONFIG | {"limit": 10}, order(10)), 4, 0)
    assert (tmp_path / "predictions.jsonl").read_bytes() == expected(10)
    small = open_run(tmp_path, CONFIG | {"limit": 4}, order(4))
    assert small.complete
    small.finish()
    assert (tmp_path / "predictions.jsonl").read_bytes() == expected(10)
    assert json.loads((tmp_path / "run.json").read_text())["config"]["limit"] == 10


def test_processes_share_the_work(tmp_path):
    folder = tmp_path / "run"
    with starting_line(folder, 3):
        children = [start(folder, 90, 3, 0.1) for _ in range(3)]
    parts = set()
    while any(child.poll() is None for child in children):
        parts |= {file.name for file in folder.glob("part-*.jsonl") if file.exists()}
        time.sleep(0.005)
    outputs = [child.communicate() for child in children]
    assert [errors for _, errors in outputs] == ["", "", ""]
    assert sorted(" ".join(ids for ids, _ in outputs).split()) == sorted(order(90))  # each row once
    assert parts == {"part-0.jsonl", "part-1.jsonl", "part-2.jsonl"}
    assert (folder / "predictions.jsonl").read_bytes() == expected(90)
    tidy(folder)


def test_every_row_is_computed_once_by_processes_of_one_batch_size(tmp_path):
    other = start(tmp_path, 9, 3, 0.5)
    others = other.stdout.readline().split()  # it holds its first lease
    run = open_run(tmp_path, CONFIG, order(9))
    own = []
    for ids in run.pending(3):
        run.append([answer(i) for i in ids])
        own += ids
    others += other.communicate()[0].split()
    assert sorted(own + others) == sorted(order(9)) and own and others
    run.finish()
    assert (tmp_path / "predictions.jsonl").read_bytes() == expected(9)


def test_a_process_that_dies_costs_its_lease_only(tmp_path):
    dying = start(tmp_path, 12, 3, 60)
    held = dying.stdout.readline().split()  # it holds this lease for a minute
    assert held == ["picture-0.jpg", "picture-1.jpg", "picture-2.jpg"]
    survivor = open_run(tmp_path, CONFIG, order(12))
    seen = []
    for ids in survivor.pending(3):
        seen.append(ids)
        survivor.append([answer(i) for i in ids])
        if len(seen) == 3:  # all but the lease of the other, which is still alive
            assert held not in seen
            os.kill(dying.pid, signal.SIGKILL)
            dying.communicate()
    assert seen[3] == held
    survivor.finish()
    assert (tmp_path / "predictions.jsonl").read_bytes() == expected(12)
    tidy(tmp_path)


def test_a_dead_process_leaves_its_rows_to_the_survivor(tmp_path):
    """The survivor takes over the part file of a process that died after it had looked: its rows count as done."""
    survivor = open_run(tmp_path, CONFIG, order(12))
    dying = start(tmp_path, 12, 3, 0.2)
    for _ in range(3):
        dying.stdout.readline()  # two batches are recorded when the third begins
    dying.kill()
    dying.communicate()
    recorded = (tmp_path / "part-0.jsonl").read_text().count("\n")
    survivor.append([answer("picture-11.jpg")])
    assert Path(survivor._part.name).name == "part-0.jsonl"
    seen = sum(survivor.pending(3), [])
    assert recorded >= 6 and len(seen) == 12 - recorded - 1


def test_a_run_is_finished_only_when_its_largest_order_is(tmp_path):
    larger = open_run(tmp_path, CONFIG, order(10))
    for ids, _ in zip(larger.pending(2), range(3), strict=False):
        larger.append([answer(i) for i in ids])
    larger._wait_for_disk()
    larger._part.close()
    larger._locks.close()  # it stops here, with six of ten rows
    work(open_run(tmp_path, CONFIG | {"limit": 4}, order(4)), 2, 0)
    record, rows = read_run(tmp_path)
    assert (record["finished"], record["target"], record["config"]["limit"], len(rows)) == (None, 10, None, 6)
    work(open_run(tmp_path, CONFIG, order(10)), 2, 0)
    record, rows = read_run(tmp_path)
    assert record["finished"] and record["rows"] == len(rows) == 10


def test_a_smaller_runs_merge_does_not_spoil_the_order(tmp_path):
    larger = open_run(tmp_path, CONFIG, order(6))
    larger.append([answer(i) for i in reversed(order(6))])
    larger._wait_for_disk()
    larger._part.close()
    larger._locks.close()  # it dies with every row recorded but nothing merged
    work(open_run(tmp_path, CONFIG | {"limit": 2}, order(2)), 2, 0)
    work(open_run(tmp_path, CONFIG, order(6)), 2, 0)
    assert (tmp_path / "predictions.jsonl").read_bytes() == expected(6)


def test_rows_without_a_record_are_not_adopted(tmp_path):
    work(open_run(tmp_path, CONFIG, order(4)), 2, 0)
    (tmp_path / "run.json").unlink()
    with pytest.raises(UserError, match="rows but no run.json"):
        open_run(tmp_path, CONFIG, order(4))


def test_every_version_that_made_rows_is_recorded(tmp_path, monkeypatch):
    work(open_run(tmp_path, CONFIG | {"limit": 4}, order(4)), 2, 0)
    monkeypatch.setattr(runs, "versions", lambda: {"torch": "99"})
    work(open_run(tmp_path, CONFIG | {"limit": 6}, order(6)), 2, 0)
    work(open_run(tmp_path, CONFIG | {"limit": 8}, order(8)), 2, 0)
    torches = [session["versions"]["torch"] for session in read_run(tmp_path)[0]["sessions"]]
    assert len(torches) == 2 and torches[1] == "99"


def test_rows_are_synced_per_batch_and_the_lease_ends_after_that(tmp_path, monkeypatch):
    allow, synced = threading.Event(), []

    def fsync(number: int) -> None:
        assert allow.wait(10)
        synced.append(number)

    run = open_run(tmp_path, CONFIG, order(4))
    batches = run.pending(2)
    run.append([answer(i) for i in next(batches)])
    run._wait_for_disk()
    monkeypatch.setattr(runs.os, "fsync", fsync)
    run.append([answer(i) for i in next(batches)])
    locked = f"import fcntl; fcntl.lockf(open({str(tmp_path / '.lock')!r}, 'a+b'), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 2)"
    assert b"BlockingIOError" in subprocess.run([sys.executable, "-c", locked], capture_output=True).stderr
    allow.set()
    run._wait_for_disk()
    assert len(synced) == 1
    assert subprocess.run([sys.executable, "-c", locked], capture_output=True).returncode == 0

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs.os, "fsync", full)
    run.append([answer("picture-0.jpg")])
    with pytest.raises(OSError, match="No space left"):
        run.finish()


def test_a_cell_that_is_not_applicable_says_why(tmp_path):
    run = open_run(tmp_path, CONFIG, order(3))
    run.not_applicable("too long")
    assert read_run(tmp_path)[0]["not_applicable"] == "too long"
    run._locks.close()
    work(open_run(tmp_path, CONFIG, order(3)), 3, 0)
    assert "not_applicable" not in read_run(tmp_path)[0]


def small_disk(command: str, size: str = "64k", options: str = "rw") -> subprocess.CompletedProcess:
    """Run a shell command with a tiny file system of its own on /mnt, in a private mount namespace."""
    mount = f"mount -t tmpfs -o size={size} tmpfs /mnt && {{ {command}; }}"
    words = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"]), "bash", "-c", mount]
    return subprocess.run(words, capture_output=True, text=True, cwd=STUB.parent.parent)


@pytest.fixture
def needs_mount() -> None:
    try:
        if small_disk("true").returncode == 0:
            return
    except FileNotFoundError:
        pass
    pytest.skip("this machine does not let a test mount a small disk")


def test_a_full_disk_keeps_what_is_recorded(needs_mount, tmp_path):
    """The first process fills the disk; after space is made, the same command finishes with the same bytes."""
    stub = f"{sys.executable} {STUB} /mnt/run 200 4 0"
    done = small_disk(
        f"head -c 30000 /dev/zero > /mnt/ballast; {stub}; echo code $?; ls -l /mnt/run; rm /mnt/ballast; "
        f"mount -o remount,size=2m /mnt; {stub} && cp /mnt/run/predictions.jsonl {tmp_path}"
    )
    assert "No space left on device" in done.stderr and "code 1" in done.stdout, done.stderr
    assert (tmp_path / "predictions.jsonl").read_bytes() == expected(200)


def test_fingerprint_is_of_the_content_alone(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"x" * 1000)
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "b" / "notes.md").write_text("not a part of the checkpoint")
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").write_bytes(b"x" * 999 + b"y")
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")
    assert len(fingerprint(tmp_path / "a" / "model.safetensors")) == 64
