"""Protects: fine-tuning changes exactly the declared parts, resumes exactly, and its weights come back."""

import csv
import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import noise, run_script, script
from safetensors.torch import load_file, save_file
from test_families import FAMILIES

from vlmclassifier import load_vlm
from vlmclassifier.finetuning.collator import IGNORED, Collator, encode_row
from vlmclassifier.finetuning.data import (
    caption_rows,
    classification_rows,
    conversation_rows,
    export_conversations,
    mixture,
)
from vlmclassifier.finetuning.loss import row_losses, summed_loss
from vlmclassifier.finetuning.parts import Lora, role_of, select_trained
from vlmclassifier.finetuning.spikes import SpikeWatch, read_steps
from vlmclassifier.finetuning.weights import load_trained, save_trained
from vlmclassifier.identity import training_record
from vlmclassifier.records import Example, UserError
from vlmclassifier.runs import read_run

QUESTION = "What type of object is in this photo?"
SMALL = {"lora_rank": 4, "lora_alpha": 8, "effective_batch": 4, "batch_size": 2, "evaluated": 4, "held_out": 0.25}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Rows about four images of different shapes, with answers of different lengths."""
    folder = tmp_path_factory.mktemp("photos")
    names = ["cat", "a long name of things", "dog house", "sea lion"]
    rows = []
    for number, (size, name) in enumerate(zip([(90, 60), (61, 130), (64, 64), (200, 64)], names, strict=True)):
        noise(size, number).save(folder / f"{number}.png")
        rows.append({"id": f"{number}.png", "image": str(folder / f"{number}.png"), "root": str(folder), "label": name,
                     "turns": [{"question": QUESTION, "answer": name}]})  # fmt: skip
    return rows


def text_row(*turns):
    turns = [{"question": question, "answer": answer} for question, answer in turns]
    return {"id": "text", "image": "", "root": "", "label": "", "turns": turns}


@pytest.mark.parametrize("key", FAMILIES)
def test_the_loss_equals_full_logits_of_single_rows(key, tiny, photos):
    """For every family; text-only rows and dialogues too, alone and beside images."""
    from vlmclassifier.ranking.one_by_one import _append_name

    vlm = load_vlm(key, tiny / key)
    collator = Collator(vlm)
    with torch.no_grad():
        losses = row_losses(vlm.model, collator(photos)).tolist()
        total = summed_loss(vlm.model, vlm.model, collator(photos)).item()
        for row, loss in zip(photos, losses, strict=True):
            encoded = encode_row(vlm, row, collator.suffix)
            inputs = vlm.process([collator.open(row)], [encoded.prompt])
            length, ids = inputs["input_ids"].shape[1], torch.tensor(encoded.ids)
            logits = vlm.model(**_append_name(vlm, inputs, ids), use_cache=False).logits[0, length - 1 : -1]
            assert abs(F.cross_entropy(logits.float(), ids, reduction="sum").item() - loss) <= 5e-5 * loss
            assert ids[-1] == vlm.processor.tokenizer.eos_token_id
        assert abs(total - sum(losses)) <= 1e-5 * total
        dialogue = text_row(("Hi there?", "hello you"), ("And now?", "nothing"))
        if hasattr(vlm.model, "qformer"):
            with pytest.raises(UserError, match="Row text has no image, which .* cannot be trained without"):
                collator([dialogue])
            return
        beside, alone = row_losses(vlm.model, collator([photos[0], dialogue]))[1], collator([dialogue])
        assert abs(row_losses(vlm.model, alone)[0] - beside) <= 1e-4 * beside
        assert (alone["labels"] != IGNORED).sum() > 4 and "pixel_values" not in alone


@pytest.mark.parametrize("choice", ["projector", "projector+lora", "lora", "qformer", "all"])
@pytest.mark.parametrize("key", FAMILIES)
def test_gradients_reach_exactly_the_declared_parts(key, choice, tiny, photos):
    vlm = load_vlm(key, tiny / key)
    if choice == "qformer" and not hasattr(vlm.model, "qformer"):
        with pytest.raises(UserError, match="has no Q-Former"):
            select_trained(vlm.model, choice, Lora(4, 8))
        return
    trained = select_trained(vlm.model, choice, Lora(4, 8, 0.0))
    with torch.no_grad():  # LoRA's second matrices are zero, so that the first ones would get no gradient
        for name, parameter in trained.items():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    summed_loss(vlm.model, vlm.model, Collator(vlm)(photos[:2])).backward()
    is_blip, reached = hasattr(vlm.model, "qformer"), set()
    for name, parameter in vlm.model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) <= (name in trained), name
        if parameter.grad is not None and parameter.grad.any():
            reached.add(role_of(name, is_blip))
    expected = {"projector": {"projector"}, "projector+lora": {"projector", "LoRA"}, "lora": {"LoRA"},
                "qformer": {"Q-Former", "projector"}, "all": {"projector", "language model"}}[choice]  # fmt: skip
    assert reached >= expected and "vision encoder" not in reached


def finetune(tiny, own, out, model="llava-1.5-7b", **options):
    module = script("training_analysis/finetune_vlm.py")
    settings = SMALL | own.args | {"weights": tiny / model, "epochs": 2.0, "learning_rate": 1e-2, "lora_rate": 1e-2}
    module.main(module.Args(model, out=out, **settings | options))
    return out


@pytest.fixture
def classes_of_colour(own):
    """Twelve train images and four test images of two colours."""
    from PIL import Image

    own.rows = []
    for number in range(16):
        colour = (200, 30 + number, 20) if number % 2 else (20, 30 + number, 200)
        Image.new("RGB", (40, 40), colour).save(own.folder / f"{number}.png")
        own.rows.append({"image": f"{number}.png", "label": ["cat", "dog"][number % 2],
                         "split": "train" if number < 12 else "test"})  # fmt: skip
    own.write()
    return own


@pytest.mark.parametrize("choice", ["projector", "projector+lora"])
def test_a_training_is_the_same_resumed_and_divided(choice, tiny, classes_of_colour, tmp_path, monkeypatch, capsys):
    """Interrupted after its third step, or with other parts of a step: the same weights and files."""
    own = classes_of_colour
    whole = finetune(tiny, own, tmp_path / "whole", train=choice, evaluate_test=True)
    printed = capsys.readouterr().out
    assert (
        "10 rows" not in printed and "8 rows, 4 per step: 2 per forward pass x 2 accumulated x 1 processes" in printed
    )
    assert f"--adapter {whole}/best" in printed and not list(whole.glob("checkpoint-*"))
    steps = read_steps(whole / "loss.csv")
    assert [step.step for step in steps] == [1, 2, 3, 4] and all(math.isfinite(step.loss) for step in steps)
    with open(whole / "epochs.csv", newline="") as stream:
        epochs = list(csv.DictReader(stream))
    assert [(row["epoch"], row["held_out_n"], row["test_n"]) for row in epochs] == [
        ("1.0", "4", "4"),
        ("2.0", "4", "4"),
    ]

    from vlmclassifier.finetuning import trainer

    original = trainer.EpochCallback.on_step_end

    def interrupt(self, args, state, control, **more):
        self.interrupted = state.global_step == 3
        original(self, args, state, control, **more)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.EpochCallback, "on_step_end", interrupt)
        with pytest.raises(SystemExit) as ended:
            finetune(tiny, own, tmp_path / "resumed", train=choice, evaluate_test=True)
    assert ended.value.code == 130
    resumed = finetune(tiny, own, tmp_path / "resumed", train=choice, evaluate_test=True)
    for name in ("loss.csv", "epochs.csv", "training.json", "best/training.json"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes(), name
    for file in whole.glob("*/*.safetensors"):
        assert file.read_bytes() == (resumed / file.relative_to(whole)).read_bytes(), file
    at_once = finetune(tiny, own, tmp_path / "once", train=choice, evaluate_test=True, batch_size=4, lora_dropout=0.0)
    parts = finetune(tiny, own, tmp_path / "parts", train=choice, evaluate_test=True, batch_size=1, lora_dropout=0.0)
    for one, other in zip(*(read_steps(folder / "loss.csv") for folder in (at_once, parts)), strict=True):
        assert one.loss == pytest.approx(other.loss, abs=1e-4)
    capsys.readouterr()
    finetune(tiny, own, whole, train=choice, evaluate_test=True)
    assert "is trained" in capsys.readouterr().out
    with pytest.raises(UserError, match="training of another configuration .learning_rate"):
        finetune(tiny, own, whole, train=choice, learning_rate=1e-3)


def test_only_declared_parts_change_and_weights_come_back(tiny, classes_of_colour, tmp_path):
    """The rest of the model is bit-identical; --adapter of classify_vlm.py gives the trained model's answers."""
    own = classes_of_colour
    folder = finetune(tiny, own, tmp_path / "run", train="projector+lora", steps=3, epochs=None)
    before = dict(load_vlm("llava-1.5-7b", tiny / "llava-1.5-7b").model.named_parameters())
    vlm = load_vlm("llava-1.5-7b", tiny / "llava-1.5-7b")
    load_trained(vlm.model, folder / "last")
    stored = load_file(folder / "last" / "trained.safetensors")
    assert stored and all("multi_modal_projector" in name for name in stored)
    for name, parameter in vlm.model.named_parameters():
        plain = name.replace(".base_layer.", ".")
        if "lora_" not in name:
            assert torch.equal(parameter, before[plain]) != (name in stored), name
    for layer in load_file(folder / "last" / "adapter_model.safetensors"):
        assert ".language_model." in layer
    from peft import PeftModel

    base = load_vlm("llava-1.5-7b", tiny / "llava-1.5-7b").model
    base.load_state_dict(stored, strict=False)
    by_peft = PeftModel.from_pretrained(base, str(folder / "last")).eval()  # PEFT reads the adapter as its own
    collator, rows = Collator(vlm), classification_rows(
        [Example("0.png", str(own.folder / "0.png"), "cat", 0, "train")], own.folder
    )  # fmt: skip
    batch = collator([rows[0]])
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "row_ids")}
    with torch.no_grad():
        ours, theirs, plain = (model(**inputs).logits for model in (vlm.model, by_peft, base))
    assert torch.allclose(ours, theirs, atol=1e-6)
    classify = script("main_results/classify_vlm.py")
    args = classify.Args(weights=tiny / "llava-1.5-7b", out=tmp_path / "answers", adapter=folder / "last", **own.args)
    classify.main(args)
    record = json.loads((tmp_path / "answers" / "run.json").read_text())["config"]
    assert (
        record["adapter"]["train"] == "projector+lora" and "fine-tuned: projector+lora on mine, last" in record["tags"]
    )
    answer = read_run(tmp_path / "answers")[1][0]
    image = collator.open({"image": str(own.folder / answer.example_id), "root": str(own.folder), "id": "x"})
    assert vlm.ask(image, QUESTION) == answer.output.strip()


