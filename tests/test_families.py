"""Protects: every family answers as plain transformers does, whatever the batch, within its context."""

import inspect
import json
import shutil

import pytest
import torch
from conftest import run_script, script
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlmclassifier import load_vlm, open_image
from vlmclassifier.benchmarks import load_evaluation
from vlmclassifier.images import image_size
from vlmclassifier.models import MODELS
from vlmclassifier.records import ContextError, UserError
from vlmclassifier.runs import read_run
from vlmclassifier.tiny import has_miniature, make_tiny
from vlmclassifier.vlm.model import extremes

# 13B models differ from their 7B ones in size only.
FAMILIES = [key for key, spec in MODELS.items() if spec.kind == "vlm" and has_miniature(spec) and "13b" not in key]
QUESTIONS = [
    "What type of object is in this photo?",
    'Identify the object in this image. Choose one from "cat, dog, horse, sunflower".',
]
# What each released checkpoint's chat template or documentation makes of the first question.
PROMPTS = {
    "llava-next-vicuna-7b": "A chat between a curious human and an artificial intelligence assistant. The assistant "
    "gives helpful, detailed, and polite answers to the human's questions. USER: <image>\n{} ASSISTANT:",
    "llava-next-mistral-7b": "[INST] <image>\n{}[/INST]",
    "instructblip-7b": "Question: {} Answer:",
    "qwen2.5-vl-7b": "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{}<|im_end|>\n"
    "<|im_start|>assistant\n",
    "paligemma2-3b": "<image>answer en {}",
    "gemma3-4b": "<bos><start_of_turn>user\n<start_of_image>{}<end_of_turn>\n<start_of_turn>model\n",
    "pixtral-12b": "<s>[INST][IMG]{}[/INST]",
}


