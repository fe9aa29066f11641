"""Objectives over all class names, from one differentiable pass over the tree of their tokens (beyond the paper).

A name's log-probability is the sum over its tokens and the end token: a name that begins another is not favoured.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vlmclassifier.finetuning.collator import IGNORED, Collator, answer_ids, end_token
from vlmclassifier.ranking.decoding import TreeDecoder, token_log_probs
from vlmclassifier.ranking.trie import build_trie
from vlmclassifier.records import UserError
from vlmclassifier.vlm import VLM

OBJECTIVES = ("generation", "names", "expected")


class NameCollator:
    """Makes a batch of rows that ask for one of the class names: the prompts' inputs and `classes` [batch].

    `labels` count one predicted thing per row, for Trainer.
    """

    def __init__(self, vlm: VLM, names: Sequence[str]) -> None:
        self.collator = Collator(vlm)
        self.number = {name: number for number, name in enumerate(dict.fromkeys(names))}

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch. Raises UserError for a row without image or whose answer is no class name."""
        for row in rows:
            if not row["image"] or len(row["turns"]) != 1 or row["turns"][0]["answer"] not in self.number:
                raise UserError(
                    f"Row {row['id']} does not ask for a class name of an image: --objective names and expected are "
                    "for classification rows alone."
                )
        inputs = self.collator.prompts(rows, [self.collator.vlm.prompt(row["turns"][0]["question"]) for row in rows])
        labels = torch.tensor([[IGNORED, 0]]).repeat(len(rows), 1)
        classes = torch.tensor([self.number[row["turns"][0]["answer"]] for row in rows])
        return inputs | {"labels": labels, "classes": classes, "row_ids": [row["id"] for row in rows]}


class NameObjective:
    """The loss of a batch of a NameCollator, summed over its rows.

    `kind`: "names": cross-entropy of the softmax over the names' log-probabilities; "expected": minus the probability
    of the right name in it, whose gradient is what sampled policy-gradient methods estimate for the accuracy. All rows
    of one training have one question, so that the names' tokens are the same.
    """

    def __init__(self, vlm: VLM, names: Sequence[str], question: str, kind: str) -> None:
        self.vlm, self.kind, self.decoder = vlm, kind, TreeDecoder(vlm)
        prompt = vlm.prompt(question)
        text = prompt + vlm.prompt_suffix(prompt)
        end = (end_token(vlm),)
        tokens = [tuple(answer_ids(vlm.processor.tokenizer, text, name)) + end for name in dict.fromkeys(names)]
        self.trie = build_trie(tokens)
        nodes = self.trie.inner[1:]
        self.children, self.parents = self.trie.children(self.trie.inner)  # both [edges]
        self.nodes = nodes
        paths = [[*self.trie.ancestors(node), int(node)] for node in self.trie.name_node]
        edge_of = {int(child): edge for edge, child in enumerate(self.children)}
        width = max(map(len, paths))
        self.paths = torch.full((len(paths), width), len(self.children))  # [names, depth] edges; the last is padding
        for number, path in enumerate(paths):
            self.paths[number, : len(path)] = torch.tensor([edge_of[node] for node in path])

    def __call__(self, model: nn.Module, core: nn.Module, batch: dict[str, Any]) -> Tensor:
        """The summed loss of a batch."""
        scores = self.log_probs(batch, model).log_softmax(dim=-1)  # [batch, names]
        right = scores[torch.arange(len(scores)), batch["classes"].to(scores.device)]  # [batch]
        return -right.sum() if self.kind == "names" else -right.exp().sum()

    def log_probs(self, batch: dict[str, Any], model: nn.Module | None = None) -> Tensor:
        """Log-probabilities float32 [batch, names], with gradients."""
        inputs = {key: value for key, value in batch.items() if key not in ("labels", "row_ids", "classes")}
        prompt = self.decoder.differentiable_prefill(inputs, model)
        images, device = len(prompt.logits), prompt.logits.device
        tokens = torch.as_tensor(self.trie.target_ids[self.children], device=device)  # [edges]
        parents = torch.as_tensor(self.parents, device=device)  # [edges] 0 is the prompt
        rows = torch.arange(images, device=device)
        from_root = tokens[parents == 0]
        found = [token_log_probs(prompt.logits, rows.repeat_interleave(len(from_root)), from_root.repeat(images))]
        found[0] = found[0].view(images, -1)  # [images, edges of the root]
        if len(self.nodes):
            states = self._states(prompt, images, device)  # [images, nodes, width]
            below = parents > 0
            for image in range(images):  # edges are sorted by their parents within an image
                log_probs = self.decoder.differentiable_log_probs(states[image], parents[below] - 1, tokens[below])
                found.append(log_probs[None])
            found = [torch.cat([found[0], torch.cat(found[1:])], dim=1)]  # [images, edges]
        edges = torch.cat([found[0], found[0].new_zeros((images, 1))], dim=1)  # [images, edges + 1]
        return edges[:, self.paths.to(device)].sum(dim=-1)

    def _states(self, prompt: Any, images: int, device: torch.device) -> Tensor:
        def on_device(values: np.ndarray) -> Tensor:
            return torch.as_tensor(values, device=device)[None].expand(images, *values.shape)

        nodes = self.nodes
        visible = on_device(self.trie.ancestry(nodes[None], nodes[None])[0])  # [images, nodes, nodes]
        return self.decoder.differentiable_tree(
            prompt, on_device(self.trie.input_ids[nodes]), on_device(self.trie.depth[nodes]), visible
        )  # fmt: skip