@pytest.mark.parametrize("key", ["llava-1.5-7b", "blip2-2.7b", "qwen3-vl-8b", "gemma3-4b"])
def test_bfloat16_trains_and_answers(key, tiny, classes_of_colour, tmp_path):
    """As on a GPU: trained parts in float32 beside the rest in bfloat16; then the weights in a model of bfloat16."""
    own = classes_of_colour
    folder = finetune(tiny, own, tmp_path / "run", key, train="projector+lora", steps=2, epochs=None, dtype="bfloat16")
    assert {value.dtype for value in load_file(folder / "last" / "trained.safetensors").values()} == {torch.float32}
    assert all(math.isfinite(step.loss) and step.gradient_norm > 0 for step in read_steps(folder / "loss.csv"))
    classify = script("main_results/classify_vlm.py")
    classify.main(
        classify.Args(key, tiny / key, adapter=folder / "best", out=tmp_path / "a", dtype="bfloat16", **own.args)
    )
    assert len(read_run(tmp_path / "a")[1]) == 4


def test_the_table_shows_answers_to_the_trained_question_alone(tiny, classes_of_colour, tmp_path, capsys):
    own = classes_of_colour
    folder = finetune(tiny, own, tmp_path / "run", steps=1, epochs=None, wording="in_the_photo")
    assert "--wording in_the_photo --adapter" in capsys.readouterr().out
    classify, table = script("main_results/classify_vlm.py"), script("training_analysis/table.py")
    settings = {"weights": tiny / "llava-1.5-7b", "adapter": folder / "last", "out": tmp_path / "answers"} | own.args
    classify.main(classify.Args(wording=("base", "in_the_photo"), **settings))
    capsys.readouterr()
    table.main(table.Args(tmp_path, tmp_path / "none", tmp_path / "none"))
    rows = [line for line in capsys.readouterr().out.splitlines() if "projector-last_epoch" in line]
    assert len(rows) == 1 and "0.0 ±" in rows[0]
    another = finetune(tiny, own, tmp_path / "another", steps=2, epochs=None, wording="in_the_photo")
    settings |= {"adapter": another / "last", "out": tmp_path / "answers-2"}
    classify.main(classify.Args(wording=("in_the_photo",), **settings))
    capsys.readouterr()
    table.main(table.Args(tmp_path, tmp_path / "none", tmp_path / "none"))
    rows = [line for line in capsys.readouterr().out.splitlines() if "projector-last_epoch" in line]
    assert len(rows) == 2 and "steps 1," in rows[0] and "steps 2," in rows[1]  # what differs from the paper is a tag
    with open(tmp_path / "table3.csv", newline="") as stream:
        assert [row["setting"] for row in csv.DictReader(stream) if row["dataset"] == "mine"].count(
            "projector-last_epoch"
        ) > 0


