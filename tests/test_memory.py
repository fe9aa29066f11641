"""Protects: a batch that does not fit into the memory is halved, said in the log, and leaves the same rows."""

import pytest
import torch
from conftest import script

from vlmclassifier.devices import Halving
from vlmclassifier.records import UserError
from vlmclassifier.runs import read_run


def test_a_batch_is_halved_until_it_fits_and_stays_so(capsys):
    seen = []

    def work(rows):
        seen.append(len(rows))
        if len(rows) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return [row * row for row in rows]

    halving = Halving()
    assert halving(work, range(10)) == [n * n for n in range(10)]
    assert seen == [10, 5, 3, 3, 3, 1]
    assert halving(work, range(4)) == [0, 1, 4, 9] and seen[6:] == [3, 1]  # not tried at 4 again
    said = capsys.readouterr().err.splitlines()
    assert said == [f"out of memory at {a} pictures: going on with {b}, no row is lost" for a, b in ((10, 5), (5, 3))]


def test_other_errors_are_not_swallowed_and_one_row_is_the_end():
    def broken(rows):
        raise RuntimeError("shapes do not match")

    def full(rows):
        raise RuntimeError(
            "[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."
        )

    with pytest.raises(RuntimeError, match="shapes do not match"):
        Halving()(broken, [1, 2])
    with pytest.raises(UserError, match="Not even one picture fits into the memory"):
        Halving()(full, [1, 2])


@pytest.mark.parametrize("kind", ["vlm", "clip"])
def test_the_scripts_leave_the_same_rows(kind, tiny, pictures, tmp_path, monkeypatch, capsys):
    """The model refuses more than three pictures at once, with CUDA's words."""
    module = script(f"main_results/classify_{kind}.py")
    key = {"vlm": "llava-next-vicuna-7b", "clip": "clip-vit-l-336"}[kind]
    args = {"weights": tiny / key, "benchmark": "caltech", "split": "all", "data_root": pictures, "limit": 11,
            "candidates": "5", "batch_size": 8}  # fmt: skip
    module.main(module.Args(key, out=tmp_path / "whole", **args))
    limited = with_small_memory(kind)
    monkeypatch.setattr(*limited)
    module.main(module.Args(key, out=tmp_path / "halved", **args))
    rows = [(tmp_path / name / "predictions.jsonl").read_bytes() for name in ("whole", "halved")]
    assert rows[0] == rows[1] and len(read_run(tmp_path / "halved")[1]) == 11
    assert "out of memory at 8 pictures: going on with 4" in capsys.readouterr().err


def with_small_memory(kind):
    """Class, name and replacement of the method that would run out of memory."""
    from vlmclassifier.clip import CLIP
    from vlmclassifier.vlm import VLM

    owner, name = {"vlm": (VLM, "generate"), "clip": (CLIP, "encode_images")}[kind]
    original = getattr(owner, name)

    def limited(self, batch, *rest):
        if len(batch["input_ids"] if kind == "vlm" else batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return original(self, batch, *rest)

    return owner, name, limited
