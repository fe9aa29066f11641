"""Protects: the ranking is exact for every model family, whatever the batch, chunk size and kind of attention."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import noise
from PIL import Image
from test_families import FAMILIES
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlmclassifier import load_vlm
from vlmclassifier.benchmarks import PAPER_BENCHMARKS, class_names
from vlmclassifier.ranking import Ranker

QUESTION = "What type of object is in this photo? Look at it as closely as you can, please."
NAMES = (
    *class_names(PAPER_BENCHMARKS["caltech"])[:12], *class_names(PAPER_BENCHMARKS["cars"])[:20],
    "great white shark", "great grey owl", "great", "cat",
)  # fmt: skip
# Sliding windows that are shorter than prompt and image.
WINDOWED = {"llava-next-mistral-7b": 60, "gemma3-4b": 50, "paligemma2-3b": 40}


def two_images() -> list[Image.Image]:
    """Two images of different shapes."""
    return [noise((90, 60), 0), noise((61, 130), 1)]


def expected_log_probs(folder: Path, attention: str, image: Image.Image, prompt: str, ranker: Ranker) -> list[float]:
    """Log-probabilities by plain transformers: a forward pass over image, prompt and name for each name, no padding."""
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation=attention).eval()
    processor = AutoProcessor.from_pretrained(folder)
    has_bos = bool(processor.tokenizer.bos_token) and prompt.startswith(processor.tokenizer.bos_token)
    inputs = processor(images=image, text=prompt, return_tensors="pt", add_special_tokens=not has_bos)
    inputs.pop("labels", None)
    start, sums = inputs["input_ids"].shape[1], []
    for ids in ranker.tokens.ids:
        row, name = dict(inputs), torch.tensor([ids])
        row["input_ids"] = torch.cat([row["input_ids"], name], dim=1)
        row["attention_mask"] = torch.ones_like(row["input_ids"])
        answer_type = int(folder.name.startswith("paligemma"))
        for key, value in (("token_type_ids", answer_type), ("mm_token_type_ids", 0)):
            if key in row:
                row[key] = torch.cat([row[key], torch.full_like(name, value)], dim=1)
        with torch.no_grad():
            logits = model(**row).logits[0, start - 1 : -1]  # [tokens, vocabulary]
        log_probs = logits.double().log_softmax(dim=-1)  # float32 would round a sum near -100 by 4e-6
        sums.append(log_probs.gather(1, name[0, :, None]).sum().item())
    return sums


CASES = [
    (key, attention)
    for key in FAMILIES + [f"{key} windowed" for key in WINDOWED]
    for attention in ("sdpa", "eager")
    if attention == "eager" or "paligemma" not in key  # transformers supports only eager attention for Gemma 2
]


@pytest.mark.parametrize("key, attention", CASES)
def test_every_family_is_ranked_exactly(key, attention, tiny, tmp_path):
    """A batch of two images with different numbers of tokens, in chunks that split subtrees, against transformers."""
    key, windowed, _ = f"{key}  ".split(" ", 2)
    folder = tiny / key
    if windowed:
        folder = shutil.copytree(folder, tmp_path / key)
        config = json.loads((folder / "config.json").read_text())
        config["text_config"]["sliding_window"] = WINDOWED[key]
        (folder / "config.json").write_text(json.dumps(config))
    vlm = load_vlm(key, folder)
    vlm.model.set_attn_implementation(attention)
    ranker = Ranker(vlm, NAMES, QUESTION, chunk=24)
    assert len(ranker.trie.chunks(24)) > 3 and any(ancestors for ancestors, _ in ranker.trie.chunks(24))
    images = two_images()
    log_probs = ranker.log_probs(images)  # [images, names]
    for image, row in zip(images, log_probs, strict=True):
        expected = expected_log_probs(folder, attention, image, ranker.prompt, ranker)
        assert max(abs(a - b) for a, b in zip(row, expected, strict=True)) <= 2e-5
    assert abs(log_probs[0] - log_probs[1]).max() > 0.01  # the log-probabilities depend on the image
    assert ranker.select_method(images[1]) == ""
