"""Protects: CLIP's rankings are those of plain open_clip, class features are computed once, candidates are kept to."""

import json
import pickle
import warnings

import open_clip
import pytest
import torch
from conftest import script
from PIL import Image
from safetensors.torch import load_file

from vlmclassifier.benchmarks import BENCHMARKS, class_names, load_evaluation
from vlmclassifier.clip import CLIP, load_clip
from vlmclassifier.images import open_image
from vlmclassifier.prompts import draw_candidates
from vlmclassifier.records import UserError
from vlmclassifier.runs import read_run

KEYS = ["clip-vit-l-336", "eva-clip-g"]
NAMES = class_names(BENCHMARKS["flowers"])


def plain_features(folder, names):
    """Class features by open_clip alone, with the text at its full length."""
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    with torch.no_grad():
        features = model.eval().encode_text(tokenizer([f"a photo of a {name}" for name in names]), normalize=True)
    return model, transform, features


def classify(out, weights, pictures, **options) -> list:
    """Run main_results/classify_clip.py in this process and read its rows back."""
    module = script("main_results/classify_clip.py")
    options = {"benchmark": "flowers", "split": "all", "data_root": pictures, "limit": 20} | options
    module.main(module.Args(weights=weights, out=out, **options))
    return read_run(out)[1]


@pytest.mark.parametrize("key", KEYS)
def test_rankings_equal_plain_open_clip(key, tiny, pictures, tmp_path):
    rows = classify(tmp_path, tiny / key, pictures, model=key, batch_size=7)
    model, transform, features = plain_features(tiny / key, NAMES)
    for row in rows:
        image = Image.open(pictures / row.example_id).convert("RGB")
        with torch.no_grad():
            similarity = model.encode_image(transform(image)[None], normalize=True)[0] @ features.T
        order = similarity.argsort(descending=True)[:5].tolist()
        assert similarity[list(row.ranking)].sub(similarity[order]).abs().max() < 1e-5  # ties may swap
        assert row.output == NAMES[row.ranking[0]] and row.choices is None
    assert len({row.output for row in rows}) > 1


@pytest.mark.parametrize("key", KEYS)
def test_cutting_the_text_is_exact(key, tiny):
    clip = load_clip(key, tiny / key)
    _, _, features = plain_features(tiny / key, NAMES)
    assert (clip.class_features(NAMES) - features).abs().max() < 1e-6
    assert clip.model.text.attn_mask.shape == (77, 77)  # put back
    lengths = []
    clip.model.text.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    clip.class_features(NAMES)
    assert lengths == [12]  # the longest flower's caption, of 77


@pytest.mark.parametrize("key", KEYS)
def test_bfloat16_is_near_float32(key, tiny, pictures):
    """The default on a GPU, here on the CPU: both towers run, similarities stay float32."""
    exact, rounded = (load_clip(key, tiny / key, dtype=dtype) for dtype in ("float32", "bfloat16"))
    images = [open_image(e.image) for e in load_evaluation("flowers", root=pictures, split="all", limit=4).examples]
    for one, other in [
        (exact.class_features(NAMES), rounded.class_features(NAMES)),
        (exact.encode_images(images), rounded.encode_images(images)),
    ]:
        assert other.dtype == torch.float32 and 0 < (one - other).abs().max() < 0.02


def test_class_features_are_computed_once_per_run(tiny, pictures, tmp_path, monkeypatch):
    calls, original = [], CLIP.class_features
    monkeypatch.setattr(CLIP, "class_features", lambda self, names: calls.append(len(names)) or original(self, names))
    classify(tmp_path, tiny / "clip-vit-l-336", pictures, batch_size=4, benchmark="imagenet")
    assert calls == [998]  # five batches, 998 distinct names


def test_batch_sizes_give_the_same_rows(tiny, pictures, tmp_path):
    files = []
    for size in (1, 3, 8):
        classify(tmp_path / str(size), tiny / "clip-vit-l-336", pictures, batch_size=size)
        files.append((tmp_path / str(size) / "predictions.jsonl").read_bytes())
    assert files[0] == files[1] == files[2]


