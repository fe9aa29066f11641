"""Protects: no row is lost, duplicated or reordered by kills, truncated files, a full disk or several processes."""

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

from vlmclassifier.records import UserError, to_line
from vlmclassifier.runs import open_run, read_run, recorded_rows, store
from vlmclassifier.runs.provenance import fingerprint

STUB = Path(__file__).parent / "stub_run.py"


def expected(count: int) -> bytes:
    """The content of predictions.jsonl for the first `count` rows."""
    return "".join(to_line(answer(i)) for i in order(count)).encode()


def start(folder: Path, rows: int, batch: int, seconds: float, *width: int) -> subprocess.Popen:
    """Start tests/stub_run.py in a process of its own."""
    command = [str(part) for part in (sys.executable, STUB, folder, rows, batch, seconds, *width)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def part_bytes(folder: Path) -> int:
    """Total size of the part files of a run."""
    return sum(file.stat().st_size for file in folder.glob("part-*.jsonl"))


def check_files(folder: Path) -> None:
    """A finished run leaves no part files behind."""
    assert {file.name for file in folder.iterdir()} == {".lock", "run.json", "predictions.jsonl"}


def test_run_from_start_to_finish(tmp_path):
    work(open_run(tmp_path, CONFIG, order(10)), 3, 0)
    assert (tmp_path / "predictions.jsonl").read_bytes() == expected(10)
    check_files(tmp_path)
    record, rows = read_run(tmp_path)
    assert record["config"] == CONFIG and record["rows"] == len(rows) == 10
    assert record["started"] <= record["finished"] and record["sessions"][0]["versions"]["torch"]


def test_pending_yields_the_last_ids_at_the_end(tmp_path):
    ids = order(6)
    run = open_run(tmp_path, CONFIG, ids)
    yielded = []
    for batch in run.pending(1, last=set(ids[:2])):
        yielded += batch
        run.append([answer(i) for i in batch])
    assert yielded == ids[2:] + ids[:2]
    assert [row.example_id for row in run.finish()] == ids


def test_reading_recorded_rows_changes_no_file(tmp_path):
    assert recorded_rows(tmp_path / "none", CONFIG) == [] and not (tmp_path / "none").exists()
    run = open_run(tmp_path, CONFIG, order(10))
    run.append([answer(i) for i in order(10)[:3]])  # in a part file that this process still has open
    files = {file: file.read_bytes() for file in tmp_path.iterdir()}
    assert recorded_rows(tmp_path, CONFIG) == [answer(i) for i in order(10)[:3]]
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == files
    with pytest.raises(UserError, match="another configuration"):
        recorded_rows(tmp_path, CONFIG | {"model": "other"})
    run.finish()
    assert len(recorded_rows(tmp_path, CONFIG)) == 3


def test_run_without_rows_is_replaced_by_another_configuration(tmp_path):
    """A run without rows is replaced, but not while its process is alive: that process may still write rows."""
    other = CONFIG | {"model": "other"}
    child = start(tmp_path, 10, 5, 3)  # has the run open and no row yet
    while not (tmp_path / "run.json").exists() or not read_run(tmp_path)[0].get("config"):
        time.sleep(0.01)
    assert recorded_rows(tmp_path, other) == []
    with pytest.raises(UserError, match="another configuration"):
        open_run(tmp_path, other, order(10)).locks.close()
    child.kill()
    child.communicate()
    work(open_run(tmp_path, other, order(10)), 3, 0)
    record, _ = read_run(tmp_path)
    assert record["config"] == other and len(record["sessions"]) == 1
    check_files(tmp_path)
    with pytest.raises(UserError, match="another configuration"):
        open_run(tmp_path, CONFIG, order(10))


def test_run_without_a_result_is_replaced_and_a_result_is_not(tmp_path):
    open_run(tmp_path / "a", CONFIG, order(10)).locks.close()  # no rows yet: started without the limit
    work(open_run(tmp_path / "a", CONFIG | {"limit": 2}, order(2)), 1, 0)
    record, rows = read_run(tmp_path / "a")
    assert record["finished"] and record["target"] == len(rows) == 2
    run = open_run(tmp_path / "b", CONFIG, order(10))
    run.not_applicable("too long")  # a result without rows
    run.locks.close()
    with pytest.raises(UserError, match="another configuration"):
        open_run(tmp_path / "b", CONFIG | {"model": "other"}, order(10))
    assert read_run(tmp_path / "b")[0]["not_applicable"] == "too long"


def test_record_without_a_template_is_resumed(tmp_path):
    run = open_run(tmp_path, CONFIG, order(4))
    run.append([answer(order(4)[0])])
    run.finish()
    work(open_run(tmp_path, CONFIG | {"template": "USER: {question}"}, order(4)), 2, 0)
    assert read_run(tmp_path)[0]["config"]["template"] == "USER: {question}"
    with pytest.raises(UserError, match="another configuration .template"):
        open_run(tmp_path, CONFIG | {"template": "other"}, order(4))


def test_killed_twenty_times_and_resumed_gives_the_same_bytes(tmp_path):
    rows, rng, killed_midway = 120, random.Random(0), 0
    whole = expected(rows)
    for attempt in range(20):
        folder = tmp_path / str(attempt)
        child = start(folder, rows, 4, 0.01)
        limit = rng.randrange(len(whole))
        while child.poll() is None and part_bytes(folder) < limit:
            time.sleep(0.0005)
        child.kill()
        child.communicate()
        if child.returncode == -signal.SIGKILL and 0 < part_bytes(folder) < len(whole):
            killed_midway += 1
        work(open_run(folder, CONFIG, order(rows)), rng.choice([1, 3, 8]), 0)
        assert (folder / "predictions.jsonl").read_bytes() == whole
        check_files(folder)
    assert killed_midway >= 15


def test_truncated_last_line_is_dropped(tmp_path):
    run = open_run(tmp_path, CONFIG, order(6))
    for ids, _ in zip(run.pending(2), range(2), strict=False):
        run.append([answer(i) for i in ids])
    run._wait_for_disk()
    run._shard.close()
    run.locks.close()
    data = (tmp_path / "part-0.jsonl").read_bytes()
    for cut in (1, 20, len(to_line(answer("image-3.jpg")).encode()) - 1):
        (tmp_path / "part-0.jsonl").write_bytes(data[:-cut])
        again = open_run(tmp_path, CONFIG, order(6))
        assert again.done == {"image-0.jpg", "image-1.jpg", "image-2.jpg"}
        again.locks.close()
    work(open_run(tmp_path, CONFIG, order(6)), 2, 0)
    assert (tmp_path / "predictions.jsonl").read_bytes() == expected(6)


def test_corrupt_line_is_reported_with_its_row(tmp_path):
    work(open_run(tmp_path, CONFIG, order(4)), 2, 0)
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "predictions.jsonl").write_text(lines[0] + "corrupt\n" + "".join(lines[2:]))
    with pytest.raises(UserError, match=r"predictions.jsonl row 2 is not a prediction"):
        open_run(tmp_path, CONFIG, order(4))


