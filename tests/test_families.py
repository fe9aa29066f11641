"""Protects: every model family answers like plain transformers, whatever the batch, and within its context."""

import inspect
import json
import re
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
from vlmclassifier.records import ContextError, UserError, images_named
from vlmclassifier.runs import read_run
from vlmclassifier.tiny import has_miniature, make_tiny
from vlmclassifier.vlm.model import largest_size_per_shape

# 13B models differ from their 7B ones in size only.
FAMILIES = [key for key, spec in MODELS.items() if spec.kind == "vlm" and has_miniature(spec) and "13b" not in key]
QUESTIONS = [
    "What type of object is in this photo?",
    'Identify the object in this image. Choose one from "cat, dog, horse, sunflower".',
]
# The prompts for a question by the chat template or the documentation of the released checkpoints.
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
def eight_images(images) -> list[Image.Image]:
    """Images of different sizes and shapes: two of each benchmark."""
    examples = []
    for benchmark in ("imagenet", "flowers", "cars", "caltech"):
        examples += load_evaluation(benchmark, root=images, split="all", limit=2).examples
    images = [open_image(example.image) for example in examples]
    images[3] = images[3].crop((0, 0, images[3].width, images[3].height // 3))
    assert len({image.size for image in images}) >= 4
    return images


@pytest.mark.parametrize("key", FAMILIES)
def test_batches_answer_like_plain_transformers_one_by_one(key, tiny, eight_images):
    """Images of different sizes, prompts of different lengths: one by one with plain transformers, and in batches."""
    vlm = load_vlm(key, tiny / key)
    prompts = [vlm.prompt(QUESTIONS[number % 2]) for number in range(len(eight_images))]
    model = AutoModelForImageTextToText.from_pretrained(tiny / key).eval()
    processor = AutoProcessor.from_pretrained(tiny / key)
    expected = []
    for image, prompt in zip(eight_images, prompts, strict=True):
        has_bos = bool(processor.tokenizer.bos_token) and prompt.startswith(processor.tokenizer.bos_token)
        inputs = processor(images=image, text=prompt, return_tensors="pt", add_special_tokens=not has_bos)
        inputs.pop("labels", None)
        with torch.no_grad():
            sequence = model.generate(**inputs, do_sample=False, max_new_tokens=24)[0]
        expected.append(processor.tokenizer.decode(sequence[inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    for size in (1, 3, 8):
        answers = []
        for start in range(0, 8, size):
            batch = vlm.prepare(eight_images[start : start + size], prompts[start : start + size])
            answers += vlm.generate(batch, 24)
        assert answers == expected, size
    assert len(set(expected)) >= 4  # the answer depends on the image


@pytest.mark.parametrize("key", FAMILIES)
def test_an_image_one_pixel_wide_is_read_or_refused_by_name(key, tiny):
    vlm = load_vlm(key, tiny / key)
    prompts = [vlm.prompt(QUESTIONS[0])] * 2
    for size in ((1, 300), (1, 4000)):
        try:
            with images_named(["good.png", "thin.png (m row 2)"]):
                batch = vlm.prepare([Image.new("RGB", (40, 40)), Image.new("RGB", size)], prompts)
            assert len(vlm.generate(batch, 2)) == 2
        except UserError as error:
            assert re.match(r"thin.png \(m row 2\) with 1 x \d+ pixels is refused by the model's image", str(error))


@pytest.mark.parametrize("key", FAMILIES)
def test_an_image_is_encoded_once_for_several_questions(key, tiny, eight_images):
    """The answers are equal. The vision encoder runs once, except if the Q-Former reads the question."""
    vlm, encoded_sizes = load_vlm(key, tiny / key), []
    encoder = next(module for name, module in vlm.model.named_modules() if name.split(".")[-1] in VISION_ENCODERS)

    def count(_, args: tuple, kwargs: dict) -> None:
        tensors = [value for value in [*args, *kwargs.values()] if isinstance(value, torch.Tensor)]
        encoded_sizes.append(tensors[0].numel())

    encoder.register_forward_pre_hook(count, with_kwargs=True)
    expected = [vlm.ask(eight_images[3], question) for question in QUESTIONS]
    image_size = encoded_sizes[0]  # number of input values of the encoder for this image
    assert encoded_sizes == [image_size, image_size] and expected[0] != expected[1]
    encoded_sizes.clear()
    assert vlm.ask_all(eight_images[3], QUESTIONS) == expected
    # Older versions of transformers do not accept precomputed features.
    accepts_features = "mm_encoder_outputs" in inspect.signature(vlm.model.forward).parameters
    is_encoded_once = accepts_features and key != "instructblip-7b"
    assert sum(encoded_sizes) == (image_size if is_encoded_once else 2 * image_size)
    batch_images = [eight_images[0], eight_images[3], eight_images[0]]
    prompts = [vlm.prompt(question) for question in (*QUESTIONS, QUESTIONS[1])]
    features = [vlm.image_features(vlm.process([image], prompts[:1])) for image in batch_images]
    batch = vlm.prepare(batch_images, prompts)
    if not accepts_features:
        assert features == [None, None, None]
    elif features[0] is None:
        assert "qformer_input_ids" in batch.inputs
    else:
        assert vlm.generate(batch, 24, features) == vlm.generate(batch, 24)


VISION_ENCODERS = {"vision_tower", "vision_model", "visual"}  # names of the module in transformers


@pytest.mark.parametrize("key", PROMPTS)
def test_prompts_are_those_of_the_released_checkpoints(key, tiny):
    vlm = load_vlm(key, tiny / key)
    assert vlm.prompt(QUESTIONS[0]) == PROMPTS[key].format(QUESTIONS[0])
    bos = vlm.processor.tokenizer.bos_token_id
    ids = vlm.process([Image.new("RGB", (90, 60))], [vlm.prompt(QUESTIONS[0])])["input_ids"][0].tolist()
    assert bos is None or ids.count(bos) == 1  # not two begin tokens


def test_chain_of_thought_begins_the_answer_or_ends_the_question(tiny):
    thought = " Let's think step by step."
    mistral = load_vlm("llava-next-mistral-7b", tiny / "llava-next-mistral-7b")
    assert mistral.prompt("Q?", True) == f"[INST] <image>\nQ?[/INST]{thought}"
    blip = load_vlm("instructblip-7b", tiny / "instructblip-7b")
    assert blip.prompt("Q?", True) == f"Question: Q?{thought} Answer:"
    gemma = load_vlm("gemma3-4b", tiny / "gemma3-4b")
    assert f"<start_of_image>Q?{thought}<end_of_turn>" in gemma.prompt("Q?", True)


def test_an_unregistered_folder_uses_its_own_chat_template(tiny, own, tmp_path, capsys):
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


def test_hub_ids_of_registered_and_other_models(own, tiny, tmp_path):
    flags = ["--benchmark", own.manifest, "--classes", own.classes]
    done = run_script("main_results/classify_vlm.py", "--model", "owner/unknown-7b", *flags, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "could not be fetched from the hub (owner/unknown-7b" in done.stderr
    from vlmclassifier.models import find_model

    assert find_model("llava-hf/llava-1.5-7b-hf", "vlm").key == "llava-1.5-7b"
    assert find_model("owner/unknown-7b", "vlm").key == "owner-unknown-7b"
    spec = find_model(str(tiny / "qwen3-vl-8b"), "vlm")  # a folder of that name is the registered model
    assert (spec.key, spec.source) == ("qwen3-vl-8b", str(tiny / "qwen3-vl-8b"))


def test_unsuitable_folders_are_refused(tiny, tmp_path):
    def copy_with_config(**changes) -> str:
        folder = shutil.copytree(tiny / "qwen3-vl-8b", tmp_path / f"copy-{len(list(tmp_path.iterdir()))}")
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)

    code = {"AutoConfig": "custom.MyConfig", "AutoModelForImageTextToText": "custom.MyModel"}
    with pytest.raises(UserError, match="requires its own code, which is not run"):
        load_vlm(copy_with_config(model_type="custom", auto_map=code))
    with pytest.raises(UserError, match="does not contain an image-text-to-text model"):
        load_vlm(copy_with_config(model_type="opt"))


def test_the_context_of_the_qformer_is_checked(tiny, own, tmp_path):
    """A list of many names fits into Vicuna's 2,048 positions, but not into the Q-Former's 512."""
    names = ["cat", "dog", *(f"zygomorphic {number}" for number in range(40))]
    own.classes.write_text(json.dumps(names))
    module = script("main_results/classify_vlm.py")
    options = {"weights": tiny / "instructblip-7b", "out": tmp_path / "run", "candidates": "all", **own.args}
    with pytest.raises(ContextError, match=r"has \d{3,4} tokens for the Q-Former .* whose context is 512"):
        module.main(module.Args("instructblip-7b", **options))
    record, rows = read_run(tmp_path / "run")
    assert "512" in record["not_applicable"] and not rows


def test_the_largest_image_decides_whether_a_prompt_fits(tiny):
    """LLaVA-NeXT divides a square image into more tiles than a narrow one."""
    key = "llava-next-vicuna-7b"
    vlm = load_vlm(key, tiny / key)
    prompt = vlm.prompt(QUESTIONS[0])
    narrow, square = (vlm._length(Image.new("RGB", size), prompt) for size in ((2000, 100), (500, 500)))
    assert narrow < square and vlm.image_size_matters(prompt)
    vlm.model.config.get_text_config().max_position_embeddings = narrow + 64 + 5
    vlm.check_context([prompt], 64, [(2000, 100)])
    with pytest.raises(ContextError, match=rf"has {square} tokens and the answer up to 64, .* is {narrow + 69}"):
        vlm.check_context([prompt], 64, [(2000, 100), (500, 500), (1999, 101)])
    with pytest.raises(ContextError, match=f"has {square} tokens"):  # `generate` also checks, if a size was unknown
        vlm.generate(vlm.prepare([Image.new("RGB", (500, 500))], [prompt]), 64)
    assert largest_size_per_shape([(10, 10), (30, 20), (5, 50), (12, 12), (300, 200)]) == [
        (5, 50),
        (12, 12),
        (300, 200),
    ]


def test_sizes_are_those_of_the_upright_image(tmp_path, realdata):
    for row in (json.loads(line) for line in (realdata / "odd" / "odd.jsonl").read_text().splitlines()):
        file = realdata / row["file"]
        try:
            size = open_image(file).size
        except UserError:
            continue
        assert image_size(file) == size, file
    (tmp_path / "corrupt.jpg").write_bytes(b"\xff\xd8nothing")
    assert image_size(tmp_path / "corrupt.jpg") is None


def test_only_registered_models_have_miniatures(tmp_path):
    with pytest.raises(UserError, match="no miniature of vit-b-16: torchvision builds"):
        make_tiny(MODELS["vit-b-16"], tmp_path / "vit")
    done = run_script("scripts/make_tiny_model.py", "--model", "owner/unknown-7b", "--out", tmp_path / "x", check=False)
    assert done.returncode == 1 and "only of registered models" in done.stderr