def test_weights_of_something_else_are_refused(tiny, classes_of_colour, tmp_path):
    own = classes_of_colour
    folder = finetune(tiny, own, tmp_path / "run", train="projector+lora", steps=1, epochs=None)
    other = shutil.copytree(tiny / "llava-1.5-7b", tmp_path / "other")
    (other / "note.txt").write_text("other weights")
    classify = script("main_results/classify_vlm.py")
    with pytest.raises(UserError, match="was trained on another checkpoint of llava-1.5-7b than"):
        classify.main(classify.Args(weights=other, adapter=folder / "last", out=tmp_path / "a", **own.args))
    with pytest.raises(UserError, match="holds no weights of training_analysis/finetune_vlm.py"):
        classify.main(classify.Args(weights=other, adapter=other, out=tmp_path / "a", **own.args))
    qwen = load_vlm("qwen3-vl-8b", tiny / "qwen3-vl-8b").model
    with pytest.raises(UserError, match="is of another architecture: its model.multi_modal_projector"):
        load_trained(qwen, folder / "last")
    blip = load_vlm("blip2-2.7b", tiny / "blip2-2.7b").model
    with pytest.raises(UserError, match="is of another architecture: the model has no layer"):
        load_trained(blip, folder / "last")
    weights = load_file(folder / "best" / "adapter_model.safetensors")
    weights.pop(next(iter(weights)))
    save_file(weights, folder / "best" / "adapter_model.safetensors")
    with pytest.raises(UserError, match="lacks the weights of"):
        load_trained(load_vlm("llava-1.5-7b", tiny / "llava-1.5-7b").model, folder / "best")