@pytest.fixture(scope="module")
def photos(pictures) -> list[Image.Image]:
    """Eight pictures of different sizes and shapes: two of each benchmark."""
    examples = [e for b in ("imagenet", "flowers", "cars", "caltech")
                for e in load_evaluation(b, root=pictures, split="all", limit=2).examples]  # fmt: skip
    images = [open_image(example.image) for example in examples]
    images[3] = images[3].crop((0, 0, images[3].width, images[3].height // 3))
    assert len({image.size for image in images}) >= 4
    return images


@pytest.mark.parametrize("key", FAMILIES)
def test_batches_answer_as_plain_transformers_one_by_one(key, tiny, photos):
    """Pictures of different sizes, prompts of different lengths: alone through plain transformers, and as batches."""
    vlm = load_vlm(key, tiny / key)
    prompts = [vlm.prompt(QUESTIONS[number % 2]) for number in range(len(photos))]
    model = AutoModelForImageTextToText.from_pretrained(tiny / key).eval()
    processor = AutoProcessor.from_pretrained(tiny / key)
    plain = []
    for image, prompt in zip(photos, prompts, strict=True):
        begun = bool(processor.tokenizer.bos_token) and prompt.startswith(processor.tokenizer.bos_token)
        inputs = processor(images=image, text=prompt, return_tensors="pt", add_special_tokens=not begun)
        inputs.pop("labels", None)
        with torch.no_grad():
            sequence = model.generate(**inputs, do_sample=False, max_new_tokens=24)[0]
        plain.append(processor.tokenizer.decode(sequence[inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    for size in (1, 3, 8):
        chunks = [(photos[start : start + size], prompts[start : start + size]) for start in range(0, 8, size)]
        assert [text for chunk in chunks for text in vlm.generate(vlm.prepare(*chunk), 24)] == plain, size
    assert len(set(plain)) >= 4  # the answer follows the picture


@pytest.mark.parametrize("key", FAMILIES)
def test_a_picture_is_encoded_once_for_several_questions(key, tiny, photos):
    """Equal answers; the vision tower runs once, except where the Q-Former reads the question."""
    vlm, values = load_vlm(key, tiny / key), []
    tower = next(m for name, m in vlm.model.named_modules() if name.split(".")[-1] in TOWERS)

    def count(_, args: tuple, kwargs: dict) -> None:
        values.append(next(v for v in [*args, *kwargs.values()] if isinstance(v, torch.Tensor)).numel())

    tower.register_forward_pre_hook(count, with_kwargs=True)
    expected = [vlm.ask(photos[3], question) for question in QUESTIONS]
    of_one = values[0]  # what the tower is given of this picture
    assert values == [of_one, of_one] and expected[0] != expected[1]
    values.clear()
    assert vlm.ask_all(photos[3], QUESTIONS) == expected
    takes = "mm_encoder_outputs" in inspect.signature(vlm.model.forward).parameters  # not in an older transformers
    assert sum(values) == (of_one if takes and key != "instructblip-7b" else 2 * of_one)
    batch = [photos[0], photos[3], photos[0]]
    prompts = [vlm.prompt(question) for question in (*QUESTIONS, QUESTIONS[1])]
    seen = [vlm.image_features(vlm.prepare([image], prompts[:1])) for image in batch]
    inputs = vlm.prepare(batch, prompts)
    if not takes:
        assert seen == [None, None, None]
    elif seen[0] is None:
        assert "qformer_input_ids" in inputs
    else:
        assert vlm.generate(inputs, 24, seen) == vlm.generate(inputs, 24)


TOWERS = {"vision_tower", "vision_model", "visual"}


def test_the_share_of_changed_answers_in_bfloat16_is_printed():
    """The script that measures it on the miniatures: JSON on its last line, one share per family."""
    words = ["--models", "llava-1.5-7b", "qwen3-vl-8b", "--pictures", "4", "--max-new-tokens", "8"]
    shares = json.loads(run_script("scripts/bench_bfloat16.py", *words).stdout.strip().splitlines()[-1])
    assert set(shares["changed"]) == set(shares["changed_by_batch"]) == {"llava-1.5-7b", "qwen3-vl-8b"}
    assert all(0 <= share <= 1 for share in [*shares["changed"].values(), *shares["changed_by_batch"].values()])


@pytest.mark.parametrize("key", PROMPTS)
def test_prompts_are_the_released_ones(key, tiny):
    vlm = load_vlm(key, tiny / key)
    assert vlm.prompt(QUESTIONS[0]) == PROMPTS[key].format(QUESTIONS[0])
    bos = vlm.processor.tokenizer.bos_token_id
    ids = vlm.prepare([Image.new("RGB", (90, 60))], [vlm.prompt(QUESTIONS[0])])["input_ids"][0].tolist()
    assert bos is None or ids.count(bos) == 1  # never two begin tokens


def test_chain_of_thought_opens_the_answer_or_ends_the_question(tiny):
    thought = " Let's think step by step."
    mistral = load_vlm("llava-next-mistral-7b", tiny / "llava-next-mistral-7b")
    assert mistral.prompt("Q?", True) == f"[INST] <image>\nQ?[/INST]{thought}"
    blip = load_vlm("instructblip-7b", tiny / "instructblip-7b")
    assert blip.prompt("Q?", True) == f"Question: Q?{thought} Answer:"
    gemma = load_vlm("gemma3-4b", tiny / "gemma3-4b")
    assert f"<start_of_image>Q?{thought}<end_of_turn>" in gemma.prompt("Q?", True)


def test_any_other_folder_is_asked_by_its_own_chat_template(tiny, own, tmp_path, capsys):
    folder = shutil.copytree(tiny / "smolvlm2-2.2b", tmp_path / "my-smol")
    module = script("main_results/classify_vlm.py")
    module.main(module.Args(str(folder), out=tmp_path / "run", **own.args))
    record, rows = read_run(tmp_path / "run")
    assert record["config"]["model"] == "my-smol" and len(rows) == 3
    assert all(row.prompt.startswith("<|im_start|>User:<image>What type") for row in rows)
    assert "my-smol (miniature)" in capsys.readouterr().out
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="processor of my-smol has no chat template"):
        load_vlm(str(folder))


def test_a_hub_id_of_a_registered_model_is_that_model(own, tiny, tmp_path):
    flags = ["--benchmark", own.manifest, "--classes", own.classes]
    done = run_script("main_results/classify_vlm.py", "--model", "nobody/knows-7b", *flags, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "could not be fetched from the hub (nobody/knows-7b" in done.stderr
    from vlmclassifier.models import find_model

    assert find_model("llava-hf/llava-1.5-7b-hf", "vlm").key == "llava-1.5-7b"
    assert find_model("nobody/knows-7b", "vlm").key == "nobody-knows-7b"
    with pytest.raises(UserError, match="name of a registered model: use --model qwen3-vl-8b --weights"):
        find_model(str(tiny / "qwen3-vl-8b"), "vlm")  # its runs would pass for the registered model's


def test_folders_that_cannot_answer_are_one_sentence(tiny, tmp_path):
    def changed(**more) -> str:
        folder = shutil.copytree(tiny / "qwen3-vl-8b", tmp_path / f"copy-{len(list(tmp_path.iterdir()))}")
        config = json.loads((folder / "config.json").read_text()) | more
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)

    code = {"AutoConfig": "mine.MyConfig", "AutoModelForImageTextToText": "mine.MyModel"}
    with pytest.raises(UserError, match="brings code of its own, which is never run here"):
        load_vlm(changed(model_type="mine", auto_map=code))
    with pytest.raises(UserError, match="holds no model that answers questions about pictures"):
        load_vlm(changed(model_type="opt"))


def test_the_qformers_limit_is_the_second(tiny, own, tmp_path):
    """A list of many names fits into Vicuna's 2,048 positions, but not into the Q-Former's 512."""
    names = ["cat", "dog", *(f"zygomorphic {number}" for number in range(40))]
    own.classes.write_text(json.dumps(names))
    module = script("main_results/classify_vlm.py")
    args = {"weights": tiny / "instructblip-7b", "out": tmp_path / "run", "candidates": "all", **own.args}
    with pytest.raises(ContextError, match=r"has \d{3,4} tokens for the Q-Former .* whose context is 512"):
        module.main(module.Args("instructblip-7b", **args))
    record, rows = read_run(tmp_path / "run")
    assert "512" in record["not_applicable"] and not rows


def test_the_largest_picture_decides_whether_a_prompt_fits(tiny):
    """LLaVA-NeXT cuts a square picture into more tiles than a narrow one."""
    key = "llava-next-vicuna-7b"
    vlm = load_vlm(key, tiny / key)
    prompt = vlm.prompt(QUESTIONS[0])
    narrow, square = (vlm._length(Image.new("RGB", size), prompt) for size in ((2000, 100), (500, 500)))
    assert narrow < square and vlm.image_size_matters(prompt)
    vlm.model.config.get_text_config().max_position_embeddings = narrow + 64 + 5
    vlm.check_context([prompt], 64, [(2000, 100)])
    with pytest.raises(ContextError, match=rf"has {square} tokens and the answer up to 64, .* is {narrow + 69}"):
        vlm.check_context([prompt], 64, [(2000, 100), (500, 500), (1999, 101)])
    with pytest.raises(ContextError, match=f"has {square} tokens"):  # the last guard, should a size have been unknown
        vlm.generate(vlm.prepare([Image.new("RGB", (500, 500))], [prompt]), 64)
    assert extremes([(10, 10), (30, 20), (5, 50), (12, 12), (300, 200)]) == [(5, 50), (12, 12), (300, 200)]


def test_sizes_are_those_of_the_upright_picture(tmp_path, realdata):
    for row in (json.loads(line) for line in (realdata / "odd" / "odd.jsonl").read_text().splitlines()):
        file = realdata / row["file"]
        try:
            size = open_image(file).size
        except UserError:
            continue
        assert image_size(file) == size, file
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8nothing")
    assert image_size(tmp_path / "torn.jpg") is None


def test_miniatures_are_of_registered_models_only(tmp_path):
    with pytest.raises(UserError, match="no miniature of vit-b-16: torchvision builds"):
        make_tiny(MODELS["vit-b-16"], tmp_path / "vit")
    done = run_script("scripts/make_tiny_model.py", "--model", "nobody/knows-7b", "--out", tmp_path / "x", check=False)
    assert done.returncode == 1 and "only of registered models" in done.stderr