def test_different_configuration_is_refused_with_the_difference(tmp_path):
    work(open_run(tmp_path, CONFIG, order(4)), 2, 0)
    before = (tmp_path / "predictions.jsonl").read_bytes()
    with pytest.raises(UserError, match='model: "stub" there, "other" now; seed: null there, 3 now'):
        open_run(tmp_path, CONFIG | {"model": "other", "seed": 3}, order(4))
    assert (tmp_path / "predictions.jsonl").read_bytes() == before
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match="run.json cannot be read"):
        open_run(tmp_path, CONFIG, order(4))


def test_larger_limit_resumes_and_smaller_limit_keeps_every_row(tmp_path):
    work(open_run(tmp_path, CONFIG | {"limit": 4}, order(4)), 2, 0)
    run = open_run(tmp_path, CONFIG | {"limit": 10}, order(10))
    assert list(run.pending(4))[0] == ["image-4.jpg", "image-5.jpg", "image-6.jpg", "image-7.jpg"]
    run.locks.close()
    work(open_run(tmp_path, CONFIG | {"limit": 10}, order(10)), 4, 0)
    assert (tmp_path / "predictions.jsonl").read_bytes() == expected(10)
    small = open_run(tmp_path, CONFIG | {"limit": 4}, order(4))
    assert small.complete
    small.finish()
    assert (tmp_path / "predictions.jsonl").read_bytes() == expected(10)
    assert json.loads((tmp_path / "run.json").read_text())["config"]["limit"] == 10