def test_spikes_are_found_and_a_loss_that_is_not_finite_ends_the_training(
    tiny, classes_of_colour, tmp_path, monkeypatch
):
    watch = SpikeWatch()
    values = [1 + 0.01 * (n % 3) for n in range(20)]
    assert not any(watch.is_spike(value) for value in values)
    assert watch.is_spike(4.0) and watch.is_spike(math.nan) and not watch.is_spike(1.02)
    from vlmclassifier.finetuning import loss

    original = loss.answer_logits

    def broken(model, core, batch):
        logits, tokens = original(model, core, batch)
        rows = (loss.next_labels(batch["labels"]) != IGNORED).nonzero()[:, 0]
        is_bad = torch.tensor([batch["row_ids"][row] == "5.png" for row in rows])
        return logits.masked_fill(is_bad[:, None], math.nan), tokens

    monkeypatch.setattr(loss, "answer_logits", broken)
    options = {"train": "projector", "epochs": 1.0, "held_out": 0.0}
    with pytest.raises(UserError, match="Step . cannot be made: row 5.png has a loss that is not finite"):
        finetune(tiny, classes_of_colour, tmp_path / "stop", **options)
    folder = finetune(tiny, classes_of_colour, tmp_path / "skip", skip_spikes=True, **options)
    steps = read_steps(folder / "loss.csv")
    (skipped,) = [step for step in steps if step.skipped]
    assert "5.png" in skipped.rows.split() and len(skipped.rows.split()) == 4 and len(steps) == 3
    assert all(value.isfinite().all() for value in load_file(folder / "last" / "trained.safetensors").values())


