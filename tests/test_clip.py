"""Protects: CLIP ranks like plain open_clip, computes class features once and chooses only among the candidates."""

import json
import pickle
import warnings

import open_clip
import pytest
import torch
import torchvision
from conftest import script
from PIL import Image
from safetensors.torch import load_file

from vlmclassifier.benchmarks import BENCHMARKS, class_names, load_evaluation
from vlmclassifier.class_lists import same_for_model
from vlmclassifier.clip import CLIP, load_clip
from vlmclassifier.images import open_image
from vlmclassifier.prompts import draw_candidates
from vlmclassifier.records import UserError
from vlmclassifier.runs import read_run

KEYS = ["clip-vit-l-336", "eva-clip-g"]
NAMES = class_names(BENCHMARKS["flowers"])


def plain_features(folder, names):
    """Class features by plain open_clip, with captions padded to the full context."""
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    with torch.no_grad():
        features = model.eval().encode_text(tokenizer([f"a photo of a {name}" for name in names]), normalize=True)
    return model, transform, features


def classify(out, weights, images, **options) -> list:
    """Run main_results/classify_clip.py in this process and return its rows."""
    module = script("main_results/classify_clip.py")
    options = {"benchmark": "flowers", "split": "all", "data_root": images, "limit": 20} | options
    module.main(module.Args(weights=weights, out=out, **options))
    return read_run(out)[1]


@pytest.mark.parametrize("key", KEYS)
def test_rankings_equal_plain_open_clip(key, tiny, images, tmp_path):
    rows = classify(tmp_path, tiny / key, images, model=key, batch_size=7)
    model, transform, features = plain_features(tiny / key, NAMES)
    for row in rows:
        image = Image.open(images / row.example_id).convert("RGB")
        with torch.no_grad():
            similarity = model.encode_image(transform(image)[None], normalize=True)[0] @ features.T
        order = similarity.argsort(descending=True)[:5].tolist()
        assert similarity[list(row.ranking)].sub(similarity[order]).abs().max() < 1e-5  # ties may be swapped
        assert row.output == NAMES[row.ranking[0]] and row.choices is None
    assert len({row.output for row in rows}) > 1


@pytest.mark.parametrize("key", KEYS)
def test_truncating_the_text_context_is_exact(key, tiny):
    clip = load_clip(key, tiny / key)
    _, _, features = plain_features(tiny / key, NAMES)
    assert (clip.class_features(NAMES) - features).abs().max() < 1e-6
    assert clip.model.text.attn_mask.shape == (77, 77)  # the mask is restored
    lengths = []
    clip.model.text.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    clip.class_features(NAMES)
    assert lengths == [12]  # tokens of the longest caption of a flower


@pytest.mark.parametrize("key", KEYS)
def test_bfloat16_is_close_to_float32(key, tiny, images):
    """bfloat16 is the default on a GPU. Features are float32 in both cases."""
    float32_clip, bfloat16_clip = (load_clip(key, tiny / key, dtype=dtype) for dtype in ("float32", "bfloat16"))
    images = [open_image(e.image) for e in load_evaluation("flowers", root=images, split="all", limit=4).examples]
    for expected, features in [
        (float32_clip.class_features(NAMES), bfloat16_clip.class_features(NAMES)),
        (float32_clip.encode_images(images), bfloat16_clip.encode_images(images)),
    ]:
        assert features.dtype == torch.float32 and 0 < (expected - features).abs().max() < 0.02


def test_class_features_are_computed_once_per_run(tiny, images, tmp_path, monkeypatch):
    calls, original = [], CLIP.class_features
    monkeypatch.setattr(CLIP, "class_features", lambda self, names: calls.append(len(names)) or original(self, names))
    classify(tmp_path, tiny / "clip-vit-l-336", images, batch_size=4, benchmark="imagenet")
    assert calls == [998]  # five batches, 998 distinct names


def test_batch_sizes_give_the_same_rows(tiny, images, tmp_path):
    files = []
    for size in (1, 3, 8):
        classify(tmp_path / str(size), tiny / "clip-vit-l-336", images, batch_size=size)
        files.append((tmp_path / str(size) / "predictions.jsonl").read_bytes())
    assert files[0] == files[1] == files[2]


def test_the_best_of_k_candidates_is_chosen(tiny, images, tmp_path):
    rows = classify(tmp_path / "5", tiny / "clip-vit-l-336", images, candidates="5")
    closed_world_rows = classify(tmp_path / "all", tiny / "clip-vit-l-336", images)
    model, transform, features = plain_features(tiny / "clip-vit-l-336", NAMES)
    examples = {e.id: e for e in load_evaluation("flowers", root=images, split="all").examples}
    for row in rows:
        assert row.choices == draw_candidates(examples[row.example_id], NAMES, 5)  # the candidate list of a VLM
        assert row.output in row.choices and len(row.ranking) == 5
        assert {NAMES[index] for index in row.ranking} == set(row.choices)
        with torch.no_grad():
            image = open_image(examples[row.example_id].image)
            similarity = model.encode_image(transform(image)[None], normalize=True)[0] @ features.T
        best = max(similarity[NAMES.index(name)].item() for name in row.choices)
        assert similarity[row.ranking[0]].item() == pytest.approx(best, abs=1e-6)
    assert [row.output for row in rows] != [row.output for row in closed_world_rows]


