"""Protects: the label trie, the tokens of names by real tokenizers, the scores, and the exactness of the search."""

import random

import numpy as np
import pytest
from conftest import REALDATA
from transformers import AutoTokenizer, GPT2Tokenizer

from vlmclassifier.benchmarks import PAPER_BENCHMARKS, class_names
from vlmclassifier.ranking import Scoring, best, build_trie, choose, curve, held_out, name_tokens, ranks, search
from vlmclassifier.records import UserError

PROMPTS = {
    "llama": "USER: <image>\nWhat type of object is in this photo?\nASSISTANT: The photo features a",
    "opt": "Question: What type of object is in this photo? Answer: A",
}


def random_trie(rng: random.Random, names: int = 60, vocabulary: int = 5):
    """A trie with shared beginnings, names within names, and equal names."""
    sequences = [[rng.randrange(vocabulary) for _ in range(rng.randint(1, 6))] for _ in range(names)]
    return sequences, build_trie(sequences)


def test_the_trie_holds_every_name_once():
    for seed in range(20):
        sequences, trie = random_trie(random.Random(seed))
        beginnings = {tuple(s[:length]) for s in sequences for length in range(1, len(s) + 1)}
        assert trie.size == 1 + len(beginnings)
        assert len(trie.inner) == len({beginning[:-1] for beginning in beginnings})
        for sequence, node in zip(sequences, trie.name_node, strict=True):
            path = [*trie.ancestors(node), node]
            assert trie.fed[path].tolist() == sequence and trie.depth[path].tolist() == list(range(1, len(path) + 1))
        above = trie.ancestry(np.arange(trie.size), np.arange(trie.size))
        for node in range(trie.size):
            assert set(np.flatnonzero(above[node])) == {0, node, *trie.ancestors(node)}
        children, place = trie.children(trie.inner)
        assert sorted(children) == list(range(1, trie.size)) and (trie.parent[children] == trie.inner[place]).all()


@pytest.mark.parametrize("limit", [1, 3, 7, 1000])
def test_chunks_run_each_inner_node_once_and_hold_what_it_looks_back_at(limit):
    for seed in range(10):
        _, trie = random_trie(random.Random(seed))
        chunks, held = trie.chunks(limit), []
        assert np.concatenate([nodes for _, nodes in chunks]).tolist() == trie.inner[1:].tolist()
        for ancestors, nodes in chunks:
            assert len(nodes) <= limit and set(ancestors) <= set(held)  # kept from the chunk before
            held = [*ancestors, *nodes]
            assert all(set(trie.ancestors(node)) <= set(held) for node in nodes)
            assert len(ancestors) <= trie.depth.max()


def test_sums_are_those_of_the_paths_and_lengths_count_tokens():
    sequences, trie = random_trie(random.Random(0))
    log_probs = np.random.default_rng(0).normal(size=(3, trie.size))
    for name, node in enumerate(trie.name_node):
        expected = log_probs[:, [*trie.ancestors(node), node]].sum(axis=1)
        assert np.allclose(trie.path_sums(log_probs)[:, name], expected, atol=1e-12)
    assert trie.lengths.tolist() == list(map(len, sequences))


def test_a_name_without_tokens_is_one_sentence():
    with pytest.raises(UserError, match="Class name number 1 has no tokens"):
        build_trie([[1], []])


@pytest.mark.skipif(not REALDATA, reason="the real tokenizers are not at hand")
@pytest.mark.parametrize("key", ["llama", "opt"])
def test_real_tokenizers_on_all_class_lists(key, realdata):
    """The sizes that the cost of a ranking follows from, and the reference's own tokenisation (paper section 2)."""
    folder = realdata.parent / "tokenizers" / key
    if key == "opt":  # BLIP-2's is GPT-2's with its own begin token
        files = str(folder / "vocab.json"), str(folder / "merges.txt")
        tokenizer = GPT2Tokenizer(*files, bos_token="</s>", eos_token="</s>", add_bos_token=True)
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    for benchmark in PAPER_BENCHMARKS.values():
        names = list(dict.fromkeys(class_names(benchmark)))
        tokens = name_tokens(tokenizer, PROMPTS[key], names)
        trie, paper = tokens.trie(), tokens.trie(paper=True)
        print(
            f"{key} {benchmark.key}: {len(names)} names, {trie.lengths.sum()} tokens, {trie.size} nodes, "
            f"{len(trie.inner)} inner; other tokens alone: {tokens.different}, other number: {tokens.different_length}"
        )
        assert tokens.apart == 0
        before = len(tokenizer(PROMPTS[key])["input_ids"])
        for name, ids in zip(names, tokens.ids, strict=True):
            assert tuple(tokenizer(f"{PROMPTS[key]} {name}")["input_ids"][before:]) == ids
            assert tokenizer.decode(ids).strip() == name
        if key == "llama":
            assert tokens.different == 0 and paper.fed.tolist() == trie.fed.tolist()
        else:
            assert tokens.different == len(names)  # the bare name has no leading space
            read = [paper.read[[*paper.ancestors(node), node]].tolist() for node in paper.name_node]
            assert all(list(bare[: len(row)]) == row for bare, row in zip(tokens.bare, read, strict=True))
        if benchmark.key == "imagenet":
            assert (trie.size, len(trie.inner)) == {"llama": (2842, 1867), "opt": (2322, 1347)}[key]
            assert key == "llama" or tokens.different_length == 408


