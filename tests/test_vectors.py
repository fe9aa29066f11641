"""Protects: every row of a run keeps its own vector after kills, truncated files and several processes."""

import json
import random
import signal
import time

import numpy as np
import pytest
from stub_run import CONFIG, answer, order, vector, work
from test_runs import part_bytes, start

from vlmclassifier.records import UserError
from vlmclassifier.runs import open_run, read_run
from vlmclassifier.runs.vectors import VALUES, read_values

WIDTH = 7


def start_with_vectors(folder, rows, batch, seconds):
    return start(folder, rows, batch, seconds, WIDTH)


def check(folder, rows):
    """The run is finished, and each row has the vector of its example."""
    ids, tensors = read_values(folder)
    assert ids == order(rows) == [row.example_id for row in read_run(folder)[1]]
    assert tensors["values"].tolist() == [vector(i, WIDTH).tolist() for i in ids]
    assert tensors["constant"].tolist() == [0, 1, 2]
    assert {file.name for file in folder.iterdir()} == {".lock", "run.json", "predictions.jsonl", VALUES}


def test_killed_and_resumed_gives_the_same_bytes(tmp_path):
    rows, rng = 80, random.Random(0)
    work(open_run(tmp_path / "whole", CONFIG, order(rows), WIDTH), 4, 0)
    check(tmp_path / "whole", rows)
    whole = [(tmp_path / "whole" / name).read_bytes() for name in ("predictions.jsonl", VALUES)]
    for attempt in range(6):
        folder = tmp_path / str(attempt)
        child = start_with_vectors(folder, rows, 4, 0.01)
        limit = rng.randrange(len(whole[0]))
        while child.poll() is None and part_bytes(folder) < limit:
            time.sleep(0.0005)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        work(open_run(folder, CONFIG, order(rows), WIDTH), 5, 0)
        assert [(folder / name).read_bytes() for name in ("predictions.jsonl", VALUES)] == whole


@pytest.mark.parametrize("truncated", ["rows", "vectors", "both", "no vectors"])
def test_row_without_its_vector_is_computed_again(truncated, tmp_path):
    """A power failure can lose the end of either file."""
    run = open_run(tmp_path, CONFIG, order(9), WIDTH)
    for ids in run.pending(3):
        run.append([answer(i) for i in ids], np.stack([vector(i, WIDTH) for i in ids]))
        if len(run.done) == 6:
            break
    run._wait_for_disk()
    run._shard.close()
    run._shard_vectors.close()
    run.locks.close()
    part = tmp_path / "part-0.jsonl"
    vectors = part.with_suffix(".f32")
    if truncated in ("rows", "both"):
        part.write_bytes(part.read_bytes()[:-20])
    if truncated in ("vectors", "both"):
        vectors.write_bytes(vectors.read_bytes()[: -4 * WIDTH * 2 - 5])
    if truncated == "no vectors":
        vectors.unlink()
    again = open_run(tmp_path, CONFIG, order(9), WIDTH)
    assert len(again.done) == {"rows": 5, "vectors": 3, "both": 3, "no vectors": 0}[truncated]
    work(again, 2, 0)
    check(tmp_path, 9)


def test_processes_share_the_rows(tmp_path):
    children = [start_with_vectors(tmp_path, 60, 3, 0.02) for _ in range(3)]
    assert all(child.wait() == 0 for child in children)
    check(tmp_path, 60)


def test_crash_between_the_two_merged_files_keeps_rows_and_vectors_matched(tmp_path, monkeypatch):
    """The vectors are written first, with their ids, so an older predictions.jsonl next to them is not a problem."""

    def fail(*_):
        raise OSError("cut")

    work(open_run(tmp_path, CONFIG, order(4), WIDTH), 2, 0)
    old = (tmp_path / "predictions.jsonl").read_bytes()
    run = open_run(tmp_path, CONFIG, order(8), WIDTH)
    for ids in run.pending(2):
        run.append([answer(i) for i in ids], np.stack([vector(i, WIDTH) for i in ids]))
    with monkeypatch.context() as patch, pytest.raises(OSError, match="cut"):
        patch.setattr("vlmclassifier.runs.store.replace_file", fail)
        run.finish()
    run.locks.close()
    assert (tmp_path / "predictions.jsonl").read_bytes() == old and len(read_values(tmp_path)[0]) == 8
    open_run(tmp_path, CONFIG, order(8), WIDTH).finish()  # keeps the constants
    check(tmp_path, 8)


def test_rows_without_their_vectors_are_reported(tmp_path):
    work(open_run(tmp_path, CONFIG, order(4), WIDTH), 2, 0)
    (tmp_path / VALUES).unlink()
    with pytest.raises(UserError, match="has rows without their numbers .such as image-0.jpg.: values.safetensors was"):
        open_run(tmp_path, CONFIG, order(4), WIDTH).finish()


def test_refused_configuration_changes_no_file(tmp_path):
    """A command with a different width, or without vectors, leaves the files of the run as they are."""
    for name, width in (("vectors", WIDTH), ("none", 0)):
        run = open_run(tmp_path / name, CONFIG, order(6), width)
        for ids in run.pending(2):
            run.append([answer(i) for i in ids], np.stack([vector(i, width) for i in ids]) if width else None)
            if len(run.done) == 4:
                break
        run._wait_for_disk()
        run._shard.close()
        run.locks.close()
        before = {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
        for other_width in (3, WIDTH + 4, 0):
            with pytest.raises(UserError, match="another configuration"):
                open_run(tmp_path / name, CONFIG | {"model": "other"}, order(6), other_width)
        assert {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} == before


def test_run_killed_before_its_merge_keeps_its_constants(tmp_path):
    """The next start finds every row and loads no model, so the constants must be on disk already."""
    run = open_run(tmp_path, CONFIG, order(4), WIDTH)
    run.keep({"constant": np.arange(3, dtype=np.float32)})
    for ids in run.pending(2):
        run.append([answer(i) for i in ids], np.stack([vector(i, WIDTH) for i in ids]))
    run._wait_for_disk()
    run._shard.close()
    run._shard_vectors.close()
    run.locks.close()
    again = open_run(tmp_path, CONFIG, order(4), WIDTH)
    assert again.complete
    again.finish()
    check(tmp_path, 4)


def test_vector_of_another_width_is_refused(tmp_path):
    run = open_run(tmp_path, CONFIG, order(2), WIDTH)
    ids = next(run.pending(2))
    for values in (None, np.zeros((2, 3), dtype=np.float32), np.zeros((2, WIDTH))):
        with pytest.raises(ValueError, match="vector of 7 numbers"):
            run.append([answer(i) for i in ids], values)


def test_corrupt_vector_file_is_reported(tmp_path):
    (tmp_path / VALUES).write_bytes(json.dumps({}).encode())
    with pytest.raises(UserError, match="values.safetensors cannot be read .* remove the run folder"):
        read_values(tmp_path)
