"""The logit lens on class names: what every layer would answer if the head read it (nostalgebraist, 2020)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vlmclassifier.ranking.ranker import Ranker
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
    root = np.zeros(1, dtype=int)
    with layer_outputs(decoder) as outputs:
        cache = ranker.prefill(ranker.prepare(images))
        read_layers(ranker, norm, root, [states[:, -1:] for states in outputs], node_log_probs)
        outputs.clear()
        for nodes, _ in ranker.tree_states(cache):
            read_layers(ranker, norm, nodes, outputs, node_log_probs)
            outputs.clear()
    sums = np.stack([trie.path_sums(values) for values in node_log_probs]).astype(np.float32)
    return ranker.checked(sums.swapaxes(0, 1)).swapaxes(0, 1)


@torch.inference_mode()
def read_layers(
    ranker: Ranker, norm: nn.Module, nodes: np.ndarray, outputs: Sequence[Tensor], node_log_probs: np.ndarray
) -> None:  # fmt: skip
    """Fill in the log-probabilities [layers, images, nodes] of the children of some nodes.

    `outputs`: states [images, nodes given, width] of every layer, before the final norm.
    """
    for layer, states in enumerate(outputs):
        children, log_probs = ranker.children_log_probs(nodes, norm(states))
        node_log_probs[layer][:, children] = log_probs


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
