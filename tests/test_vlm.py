"""Protects: the answers equal those of plain transformers, whatever the batch; unsuitable checkpoints are refused."""

import json
import shutil

import pytest
import torch
from conftest import script
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    Blip2ForConditionalGeneration,
    Blip2Processor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from vlmclassifier.benchmarks import load_evaluation
from vlmclassifier.images import open_image
from vlmclassifier.records import ContextError, UserError
from vlmclassifier.runs import read_run
from vlmclassifier.vlm import load_vlm
from vlmclassifier.vlm.loading import _device_map

QUESTION = "What type of object is in this photo?"
PLAIN = {
    "llava-1.5-7b": (LlavaForConditionalGeneration, LlavaProcessor, f"USER: <image>\n{QUESTION}\nASSISTANT:"),
    "blip2-2.7b": (Blip2ForConditionalGeneration, Blip2Processor, f"Question: {QUESTION} Answer:"),
}


def classify(out, tiny, images, **options) -> list:
    """Run main_results/classify_vlm.py in this process and return its rows."""
    module = script("main_results/classify_vlm.py")
    key = options.setdefault("model", "llava-1.5-7b")
    options = {"benchmark": "flowers", "split": "all", "data_root": images, "limit": 20} | options
    module.main(module.Args(weights=tiny / key, out=out, **options))
    return read_run(out)[1]


