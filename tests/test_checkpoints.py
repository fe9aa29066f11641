"""Protects: weights converted to another form give the same outputs."""

import json

import pytest
import torch
from conftest import noise, script
from safetensors.torch import load_file
from test_finetuning import classes_of_colour, finetune

from vlmclassifier import load_vlm
from vlmclassifier.checkpoints import logits_of
from vlmclassifier.records import UserError
from vlmclassifier.runs import read_run

__all__ = ["classes_of_colour"]  # a fixture
KEY = "llava-1.5-7b"


def convert(what, weights, **options):
    module = script("training_analysis/merge.py")
    module.main(module.Args(KEY, weights, what=what, **options))


@pytest.mark.parametrize("choice", ["projector", "projector+lora"])
def test_a_merged_checkpoint_answers_as_its_adapter(choice, tiny, classes_of_colour, tmp_path, capsys):
    own = classes_of_colour
    run = finetune(
        tiny, own, tmp_path / "run", train=choice, steps=2, epochs=None, template="llava-v1", pad_square=True
    )
    convert("adapter", tiny / KEY, adapter=run / "last", out=tmp_path / "merged")
    assert "the logits differ by" in capsys.readouterr().out
    names = {name for file in (tmp_path / "merged").glob("*.safetensors") for name in load_file(file)}
    assert names and not any("lora" in name or "base_layer" in name for name in names)
    classify = script("main_results/classify_vlm.py")
    for out, options in (
        ("a", {"weights": tiny / KEY, "adapter": run / "last"}),
        ("b", {"weights": tmp_path / "merged"}),
    ):
        classify.main(classify.Args(out=tmp_path / out, split="all", **options, **own.args))
    beside, merged = (read_run(tmp_path / out) for out in "ab")
    assert [row.output for row in beside[1]] == [row.output for row in merged[1]]
    assert beside[1][0].prompt == merged[1][0].prompt and "A chat between a curious user" in merged[1][0].prompt
    assert merged[0]["config"]["adapter"]["train"] == choice
    further = finetune(tiny, own, tmp_path / "further", weights=tmp_path / "merged", steps=1, epochs=None)
    trained = json.loads((further / "training.json").read_text())["config"]
    assert trained["template"] == "llava-v1" and trained["pad_square"] is True  # as the checkpoint was trained
    with pytest.raises(UserError, match="merged exists"):
        convert("adapter", tiny / KEY, adapter=run / "last", out=tmp_path / "merged")


def test_a_projector_of_the_original_code_goes_in_and_out(tiny, tmp_path, capsys):
    """Random weights by the original names: the model's logits are those of a model that was given them by hand."""
    vlm = load_vlm(KEY, tiny / KEY)
    projector = vlm.model.model.multi_modal_projector
    prefix = "model.mm_projector."
    weights = {}
    for layer, number in (("linear_1", 0), ("linear_2", 2)):
        for kind in ("weight", "bias"):
            parameter = getattr(getattr(projector, layer), kind)
            weights[f"{prefix}{number}.{kind}"] = torch.randn(parameter.shape) / 5
            parameter.data = weights[f"{prefix}{number}.{kind}"].clone()
    torch.save(weights, tmp_path / "mm_projector.bin")
    convert("from-original", tiny / KEY, projector=tmp_path / "mm_projector.bin", out=tmp_path / "in")
    from vlmclassifier.finetuning.weights import load_trained

    other = load_vlm(KEY, tiny / KEY)
    batch = vlm.prepare([noise((64, 64))], [vlm.prompt("What?")])
    assert not torch.allclose(logits_of(other, batch), logits_of(vlm, batch), atol=1e-3)
    load_trained(other.model, tmp_path / "in")
    assert torch.equal(logits_of(other, batch), logits_of(vlm, batch))
    record = json.loads((tmp_path / "in" / "training.json").read_text())["config"]
    assert record["template"] == "llava-v1" and record["pad_square"] is True
    for name in ("out.bin", "out.safetensors"):
        convert("to-original", tiny / KEY, adapter=tmp_path / "in", projector=tmp_path / name)
    back = torch.load(tmp_path / "out.bin", weights_only=True)
    assert back.keys() == weights.keys() == load_file(tmp_path / "out.safetensors").keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


class Code:
    def __reduce__(self):
        return (print, ("this code ran",))


def test_files_that_are_no_projector_are_refused(tiny, tmp_path, capsys):
    torch.save({"model.mm_projector.0.weight": Code()}, tmp_path / "code.bin")
    torch.save({"model.mm_projector.0.weight": torch.zeros(2, 2)}, tmp_path / "part.bin")
    wrong = {f"model.mm_projector.{n}.{kind}": torch.zeros(3, 3) for n in (0, 2) for kind in ("weight", "bias")}
    torch.save(wrong, tmp_path / "wrong.bin")
    (tmp_path / "text.bin").write_text("no weights")
    torch.save(3, tmp_path / "number.bin")
    for name, message in (
        ("code.bin", "no file of weights that can be read safely"),
        ("text.bin", "no file of weights that can be read safely"),
        ("number.bin", "is no projector of LLaVA's original code"),
        ("part.bin", "is no projector of LLaVA's original code: it needs model.mm_projector.0.weight"),
        ("wrong.bin", "is of another architecture: its linear_1.weight has the shape .3, 3."),
    ):
        with pytest.raises(UserError, match=message):
            convert("from-original", tiny / KEY, projector=tmp_path / name, out=tmp_path / "out")
    assert "this code ran" not in capsys.readouterr().out and not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="needs --adapter"):
        convert("adapter", tiny / KEY, out=tmp_path / "out")
    module = script("training_analysis/merge.py")
    with pytest.raises(UserError, match="has no projector like LLaVA's"):
        module.main(module.Args("qwen3-vl-8b", tiny / "qwen3-vl-8b", what="to-original", projector=tmp_path / "x.bin"))