def simulated(trie, rng: np.random.Generator, pictures: int, steps: float | None) -> np.ndarray:
    """Log-probabilities [pictures, nodes] of random next-token distributions; `steps` rounds them, to make ties."""
    log_probs = np.zeros((pictures, trie.size))
    for node in trie.inner:
        children, _ = trie.children(np.array([node]))
        logits = rng.normal(scale=2, size=(pictures, len(children) + 3))  # 3 tokens that no name continues with
        values = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        values = values if steps is None else np.minimum(np.round(values / steps) * steps, 0)
        log_probs[:, children] = values[:, : len(children)]
    return log_probs


def searched(trie, scoring, k, log_probs, subtrees):
    """The search over simulated log-probabilities, with what it ran of every picture."""
    ran = [set() for _ in log_probs]

    def run(pictures, nodes):
        for picture, some in zip(pictures, nodes, strict=True):
            assert not ran[picture] & set(some.tolist()), "a node is run once"
            assert all(int(trie.parent[node]) in ran[picture] | set(some.tolist()) | {0} for node in some)
            ran[picture] |= set(some.tolist())
        return [log_probs[p][trie.children(some)[0]] for p, some in zip(pictures, nodes, strict=True)]

    first = log_probs[:, trie.children(np.zeros(1, dtype=int))[0]]
    return search(trie, scoring, k, first, run, subtrees), ran


@pytest.mark.parametrize("steps", [None, 0.5])
def test_the_search_finds_what_the_full_ranking_finds(steps):
    """500 random cases of sum, mean and guidance, with and without ties: the same names in the same order."""
    rng, saved = np.random.default_rng(1), 0
    for case in range(500):
        _, trie = random_trie(random.Random(case), names=80, vocabulary=6)
        prior = trie.path_sums(simulated(trie, rng, 1, steps))[0]
        scoring = Scoring(bool(case % 2), (1.0, 1.0, 1.5, 4.0, 0.5, 0.0)[case % 6], prior)
        log_probs = simulated(trie, rng, 2, steps)
        found, ran = searched(trie, scoring, 5, log_probs, subtrees=bool(case // 6 % 2))
        scores = scoring(trie.path_sums(log_probs).astype(np.float32), trie.lengths)
        for result, row, nodes in zip(found, scores, ran, strict=True):
            assert result.names.tolist() == best(row, 5).tolist()
            assert result.scores.tolist() == row[best(row, 5)].tolist()
            assert result.nodes == len(nodes) <= len(trie.inner) - 1
            saved += len(trie.inner) - 1 - len(nodes)
    assert saved > 5000


def test_equal_scores_come_in_the_order_of_the_classes():
    trie = build_trie([[1, 2], [3], [1, 2], [4]])  # names 0 and 2 have the same tokens
    log_probs = np.zeros((1, trie.size))
    log_probs[0, trie.name_node] = np.log([0.5, 0.5, 0.5, 0.5])
    found, _ = searched(trie, Scoring(), 4, log_probs, False)
    assert found[0].names.tolist() == [0, 1, 2, 3]


def test_sums_that_round_to_the_same_number_are_equal_in_both():
    """The full ranking stores float32: a name that another one continues with near certainty ties with it."""
    trie = build_trie([[1, 2], [1], [3]])
    log_probs = np.zeros((1, trie.size))
    log_probs[0, trie.name_node] = [-1e-7, -16.0, -20.0]
    full = best(Scoring()(trie.path_sums(log_probs).astype(np.float32), trie.lengths), 3)
    for subtrees in (False, True):
        found, _ = searched(trie, Scoring(), 3, log_probs, subtrees)
        assert found[0].names.tolist() == full[0].tolist() == [0, 1, 2]


def test_more_names_than_there_are():
    trie = build_trie([[1], [2, 3]])
    found, _ = searched(trie, Scoring(), 5, np.log(np.full((1, trie.size), 0.3)), False)
    assert found[0].names.tolist() == [0, 1]


def test_scores_are_the_papers_formulas():
    sums, lengths, prior = np.array([[-4.0, -6.0]]), np.array([1, 3]), np.array([-1.0, -9.0])
    assert Scoring()(sums, lengths).tolist() == [[-4, -6]]
    assert Scoring(per_token=True)(sums, lengths).tolist() == [[-4, -2]]
    assert Scoring(False, 2.0, prior)(sums, lengths).tolist() == [[-8 + 1, -12 + 9]]
    assert Scoring(True, 2.0, prior)(sums, lengths).tolist() == [[-7, -1]]
    assert Scoring(False, 0.0, prior)(sums, lengths).tolist() == [[-1, -9]]
    truth = np.array([1])
    assert curve(sums, lengths, truth, prior, False, [0, 1, 2]).tolist() == [[False], [False], [True]]
    assert ranks(sums, truth).tolist() == [1]
    rng = np.random.default_rng(0)
    scores, truth = np.round(rng.normal(size=(50, 9)), 1), rng.integers(9, size=50)  # with ties
    assert ranks(scores, truth).tolist() == [
        np.flatnonzero(b == t)[0] for b, t in zip(best(scores, 9), truth, strict=True)
    ]
    table = curve(scores, np.ones(9), truth, scores[0], True, [1.0, 2.5])
    assert table[0].tolist() == (ranks(scores, truth) == 0).tolist()


def test_t_is_never_chosen_on_the_pictures_it_is_scored_on():
    half = np.array([False, False, True, True])
    table = np.array([[1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]], dtype=bool)  # each half has its own best t
    assert choose(table) == 0 and held_out(table, half).tolist() == [False] * 4
    table[2] = True
    assert held_out(table, half).tolist() == [True] * 4 if choose(table[:, half]) == 2 else True
