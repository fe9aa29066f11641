"""log p(class name | image, prompt) of all names in one pass, or of the k best alone (paper section 2)."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlmclassifier.ranking.decoding import Prefix, TreeDecoder, gathered
from vlmclassifier.ranking.names import name_tokens, separator
from vlmclassifier.ranking.one_by_one import behind_the_cache, whole_passes
from vlmclassifier.ranking.scores import Scoring, best
from vlmclassifier.ranking.search import Found, search
from vlmclassifier.records import ContextError, UserError
from vlmclassifier.vlm import VLM

CHUNK = 256  # tree tokens of a picture in one forward pass
EXACT = (1e-3, 0.0)  # how far the tree may be from a whole pass: nats, and nats per nat; here rounding in float32
ROUNDED = (0.3, 0.03)  # in bfloat16 and float16
STRANGE = (RuntimeError, ValueError, TypeError, AttributeError, LookupError)  # what a model of another design raises
SINGLE = {"names": "name by name behind the cached prompt", "whole": "with a whole forward pass for each name"}


class Ranker:
    """Ranks class names for pictures.

    `way` is "tree", or where a family cannot be served by tree masks "names" (one by one behind the cached prompt) or
    "whole" (a whole forward pass for each); `settle` finds out with a picture. Raises UserError where the processor
    changes the prompt's end.
    """

    def __init__(
        self, vlm: VLM, names: Sequence[str], question: str, opening: str | None = None,
        paper_tokenisation: bool = False, chunk: int = CHUNK,
    ) -> None:  # fmt: skip
        self.vlm, self.names, self.chunk, self.way = vlm, tuple(names), chunk, "tree"
        self.question, self.opening = question, vlm.spec.opening if opening is None else opening
        self.prompt = self._opened(vlm.prompt(question))
        self.failure = ""  # why the tree does not serve
        try:
            self.decoder = TreeDecoder(vlm)
        except STRANGE as error:
            self.way, self.failure = "names", f"{type(error).__name__}: {error}".splitlines()[0]
        self.ending = self._ending()
        self.tokens = name_tokens(vlm.processor.tokenizer, self.prompt + self.ending, names)
        self.trie = self.tokens.trie(paper_tokenisation)
        self.report = self.tokens.report(paper_tokenisation)

    def prepare(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Processor output for pictures, each with the prompt that a name can follow."""
        return self.vlm.prepare(images, [self.prompt] * len(images))

    def log_probs(self, images: Sequence[Image.Image], inputs: Mapping[str, Tensor] | None = None) -> np.ndarray:
        """Summed log-probabilities float32 [pictures, names] (nats). Raises ContextError.

        `inputs`: what `prepare` made of the pictures, where it is at hand.
        """
        if self.way != "tree":
            return np.concatenate([self._one_by_one(self.prepare([image])) for image in images])
        return self._summed(self.prepare(images) if inputs is None else inputs)

    def prior(self) -> np.ndarray:
        """Summed log-probabilities float32 [names] behind the same prompt without the picture (paper section 2)."""
        tokenizer = self.vlm.processor.tokenizer
        text = self._opened(self.vlm.prompt(self.question, picture=False)) + self.ending
        once = {"add_special_tokens": False} if tokenizer.bos_token and text.startswith(tokenizer.bos_token) else {}
        ids = tokenizer(text, return_tensors="pt", **once)["input_ids"]
        if self._begins() and tokenizer.bos_token_id not in ids[0].tolist():
            ids = torch.cat([torch.full((1, 1), tokenizer.bos_token_id), ids], dim=1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.vlm.model.config.model_type == "paligemma":
            inputs["token_type_ids"] = torch.zeros_like(ids)  # the prompt's: read in both directions
        return (self._summed(inputs) if self.way == "tree" else self._one_by_one(inputs))[0]

    def top_k(
        self, images: Sequence[Image.Image], k: int, scoring: Scoring, inputs: Mapping[str, Tensor] | None = None,
        subtrees: bool | None = None,
    ) -> list[Found]:  # fmt: skip
        """The k best names of every picture, as the full ranking has them. Raises ContextError."""
        if self.way != "tree":
            scores = scoring(self.log_probs(images), self.trie.lengths)
            return [Found(best(row, k), row[best(row, k)], 0, 0) for row in scores]
        walk = _Walk(self, self._read(self.prepare(images) if inputs is None else inputs))
        return search(self.trie, scoring, k, walk.first(), walk, subtrees)

    def settle(self, image: Image.Image) -> str:
        """Compare the tree with whole forward passes on one picture; fall back where they differ.

        Returns a sentence that says so, empty where the tree is exact. Raises ContextError.
        """
        row = self._on_device(self.prepare([image]))
        self._check_length(row["input_ids"].shape[1])
        order = np.argsort(self.trie.lengths, kind="stable")
        some = sorted({int(order[0]), int(order[len(order) // 2]), int(order[-1])})
        try:
            expected = whole_passes(self.vlm, row, self._tokens(some))
        except STRANGE as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(
                f"{self.vlm.spec.key} cannot be ranked: its forward pass does not take picture, prompt and name "
                f"together ({what}); ask it with main_results/classify_vlm.py."
            ) from error
        for way in ("names", "whole") if self.failure else ("tree", "names", "whole"):
            self.way = way
            problem = self._problem(row, some, expected) if way != "whole" else ""
            if not problem:
                break
            self.failure = self.failure or problem
        if self.way == "tree":
            return ""
        return (
            f"{self.vlm.spec.key} cannot be ranked with tree masks ({self.failure}): its names are scored "
            f"{SINGLE[self.way]}, exactly but slowly"
        )

    def _problem(self, row: Mapping[str, Tensor], some: Sequence[int], expected: np.ndarray) -> str:
        """What is wrong with the present way on some names of one picture; empty where nothing is."""
        try:
            if self.way == "tree":
                got = self._summed(row)[0][some]
            else:
                got = behind_the_cache(self.vlm, row, self._tokens(some))
        except STRANGE as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return f"{type(error).__name__}: {error}".splitlines()[0]
        absolute, relative = EXACT if self.vlm.model.dtype == torch.float32 else ROUNDED
        off = np.abs(got - expected)
        return "" if (off <= absolute + relative * np.abs(expected)).all() else f"{off.max():.2g} nats off"

    def _begins(self) -> bool:
        """Whether the processor's prompts hold a begin token: PaliGemma's writes it, its tokenizer does not."""
        ids = self.prepare([Image.new("RGB", (64, 64))])["input_ids"][0].tolist()
        return self.vlm.processor.tokenizer.bos_token_id in ids

    def _opened(self, prompt: str) -> str:
        return prompt + (separator(prompt) + self.opening if self.opening else "")

    def _ending(self) -> str:
        """What the processor writes behind the prompt: PaliGemma's ends the line. Raises UserError for other things."""
        tokenizer = self.vlm.processor.tokenizer
        ids = self.prepare([Image.new("RGB", (64, 64))])["input_ids"][0].tolist()
        for ending in ("", "\n"):
            tail = tokenizer(self.prompt + ending)["input_ids"][-4:]
            if ids[-len(tail) :] == tail:
                return ending
        raise UserError(
            f"The processor of {self.vlm.spec.key} changes the end of the prompt {self.prompt[-40:]!r}: a name cannot "
            "follow it; give another --opening."
        )

    def _on_device(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: self.vlm._to_device(value) for key, value in inputs.items()}

    def check_context(self, sizes: Sequence[tuple[int, int]] = ()) -> None:
        """Raise ContextError when prompt and longest name exceed the context with pictures of these sizes."""
        self._check_length(self.vlm.longest([self.prompt], sizes))

    def _check_length(self, prompt: int) -> None:
        context = getattr(self.vlm.model.config.get_text_config(), "max_position_embeddings", None)
        length = prompt + int(self.trie.lengths.max())
        if context is not None and length > context:
            raise ContextError(
                f"The prompt and the longest name have {length} tokens, but the context of {self.vlm.spec.key} is "
                f"{context}: this cell is N/A."
            )

    def _tokens(self, names: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """The tokens of some names, fed and read, on the model's device."""
        paths = [[*self.trie.ancestors(node), node] for node in self.trie.name_node[list(names)]]
        device = self.vlm.model.device
        return [
            (torch.as_tensor(self.trie.fed[path], device=device), torch.as_tensor(self.trie.read[path], device=device))
            for path in paths
        ]

    def _one_by_one(self, row: Mapping[str, Tensor]) -> np.ndarray:
        row = self._on_device(row)
        self._check_length(row["input_ids"].shape[1])
        score = behind_the_cache if self.way == "names" else whole_passes
        return score(self.vlm, row, self._tokens(range(len(self.names))))[None]

    def _read(self, inputs: Mapping[str, Tensor]) -> Prefix:
        self._check_length(int(inputs["attention_mask"].sum(dim=1).max()))
        return self.decoder.read(self._on_device(inputs))

    def _summed(self, inputs: Mapping[str, Tensor]) -> np.ndarray:
        return self.trie.path_sums(self._nodes(self._read(inputs))).astype(np.float32)

    def _nodes(self, prefix: Prefix) -> np.ndarray:
        """Log-probabilities float32 [pictures, nodes]; every inner node is run once."""
        trie, pictures = self.trie, len(prefix.logits)
        result = np.zeros((pictures, trie.size), dtype=np.float32)
        children, _ = trie.children(np.zeros(1, dtype=int))
        result[:, children] = root_log_probs(trie, prefix)
        held = np.zeros(0, dtype=int)  # the tree nodes in the cache
        for ancestors, nodes in trie.chunks(self.chunk):
            kept = np.flatnonzero(np.isin(held, ancestors))
            prefix.keep_tree(torch.as_tensor(kept, device=prefix.mask.device))
            held = np.concatenate([held[kept], nodes])
            children, place = trie.children(nodes)
            states = run_nodes(self, prefix, nodes[None], held[None]).flatten(0, 1)  # [pictures x new, width]
            rows = len(nodes) * np.arange(pictures)[:, None] + place  # [pictures, edges]
            tokens = np.broadcast_to(trie.read[children], rows.shape)
            result[:, children] = self.gather(states, rows, tokens).reshape(rows.shape)
        return result

    def gather(self, states: Tensor, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Log-probabilities [edges] of tokens behind the hidden states at these rows, flat and never falling."""
        flat = [torch.as_tensor(values.ravel(), device=states.device) for values in (rows, tokens.copy())]
        return self.decoder.log_probs(states, *flat).cpu().numpy()


def root_log_probs(trie: object, prefix: Prefix) -> np.ndarray:
    """Log-probabilities [pictures, edges] of the first tokens, behind the prompt."""
    children, _ = trie.children(np.zeros(1, dtype=int))
    tokens = torch.as_tensor(trie.read[children], device=prefix.logits.device)
    rows = torch.arange(len(prefix.logits), device=tokens.device)
    flat = gathered(prefix.logits, rows.repeat_interleave(len(tokens)), tokens.repeat(len(rows)))
    return flat.view(len(rows), -1).cpu().numpy()


def run_nodes(ranker: Ranker, prefix: Prefix, nodes: np.ndarray, held: np.ndarray) -> Tensor:
    """Hidden states [pictures, new, width] of nodes [1 or pictures, new]; -1 fills up a row.

    `held`: the tree nodes in the cache [1 or pictures, held + new], the new ones among them.
    """
    trie, pictures = ranker.trie, len(prefix.logits)
    visible = trie.ancestry(held, nodes)
    spread = [
        torch.as_tensor(values, device=prefix.mask.device).expand(pictures, *values.shape[1:])
        for values in (trie.fed[nodes].clip(0), trie.depth[nodes], visible)
    ]
    return ranker.decoder.run(prefix, *spread)


class _Walk:
    """Runs the nodes that a search asks for; the cache holds what each picture has run so far."""

    def __init__(self, ranker: Ranker, prefix: Prefix) -> None:
        self.ranker, self.prefix = ranker, prefix
        self.pictures = list(range(len(prefix.logits)))  # those that are still searched
        self.held = np.zeros((len(self.pictures), 0), dtype=int)

    def first(self) -> np.ndarray:
        return root_log_probs(self.ranker.trie, self.prefix)

    def __call__(self, pictures: list[int], nodes: list[np.ndarray]) -> list[np.ndarray]:
        trie = self.ranker.trie
        if pictures != self.pictures:
            left = [self.pictures.index(picture) for picture in pictures]
            self.prefix.keep_rows(torch.as_tensor(left, device=self.prefix.mask.device))
            self.pictures, self.held = pictures, self.held[left]
        width = max(map(len, nodes))
        padded = np.full((len(nodes), width), -1)
        for row, some in zip(padded, nodes, strict=True):
            row[: len(some)] = some
        self.held = np.concatenate([self.held, padded], axis=1)
        states = run_nodes(self.ranker, self.prefix, padded, self.held).flatten(0, 1)  # [pictures x new, width]
        edges = [trie.children(some) for some in nodes]
        rows = np.concatenate([number * width + place for number, (_, place) in enumerate(edges)])
        tokens = np.concatenate([trie.read[children] for children, _ in edges])
        values = self.ranker.gather(states, rows, tokens)
        return np.split(values, np.cumsum([len(children) for children, _ in edges])[:-1])
