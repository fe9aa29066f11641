"""Protects: the ranking script from images to numbers: resuming, processes, search, guidance, fallback, user errors."""

import json
import re
import subprocess
import time

import numpy as np
import pytest
import torch
from conftest import kill_script, noise, run_script, script, start_script
from PIL import Image
from test_families import FAMILIES
from test_ranking import NAMES, QUESTION
from test_runs import part_bytes
from transformers import LlavaConfig, LlavaForConditionalGeneration

from vlmclassifier import load_vlm
from vlmclassifier.benchmarks import load_evaluation
from vlmclassifier.plane_figures import FIGURES
from vlmclassifier.ranking import Ranker
from vlmclassifier.ranking.decoding import TreeDecoder
from vlmclassifier.records import ContextError, UserError
from vlmclassifier.runs import read_run
from vlmclassifier.runs.vectors import read_values
from vlmclassifier.scoring.guidance import Scoring, best, best_t
from vlmclassifier.scoring.rankings import is_train_run_of, read_ranking
from vlmclassifier.scoring.runs import score_run
from vlmclassifier.tiny.parts import redraw_weights
from vlmclassifier.vlm import VLM

SCRIPT = "inference_analysis/rank_labels.py"


def rank(out, weights, **options):
    """Run the script in this process. Returns its rows and tensors."""
    module = script(SCRIPT)
    module.main(module.Args(options.pop("model", "llava-1.5-7b"), weights, out=out, **options))
    return read_run(out)[1], read_values(out)[1]


def as_flags(options):
    """Options of `rank` as command-line arguments."""
    flags = []
    for key, value in options.items():
        flags += [f"--{key.replace('_', '-')}", value]
    return flags


@pytest.fixture(scope="module")
def caltech(images):
    return {"benchmark": "caltech", "split": "all", "data_root": images, "limit": 24}


def test_batches_chunks_and_the_search_agree(tiny, caltech, tmp_path):
    """Other batch and chunk sizes give the same numbers except for rounding; the search finds the same names."""
    rows, tensors = rank(tmp_path / "one", tiny / "llava-1.5-7b", **caltech, batch_size=1)
    batch_rows, batch_tensors = rank(tmp_path / "five", tiny / "llava-1.5-7b", **caltech, batch_size=5, chunk=16)
    assert rows == batch_rows and np.abs(tensors["values"] - batch_tensors["values"]).max() <= 2e-5
    assert tensors["values"].shape == (24, 100) and tensors["values"].dtype == np.float32
    assert [list(row.ranking) for row in rows] == best(tensors["values"], 5).tolist()
    for score, t in (("sum", 1.0), ("mean", 1.0), ("mean", 3.0)):
        scoring = Scoring(score == "mean", t, tensors["prior"])
        scores = scoring(tensors["values"], tensors["lengths"])
        out = tmp_path / f"{score}{t}"
        search_rows, search_tensors = rank(
            out, tiny / "llava-1.5-7b", **caltech, top_k=5, score=score, guidance=t
        )  # fmt: skip
        assert [list(row.ranking) for row in search_rows] == best(scores, 5).tolist()
        assert np.allclose(search_tensors["values"][:, :5], -np.sort(-scores, axis=1)[:, :5], atol=1e-4)
        nodes, rounds = search_tensors["values"][:, 5], search_tensors["values"][:, 6]
        assert (nodes <= 254).all() and (score == "mean" or nodes.max() < 150) and (rounds >= 1).all()


