"""Protects: the ranking's script from pictures to numbers: resume, processes, search, guidance, fallback, mistakes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, noise, run_script, script
from PIL import Image
from test_ranking import NAMES, QUESTION
from test_runs import part_bytes
from transformers import LlavaConfig, LlavaForConditionalGeneration

from vlmclassifier import load_vlm
from vlmclassifier.benchmarks import load_evaluation
from vlmclassifier.plane_figures import FIGURES
from vlmclassifier.ranking import Ranker, Scoring, best, choose
from vlmclassifier.ranking.results import of_train, read_ranking, scores_of
from vlmclassifier.records import ContextError, UserError
from vlmclassifier.runs import read_run
from vlmclassifier.tiny.parts import redraw_weights
from vlmclassifier.values import read_values
from vlmclassifier.vlm import VLM

SCRIPT = "inference_analysis/rank_labels.py"


def rank(out, weights, **more):
    """The script in this process; its rows and tensors."""
    module = script(SCRIPT)
    module.main(module.Args(more.pop("model", "llava-1.5-7b"), weights, out=out, **more))
    return read_run(out)[1], read_values(out)[1]


@pytest.fixture(scope="module")
def caltech(pictures):
    return {"benchmark": "caltech", "split": "all", "data_root": pictures, "limit": 24}


def test_batches_chunks_and_the_search_agree(tiny, caltech, tmp_path):
    """Other batches and chunks give the same numbers but for rounding; the search finds the same names."""
    rows, tensors = rank(tmp_path / "one", tiny / "llava-1.5-7b", **caltech, batch_size=1)
    others, again = rank(tmp_path / "five", tiny / "llava-1.5-7b", **caltech, batch_size=5, chunk=16)
    assert rows == others and np.abs(tensors["values"] - again["values"]).max() <= 2e-5
    assert tensors["values"].shape == (24, 100) and tensors["values"].dtype == np.float32
    assert [list(row.ranking) for row in rows] == best(tensors["values"], 5).tolist()
    for score, t in (("sum", 1.0), ("mean", 1.0), ("mean", 3.0)):
        scoring = Scoring(score == "mean", t, tensors["prior"])
        scores = scoring(tensors["values"], tensors["lengths"])
        found, cost = rank(tmp_path / f"{score}{t}", tiny / "llava-1.5-7b", **caltech, top_k=5, score=score, guidance=t)
        assert [list(row.ranking) for row in found] == best(scores, 5).tolist()
        assert np.allclose(cost["values"][:, :5], -np.sort(-scores, axis=1)[:, :5], atol=1e-4)
        nodes, rounds = cost["values"][:, 5], cost["values"][:, 6]
        assert (nodes <= 254).all() and (score == "mean" or nodes.max() < 150) and (rounds >= 1).all()


def test_killed_and_resumed_gives_the_same_bytes(tiny, caltech, tmp_path):
    words = ["--model", "qwen3-vl-8b", "--weights", tiny / "qwen3-vl-8b", "--batch-size", 2]
    words += [w for key, value in caltech.items() for w in (f"--{key.replace('_', '-')}", value)]
    command = [sys.executable, SCRIPT, *words, "--out", tmp_path / "killed"]
    child = subprocess.Popen(list(map(str, command)), cwd=ROOT, stderr=subprocess.DEVNULL)
    while child.poll() is None and part_bytes(tmp_path / "killed") < 1500:
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    resumed = run_script(SCRIPT, *words, "--out", tmp_path / "killed")
    assert "pictures are answered already" in resumed.stderr and "nodes" in resumed.stderr
    rank(tmp_path / "whole", tiny / "qwen3-vl-8b", model="qwen3-vl-8b", **caltech, batch_size=2)
    names = ["predictions.jsonl", "values.safetensors", "scores.csv"]
    assert all((tmp_path / "killed" / n).read_bytes() == (tmp_path / "whole" / n).read_bytes() for n in names)


def test_two_processes_share_a_ranking(tiny, caltech, tmp_path):
    words = ["--weights", tiny / "llava-1.5-7b", "--batch-size", 1, "--out", tmp_path / "two"]
    words += [w for key, value in caltech.items() for w in (f"--{key.replace('_', '-')}", value)]
    env = {**os.environ, "PROCESSES": "2", "PYTHON": sys.executable}
    run_script("bash", "scripts/multi_gpu.sh", SCRIPT, *words, env=env)
    rows, tensors = rank(tmp_path / "one", tiny / "llava-1.5-7b", **caltech, batch_size=1)
    assert (tmp_path / "two" / "predictions.jsonl").read_bytes() == (
        tmp_path / "one" / "predictions.jsonl"
    ).read_bytes()
    two = read_values(tmp_path / "two")[1]
    assert np.abs(two["values"] - tensors["values"]).max() <= 2e-5 and not list((tmp_path / "two").glob("part-*"))


def test_t_is_chosen_on_the_train_pictures_and_the_table_says_so(tiny, own, tmp_path, capsys):
    own.rows = [row | {"image": name, "split": split} for split in ("train", "test") for row in own.rows
                for name in [f"{split}-{row['image']}"]]  # fmt: skip
    for number, row in enumerate(own.rows):
        noise((40, 30 + number), number).save(own.folder / row["image"])
    own.write()
    home = tmp_path / "outputs" / "inference_analysis"
    for split in ("train", "test"):
        rank(home / split, tiny / "llava-1.5-7b", split=split, **own.args)
    train, test = read_ranking(home / "train"), read_ranking(home / "test")
    ways = {way.setting: way for way in test.ways(train)}
    assert len(ways) == 10
    for score, per_token in (("prob_sum", False), ("prob_avg", True)):
        table = train.curve(per_token)
        assert ways[f"{score}_cfg_held_out"].scoring.t == choose(table) / 4
        assert ways[f"{score}_cfg_held_out"].chosen_on == "train"
        whole = test.curve(per_token)[::4].sum(axis=1)  # t = 0, 1, .. 8
        assert ways[f"{score}_cfg"].top1.sum() == whole.max() >= ways[score].top1.sum()
    alone = {way.setting: way for way in test.ways()}
    assert alone["prob_sum_cfg_held_out"].chosen_on == "the other half"
    capsys.readouterr()
    module = script("inference_analysis/table.py")
    module.main(module.Args(outputs=tmp_path / "outputs"))
    printed = capsys.readouterr().out
    assert re.search(r"LLaVA1.5-7B \(miniature\) +\| prob_sum_cfg_held_out +\| mine +\| [\d.]+ +\| train", printed)
    assert "split train" not in printed and "missing (47.6)" in printed and "missing (62.2)" in printed  # Tables 2, 12
    assert {score.metric for score in scores_of(home / "test", "s", "t")} == {"accuracy", "top5"}


def test_guidance_with_t_1_is_none_and_with_t_0_sees_no_picture(tiny, caltech, tmp_path):
    rank(tmp_path / "run", tiny / "llava-1.5-7b", **caltech)
    ranking = read_ranking(tmp_path / "run")
    for prior in ("no_image", "mean"):
        table = ranking.curve(False, prior)
        assert (table[4] == (ranking.ranks(Scoring()) == 0)).all()  # t = 1
        blind = Scoring(False, 0.0, ranking.prior(prior))(ranking.sums, ranking.lengths)
        assert (blind == blind[0]).all() and (table[0] == (blind.argmax(axis=1) == ranking.truth)).all()
    assert np.allclose(ranking.prior("mean"), ranking.sums.mean(axis=0), atol=1e-4)


def test_the_prior_is_the_prompt_without_its_picture(tiny):
    """Against plain transformers on the text alone, for the three kinds of template."""
    for key, text in (
        ("llava-1.5-7b", "USER: What type?\nASSISTANT: The photo features a"),
        ("blip2-2.7b", "Question: What type? Answer: A"),
        ("qwen2.5-vl-7b", "<|im_start|>user\nWhat type?<|im_end|>\n<|im_start|>assistant\nThe photo features a"),
        ("gemma3-4b", "<start_of_turn>user\nWhat type?<end_of_turn>\n<start_of_turn>model\nThe photo features a"),
        ("paligemma2-3b", "<bos>answer en What type?\n"),  # its processor writes the begin token, not its tokenizer
    ):
        vlm = load_vlm(key, tiny / key)
        ranker = Ranker(vlm, NAMES, "What type?")
        ids = vlm.processor.tokenizer(text, return_tensors="pt")["input_ids"]
        begin = vlm.processor.tokenizer.bos_token_id
        assert begin is None or ids[0].tolist().count(begin) == 1
        network = vlm.model.language_model if key.startswith("blip") else vlm.model
        for place, prior in enumerate(ranker.prior()):
            name = torch.tensor([ranker.tokens.ids[place]])
            more = {}
            if key.startswith("paligemma"):
                more["token_type_ids"] = torch.cat([torch.zeros_like(ids), torch.ones_like(name)], dim=1)
            with torch.no_grad():
                logits = network(input_ids=torch.cat([ids, name], dim=1), **more).logits[0, ids.shape[1] - 1 : -1]
            expected = logits.log_softmax(dim=-1).gather(1, name[0, :, None]).sum().item()
            assert abs(prior - expected) <= 2e-5


@pytest.mark.parametrize("policy", [False, True])
def test_the_search_is_the_full_ranking_on_random_and_trained_models(policy, tiny, trained, world):
    """250 cases per policy and model: pictures x sum, mean and guidance, one by one and in batches."""
    photos = [noise((64, 64), number) for number in range(42)]
    task = load_evaluation("plane_figures", root=world, limit=42)
    shown = [Image.open(example.image).convert("RGB") for example in task.examples]
    for vlm, names, images in (
        (load_vlm("llava-1.5-7b", tiny / "llava-1.5-7b"), NAMES, photos),
        (load_vlm("mini-llava", trained / "vlm"), tuple(FIGURES), shown),
    ):
        ranker = Ranker(vlm, names, QUESTION)
        sums, prior = ranker.log_probs(images), ranker.prior()
        for per_token in (False, True):
            for t in (1.0, 2.0, 5.0):
                scoring = Scoring(per_token, t, prior)
                scores = scoring(sums, ranker.trie.lengths)
                for start in range(0, len(images), 14):
                    found = ranker.top_k(images[start : start + 14], 5, scoring, subtrees=policy)
                    assert [one.names.tolist() for one in found] == best(scores[start : start + 14], 5).tolist()
        alone = ranker.top_k(images[:1], 5, Scoring())
        assert alone[0].names.tolist() == best(Scoring()(sums[:1], ranker.trie.lengths), 5)[0].tolist()


@pytest.fixture
def convolving(tiny):
    """A LLaVA on a decoder with convolutions (LFM2): each token sees its neighbours in the list, whatever the mask."""
    vlm = load_vlm("llava-1.5-7b", tiny / "llava-1.5-7b")
    text = {"model_type": "lfm2", "vocab_size": 600, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 4096,
            "layer_types": ["conv", "full_attention"], "pad_token_id": 3, "bos_token_id": 1}  # fmt: skip
    config = LlavaConfig.from_pretrained(tiny / "llava-1.5-7b").to_dict() | {"text_config": text}
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig.from_dict(config))
    redraw_weights(model)
    return VLM(model, vlm.processor, vlm.spec)


def test_a_family_without_tree_masks_is_scored_name_by_name_and_says_so(convolving):
    ranker, image = Ranker(convolving, NAMES[:6], QUESTION), noise((80, 60))
    said = ranker.settle(image)
    assert ranker.way != "tree" and "cannot be ranked with tree masks" in said and "exactly but slowly" in said
    inputs = convolving.prepare([image], [ranker.prompt])
    start, sums = inputs["input_ids"].shape[1], ranker.log_probs([image, image])
    for place, ids in enumerate(ranker.tokens.ids):
        longer = dict(inputs) | {"input_ids": torch.cat([inputs["input_ids"], torch.tensor([ids])], dim=1)}
        longer["attention_mask"] = torch.ones_like(longer["input_ids"])
        with torch.no_grad():
            log_probs = convolving.model(**longer).logits[0, start - 1 : -1].log_softmax(dim=-1)
        expected = log_probs.gather(1, torch.tensor(ids)[:, None]).sum().item()
        assert abs(sums[0, place] - expected) <= 2e-5 and sums[0, place] == sums[1, place]
    found = ranker.top_k([image], 3, Scoring())
    assert found[0].names.tolist() == best(sums[:1], 3)[0].tolist()


def test_a_batch_that_did_not_fit_leaves_nothing_behind(tiny, monkeypatch):
    """A watch that stayed on the head would hold on to every later batch's logits."""
    vlm = load_vlm("llava-1.5-7b", tiny / "llava-1.5-7b")
    ranker, image = Ranker(vlm, NAMES, QUESTION), noise((80, 60))

    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
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


