"""Protects: the objectives over all names equal one forward pass per name, with their gradients, in every family."""

import pytest
import torch
from conftest import noise
from test_families import FAMILIES
from test_finetuning import classes_of_colour, finetune

from vlmclassifier import load_vlm
from vlmclassifier.finetuning.collator import Collator
from vlmclassifier.finetuning.loss import row_losses
from vlmclassifier.finetuning.objectives import NameCollator, NameObjective
from vlmclassifier.finetuning.parts import Lora, select_trained
from vlmclassifier.finetuning.spikes import read_steps
from vlmclassifier.records import UserError

__all__ = ["classes_of_colour"]  # a fixture
QUESTION = "What type of object is in this photo?"
NAMES = ["cat", "cat lion", "dog house", "dog", "a long name of things"]


@pytest.mark.parametrize("key", FAMILIES)
def test_the_tree_equals_one_pass_per_name(key, tiny, tmp_path):
    vlm = load_vlm(key, tiny / key)
    trained = select_trained(vlm.model, "projector+lora", Lora(2, 4, 0.0))
    rows = []
    for number, (size, name) in enumerate([((90, 60), "cat"), ((61, 130), "dog house")]):
        noise(size, number).save(tmp_path / f"{number}.png")
        rows.append({"id": str(number), "image": str(tmp_path / f"{number}.png"), "root": str(tmp_path),
                     "turns": [{"question": QUESTION, "answer": name}]})  # fmt: skip
    with torch.no_grad():
        for name, parameter in trained.items():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    batch = NameCollator(vlm, NAMES)(rows)
    objective = NameObjective(vlm, NAMES, QUESTION, "names")
    collator = Collator(vlm)
    plain = [collator([row | {"turns": [{"question": QUESTION, "answer": name}]} for row in rows]) for name in NAMES]
    sums = -torch.stack([row_losses(vlm.model, one) for one in plain], dim=1)  # [batch, names]
    assert (objective.log_probs(batch) - sums).abs().max() <= 1e-4
    for kind in ("names", "expected"):
        right = sums.log_softmax(dim=1)[torch.arange(2), batch["classes"]]
        expected = -right.sum() if kind == "names" else -right.exp().sum()
        loss = NameObjective(vlm, NAMES, QUESTION, kind)(vlm.model, vlm.model, batch)
        assert abs(loss - expected) <= 1e-4 * max(1, abs(expected))
        parameters = list(trained.values())
        ours = torch.autograd.grad(loss, parameters, allow_unused=True)
        theirs = torch.autograd.grad(expected, parameters, retain_graph=True, allow_unused=True)
        largest = max(float(gradient.abs().max()) for gradient in theirs if gradient is not None)
        for one, other in zip(ours, theirs, strict=True):
            if other is not None:
                assert (one - other).abs().max() <= 1e-5 * max(1, largest)


@pytest.mark.parametrize("objective", ["names", "expected"])
def test_both_objectives_train(objective, tiny, classes_of_colour, tmp_path):
    folder = finetune(tiny, classes_of_colour, tmp_path / "run", train="all", objective=objective, epochs=12.0,
                      effective_batch=8, batch_size=8, evaluated=1)  # fmt: skip
    losses = [step.loss for step in read_steps(folder / "loss.csv")]  # every step has all rows
    assert losses[-1] < losses[0] - 0.2
    with pytest.raises(UserError, match="is for classification rows alone"):
        finetune(tiny, classes_of_colour, tmp_path / "b", objective=objective, gradient_checkpointing=True)
    with pytest.raises(UserError, match="Row x does not ask for a class name"):
        NameCollator(load_vlm("llava-1.5-7b", tiny / "llava-1.5-7b"), NAMES)([
            {"id": "x", "image": "", "root": "", "turns": [{"question": QUESTION, "answer": "cat"}]}
        ])  # fmt: skip
