"""Protects: the label trie, the tokens of names with real tokenizers, the scores, and the exactness of the search."""

import random

import numpy as np
import pytest
from conftest import REALDATA
from transformers import AutoTokenizer, GPT2Tokenizer

from vlmclassifier.benchmarks import PAPER_BENCHMARKS, class_names
from vlmclassifier.ranking import build_trie, name_tokens, search
from vlmclassifier.records import UserError
from vlmclassifier.scoring.guidance import Scoring, best, best_t, curve, held_out, ranks

PROMPTS = {
    "llama": "USER: <image>\nWhat type of object is in this photo?\nASSISTANT: The photo features a",
    "opt": "Question: What type of object is in this photo? Answer: A",
}


def random_trie(rng: random.Random, names: int = 60, vocabulary: int = 5):
    """Random token sequences, with shared prefixes, prefixes of others and duplicates, and their trie."""
    sequences = [[rng.randrange(vocabulary) for _ in range(rng.randint(1, 6))] for _ in range(names)]
    return sequences, build_trie(sequences)


def test_the_trie_stores_every_prefix_once():
    for seed in range(20):
        sequences, trie = random_trie(random.Random(seed))
        prefixes = {tuple(sequence[:length]) for sequence in sequences for length in range(1, len(sequence) + 1)}
        assert trie.size == 1 + len(prefixes)
        assert len(trie.inner) == len({prefix[:-1] for prefix in prefixes})
        for sequence, node in zip(sequences, trie.name_node, strict=True):
            path = [*trie.ancestors(node), node]
            assert trie.input_ids[path].tolist() == sequence
            assert trie.depth[path].tolist() == list(range(1, len(path) + 1))
        ancestry = trie.ancestry(np.arange(trie.size), np.arange(trie.size))  # [nodes, nodes]
        for node in range(trie.size):
            assert set(np.flatnonzero(ancestry[node])) == {0, node, *trie.ancestors(node)}
        children, parent_index = trie.children(trie.inner)
        assert sorted(children) == list(range(1, trie.size))
        assert (trie.parent[children] == trie.inner[parent_index]).all()


@pytest.mark.parametrize("limit", [1, 3, 7, 1000])
def test_chunks_run_each_inner_node_once_after_its_ancestors(limit):
    for seed in range(10):
        _, trie = random_trie(random.Random(seed))
        chunks, cached_nodes = trie.chunks(limit), []
        assert np.concatenate([nodes for _, nodes in chunks]).tolist() == trie.inner[1:].tolist()
        for ancestors, nodes in chunks:
            assert len(nodes) <= limit and set(ancestors) <= set(cached_nodes)  # kept from the previous chunk
            cached_nodes = [*ancestors, *nodes]
            assert all(set(trie.ancestors(node)) <= set(cached_nodes) for node in nodes)
            assert len(ancestors) <= trie.depth.max()


def test_path_sums_and_lengths_are_those_of_the_names():
    sequences, trie = random_trie(random.Random(0))
    log_probs = np.random.default_rng(0).normal(size=(3, trie.size))
    for name, node in enumerate(trie.name_node):
        expected = log_probs[:, [*trie.ancestors(node), node]].sum(axis=1)
        assert np.allclose(trie.path_sums(log_probs)[:, name], expected, atol=1e-12)
    assert trie.lengths.tolist() == [len(sequence) for sequence in sequences]


def test_a_name_without_tokens_is_refused():
    with pytest.raises(UserError, match="Class name number 1 has no tokens"):
        build_trie([[1], []])


@pytest.mark.skipif(not REALDATA, reason="VLMCLASSIFIER_REALDATA is not set, so there are no real tokenizers")
@pytest.mark.parametrize("key", ["llama", "opt"])
def test_real_tokenizers_on_all_class_lists(key, realdata):
    """The sizes that decide the cost of a ranking, and the reference code's tokenisation (paper, section 3.1)."""
    folder = realdata.parent / "tokenizers" / key
    if key == "opt":  # the tokenizer of BLIP-2 is GPT-2's with another begin token
        files = str(folder / "vocab.json"), str(folder / "merges.txt")
        tokenizer = GPT2Tokenizer(*files, bos_token="</s>", eos_token="</s>", add_bos_token=True)
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    for benchmark in PAPER_BENCHMARKS.values():
        names = list(dict.fromkeys(class_names(benchmark)))
        tokens = name_tokens(tokenizer, PROMPTS[key], names)
        trie, paper_trie = tokens.trie(), tokens.trie(paper_tokenisation=True)
        print(
            f"{key} {benchmark.key}: {len(names)} names, {trie.lengths.sum()} tokens, {trie.size} nodes, "
            f"{len(trie.inner)} inner nodes; names with other tokens alone: {tokens.different_count}, with another "
            f"number of tokens: {tokens.different_length_count}"
        )
        assert tokens.retokenised_count == 0
        prompt_length = len(tokenizer(PROMPTS[key])["input_ids"])
        for name, ids in zip(names, tokens.ids, strict=True):
            assert tuple(tokenizer(f"{PROMPTS[key]} {name}")["input_ids"][prompt_length:]) == ids
            assert tokenizer.decode(ids).strip() == name
        if key == "llama":
            assert tokens.different_count == 0 and paper_trie.input_ids.tolist() == trie.input_ids.tolist()
        else:
            assert tokens.different_count == len(names)  # the name alone has no leading space
            for bare_ids, node in zip(tokens.bare_ids, paper_trie.name_node, strict=True):
                target_ids = paper_trie.target_ids[[*paper_trie.ancestors(node), node]].tolist()
                assert list(bare_ids[: len(target_ids)]) == target_ids
        if benchmark.key == "imagenet":
            assert (trie.size, len(trie.inner)) == {"llama": (2842, 1867), "opt": (2322, 1347)}[key]
            assert key == "llama" or tokens.different_length_count == 408