def test_a_ranking_that_holds_the_train_pictures_takes_no_t_from_them(tiny, own, tmp_path):
    own.rows[0]["split"] = "train"
    own.write()
    runs = {split: tmp_path / split for split in ("train", "test", "all")}
    for split, out in runs.items():
        rank(out, tiny / "llava-1.5-7b", split=split, **own.args)
    train, test, every = (read_ranking(out) for out in runs.values())
    assert of_train(test, [train, every]) is train and of_train(every, [train]) is None
    assert of_train(replace(test, config=test.config | {"manifest": "another"}), [train]) is None


def test_another_opening_is_another_row(tiny, own, tmp_path):
    rank(tmp_path / "run", tiny / "llava-1.5-7b", opening="This is a", split="test", **own.args)
    settings = {score.setting for score in scores_of(tmp_path / "run", "s", "t")}
    assert "prob_sum-opening 'This is a'" in settings and "prob_sum" not in settings
    module = script(SCRIPT)
    task = load_evaluation(**{"name": own.args["benchmark"], "classes": own.classes})
    assert module.run_name(module.Args(opening="This is a"), task) == "ranking-opening_This_is_a"


def test_a_model_of_another_design_is_refused_or_scored_name_by_name(tiny, monkeypatch):
    vlm = load_vlm("llava-1.5-7b", tiny / "llava-1.5-7b")
    image = noise((80, 60))
    right = Ranker(vlm, NAMES, QUESTION).log_probs([image])
    with monkeypatch.context() as patch:
        patch.setattr(type(vlm.model), "get_decoder", lambda model: None)
        ranker = Ranker(vlm, NAMES, QUESTION)
        assert "cannot be ranked with tree masks (AttributeError" in ranker.settle(image)
        assert np.abs(ranker.log_probs([image]) - right).max() <= 2e-5
    ranker = Ranker(vlm, NAMES, QUESTION)
    monkeypatch.setattr(type(vlm.model), "forward", lambda *_, **__: (_ for _ in ()).throw(ValueError("decoder ids")))
    with pytest.raises(UserError, match="cannot be ranked: its forward pass .* .ValueError: decoder ids.; ask it with"):
        ranker.settle(image)