def test_processes_share_the_rows(tmp_path):
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
    check_files(folder)


def test_processes_with_the_same_batch_size_compute_each_row_once(tmp_path):
    child = start(tmp_path, 9, 3, 0.5)
    child_ids = child.stdout.readline().split()  # the child holds its first lease
    run = open_run(tmp_path, CONFIG, order(9))
    parent_ids = []
    for ids in run.pending(3):
        run.append([answer(i) for i in ids])
        parent_ids += ids
    child_ids += child.communicate()[0].split()
    assert sorted(parent_ids + child_ids) == sorted(order(9)) and parent_ids and child_ids
    run.finish()
    assert (tmp_path / "predictions.jsonl").read_bytes() == expected(9)


def test_killed_process_loses_only_its_lease(tmp_path):
    killed = start(tmp_path, 12, 3, 60)
    leased = killed.stdout.readline().split()  # the process holds this lease for a minute
    assert leased == ["image-0.jpg", "image-1.jpg", "image-2.jpg"]
    survivor = open_run(tmp_path, CONFIG, order(12))
    batches = []
    for ids in survivor.pending(3):
        batches.append(ids)
        survivor.append([answer(i) for i in ids])
        if len(batches) == 3:  # every batch except the lease of the other process, which is still alive
            assert leased not in batches
            os.kill(killed.pid, signal.SIGKILL)
            killed.communicate()
    assert batches[3] == leased
    survivor.finish()
    assert (tmp_path / "predictions.jsonl").read_bytes() == expected(12)
    check_files(tmp_path)


def test_rows_of_a_killed_process_count_as_done(tmp_path):
    """The survivor takes over the part file of a process that wrote rows after the survivor had opened the run."""
    survivor = open_run(tmp_path, CONFIG, order(12))
    killed = start(tmp_path, 12, 3, 0.2)
    for _ in range(3):
        killed.stdout.readline()  # two batches are recorded when the third begins
    killed.kill()
    killed.communicate()
    recorded = (tmp_path / "part-0.jsonl").read_text().count("\n")
    survivor.append([answer("image-11.jpg")])
    assert Path(survivor._shard.name).name == "part-0.jsonl"
    remaining = [i for batch in survivor.pending(3) for i in batch]
    assert recorded >= 6 and len(remaining) == 12 - recorded - 1


def test_run_is_finished_only_when_its_largest_limit_is(tmp_path):
    larger = open_run(tmp_path, CONFIG, order(10))
    for ids, _ in zip(larger.pending(2), range(3), strict=False):
        larger.append([answer(i) for i in ids])
    larger._wait_for_disk()
    larger._shard.close()
    larger.locks.close()  # this process stops with six of ten rows
    work(open_run(tmp_path, CONFIG | {"limit": 4}, order(4)), 2, 0)
    record, rows = read_run(tmp_path)
    assert (record["finished"], record["target"], record["config"]["limit"], len(rows)) == (None, 10, None, 6)
    work(open_run(tmp_path, CONFIG, order(10)), 2, 0)
    record, rows = read_run(tmp_path)
    assert record["finished"] and record["rows"] == len(rows) == 10


def test_merge_with_a_smaller_limit_keeps_the_evaluation_order(tmp_path):
    larger = open_run(tmp_path, CONFIG, order(6))
    larger.append([answer(i) for i in reversed(order(6))])
    larger._wait_for_disk()
    larger._shard.close()
    larger.locks.close()  # this process stops with every row recorded and nothing merged
    work(open_run(tmp_path, CONFIG | {"limit": 2}, order(2)), 2, 0)
    work(open_run(tmp_path, CONFIG, order(6)), 2, 0)
    assert (tmp_path / "predictions.jsonl").read_bytes() == expected(6)


def test_rows_without_run_json_are_refused(tmp_path):
    work(open_run(tmp_path, CONFIG, order(4)), 2, 0)
    (tmp_path / "run.json").unlink()
    with pytest.raises(UserError, match="rows but no run.json"):
        open_run(tmp_path, CONFIG, order(4))