def test_duplicate_names_give_their_first_class(tiny, images, tmp_path):
    for row in classify(tmp_path, tiny / "clip-vit-l-336", images, benchmark="imagenet", limit=60):
        names = class_names(BENCHMARKS["imagenet"])
        assert row.ranking[0] == names.index(row.output)


def test_classes_that_differ_in_letter_case_are_right_by_their_index(tiny, own, tmp_path, capsys):
    """Both names have the same features, so the first wins: the images of the second are wrong, not right by name."""
    own.rows = [row | {"label": "aA"[number % 2]} for number, row in enumerate(own.rows)]
    own.classes.write_text('["a", "A"]')
    own.write()
    module = script("main_results/classify_clip.py")
    module.main(module.Args(weights=tiny / "clip-vit-l-336", out=tmp_path / "run", **own.args))
    printed = capsys.readouterr()
    assert "warning: clip-vit-l-336 cannot tell 2 class names apart ('a' = 'A')" in printed.err
    assert "accuracy 66.7%" in printed.out
    scores = (tmp_path / "run" / "scores.csv").read_text()
    assert ",exact,100.0," in scores
    assert same_for_model(["a", "b", "A", "a"], [1, 2, 1, 1]) == [("a", "A")]


def test_captions_that_are_cut_alike_are_reported(tiny):
    clip = load_clip("clip-vit-l-336", tiny / "clip-vit-l-336")
    names = ["cat", "very " * 80 + "long", "very " * 80 + "longer"]
    assert same_for_model(names, clip.token_keys(names)) == [tuple(names[1:])]


def test_the_transform_of_an_elongated_image_is_bounded(tiny, monkeypatch):
    """Of 1 x 4000 pixels, resizing the shorter side first made an image of 336 x 1,344,000: 11 s and 2.6 GB."""
    sizes, resize = [], torchvision.transforms.functional.resize

    def measured(image, size, *arguments, **options):
        result = resize(image, size, *arguments, **options)
        sizes.append(result.size)
        return result

    monkeypatch.setattr("torchvision.transforms.transforms.F.resize", measured)
    clip = load_clip("clip-vit-l-336", tiny / "clip-vit-l-336")
    side = clip.prepare([Image.new("RGB", (1, 4000)), Image.new("RGB", (40, 30))]).shape[-1]
    assert sizes and max(max(size) for size in sizes) <= 20 * side


def test_token_0_in_a_caption_is_not_padding(tiny):
    """Token 0 of CLIP's vocabulary is a "!" within a word: a caption with this token keeps its end token."""
    clip = load_clip("clip-vit-l-336", tiny / "clip-vit-l-336")
    names = ["wow!(x", "a"]
    ids = clip.tokenizer([f"a photo of a {name}" for name in names])
    assert (ids[0, : ids[0].argmax()] == 0).any()
    _, _, features = plain_features(tiny / "clip-vit-l-336", names)
    assert (clip.class_features(names) - features).abs().max() < 1e-6


@pytest.fixture
def small_architecture(tmp_path, tiny):
    """An architecture added to open_clip, and its weights as safetensors, as a pickle and as a TorchScript archive."""
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
        torch.jit.save(traced, tmp_path / "jit.pt")  # the format of OpenAI's releases
    return source, tmp_path / "weights.pt", tmp_path / "jit.pt"


def test_local_files_of_all_formats_load(small_architecture, tiny):
    expected = load_clip("clip-vit-l-336", tiny / "clip-vit-l-336").class_features(NAMES)
    for file in small_architecture:
        assert torch.equal(load_clip("Small-quick/local", file).class_features(NAMES), expected)