def test_k_candidates_win_among_themselves(tiny, pictures, tmp_path):
    rows = classify(tmp_path / "5", tiny / "clip-vit-l-336", pictures, candidates="5")
    whole = classify(tmp_path / "all", tiny / "clip-vit-l-336", pictures)
    model, transform, features = plain_features(tiny / "clip-vit-l-336", NAMES)
    examples = {e.id: e for e in load_evaluation("flowers", root=pictures, split="all").examples}
    for row in rows:
        assert row.choices == draw_candidates(examples[row.example_id], NAMES, 5)  # the list a VLM is given
        assert row.output in row.choices and len(row.ranking) == 5
        assert {NAMES[index] for index in row.ranking} == set(row.choices)
        with torch.no_grad():
            image = open_image(examples[row.example_id].image)
            similarity = model.encode_image(transform(image)[None], normalize=True)[0] @ features.T
        best = max(similarity[NAMES.index(name)].item() for name in row.choices)
        assert similarity[row.ranking[0]].item() == pytest.approx(best, abs=1e-6)
    assert [row.output for row in rows] != [row.output for row in whole]


def test_double_names_stand_for_their_first_class(tiny, pictures, tmp_path):
    for row in classify(tmp_path, tiny / "clip-vit-l-336", pictures, benchmark="imagenet", limit=60):
        names = class_names(BENCHMARKS["imagenet"])
        assert row.ranking[0] == names.index(row.output)


def test_token_zero_is_a_word_and_not_padding(tiny):
    """Token 0 of CLIP's vocabulary is a "!" within a word: a prompt that has it keeps its end token."""
    clip = load_clip("clip-vit-l-336", tiny / "clip-vit-l-336")
    names = ["wow!(x", "a"]
    ids = clip.tokenizer([f"a photo of a {name}" for name in names])
    assert (ids[0, : ids[0].argmax()] == 0).any()
    _, _, features = plain_features(tiny / "clip-vit-l-336", names)
    assert (clip.class_features(names) - features).abs().max() < 1e-6


@pytest.fixture
def small_architecture(tmp_path, tiny):
    """An architecture by name, as open_clip's users add one, with a safetensors and a pickle file of its weights."""
    config = json.loads((tiny / "clip-vit-l-336" / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "Small-quick.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "Small-quick.json")
    source = tiny / "clip-vit-l-336" / "open_clip_model.safetensors"
    torch.save({"state_dict": load_file(source)}, tmp_path / "weights.pt")
    model, _, _ = open_clip.create_model_and_transforms("Small-quick", pretrained=str(source))
    inputs = (torch.zeros(1, 3, 56, 56), torch.zeros(1, 77, dtype=torch.int64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model.eval(), inputs, strict=False, check_trace=False)
        torch.jit.save(traced, tmp_path / "jit.pt")  # the form of OpenAI's own releases
    return source, tmp_path / "weights.pt", tmp_path / "jit.pt"


def test_any_local_file_of_any_architecture(small_architecture, tiny):
    expected = load_clip("clip-vit-l-336", tiny / "clip-vit-l-336").class_features(NAMES)
    for file in small_architecture:
        assert torch.equal(load_clip("Small-quick/mine", file).class_features(NAMES), expected)


class Harm:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


def test_a_pickle_cannot_run_code(small_architecture, tmp_path):
    (tmp_path / "harm.pt").write_bytes(pickle.dumps(Harm(tmp_path / "written")))
    torch.save({"state_dict": Harm(tmp_path / "written")}, tmp_path / "harm2.pt")
    for name in ("harm.pt", "harm2.pt"):
        with pytest.raises(UserError, match=f"{name} do not load as Small-quick-mine"):
            load_clip("Small-quick/mine", tmp_path / name)
    assert not (tmp_path / "written").exists()


def test_mistakes_are_named(tiny, pictures, tmp_path):
    def refuse(words, **options):
        with pytest.raises(UserError, match=words):
            classify(tmp_path, **{"weights": tiny / "clip-vit-l-336", "pictures": pictures} | options)

    refuse("always chooses among class names", candidates="none")
    refuse("outside 2 to 102", candidates="103")
    refuse(
        "has no weights ViT-B-32/nonsense: the tags of ViT-B-32 are .*openai", model="ViT-B-32/nonsense", weights=None
    )
    refuse("no such architecture", model="ViT-Z/openai", weights=None)
    refuse("could not be fetched from the hub", model="ViT-B-32/laion2b_s34b_b79k", weights=None)