def test_a_full_disk_keeps_the_weights_before(tiny, tmp_path, monkeypatch):
    model = load_vlm("llava-1.5-7b", tiny / "llava-1.5-7b").model
    select_trained(model, "projector", Lora())
    record = {"config": {"train": "projector"}, "lora": None}
    save_trained(model, tmp_path / "last", record)
    before = {file.name: file.read_bytes() for file in (tmp_path / "last").iterdir()}

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_trained(model, tmp_path / "last", record)
    assert {file.name: file.read_bytes() for file in (tmp_path / "last").iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["last"]
    assert training_record(tmp_path / "last")["config"]["train"] == "projector"


def test_rows_of_every_kind_are_mixed_and_exported(tmp_path):
    examples = [
        Example(f"{n}.png", str(tmp_path / f"{n}.png"), ["cat", "dog"][n % 2], n % 2, "train") for n in range(4)
    ]
    own = classification_rows(examples, tmp_path)
    assert own[0]["turns"] == [{"question": QUESTION, "answer": "cat"}]
    assert classification_rows(examples, tmp_path, "none")[1]["turns"] == [{"question": "", "answer": "a photo of dog"}]
    items = [
        {"id": 7, "image": "x/1.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat?"},
         {"from": "gpt", "value": "A cat."}, {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]},
        {"id": "t", "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]},
    ]  # fmt: skip
    file = tmp_path / "llava.json"
    file.write_text(json.dumps(items))
    talks = conversation_rows(file, tmp_path / "images")
    assert talks[0]["image"] == str(tmp_path / "images" / "x/1.jpg") and talks[1]["image"] == ""
    assert talks[0]["turns"][0] == {"question": "What?", "answer": "A cat."} and len(talks[0]["turns"]) == 2
    mixed = mixture([(own, 0.5), (talks, 2.0)], seed=1)
    assert len(mixed) == 2 + 4 and mixed["id"] == mixture([(own, 0.5), (talks, 2.0)], seed=1)["id"]
    export_conversations(mixed, tmp_path / "out.json")
    again = json.loads((tmp_path / "out.json").read_text())
    assert len(again) == 6 and {item.get("image", "") for item in again} >= {"x/1.jpg", ""}
    assert conversation_rows(tmp_path / "out.json", tmp_path)[0]["turns"] == mixed[0]["turns"]
    captions = tmp_path / "captions.jsonl"
    captions.write_text('{"id": "0.png", "caption": "a cat on a mat"}\n{"id": "1.png", "caption": null}\n')
    (row,) = caption_rows(examples, tmp_path, captions)
    assert row["turns"] == [{"question": "Generate a caption for the image.", "answer": "a cat on a mat"}]
    for text, message in (
        (
            '[{"id": 1, "conversations": [{"from": "gpt", "value": "x"}]}]',
            "row 1 has no .conversations. of human and gpt",
        ),
        (
            '[{"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": " "}]}]',
            "a turn without text",
        ),
        ('[{"conversations": [', "cannot be read"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            conversation_rows(file, tmp_path)
    captions.write_text('{"id": "9.png", "caption": "x"}\n')
    with pytest.raises(UserError, match="has no caption of an image of this split"):
        caption_rows(examples, tmp_path, captions)


def test_a_class_name_without_tokens_is_told_before_training(tiny, classes_of_colour, tmp_path, monkeypatch):
    from vlmclassifier.finetuning import collator

    original = collator.answer_ids
    monkeypatch.setattr(collator, "answer_ids", lambda *words: [] if words[-1] == "dog" else original(*words))
    with pytest.raises(UserError, match="The class name 'dog' has no tokens for llava-1.5-7b: rename it"):
        finetune(tiny, classes_of_colour, tmp_path / "run")
    assert not (tmp_path / "run" / "loss.csv").exists()


def test_mistakes_are_told_before_a_model_loads(tiny, classes_of_colour, tmp_path):
    for options, message in (
        ({"effective_batch": 6, "batch_size": 4}, "--effective-batch 6 is no multiple of --batch-size 4 x 1 processes"),
        ({"steps": 3}, "--steps and --epochs exclude each other"),
        ({"held_out": 1.0}, "--held-out 1 is outside 0 to 1"),
        ({"learning_rate": 0.0}, "--learning-rate 0 is not above 0"),
        ({"mix": ("x.json",)}, "--mix needs --image-root"),
        ({"mix": ("x.json=much",), "image_root": tmp_path}, "the weight is no number above 0"),
        ({"mix": ("x.json",), "image_root": tmp_path}, "x.json does not exist"),
        ({"split": "test"}, "--split test would train on the test images"),
        ({"split": "all"}, "--split all would train on the test images"),
        ({"dtype": "float16"}, "--dtype float16 has too small a range"),
        ({"objective": "names", "max_length": 64}, "--objective names reads whole prompts: leave out --max-length"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            finetune(tiny, classes_of_colour, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()
    own, export = classes_of_colour, tmp_path / "rows.json"
    finetune(tiny, own, tmp_path / "run", export=export)
    assert len(rows := json.loads(export.read_text())) == 8
    (tmp_path / "link").symlink_to(own.folder)
    own.manifest = tmp_path / "link" / own.manifest.name
    finetune(tiny, own, tmp_path / "run", export=export)
    assert [row["image"] for row in json.loads(export.read_text())] == [row["image"] for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["projector", "projector+lora"])
def test_two_processes_give_the_losses_of_one(choice, tiny, classes_of_colour, tmp_path):
    """accelerate launch with DDP over gloo; a row without an image among the rows, and so whole batches without."""
    own = classes_of_colour
    talks = [{"id": n, "conversations": [{"from": "human", "value": f"Hello {n}"}, {"from": "gpt", "value": "Hi"}]}
             for n in range(8)]  # fmt: skip
    (own.folder / "talks.json").write_text(json.dumps(talks))
    common = ["training_analysis/finetune_vlm.py", "--model", "llava-1.5-7b", "--weights", tiny / "llava-1.5-7b",
              "--benchmark", own.manifest, "--classes", own.classes, "--train", choice, "--epochs", 2, "--held-out",
              0.25,
              "--lora-rank", 4, "--lora-alpha", 8, "--lora-dropout", 0, "--effective-batch", 4, "--evaluated", 4,
              "--learning-rate", "1e-2", "--mix", own.folder / "talks.json", "--image-root", own.folder]  # fmt: skip
    run_script(*common, "--batch-size", 2, "--out", tmp_path / "one")
    run_script("-m", "accelerate.commands.launch", "--num_processes", 2, "--cpu", *common, "--batch-size", 1,
               "--out", tmp_path / "two")  # fmt: skip
    one, two = (read_steps(tmp_path / name / "loss.csv") for name in ("one", "two"))
    assert len(one) == len(two) == 8
    for left, right in zip(one, two, strict=True):
        assert left.loss == pytest.approx(right.loss, rel=2e-4) and left.gradient_norm == pytest.approx(
            right.gradient_norm, rel=2e-3
        )  # fmt: skip
    assert (tmp_path / "one" / "epochs.csv").read_text() == (tmp_path / "two" / "epochs.csv").read_text()


def test_blip_reads_larger_images_and_crops_by_epoch_and_row(tiny, classes_of_colour, photos, tmp_path):
    """Also where its weights are loaded again; the miniature's patches are 14 pixels wide."""
    own = classes_of_colour
    options = {"model": "blip2-2.7b", "train": "qformer", "epochs": 1.0}
    folder = finetune(tiny, own, tmp_path / "run", image_size=84, augment=True, **options)
    classify = script("main_results/classify_vlm.py")
    classify.main(
        classify.Args("blip2-2.7b", tiny / "blip2-2.7b", adapter=folder / "last", out=tmp_path / "a", **own.args)
    )
    vlm = load_vlm("blip2-2.7b", tiny / "blip2-2.7b")
    plain = vlm.process([noise((90, 60))], [vlm.prompt("What?")])
    vlm.resize_images(84)
    larger = vlm.process([noise((90, 60))], [vlm.prompt("What?")])
    assert larger["pixel_values"].shape[-1] == 84 > plain["pixel_values"].shape[-1]
    assert isinstance(vlm.ask(noise((90, 60)), "What?"), str) and len(read_run(tmp_path / "a")[1]) == 4
    collator = Collator(vlm, augment=0)
    first, again = (collator.open(photos[0]).tobytes() for _ in range(2))
    collator.epoch = 1
    assert first == again != collator.open(photos[0]).tobytes()
    with pytest.raises(UserError, match="cannot read images of 85 pixels"):
        finetune(tiny, own, tmp_path / "b", image_size=85, **options)
    with pytest.raises(UserError, match="llava-1.5-7b cannot read images of 84 pixels"):
        finetune(tiny, own, tmp_path / "c", image_size=84)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_one_sentence(workers, tiny, classes_of_colour, tmp_path):
    own = classes_of_colour
    (own.folder / "5.png").write_bytes(b"no image")
    done = run_script(
        "training_analysis/finetune_vlm.py", "--model", "llava-1.5-7b", "--weights", tiny / "llava-1.5-7b",
        "--benchmark", own.manifest, "--classes", own.classes, "--held-out", 0, "--effective-batch", 4,
        "--batch-size", 4, "--epochs", 1, "--workers", workers, "--out", tmp_path / "run", check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "5.png (row 5.png) is not an image in a supported format" in done.stderr


@pytest.mark.slow
def test_fsdp_that_is_not_used_ends_the_training(tiny, classes_of_colour, tmp_path):
    own = classes_of_colour
    done = run_script(
        "training_analysis/finetune_vlm.py", "--model", "llava-1.5-7b", "--weights", tiny / "llava-1.5-7b",
        "--benchmark", own.manifest, "--classes", own.classes, "--effective-batch", 4, "--batch-size", 4, "--steps", 1,
        "--out", tmp_path / "run", env={"ACCELERATE_USE_FSDP": "true"}, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "the parameters are not sharded" in done.stderr


@pytest.mark.slow
def test_sharded_parameters_have_the_gradients_of_whole_ones(tiny, photos, tmp_path):
    """`fully_shard` over two gloo processes with the product's collator and loss."""
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps(photos))
    code = tmp_path / "shard.py"
    code.write_text(SHARDED)
    done = run_script("-m", "torch.distributed.run", "--nproc_per_node", 2, code, tiny / "llava-1.5-7b", rows)
    assert done.stdout.count("sharded equals whole") == 2


SHARDED = """
import json, os, sys
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from vlmclassifier import load_vlm
from vlmclassifier.finetuning.collator import Collator
from vlmclassifier.finetuning.loss import summed_loss
from vlmclassifier.finetuning.parts import Lora, select_trained

dist.init_process_group("gloo")
mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
rows = json.load(open(sys.argv[2]))

def build():
    vlm = load_vlm("llava-1.5-7b", sys.argv[1], "cpu")
    return vlm, select_trained(vlm.model, "projector+lora", Lora(2, 4, 0.0), seed=0)

plain, trained = build()
collator = Collator(plain)
loss = summed_loss(plain.model, plain.model, collator(rows))
loss.backward()
vlm, _ = build()
for layer in vlm.model.model.language_model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(vlm.model, mesh=mesh)
half = rows[dist.get_rank() * 2 : dist.get_rank() * 2 + 2]
own = summed_loss(vlm.model, vlm.model, collator(half))
(own * 2).backward()  # gradients are averaged over the processes
total = own.detach().clone()
dist.all_reduce(total)
assert abs(total - loss) < 1e-3, (total, loss)
sharded = dict(vlm.model.named_parameters())
assert all(hasattr(parameter, "full_tensor") for parameter in sharded.values())
for name, parameter in trained.items():
    gradient = sharded[name].grad
    whole = torch.zeros_like(parameter) if gradient is None else gradient.full_tensor()
    expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    assert (whole - expected).abs().max() <= 1e-4 * max(1.0, float(expected.abs().max())), name
print("sharded equals whole", flush=True)
"""