def test_a_killed_and_resumed_run_gives_the_same_bytes(tiny, caltech, tmp_path):
    flags = ["--model", "qwen3-vl-8b", "--weights", tiny / "qwen3-vl-8b", "--batch-size", 2, *as_flags(caltech)]
    pid_file = tmp_path / "pid"
    child = start_script(
        SCRIPT, *flags, "--out", tmp_path / "killed", env={"WARM_PID_FILE": str(pid_file)}, stderr=subprocess.DEVNULL
    )
    while child.poll() is None and part_bytes(tmp_path / "killed") < 1500:
        time.sleep(0.005)
    kill_script(child, pid_file)
    resumed = run_script(SCRIPT, *flags, "--out", tmp_path / "killed")
    assert "images are done already" in resumed.stderr and "nodes" in resumed.stderr
    rank(tmp_path / "whole", tiny / "qwen3-vl-8b", model="qwen3-vl-8b", **caltech, batch_size=2)
    for name in ("predictions.jsonl", "values.safetensors", "scores.csv"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.slow
def test_two_processes_share_a_ranking(tiny, caltech, tmp_path):
    flags = ["--weights", tiny / "llava-1.5-7b", "--batch-size", 1, "--out", tmp_path / "two", *as_flags(caltech)]
    run_script("bash", "scripts/multi_gpu.sh", SCRIPT, *flags, env={"PROCESSES": "2"})
    _, tensors = rank(tmp_path / "one", tiny / "llava-1.5-7b", **caltech, batch_size=1)
    rows = [(tmp_path / name / "predictions.jsonl").read_bytes() for name in ("one", "two")]
    assert rows[0] == rows[1]
    shared_tensors = read_values(tmp_path / "two")[1]
    assert np.abs(shared_tensors["values"] - tensors["values"]).max() <= 2e-5
    assert not list((tmp_path / "two").glob("part-*"))


def test_t_is_chosen_on_the_train_images_and_the_table_says_so(tiny, own, tmp_path, capsys):
    rows = []
    for split in ("train", "test"):
        for row in own.rows:
            rows.append(row | {"image": f"{split}-{row['image']}", "split": split})
    own.rows = rows
    for number, row in enumerate(own.rows):
        noise((40, 30 + number), number).save(own.folder / row["image"])
    own.write()
    runs = tmp_path / "outputs" / "inference_analysis"
    for split in ("train", "test"):
        rank(runs / split, tiny / "llava-1.5-7b", split=split, **own.args)
    train, test = read_ranking(runs / "train"), read_ranking(runs / "test")
    variants = {variant.setting: variant for variant in test.variants(train)}
    assert len(variants) == 10
    for score, per_token in (("prob_sum", False), ("prob_avg", True)):
        hits = train.curve(per_token)  # [grid, images]
        assert variants[f"{score}_cfg_held_out"].scoring.t == best_t(hits) / 4
        assert variants[f"{score}_cfg_held_out"].chosen_on == "train"
        hit_counts = test.curve(per_token)[::4].sum(axis=1)  # t = 0, 1, .. 8
        assert variants[f"{score}_cfg"].top1.sum() == hit_counts.max() >= variants[score].top1.sum()
    without_train = {variant.setting: variant for variant in test.variants()}
    assert without_train["prob_sum_cfg_held_out"].chosen_on == "the other half"
    capsys.readouterr()
    module = script("inference_analysis/table.py")
    module.main(module.Args(outputs=tmp_path / "outputs", all=True))
    printed = capsys.readouterr().out
    assert re.search(r"LLaVA1.5-7B \(miniature\) +\| prob_sum_cfg_held_out +\| mine +\| [\d.]+ +\| train", printed)
    assert "split train" not in printed and "missing (47.6)" in printed and "missing (62.2)" in printed  # Tables 2, 12
    assert {score.metric for score in score_run(runs / "test").scores} == {"accuracy", "top5"}


def test_guidance_has_no_effect_at_t_1_and_ignores_the_image_at_t_0(tiny, caltech, tmp_path):
    rank(tmp_path / "run", tiny / "llava-1.5-7b", **caltech)
    ranking = read_ranking(tmp_path / "run")
    for prior in ("no_image", "mean"):
        hits = ranking.curve(False, prior)  # [grid, images]
        assert (hits[4] == (ranking.ranks(Scoring()) == 0)).all()  # t = 1
        scores = Scoring(False, 0.0, ranking.prior(prior))(ranking.sums, ranking.lengths)  # [images, names]
        assert (scores == scores[0]).all() and (hits[0] == (scores.argmax(axis=1) == ranking.truth)).all()
    assert np.allclose(ranking.prior("mean"), ranking.sums.mean(axis=0), atol=1e-4)


def test_the_prior_is_that_of_the_prompt_without_the_image(tiny):
    """Compared with plain transformers on the text alone, for the three kinds of template."""
    for key, text in (
        ("llava-1.5-7b", "USER: What type?\nASSISTANT: The photo features a"),
        ("blip2-2.7b", "Question: What type? Answer: A"),
        ("qwen2.5-vl-7b", "<|im_start|>user\nWhat type?<|im_end|>\n<|im_start|>assistant\nThe photo features a"),
        ("gemma3-4b", "<start_of_turn>user\nWhat type?<end_of_turn>\n<start_of_turn>model\nThe photo features a"),
        ("paligemma2-3b", "<bos>answer en What type?\n"),  # its processor adds the begin token, not its tokenizer
    ):
        vlm = load_vlm(key, tiny / key)
        ranker = Ranker(vlm, NAMES, "What type?")
        ids = vlm.processor.tokenizer(text, return_tensors="pt")["input_ids"]
        bos = vlm.processor.tokenizer.bos_token_id
        assert bos is None or ids[0].tolist().count(bos) == 1
        network = vlm.model.language_model if key.startswith("blip") else vlm.model
        for index, prior in enumerate(ranker.prior()):
            name = torch.tensor([ranker.tokens.ids[index]])  # [1, tokens]
            inputs = {"input_ids": torch.cat([ids, name], dim=1)}
            if key.startswith("paligemma"):
                inputs["token_type_ids"] = torch.cat([torch.zeros_like(ids), torch.ones_like(name)], dim=1)
            with torch.no_grad():
                logits = network(**inputs).logits[0, ids.shape[1] - 1 : -1]  # [tokens, vocabulary]
            expected = logits.log_softmax(dim=-1).gather(1, name[0, :, None]).sum().item()
            assert abs(prior - expected) <= 2e-5


@pytest.mark.parametrize("whole_subtrees", [False, True])
def test_the_search_equals_the_full_ranking_on_random_and_trained_models(whole_subtrees, tiny, trained, figures_root):
    """250 cases per policy and model: images x sum, mean and guidance, one by one and in batches."""
    noise_images = [noise((64, 64), number) for number in range(42)]
    task = load_evaluation("plane_figures", root=figures_root, limit=42)
    figure_images = [Image.open(example.image).convert("RGB") for example in task.examples]
    for vlm, names, images in (
        (load_vlm("llava-1.5-7b", tiny / "llava-1.5-7b"), NAMES, noise_images),
        (load_vlm("mini-llava", trained / "vlm"), tuple(FIGURES), figure_images),
    ):
        ranker = Ranker(vlm, names, QUESTION)
        sums, prior = ranker.log_probs(images), ranker.prior()
        for per_token in (False, True):
            for t in (1.0, 2.0, 5.0):
                scoring = Scoring(per_token, t, prior)
                scores = scoring(sums, ranker.trie.lengths)
                for start in range(0, len(images), 14):
                    results = ranker.top_k(images[start : start + 14], 5, scoring, whole_subtrees)
                    expected = best(scores[start : start + 14], 5).tolist()
                    assert [result.names.tolist() for result in results] == expected
        results = ranker.top_k(images[:1], 5, Scoring())
        assert results[0].names.tolist() == best(Scoring()(sums[:1], ranker.trie.lengths), 5)[0].tolist()


@pytest.fixture
def convolutional_vlm(tiny):
    """A LLaVA with a convolutional decoder (LFM2), in which tokens influence their neighbours despite the mask."""
    vlm = load_vlm("llava-1.5-7b", tiny / "llava-1.5-7b")
    text = {"model_type": "lfm2", "vocab_size": 600, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 4096,
            "layer_types": ["conv", "full_attention"], "pad_token_id": 3, "bos_token_id": 1}  # fmt: skip
    config = LlavaConfig.from_pretrained(tiny / "llava-1.5-7b").to_dict() | {"text_config": text}
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig.from_dict(config))
    redraw_weights(model)
    return VLM(model, vlm.processor, vlm.spec)


