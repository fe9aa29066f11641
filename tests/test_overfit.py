"""Protects: every choice of --train learns from real photographs."""

import pytest
import torch
from conftest import script
from safetensors.torch import load_file, save_file

from vlmclassifier.runs import read_run

KEY, COUNT = "llava-1.5-7b", 30


@pytest.mark.slow
def test_a_miniature_overfits_real_photographs(tiny, realdata, tmp_path):
    """LoRA, LoRA and projector, and all of the language model from random weights; then a new projector alone.

    A projector in front of a language model that has never spoken cannot make it speak: it gets the trained one.
    """
    merge = script("training_analysis/merge.py")
    for choice in ("lora", "projector+lora", "all"):
        assert accuracy(tiny / KEY, realdata, choice, tmp_path / choice) >= 90, choice
    whole = tmp_path / "whole"
    merge.main(merge.Args(KEY, tiny / KEY, what="adapter", adapter=tmp_path / "all" / "last", out=whole))
    (file,) = whole.glob("*.safetensors")
    weights = load_file(file)
    for name, value in weights.items():
        if "multi_modal_projector" in name and value.ndim == 2:
            weights[name] = torch.randn(value.shape, generator=torch.Generator().manual_seed(0)) / value.shape[1] ** 0.5
    save_file(weights, file, metadata={"format": "pt"})
    assert accuracy(whole, realdata, "projector", tmp_path / "projector", learning_rate=3e-3, steps=120) >= 90


def accuracy(weights, realdata, choice, out, **options):
    """Accuracy in percent on the images that were trained on."""
    finetune, classify = script("training_analysis/finetune_vlm.py"), script("main_results/classify_vlm.py")
    data = {"benchmark": "caltech", "data_root": realdata, "limit": COUNT}
    settings = {"learning_rate": 1e-2, "lora_rate": 1e-2, "steps": 150, "lora_rank": 16, "lora_alpha": 32}
    settings |= {"lora_dropout": 0.0, "effective_batch": COUNT, "batch_size": COUNT, "held_out": 0.0} | options
    finetune.main(finetune.Args(KEY, weights, train=choice, out=out, **settings, **data))
    run = out.with_name(f"{out.name}-answers")
    classify.main(classify.Args(KEY, weights, adapter=out / "last", split="train", out=run, batch_size=COUNT, **data))
    rows = read_run(run)[1]
    assert len(rows) == COUNT
    return 100 * sum(row.label.lower() in row.output.lower() for row in rows) / COUNT