def test_a_tree_that_is_wrong_is_noticed(tiny, monkeypatch):
    """Should another release of transformers read the mask otherwise, the numbers do not change silently."""
    vlm = load_vlm("llava-1.5-7b", tiny / "llava-1.5-7b")
    ranker, image = Ranker(vlm, NAMES, QUESTION), noise((80, 60))
    right = ranker.log_probs([image])
    monkeypatch.setattr("vlmclassifier.ranking.decoding._additive", lambda mask, dtype: mask[:, None].to(dtype))
    assert re.search(r"nats off\): its names are scored name by name behind the cached prompt", ranker.settle(image))
    assert np.abs(ranker.log_probs([image]) - right).max() <= 2e-5


def test_mistakes_are_one_sentence(own, tiny, tmp_path, capsys):
    def refuse(words, error=UserError, **more):
        with pytest.raises(error, match=words):
            rank(more.pop("out", tmp_path / "run"), tiny / "llava-1.5-7b", **own.args, **more)

    refuse("--score and --guidance go with --top-k", score="mean")
    refuse("--guidance -1 is not a number from 0 on", top_k=5, guidance=-1)
    refuse("--guidance nan is not", top_k=5, guidance=float("nan"))
    refuse("--top-k 0 is below 1", top_k=0)
    own.classes.write_text(json.dumps(["cat", "dog", "zygomorphic " * 2000]))
    refuse("the context of llava-1.5-7b is 4096", ContextError)
    home = tmp_path / "outputs" / "inference_analysis"
    refuse("the context of llava-1.5-7b is 4096", ContextError, out=home / "long")
    assert "4096" in read_run(home / "long")[0]["not_applicable"]
    module = script("inference_analysis/table.py")
    with pytest.raises(UserError, match="No finished run"):
        module.main(module.Args(outputs=tmp_path / "outputs"))
    assert re.search(r"LLaVA1.5-7B \(miniature\) +\| prob_sum +\|.*\| N/A +\|\n", capsys.readouterr().out)
    with pytest.raises(UserError, match="nothing is absent, so there are no runs: start with"):
        module.main(module.Args(outputs=tmp_path / "nothing"))
    assert not (tmp_path / "nothing").exists()


def test_the_papers_tokenisation_reads_the_bare_name(own, tiny, tmp_path):
    """A byte-level tokenizer gives a bare name other tokens: other numbers, another run, a note in both."""
    _, usual = rank(tmp_path / "a", tiny / "llava-1.5-7b", **own.args)
    done = run_script(SCRIPT, "--weights", tiny / "llava-1.5-7b", "--out", tmp_path / "b", "--paper-tokenisation",
                      *(w for key, value in own.args.items() for w in (f"--{key}", value)))  # fmt: skip
    assert re.search(r"2 of 2 names have other tokens .* those of the name alone are read", done.stderr)
    assert "prob_sum-paper_tokenisation" in done.stdout
    assert np.abs(read_values(tmp_path / "b")[1]["values"] - usual["values"]).min() > 0.01