def test_a_model_without_support_for_tree_masks_is_scored_name_by_name(convolutional_vlm):
    ranker, image = Ranker(convolutional_vlm, NAMES[:6], QUESTION), noise((80, 60))
    remark = ranker.select_method(image)
    assert ranker.method != "tree"
    assert "cannot be ranked with tree attention masks" in remark and "exact but slow" in remark
    inputs = convolutional_vlm.process([image], [ranker.prompt])
    start, sums = inputs["input_ids"].shape[1], ranker.log_probs([image, image])
    for index, ids in enumerate(ranker.tokens.ids):
        row = dict(inputs) | {"input_ids": torch.cat([inputs["input_ids"], torch.tensor([ids])], dim=1)}
        row["attention_mask"] = torch.ones_like(row["input_ids"])
        with torch.no_grad():
            log_probs = convolutional_vlm.model(**row).logits[0, start - 1 : -1].log_softmax(dim=-1)
        expected = log_probs.gather(1, torch.tensor(ids)[:, None]).sum().item()
        assert abs(sums[0, index] - expected) <= 2e-5 and sums[0, index] == sums[1, index]
    results = ranker.top_k([image], 3, Scoring())
    assert results[0].names.tolist() == best(sums[:1], 3)[0].tolist()


def test_no_hook_remains_after_running_out_of_memory(tiny, monkeypatch):
    """A remaining hook on the output embeddings would keep the logits of every later batch."""
    vlm = load_vlm("llava-1.5-7b", tiny / "llava-1.5-7b")
    ranker, image = Ranker(vlm, NAMES, QUESTION), noise((80, 60))

    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="A single image does not fit"):
        patch.setattr(type(vlm.model), "forward", out_of_memory)
        ranker.log_probs([image])
    assert not vlm.model.get_output_embeddings()._forward_hooks