class MaliciousObject:
    """An object that creates a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


def test_a_pickle_cannot_run_code(small_architecture, tmp_path):
    (tmp_path / "malicious.pt").write_bytes(pickle.dumps(MaliciousObject(tmp_path / "written")))
    torch.save({"state_dict": MaliciousObject(tmp_path / "written")}, tmp_path / "malicious2.pt")
    for name in ("malicious.pt", "malicious2.pt"):
        with pytest.raises(UserError, match=f"{name} do not load as Small-quick-local"):
            load_clip("Small-quick/local", tmp_path / name)
    assert not (tmp_path / "written").exists()


def test_user_errors_are_explained(tiny, images, tmp_path):
    def refuse(message, **options):
        with pytest.raises(UserError, match=message):
            classify(tmp_path, **{"weights": tiny / "clip-vit-l-336", "images": images} | options)

    refuse("always chooses among class names", candidates="none")
    refuse("outside 2 to 102", candidates="103")
    refuse(
        "has no weights ViT-B-32/nonsense: the tags of ViT-B-32 are .*openai", model="ViT-B-32/nonsense", weights=None
    )
    refuse("no such architecture", model="ViT-Z/openai", weights=None)
    refuse("could not be fetched from the hub", model="ViT-B-32/laion2b_s34b_b79k", weights=None)


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    """The folder of a small SigLIP, saved by transformers, with a tokenizer that pads to its context."""
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    from vlmclassifier.tiny.parts import SIZE, VISION, redraw_weights, train_tokenizer

    folder = tmp_path_factory.mktemp("siglip")
    tokenizer = train_tokenizer(["<pad>", "</s>", "<unk>"], None, "</s>", "<pad>")
    tokenizer.padding_side, tokenizer.model_max_length = "right", 64
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "vocab_size": len(tokenizer), "max_position_embeddings": 64, "projection_size": 32}  # fmt: skip
    torch.manual_seed(0)
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=VISION))
    model.get_output_embeddings = lambda: None  # required by `redraw_weights`
    redraw_weights(model)
    for part in (model, tokenizer, SiglipImageProcessor(size=SIZE)):
        part.save_pretrained(folder)
    return folder


def test_a_siglip_folder_ranks_like_plain_transformers(siglip, images):
    """The same ranking as by the logits of transformers, for a folder given as --model."""
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    clip, names = load_clip(str(siglip)), class_names(BENCHMARKS["flowers"])
    images = [open_image(e.image) for e in load_evaluation("flowers", root=images, split="all", limit=4).examples]
    model, tokenizer = AutoModel.from_pretrained(siglip).eval(), AutoTokenizer.from_pretrained(siglip)
    captions = [f"a photo of a {name}".replace("-", "").replace("'", "") for name in names]  # it reads no punctuation
    text = tokenizer(captions, padding="max_length", max_length=64, return_tensors="pt")
    pixels = AutoImageProcessor.from_pretrained(siglip)(images, return_tensors="pt")
    with torch.no_grad():
        logits = model(input_ids=text["input_ids"], **pixels).logits_per_image  # [images, classes]
    assert clip.classify(images, clip.class_features(names)) == logits.topk(5).indices.tolist()
    # SigLIP2's tokenizer keeps the letter case, but the model was trained on lower case.
    upper = clip.class_features([name.upper() for name in names])
    assert torch.equal(upper, clip.class_features(names))


def test_a_folder_of_another_architecture_is_refused(tiny):
    with pytest.raises(UserError, match="contains a llava model, not a CLIP or SigLIP model"):
        load_clip("mini-clip", tiny / "llava-1.5-7b")


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """torchvision's ViT-B/16 with random weights, as safetensors and as a pickle."""
    import torchvision
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    model = torchvision.models.vit_b_16()
    torch.nn.init.normal_(model.heads.head.weight)  # torchvision initialises it with zeros
    save_file(model.state_dict(), folder / "vit.safetensors")
    torch.save(model.state_dict(), folder / "vit.pth")
    return folder


def test_the_supervised_baseline_classifies_like_torchvision(vit, images, tmp_path):
    """The best class has the largest logit; of two classes with the same name, the first one is reported."""
    import torchvision

    names = class_names(BENCHMARKS["imagenet"])
    module = script("main_results/classify_clip.py")
    args = module.Args("vit-b-16", vit / "vit.safetensors", benchmark="imagenet", split="all", data_root=images,
                       limit=6, out=tmp_path / "run")  # fmt: skip
    module.main(args)
    rows = read_run(tmp_path / "run")[1]
    model = torchvision.models.vit_b_16().eval()
    model.load_state_dict(torch.load(vit / "vit.pth", weights_only=True))
    transform = torchvision.models.ViT_B_16_Weights.DEFAULT.transforms()
    with torch.no_grad():
        logits = model(torch.stack([transform(open_image(images / row.example_id)) for row in rows]))
    assert [row.output for row in rows] == [names[index] for index in logits.argmax(1).tolist()]
    assert load_clip("vit-b-16", vit / "vit.pth").classify([open_image(images / rows[0].example_id)], torch.eye(1000))

    clip = load_clip("vit-b-16", vit / "vit.safetensors")
    missiles = [index for index, name in enumerate(names) if name == "missile"]
    assert len(missiles) == 2
    clip.model.forward = lambda pixel_values: torch.eye(1000)[missiles[1:]]
    distinct_names = list(dict.fromkeys(names))
    ranking = clip.classify(torch.zeros(1, 3, 224, 224), clip.class_features(distinct_names))[0]
    assert distinct_names[ranking[0]] == "missile"


def test_the_supervised_baseline_can_only_classify_imagenet(vit, tmp_path):
    with pytest.raises(UserError, match="can only classify ImageNet's 1,000 classes, not 'pink primrose'"):
        load_clip("vit-b-16", vit / "vit.safetensors").class_features(["pink primrose"])
    with pytest.raises(UserError, match="read from a local file of torchvision's weights"):
        load_clip("vit-b-16")
    (tmp_path / "other.pth").write_bytes(b"corrupt")
    with pytest.raises(UserError, match="do not load as torchvision's vit_b_16"):
        load_clip("vit-b-16", tmp_path / "other.pth")
