"""The logit lens on class names: what every layer would answer if the head read it (nostalgebraist, 2020)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vlmclassifier.ranking.ranker import Ranker, run_nodes
from vlmclassifier.records import UserError

FINAL_NORMS = ("norm", "final_layer_norm")  # what families call the decoder's last norm


def lens_log_probs(ranker: Ranker, images: Sequence[Image.Image]) -> np.ndarray:
    """Summed log-probabilities float32 [layers, images, names], where every layer is read through final norm and head.

    The states are those of the ranking's own pass: the last token of the prompt and every node of the label trie.
    Row 0 is the output of the first layer; the last row equals `Ranker.log_probs`. Raises UserError for a model that
    is not ranked with tree attention masks.
    """
    if ranker.method != "tree":
        raise UserError(f"{ranker.vlm.spec.key} is not ranked with tree attention masks, so it has no lens.")
    trie, decoder = ranker.trie, ranker.decoder.decoder
    norm = next(getattr(decoder, name) for name in FINAL_NORMS if getattr(decoder, name, None) is not None)
    count = len(decoder.layers)
    node_log_probs = np.zeros((count, len(images), trie.size), dtype=np.float32)  # [layers, images, nodes]
    with layer_outputs(decoder) as outputs:
        cache = ranker.prefill(ranker.prepare(images))
        read_nodes(ranker, norm, [states[:, -1:] for states in outputs], np.zeros(1, dtype=int), node_log_probs)
        cached_nodes = np.zeros(0, dtype=int)
        for ancestors, nodes in trie.chunks(ranker.chunk):
            kept = np.flatnonzero(np.isin(cached_nodes, ancestors))
            cache.keep_tree_tokens(torch.as_tensor(kept, device=cache.mask.device))
            cached_nodes = np.concatenate([cached_nodes[kept], nodes])
            outputs.clear()
            run_nodes(ranker, cache, nodes[None], cached_nodes[None])
            read_nodes(ranker, norm, outputs, nodes, node_log_probs)
    sums = np.stack([trie.path_sums(values) for values in node_log_probs]).astype(np.float32)
    return ranker.checked(sums.swapaxes(0, 1)).swapaxes(0, 1)


@torch.inference_mode()
def read_nodes(
    ranker: Ranker, norm: nn.Module, outputs: Sequence[Tensor], nodes: np.ndarray, node_log_probs: np.ndarray
) -> None:  # fmt: skip
    """Fill in the log-probabilities [layers, images, nodes] of the children of some nodes.

    `outputs`: states [images, nodes given, width] of every layer, before the final norm.
    """
    children, parent_index = ranker.trie.children(nodes)  # both [edges]
    for layer, states in enumerate(outputs):
        images = len(states)
        rows = len(nodes) * np.arange(images)[:, None] + parent_index  # [images, edges]
        tokens = np.broadcast_to(ranker.trie.target_ids[children], rows.shape)
        values = ranker.edge_log_probs(norm(states).flatten(0, 1), rows, tokens)
        node_log_probs[layer][:, children] = values.reshape(rows.shape)


@contextmanager
def layer_outputs(decoder: Any) -> Iterator[list[Tensor]]:
    """Within it, every forward pass of the decoder appends the output of each layer to the yielded list."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, arguments: tuple, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(keep) for layer in decoder.layers]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