def test_a_ranking_killed_before_its_merge_is_finished_without_the_model(tiny, own, tmp_path, monkeypatch):
    rank(tmp_path / "whole", tiny / "llava-1.5-7b", **own.args)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("vlmclassifier.runs.Run._merge", lambda run: (_ for _ in ()).throw(KeyboardInterrupt()))
        rank(tmp_path / "run", tiny / "llava-1.5-7b", **own.args)
    assert list((tmp_path / "run").glob("part-*.jsonl"))
    monkeypatch.setattr("vlmclassifier.ranking.ranker.Ranker.__init__", None)  # no model is needed
    rank(tmp_path / "run", tiny / "llava-1.5-7b", **own.args)
    for name in ("predictions.jsonl", "values.safetensors", "scores.csv"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_t_is_not_chosen_on_train_images_that_are_also_evaluated(tiny, own, tmp_path):
    own.rows[0]["split"] = "train"
    own.write()
    runs = {split: tmp_path / split for split in ("train", "test", "all")}
    for split, out in runs.items():
        rank(out, tiny / "llava-1.5-7b", split=split, **own.args)
    train, test, all_images = (read_ranking(out) for out in runs.values())
    assert is_train_run_of(train.config, test.config) and not is_train_run_of(all_images.config, test.config)
    assert not is_train_run_of(train.config, all_images.config)
    assert not is_train_run_of(train.config, test.config | {"dtype": "another"})


def test_another_answer_prefix_is_another_setting(tiny, own, tmp_path):
    rank(tmp_path / "run", tiny / "llava-1.5-7b", answer_prefix="This is a", split="test", **own.args)
    settings = {score.setting for score in score_run(tmp_path / "run").scores}
    assert "prob_sum-answer_prefix 'This is a'" in settings and "prob_sum" not in settings
    module = script(SCRIPT)
    task = load_evaluation(**{"name": own.args["benchmark"], "classes": own.classes})
    assert module.setting_name(module.Args(answer_prefix="This is a"), task) == "ranking-answer_prefix_This_is_a"


def test_an_unsupported_architecture_is_refused_or_scored_name_by_name(tiny, monkeypatch):
    vlm = load_vlm("llava-1.5-7b", tiny / "llava-1.5-7b")
    image = noise((80, 60))
    expected = Ranker(vlm, NAMES, QUESTION).log_probs([image])
    with monkeypatch.context() as patch:
        patch.setattr(type(vlm.model), "get_decoder", lambda model: None)
        ranker = Ranker(vlm, NAMES, QUESTION)
        assert "cannot be ranked with tree attention masks (AttributeError" in ranker.select_method(image)
        assert np.abs(ranker.log_probs([image]) - expected).max() <= 2e-5
    ranker = Ranker(vlm, NAMES, QUESTION)
    monkeypatch.setattr(type(vlm.model), "forward", lambda *_, **__: (_ for _ in ()).throw(ValueError("decoder ids")))
    with pytest.raises(
        UserError, match="cannot be ranked: its forward pass .* .ValueError: decoder ids.; use main_results"
    ):
        ranker.select_method(image)


def test_wrong_numbers_of_the_tree_are_detected(tiny, monkeypatch):
    """If another version of transformers interprets the mask in another way, the numbers do not change silently."""
    vlm = load_vlm("llava-1.5-7b", tiny / "llava-1.5-7b")
    ranker, image = Ranker(vlm, NAMES, QUESTION), noise((80, 60))
    expected = ranker.log_probs([image])
    monkeypatch.setattr("vlmclassifier.ranking.decoding._additive_mask", lambda mask, dtype: mask[:, None].to(dtype))
    assert re.search(
        r"nats off\): its names are scored name by name after the cached prompt", ranker.select_method(image)
    )
    assert np.abs(ranker.log_probs([image]) - expected).max() <= 2e-5


FAULTS = {"positions shifted by one": 1, "positions shifted by 50": 50, "no tree mask": 0}


@pytest.mark.parametrize("key", FAMILIES)
def test_the_exactness_check_sees_faults_of_the_tree_in_bfloat16(key, tiny, monkeypatch):
    """Rounding passes in bfloat16 and float16; each of three faults in the passes of the tree does not."""
    image, run_tree = noise((80, 60)), TreeDecoder.run_tree
    for dtype in ("bfloat16", "float16"):
        vlm = load_vlm(key, tiny / key, dtype=dtype)
        assert Ranker(vlm, NAMES, QUESTION).select_method(image) == "", dtype
    vlm = load_vlm(key, tiny / key, dtype="bfloat16")
    for fault, shift in FAULTS.items():

        def run_with_fault(decoder, cache, input_ids, depth, visible, shift=shift):
            position, cache.last_position = cache.last_position, cache.last_position + shift
            states = run_tree(decoder, cache, input_ids, depth, visible if shift else torch.ones_like(visible))
            cache.last_position = position
            return states

        monkeypatch.setattr(TreeDecoder, "run_tree", run_with_fault)
        assert "nats off" in Ranker(vlm, NAMES, QUESTION).select_method(image), fault
        monkeypatch.setattr(TreeDecoder, "run_tree", run_tree)


def test_siblings_in_the_trie_are_compared(tiny):
    names = ("a cat", "great white shark", "great white owl", "great white heron", "dog")
    ranker = Ranker(load_vlm("llava-1.5-7b", tiny / "llava-1.5-7b"), names, QUESTION)
    assert {1, 2, 3} <= set(ranker._compared_names())


def test_user_errors_are_explained(own, tiny, tmp_path, capsys):
    def refuse(message, error=UserError, **options):
        with pytest.raises(error, match=message):
            rank(options.pop("out", tmp_path / "run"), tiny / "llava-1.5-7b", **own.args, **options)

    refuse("--score and --guidance go with --top-k", score="mean")
    refuse("--guidance -1 is not a number from 0 on", top_k=5, guidance=-1)
    refuse("--guidance nan is not", top_k=5, guidance=float("nan"))
    refuse("--top-k 0 is below 1", top_k=0)
    own.classes.write_text(json.dumps(["cat", "dog", "zygomorphic " * 2000]))
    refuse("the context of llava-1.5-7b is 4096", ContextError)
    runs = tmp_path / "outputs" / "inference_analysis"
    refuse("the context of llava-1.5-7b is 4096", ContextError, out=runs / "long")
    assert "4096" in read_run(runs / "long")[0]["not_applicable"]
    module = script("inference_analysis/table.py")
    with pytest.raises(UserError, match="No finished run"):
        module.main(module.Args(outputs=tmp_path / "outputs"))
    assert re.search(r"LLaVA1.5-7B \(miniature\) +\| prob_sum +\|.*\| N/A +\|\n", capsys.readouterr().out)
    with pytest.raises(UserError, match="nothing does not exist, so there are no runs: start with"):
        module.main(module.Args(outputs=tmp_path / "nothing"))
    assert not (tmp_path / "nothing").exists()


def test_the_papers_tokenisation_uses_the_tokens_of_the_name_alone(own, tiny, tmp_path):
    """With a byte-level tokenizer the name alone has other tokens: other numbers, another setting, and a remark."""
    _, tensors = rank(tmp_path / "a", tiny / "llava-1.5-7b", **own.args)
    done = run_script(SCRIPT, "--weights", tiny / "llava-1.5-7b", "--out", tmp_path / "b", "--paper-tokenisation",
                      *as_flags(own.args))  # fmt: skip
    assert re.search(r"2 of 2 names have other tokens .* those of the name alone are the targets", done.stderr)
    assert "prob_sum-paper_tokenisation" in done.stdout
    assert np.abs(read_values(tmp_path / "b")[1]["values"] - tensors["values"]).min() > 0.01
