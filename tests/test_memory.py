"""Protects: a batch that does not fit into the memory is halved, with a line in the log and the same rows."""

import pytest
import torch
from conftest import script

from vlmclassifier.devices import BatchSplitter
from vlmclassifier.records import UserError
from vlmclassifier.runs import read_run


def test_a_batch_is_halved_until_it_fits_and_later_batches_too(capsys):
    sizes = []

    def squares(part):
        numbers = range(10)[part]
        sizes.append(len(numbers))
        if len(numbers) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return [number * number for number in numbers]

    splitter = BatchSplitter()
    assert splitter.run(squares, 10) == [number * number for number in range(10)]
    assert sizes == [10, 5, 3, 3, 3, 1]
    assert splitter.run(squares, 4) == [0, 1, 4, 9] and sizes[6:] == [3, 1]  # 4 is not tried again
    assert capsys.readouterr().err.splitlines() == [
        "out of memory at 10 images: continuing with 5, no row is lost",
        "out of memory at 5 images: continuing with 3, no row is lost",
    ]


def test_other_errors_are_raised_and_a_single_row_that_does_not_fit_is_an_error():
    def fail(part):
        raise RuntimeError("shapes do not match")

    def run_out_of_memory(part):
        raise RuntimeError(
            "[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."
        )

    with pytest.raises(RuntimeError, match="shapes do not match"):
        BatchSplitter().run(fail, 2)
    with pytest.raises(UserError, match="A single image does not fit into the device"):
        BatchSplitter().run(run_out_of_memory, 2)


@pytest.mark.parametrize("kind", ["vlm", "clip"])
def test_the_scripts_record_the_same_rows(kind, tiny, images, tmp_path, monkeypatch, capsys):
    """The model runs out of memory with more than three images, with CUDA's error message."""
    module = script(f"main_results/classify_{kind}.py")
    key = {"vlm": "llava-next-vicuna-7b", "clip": "clip-vit-l-336"}[kind]
    options = {"weights": tiny / key, "benchmark": "caltech", "split": "all", "data_root": images, "limit": 11,
               "candidates": "5", "batch_size": 8}  # fmt: skip
    module.main(module.Args(key, out=tmp_path / "whole", **options))
    limit_memory(kind, monkeypatch)
    module.main(module.Args(key, out=tmp_path / "halved", **options))
    rows = [(tmp_path / name / "predictions.jsonl").read_bytes() for name in ("whole", "halved")]
    assert rows[0] == rows[1] and len(read_run(tmp_path / "halved")[1]) == 11
    assert "out of memory at 8 images: continuing with 4" in capsys.readouterr().err


def limit_memory(kind, monkeypatch):
    """Let the model run out of memory with more than three images."""
    from vlmclassifier.clip import CLIP
    from vlmclassifier.vlm import VLM

    model_class, method = {"vlm": (VLM, "_generate"), "clip": (CLIP, "_encode")}[kind]
    original = getattr(model_class, method)

    def limited(self, batch, *arguments):
        if len(batch["input_ids"] if kind == "vlm" else batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return original(self, batch, *arguments)

    monkeypatch.setattr(model_class, method, limited)