def test_every_package_version_that_wrote_rows_is_recorded(tmp_path, monkeypatch):
    work(open_run(tmp_path, CONFIG | {"limit": 4}, order(4)), 2, 0)
    monkeypatch.setattr(store, "versions", lambda: {"torch": "99"})
    work(open_run(tmp_path, CONFIG | {"limit": 6}, order(6)), 2, 0)
    work(open_run(tmp_path, CONFIG | {"limit": 8}, order(8)), 2, 0)
    torch_versions = [session["versions"]["torch"] for session in read_run(tmp_path)[0]["sessions"]]
    assert len(torch_versions) == 2 and torch_versions[1] == "99"


def test_rows_are_synced_per_batch_before_the_lease_ends(tmp_path, monkeypatch):
    allow, synced = threading.Event(), []

    def fsync(number: int) -> None:
        assert allow.wait(10)
        synced.append(number)

    run = open_run(tmp_path, CONFIG, order(4))
    batches = run.pending(2)
    run.append([answer(i) for i in next(batches)])
    run._wait_for_disk()
    monkeypatch.setattr(store.os, "fsync", fsync)
    run.append([answer(i) for i in next(batches)])
    take_lease = (
        f"import fcntl; fcntl.lockf(open({str(tmp_path / '.lock')!r}, 'a+b'), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 2)"
    )
    assert b"BlockingIOError" in subprocess.run([sys.executable, "-c", take_lease], capture_output=True).stderr
    allow.set()
    run._wait_for_disk()
    assert len(synced) == 1
    assert subprocess.run([sys.executable, "-c", take_lease], capture_output=True).returncode == 0

    def fsync_on_full_disk(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", fsync_on_full_disk)
    run.append([answer("image-0.jpg")])
    with pytest.raises(OSError, match="No space left"):
        run.finish()


def test_reason_for_not_applicable_is_recorded(tmp_path):
    run = open_run(tmp_path, CONFIG, order(3))
    run.not_applicable("too long")
    assert read_run(tmp_path)[0]["not_applicable"] == "too long"
    run.locks.close()
    work(open_run(tmp_path, CONFIG, order(3)), 3, 0)
    assert "not_applicable" not in read_run(tmp_path)[0]


def small_disk(command: str, size: str = "64k", options: str = "rw") -> subprocess.CompletedProcess:
    """Run a shell command with a small tmpfs mounted on /mnt, in a private mount namespace."""
    mount = f"mount -t tmpfs -o size={size} tmpfs /mnt && {{ {command}; }}"
    map_user = [] if os.geteuid() == 0 else ["--map-root-user"]
    arguments = ["unshare", "--mount", *map_user, "bash", "-c", mount]
    return subprocess.run(arguments, capture_output=True, text=True, cwd=STUB.parent.parent)


@pytest.fixture
def needs_mount() -> None:
    """Skip the test where `small_disk` cannot mount a tmpfs."""
    try:
        if small_disk("true").returncode == 0:
            return
    except FileNotFoundError:
        pass
    pytest.skip("this machine does not allow a test to mount a tmpfs")


def test_full_disk_keeps_the_recorded_rows(needs_mount, tmp_path):
    """The first process fills the disk; after space is freed, the same command finishes with the same bytes."""
    stub = f"{sys.executable} {STUB} /mnt/run 200 4 0"
    result = small_disk(
        f"head -c 30000 /dev/zero > /mnt/ballast; {stub}; echo code $?; ls -l /mnt/run; rm /mnt/ballast; "
        f"mount -o remount,size=2m /mnt; {stub} && cp /mnt/run/predictions.jsonl {tmp_path}"
    )
    assert "No space left on device" in result.stderr and "code 1" in result.stdout, result.stderr
    assert (tmp_path / "predictions.jsonl").read_bytes() == expected(200)


def test_fingerprint_depends_only_on_the_checkpoint_files(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"x" * 1000)
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "b" / "notes.md").write_text("not a part of the checkpoint")
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").write_bytes(b"x" * 999 + b"y")
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")
    assert len(fingerprint(tmp_path / "a" / "model.safetensors")) == 64