def simulated_log_probs(trie, rng: np.random.Generator, images: int, step: float | None) -> np.ndarray:
    """Log-probabilities [images, nodes] of random distributions of the next token; `step`: round them, to make ties."""
    log_probs = np.zeros((images, trie.size))
    for node in trie.inner:
        children, _ = trie.children(np.array([node]))
        logits = rng.normal(scale=2, size=(images, len(children) + 3))  # 3 tokens that continue no name
        values = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        values = values if step is None else np.minimum(np.round(values / step) * step, 0)
        log_probs[:, children] = values[:, : len(children)]
    return log_probs


def run_search(trie, scoring, k, log_probs, whole_subtrees):
    """Search with simulated log-probabilities. Returns the results and the set of run nodes of every image."""
    run_nodes_of = [set() for _ in log_probs]

    def run_nodes(images, nodes):
        results = []
        for image, image_nodes in zip(images, nodes, strict=True):
            new_nodes = set(image_nodes.tolist())
            assert not run_nodes_of[image] & new_nodes, "a node must be run only once"
            assert all(int(trie.parent[node]) in run_nodes_of[image] | new_nodes | {0} for node in image_nodes)
            run_nodes_of[image] |= new_nodes
            children, _ = trie.children(image_nodes)
            results.append(log_probs[image][children])
        return results

    root_log_probs = log_probs[:, trie.children(np.zeros(1, dtype=int))[0]]
    return search(trie, scoring, k, root_log_probs, run_nodes, whole_subtrees), run_nodes_of


@pytest.mark.parametrize("step", [None, 0.5])
def test_the_search_equals_the_full_ranking(step):
    """500 random cases of sum, mean and guidance, with and without ties: the same names in the same order."""
    rng, saved_nodes = np.random.default_rng(1), 0
    for case in range(500):
        _, trie = random_trie(random.Random(case), names=80, vocabulary=6)
        prior = trie.path_sums(simulated_log_probs(trie, rng, 1, step))[0]
        scoring = Scoring(bool(case % 2), (1.0, 1.0, 1.5, 4.0, 0.5, 0.0)[case % 6], prior)
        log_probs = simulated_log_probs(trie, rng, 2, step)
        results, run_nodes_of = run_search(trie, scoring, 5, log_probs, whole_subtrees=bool(case // 6 % 2))
        scores = scoring(trie.path_sums(log_probs).astype(np.float32), trie.lengths)
        for result, row, nodes in zip(results, scores, run_nodes_of, strict=True):
            assert result.names.tolist() == best(row, 5).tolist()
            assert result.scores.tolist() == row[best(row, 5)].tolist()
            assert result.nodes == len(nodes) <= len(trie.inner) - 1
            saved_nodes += len(trie.inner) - 1 - len(nodes)
    assert saved_nodes > 5000


def test_equal_scores_come_in_the_order_of_the_classes():
    trie = build_trie([[1, 2], [3], [1, 2], [4]])  # names 0 and 2 have the same tokens
    log_probs = np.zeros((1, trie.size))
    log_probs[0, trie.name_node] = np.log([0.5, 0.5, 0.5, 0.5])
    results, _ = run_search(trie, Scoring(), 4, log_probs, False)
    assert results[0].names.tolist() == [0, 1, 2, 3]


def test_sums_that_are_rounded_to_the_same_number_are_ties_in_both():
    """The full ranking stores float32: a name and a nearly certain continuation of it have equal scores."""
    trie = build_trie([[1, 2], [1], [3]])
    log_probs = np.zeros((1, trie.size))
    log_probs[0, trie.name_node] = [-1e-7, -16.0, -20.0]
    full = best(Scoring()(trie.path_sums(log_probs).astype(np.float32), trie.lengths), 3)
    for whole_subtrees in (False, True):
        results, _ = run_search(trie, Scoring(), 3, log_probs, whole_subtrees)
        assert results[0].names.tolist() == full[0].tolist() == [0, 1, 2]


def test_k_may_exceed_the_number_of_names():
    trie = build_trie([[1], [2, 3]])
    results, _ = run_search(trie, Scoring(), 5, np.log(np.full((1, trie.size), 0.3)), False)
    assert results[0].names.tolist() == [0, 1]


def test_scores_follow_the_papers_formulas():
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
    for rank, order, index in zip(ranks(scores, truth), best(scores, 9), truth, strict=True):
        assert rank == np.flatnonzero(order == index)[0]
    table = curve(scores, np.ones(9), truth, scores[0], True, [1.0, 2.5])
    assert table[0].tolist() == (ranks(scores, truth) == 0).tolist()


def test_t_is_never_chosen_on_the_images_that_it_is_evaluated_on():
    half = np.array([False, False, True, True])
    table = np.array([[1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]], dtype=bool)  # each half has its own best t
    assert best_t(table) == 0 and held_out(table, half).tolist() == [False] * 4
    table[2] = True
    assert held_out(table, half).tolist() == [True] * 4 if best_t(table[:, half]) == 2 else True