@pytest.mark.parametrize("key", PLAIN)
def test_answers_equal_plain_transformers_one_image_at_a_time(key, tiny, images, tmp_path):
    rows = classify(tmp_path, tiny, images, model=key)
    model_class, processor_class, prompt = PLAIN[key]
    model = model_class.from_pretrained(tiny / key).eval()
    processor = processor_class.from_pretrained(tiny / key)
    answers = []
    for row in rows:
        image = Image.open(images / row.example_id).convert("RGB")
        inputs = processor(images=image, text=prompt, return_tensors="pt")
        with torch.no_grad():
            sequence = model.generate(**inputs, do_sample=False, max_new_tokens=64)[0]
        answers.append(processor.tokenizer.decode(sequence[inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    assert [row.output for row in rows] == answers
    assert len(answers) == 20 and len(set(answers)) >= 10
    assert all(row.prompt == prompt and row.choices is None for row in rows)


@pytest.mark.parametrize("key", PLAIN)
def test_the_answer_depends_on_the_image(key, tiny, images):
    vlm = load_vlm(key, tiny / key)
    examples = load_evaluation("caltech", root=images, split="all", limit=2).examples
    images = [open_image(example.image) for example in examples]
    prompts = [vlm.prompt(QUESTION)] * 2
    first, second = vlm.generate(vlm.prepare(images, prompts))
    assert first != second
    assert vlm.generate(vlm.prepare(images[::-1], prompts)) == [second, first]


@pytest.mark.parametrize(("key", "candidates"), [("llava-1.5-7b", "5"), ("blip2-2.7b", "20")])
def test_batch_sizes_give_the_same_bytes(key, candidates, tiny, images, tmp_path):
    """With prompts of different lengths, because their candidates differ, and images of different sizes."""
    files = []
    for batch_size in (1, 3, 8):
        out = tmp_path / str(batch_size)
        rows = classify(out, tiny, images, model=key, candidates=candidates, batch_size=batch_size)
        files.append((out / "predictions.jsonl").read_bytes())
    assert files[0] == files[1] == files[2]
    assert len({len(row.prompt) for row in rows}) > 5
    for row in rows:
        assert len(row.choices) == int(candidates) and row.label in row.choices
        assert f'Choose one from "{", ".join(row.choices)}".' in row.prompt


def test_rows_are_in_evaluation_order_and_contain_the_prompt(tiny, images, tmp_path):
    rows = classify(tmp_path, tiny, images, chain_of_thought=True, wording="alternative_2", max_new_tokens=4, limit=9)
    task = load_evaluation("flowers", root=images, split="all", limit=9)
    assert [row.example_id for row in rows] == [example.id for example in task.examples]
    prompt = "USER: <image>\nWhat is the main object depicted in this photograph?\nASSISTANT: Let's think step by step."
    assert {row.prompt for row in rows} == {prompt}
    assert all(task.names[row.class_index] == row.label for row in rows)
    config = read_run(tmp_path)[0]["config"]
    assert (
        config["tags"] == ["miniature", "4 tokens", "split all"]
        and config["max_new_tokens"] == 4
        and config["template"].startswith("USER:")
        and len(config["checkpoint"]) == 64
    )


def test_a_row_stops_at_its_end_token(tiny, images):
    """If a frequent token is the end token, the rows of one batch end at different positions, as one by one."""
    vlm = load_vlm("llava-1.5-7b", tiny / "llava-1.5-7b")
    images = [open_image(e.image) for e in load_evaluation("flowers", root=images, split="all", limit=8).examples]
    prompts = [vlm.prompt(QUESTION)] * 8
    batch = vlm.prepare(images, prompts)
    length = batch.inputs["input_ids"].shape[1]
    tokens = vlm.model.generate(**batch.inputs, do_sample=False, max_new_tokens=64)[:, length:]
    end_token = tokens.flatten().mode().values.item()
    vlm.model.generation_config.eos_token_id = end_token
    lengths, expected = set(), []
    for row in tokens:
        length = (row == end_token).nonzero()[0].item() if end_token in row else 64
        lengths.add(length)
        expected.append(vlm.processor.tokenizer.decode(row[:length], skip_special_tokens=True))
    assert len(lengths) > 2
    assert vlm.generate(batch) == expected
    assert [vlm.generate(vlm.prepare([image], prompts[:1]))[0] for image in images] == expected


def test_stored_sampling_settings_have_no_effect(tiny, images, tmp_path):
    folder = shutil.copytree(tiny / "llava-1.5-7b", tmp_path / "copy")
    settings = json.loads((folder / "generation_config.json").read_text())
    settings |= {"do_sample": True, "temperature": 5.0, "repetition_penalty": 3.0, "num_beams": 3}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    image = open_image(load_evaluation("flowers", root=images, split="all", limit=1).examples[0].image)
    answers = [load_vlm("llava-1.5-7b", path).ask(image, QUESTION) for path in (folder, tiny / "llava-1.5-7b")]
    assert answers[0] == answers[1] != ""


def test_older_processors_do_not_ignore_the_image(tiny, images, tmp_path):
    """A BLIP-2 processor without `num_query_tokens` would silently ignore the image."""
    folder = shutil.copytree(tiny / "blip2-2.7b", tmp_path / "copy")
    settings = json.loads((folder / "processor_config.json").read_text())
    settings["num_query_tokens"] = None
    (folder / "processor_config.json").write_text(json.dumps(settings))
    image = open_image(load_evaluation("flowers", root=images, split="all", limit=1).examples[0].image)
    answers = [load_vlm("blip2-2.7b", path).ask(image, QUESTION) for path in (folder, tiny / "blip2-2.7b")]
    assert answers[0] == answers[1]


def test_a_prompt_without_an_image_token_is_refused(tiny):
    """The tokenizer of another checkpoint may encode the placeholder as another token, or as plain text."""
    vlm = load_vlm("llava-1.5-7b", tiny / "llava-1.5-7b")
    vlm.model.config.image_token_index = vlm.model.config.image_token_id = 599
    with pytest.raises(UserError, match="no image token"):
        vlm.prepare([Image.new("RGB", (9, 9))], [vlm.prompt(QUESTION)])


def test_an_incomplete_checkpoint_is_refused(tiny, tmp_path):
    folder = shutil.copytree(tiny / "llava-1.5-7b", tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    missing = next(name for name in weights if "linear_1.weight" in name)
    incomplete = {name: tensor for name, tensor in weights.items() if name != missing}
    save_file(incomplete, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="1 weights such as .*linear_1.weight are missing"):
        load_vlm("llava-1.5-7b", folder)
    other_shapes = {name: tensor[:5].clone() for name, tensor in weights.items()}
    save_file(other_shapes, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="cannot be loaded"):
        load_vlm("llava-1.5-7b", folder)
    (folder / "model.safetensors").write_bytes(b"corrupt")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_vlm("llava-1.5-7b", folder)
    (folder / "config.json").write_text('{"model_type": "unknown"}')
    with pytest.raises(UserError, match="transformers does not know .*: install a newer one"):
        load_vlm("llava-1.5-7b", folder)


def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers(tiny, images, tmp_path):
    with pytest.raises(ContextError, match=r"longest prompt has \d+ tokens and the answer up to 64, .* is 2048"):
        classify(tmp_path, tiny, images, model="blip2-2.7b", benchmark="cars", candidates="all")
    record, rows = read_run(tmp_path)
    assert "2048" in record["not_applicable"] and rows == []


@pytest.mark.parametrize(
    ("gpus", "relative_memory", "is_distributed"), [(1, 1, False), (2, 2, False), (2, 1, True), (8, 1.2, True)]
)
def test_a_model_larger_than_one_gpu_is_distributed(gpus, relative_memory, is_distributed, tiny, monkeypatch):
    """Only the device map, because the tests have no GPU. Under a launcher every process uses one GPU."""
    folder, device = tiny / "llava-1.5-7b", torch.device("cuda:0")
    free = int(relative_memory * (folder / "model.safetensors").stat().st_size)  # bytes
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, free))
    assert _device_map(folder, device) == ("auto" if is_distributed else {"": device})
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert _device_map(folder, device) == {"": device}


def test_the_context_is_also_checked_in_the_open_world(tiny, images, tmp_path):
    with pytest.raises(ContextError, match="answer up to 2100, .* is 2048"):
        classify(tmp_path, tiny, images, model="blip2-2.7b", max_new_tokens=2100)


def test_another_models_folder_is_refused(tiny):
    with pytest.raises(UserError, match="contains a blip-2 model, but llava-1.5-7b is of type llava"):
        load_vlm("llava-1.5-7b", tiny / "blip2-2.7b")


def test_bfloat16_and_invalid_options(tiny, images, tmp_path):
    rows = classify(tmp_path, tiny, images, dtype="bfloat16", limit=4)
    assert len(rows) == 4 and read_run(tmp_path)[0]["config"]["dtype"] == "bfloat16"
    with pytest.raises(UserError, match="does not fit|another configuration"):
        classify(tmp_path, tiny, images, dtype="float32", limit=4)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="sees no CUDA GPU"):
            classify(tmp_path / "b", tiny, images, device="cuda")
    with pytest.raises(UserError, match="--device gpu is not a device"):
        classify(tmp_path / "b", tiny, images, device="gpu")
    assert not (tmp_path / "b").exists()
    with pytest.raises(UserError, match="--batch-size 0 is below 1"):
        classify(tmp_path / "b", tiny, images, batch_size=0)
    with pytest.raises(UserError, match="--max-new-tokens 0 is below 1"):
        classify(tmp_path / "b", tiny, images, max_new_tokens=0)
