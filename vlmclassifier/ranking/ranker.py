"""log p(class name | image, prompt) of all names in one pass, or of the k best names alone (paper, section 3.1)."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlmclassifier.devices import BatchSplitter
from vlmclassifier.finite import check_finite
from vlmclassifier.ranking.decoding import PromptCache, TreeDecoder, token_log_probs
from vlmclassifier.ranking.names import name_tokens, separator
from vlmclassifier.ranking.one_by_one import cached_prompt_log_probs, full_forward_log_probs
from vlmclassifier.ranking.search import SearchResult, search
from vlmclassifier.ranking.trie import LabelTrie
from vlmclassifier.records import ContextError, UserError, rows_from
from vlmclassifier.scoring.guidance import Scoring, best
from vlmclassifier.thoughts import opened_by
from vlmclassifier.vlm import VLM, Batch

CHUNK = 256  # tree tokens per image in one forward pass
# Tolerated difference in nats between a method and full forward passes, due to rounding: in bfloat16 and float16 the
# smaller number plus twice the noise that is measured on the spot, at most the larger. Positions that are off by
# one change 0.1 to 6 nats, a missing tree mask 0.3 to 4 (docs/correctness.md).
FLOAT32_TOLERANCE = 1e-3
LOW_PRECISION_TOLERANCE = (0.07, 0.1)
SIBLINGS = 4  # names below one node of the trie that are compared too: they show a wrong attention mask
# What models with another architecture raise.
UNSUPPORTED_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError)
METHODS = {  # in the order in which they are tried
    "tree": "with tree attention masks",
    "cached_prompt": "name by name after the cached prompt",
    "full_forward": "with a full forward pass for each name",
}


class Ranker:
    """Ranks class names for images.

    `method` is a key of METHODS: "tree", or "cached_prompt" or "full_forward" for an architecture that does not support
    tree attention masks; `select_method` finds out which one works. Raises UserError when the processor changes the end
    of the prompt, or when a name has no tokens.
    """

    def __init__(
        self, vlm: VLM, names: Sequence[str], question: str, answer_prefix: str | None = None,
        paper_tokenisation: bool = False, chunk: int = CHUNK,
    ) -> None:  # fmt: skip
        self.vlm, self.names, self.chunk, self.method = vlm, tuple(names), chunk, "tree"
        self.question = question
        self.answer_prefix = vlm.spec.answer_prefix if answer_prefix is None else answer_prefix
        self.prompt = self._add_answer_prefix(vlm.prompt(question))
        self.failure = ""  # why the tree cannot be used
        self._splitter = BatchSplitter()
        try:
            self.decoder = TreeDecoder(vlm)
        except UNSUPPORTED_ERRORS as error:
            self.method, self.failure = "cached_prompt", _first_line(error)
        self.prompt_suffix = vlm.prompt_suffix(self.prompt)
        self.tokens = name_tokens(vlm.processor.tokenizer, self.prompt + self.prompt_suffix, names)
        self.trie = self.tokens.trie(paper_tokenisation)
        self.report = self.tokens.report(paper_tokenisation)
        if vlm.opens_thought:
            self.report += "; the chat template opens a thought, which is closed before the names"

    def prepare(self, images: Sequence[Image.Image]) -> Batch:
        """A batch of images, each with the prompt that a name continues."""
        return self.vlm.prepare(images, [self.prompt] * len(images))

    def log_probs(self, images: Sequence[Image.Image] | Batch) -> np.ndarray:
        """Summed log-probabilities float32 [images, names] in nats, for images or for the output of `prepare`.

        A batch that does not fit into the device's memory is split. Raises ContextError when the prompt and the longest
        name exceed the context, and UserError when a single image does not fit into the memory.
        """
        batch = images if isinstance(images, Batch) else self.prepare(images)

        def rank_part(part: slice) -> list[np.ndarray]:
            if self.method != "tree":
                log_probs = np.stack([self._one_by_one(self._process(image)) for image in batch.images[part]])
            else:
                log_probs = self._tree_log_probs(self._inputs(batch, part))
            return list(self.checked(log_probs))

        return np.stack(self._splitter.run(rank_part, len(batch)))

    def top_k(
        self, images: Sequence[Image.Image] | Batch, k: int, scoring: Scoring, whole_subtrees: bool | None = None
    ) -> list[SearchResult]:  # fmt: skip
        """The k best names of every image: the same names in the same order as in the full ranking.

        `whole_subtrees`: as in `search`. A batch that does not fit into the device's memory is split. Raises
        ContextError and UserError like `log_probs`.
        """
        batch = images if isinstance(images, Batch) else self.prepare(images)
        if self.method != "tree":
            results = []
            for scores in scoring(self.log_probs(batch), self.trie.lengths):  # [names]
                names = best(scores, k)
                results.append(SearchResult(names, scores[names], 0, 0))
            return results

        def search_part(part: slice) -> list[SearchResult]:
            expander = NodeExpander(self, self._prefill(self._inputs(batch, part)))
            return search(self.trie, scoring, k, expander.root_log_probs(), expander, whole_subtrees)

        return self._splitter.run(search_part, len(batch))

    def prior(self) -> np.ndarray:
        """Summed log-probabilities float32 [names] after the same prompt without the image (paper, section 3.1)."""
        tokenizer = self.vlm.processor.tokenizer
        text = self._add_answer_prefix(self.vlm.prompt(self.question, image=False)) + self.prompt_suffix
        options = {}
        if tokenizer.bos_token and text.startswith(tokenizer.bos_token):
            options["add_special_tokens"] = False  # the tokenizer would add a second begin token
        input_ids = tokenizer(text, return_tensors="pt", **options)["input_ids"]  # [1, tokens]
        if self._prompts_begin_with_bos() and tokenizer.bos_token_id not in input_ids[0].tolist():
            input_ids = torch.cat([torch.full((1, 1), tokenizer.bos_token_id), input_ids], dim=1)
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        if self.vlm.model.config.model_type == "paligemma":
            inputs["token_type_ids"] = torch.zeros_like(input_ids)  # the type of the prompt
        if self.method != "tree":
            log_probs = self._one_by_one(inputs)
        else:
            log_probs = self._splitter.run(lambda part: list(self._tree_log_probs(inputs)), 1)[0]
        return self.checked(log_probs[None], has_rows=False)[0]

    def checked(self, log_probs: np.ndarray, has_rows: bool = True) -> np.ndarray:
        """Log-probabilities [rows, ...]; raises NotFiniteError for one that is not finite."""
        check_finite(torch.as_tensor(log_probs), "A log-probability of a name", self.vlm.logits_dtype, has_rows)
        return log_probs

    def select_method(self, image: Image.Image) -> str:
        """Compare the method with full forward passes on one image, and fall back to a slower one if they differ.

        Returns a sentence about the fallback, or an empty string if the tree is exact. Raises ContextError when the
        prompt and the longest name exceed the context, and UserError when the model cannot rank names.
        """
        row = self.vlm.to_device(self._process(image))
        self._check_length(row["input_ids"].shape[1])
        names = self._compared_names()
        try:
            expected = self._splitter.run(
                lambda part: [full_forward_log_probs(self.vlm, row, self.name_pairs(names))], 1
            )[0]  # [names]
        except UNSUPPORTED_ERRORS as error:
            raise UserError(
                f"{self.vlm.spec.key} cannot be ranked: its forward pass does not accept image, prompt and name "
                f"together ({_first_line(error)}); use main_results/classify_vlm.py."
            ) from error
        self.checked(expected[None])
        for method in METHODS:
            if method == "tree" and self.failure:
                continue
            self.method = method
            problem = "" if method == "full_forward" else self._find_problem(row, names, expected)
            if not problem:
                break
            self.failure = self.failure or problem
        if self.method == "tree":
            return ""
        return (
            f"{self.vlm.spec.key} cannot be ranked with tree attention masks ({self.failure}): its names are scored "
            f"{METHODS[self.method]}, which is exact but slow"
        )

    def _compared_names(self) -> list[int]:
        """The shortest name, one of median length, the longest, and some that share their first tokens."""
        by_length = np.argsort(self.trie.lengths, kind="stable")  # [names]
        names = {int(by_length[0]), int(by_length[len(by_length) // 2]), int(by_length[-1])}
        branching = [node for node in self.trie.inner if len(self.trie.children(np.array([node]))[0]) > 1]
        deepest = max(branching, key=lambda node: self.trie.depth[node], default=0)
        below = (self.trie.name_node >= deepest) & (self.trie.name_node < self.trie.end[deepest])  # [names]
        return sorted(names | set(np.flatnonzero(below)[:SIBLINGS].tolist()))

    def _find_problem(self, row: Mapping[str, Tensor], names: Sequence[int], expected: np.ndarray) -> str:
        """What is wrong with the current method for some names of one image; empty if the method is exact."""

        def rank_row(part: slice) -> list[np.ndarray]:
            if self.method == "tree":
                return [self._tree_log_probs(row)[0][names]]
            return [cached_prompt_log_probs(self.vlm, row, self.name_pairs(names))]

        try:
            log_probs = self._splitter.run(rank_row, 1)[0]  # [names]
        except UNSUPPORTED_ERRORS as error:
            return _first_line(error)
        difference = np.abs(log_probs - expected).max()  # NaN where a method gives one
        if difference <= self._tolerance(row, names, expected):
            return ""
        return f"{difference:.2g} nats off"

    def _tolerance(self, row: Mapping[str, Tensor], names: Sequence[int], expected: np.ndarray) -> float:
        """The tolerated difference in nats of the current method, by the dtype of the logits.

        The noise of low precision is the difference between full passes and passes after the cached prompt.
        """
        if self.vlm.logits_dtype == torch.float32:
            return FLOAT32_TOLERANCE
        smallest, largest = LOW_PRECISION_TOLERANCE
        if self.method == "cached_prompt":  # it would be compared with itself
            return largest
        try:
            cached = self._splitter.run(
                lambda part: [cached_prompt_log_probs(self.vlm, row, self.name_pairs(names))], 1
            )[0]  # [names]
        except UNSUPPORTED_ERRORS:
            return smallest
        noise = float(np.abs(cached - expected).max())
        return min(largest, smallest + 2 * noise) if noise == noise else smallest

    def _prompts_begin_with_bos(self) -> bool:
        """Whether the processor's prompts contain a begin token: PaliGemma's processor adds it, its tokenizer not."""
        ids = self._process(Image.new("RGB", (64, 64)))["input_ids"][0].tolist()
        return self.vlm.processor.tokenizer.bos_token_id in ids

    def _add_answer_prefix(self, prompt: str) -> str:
        if marks := opened_by(prompt):  # a name cannot be ranked within a thought: an empty one comes before it
            prompt = f"{prompt.rstrip()}\n\n{marks[1]}\n\n"
        if not self.answer_prefix:
            return prompt
        return prompt + separator(prompt) + self.answer_prefix

    def _process(self, image: Image.Image) -> dict[str, Tensor]:
        """The processor's output for one image with the prompt, without padding."""
        return self.vlm.process([image], [self.prompt])

    def _inputs(self, batch: Batch, part: slice) -> Mapping[str, Tensor]:
        """The processor's output for a part of a batch."""
        if part == slice(0, len(batch)):
            return batch.inputs
        return self.vlm.process(batch.images[part], batch.prompts[part])

    def check_context(self, sizes: Sequence[tuple[int, int]] = ()) -> None:
        """Raise ContextError when the prompt and the longest name exceed the context.

        `sizes`: widths and heights of the images in pixels; empty if the number of tokens does not depend on them.
        """
        self._check_length(self.vlm.longest_prompt_length([self.prompt], sizes))

    def _check_length(self, prompt_length: int) -> None:
        context = getattr(self.vlm.model.config.get_text_config(), "max_position_embeddings", None)
        length = prompt_length + int(self.trie.lengths.max())
        if context is not None and length > context:
            raise ContextError(
                f"The prompt and the longest name have {length} tokens, but the context of {self.vlm.spec.key} is "
                f"{context}: this cell is N/A."
            )

    def name_pairs(self, names: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """The input ids and the target ids of some names, both [tokens], on the model's device."""
        device = self.vlm.model.device
        pairs = []
        for node in self.trie.name_node[list(names)]:
            path = [*self.trie.ancestors(node), node]
            input_ids = torch.as_tensor(self.trie.input_ids[path], device=device)
            target_ids = torch.as_tensor(self.trie.target_ids[path], device=device)
            pairs.append((input_ids, target_ids))
        return pairs

    def _one_by_one(self, inputs: Mapping[str, Tensor]) -> np.ndarray:
        """Summed log-probabilities float32 [names] of one row, one name at a time."""
        row = self.vlm.to_device(inputs)
        self._check_length(row["input_ids"].shape[1])
        pairs = self.name_pairs(range(len(self.names)))
        if self.method == "cached_prompt":
            return cached_prompt_log_probs(self.vlm, row, pairs)
        return full_forward_log_probs(self.vlm, row, pairs)

    def _prefill(self, inputs: Mapping[str, Tensor]) -> PromptCache:
        self._check_length(int(inputs["attention_mask"].sum(dim=1).max()))
        return self.decoder.prefill(self.vlm.to_device(inputs))

    def prefill(self, batch: Batch) -> PromptCache:
        """The cached prompts of a batch. Raises ContextError when prompt and longest name exceed the context."""
        return self._prefill(batch.inputs)

    def path_log_probs(self, prompt_cache: PromptCache) -> np.ndarray:
        """Summed log-probabilities float32 [images, names] after cached prompts."""
        return self.trie.path_sums(self._node_log_probs(prompt_cache)).astype(np.float32)

    def _tree_log_probs(self, inputs: Mapping[str, Tensor]) -> np.ndarray:
        """Summed log-probabilities float32 [images, names], by the tree."""
        return self.path_log_probs(self._prefill(inputs))

    def _node_log_probs(self, prompt_cache: PromptCache) -> np.ndarray:
        """Log-probabilities float32 [images, nodes]. Every inner node is run once."""
        trie, images = self.trie, len(prompt_cache.logits)
        result = np.zeros((images, trie.size), dtype=np.float32)
        children, _ = trie.children(np.zeros(1, dtype=int))
        result[:, children] = root_log_probs(trie, prompt_cache)
        for nodes, states in self.tree_states(prompt_cache):
            children, log_probs = self.children_log_probs(nodes, states)
            result[:, children] = log_probs
        return result

    def tree_states(self, prompt_cache: PromptCache) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Run every inner node once: nodes [new] and their hidden states [images, new, width], chunk by chunk."""
        cached_nodes = np.zeros(0, dtype=int)  # [tree] the tree nodes in the cache
        for ancestors, nodes in self.trie.chunks(self.chunk):
            kept = np.flatnonzero(np.isin(cached_nodes, ancestors))
            prompt_cache.keep_tree_tokens(torch.as_tensor(kept, device=prompt_cache.mask.device))
            cached_nodes = np.concatenate([cached_nodes[kept], nodes])
            yield nodes, run_nodes(self, prompt_cache, nodes[None], cached_nodes[None])

    def children_log_probs(self, nodes: np.ndarray, states: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The children [edges] of nodes [new], and their log-probabilities [images, edges] after the nodes' states."""
        children, parent_index = self.trie.children(nodes)  # both [edges]
        rows = len(nodes) * np.arange(len(states))[:, None] + parent_index  # [images, edges]
        tokens = np.broadcast_to(self.trie.target_ids[children], rows.shape)
        return children, self.edge_log_probs(states.flatten(0, 1), rows, tokens).reshape(rows.shape)

    def edge_log_probs(self, states: Tensor, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Log-probabilities [edges] of tokens after the hidden states [states, width] in these rows.

        `rows` and `tokens` may have any shape; they are flattened, and the flat rows must be sorted.
        """
        flat_rows = torch.as_tensor(rows.ravel(), device=states.device)
        flat_tokens = torch.as_tensor(tokens.copy().ravel(), device=states.device)
        return self.decoder.log_probs(states, flat_rows, flat_tokens).cpu().numpy()


def root_log_probs(trie: LabelTrie, prompt_cache: PromptCache) -> np.ndarray:
    """Log-probabilities [images, edges] of the children of the root, after the prompt."""
    children, _ = trie.children(np.zeros(1, dtype=int))
    tokens = torch.as_tensor(trie.target_ids[children], device=prompt_cache.logits.device)  # [edges]
    rows = torch.arange(len(prompt_cache.logits), device=tokens.device)  # [images]
    log_probs = token_log_probs(prompt_cache.logits, rows.repeat_interleave(len(tokens)), tokens.repeat(len(rows)))
    return log_probs.view(len(rows), -1).cpu().numpy()


def run_nodes(ranker: Ranker, prompt_cache: PromptCache, nodes: np.ndarray, cached_nodes: np.ndarray) -> Tensor:
    """Hidden states [images, new, width] of the nodes [1 or images, new]; -1 is padding.

    `cached_nodes`: the tree nodes in the cache [1 or images, tree], the new ones at the end.
    """
    trie, images, device = ranker.trie, len(prompt_cache.logits), prompt_cache.mask.device

    def on_device(values: np.ndarray) -> Tensor:
        """A tensor [images, ...]; a single row is expanded to all images."""
        return torch.as_tensor(values, device=device).expand(images, *values.shape[1:])

    input_ids = on_device(trie.input_ids[nodes].clip(0))  # [images, new]
    depth = on_device(trie.depth[nodes])  # [images, new]
    visible = on_device(trie.ancestry(cached_nodes, nodes))  # [images, new, tree]
    return ranker.decoder.run_tree(prompt_cache, input_ids, depth, visible)


class NodeExpander:
    """Runs the nodes that a search selects. The cache contains all nodes that were run for each image."""

    def __init__(self, ranker: Ranker, prompt_cache: PromptCache) -> None:
        self.ranker, self.prompt_cache = ranker, prompt_cache
        self.images = list(range(len(prompt_cache.logits)))  # the images whose search has not ended
        self.cached_nodes = np.zeros((len(self.images), 0), dtype=int)  # [images, tree]

    def root_log_probs(self) -> np.ndarray:
        """Log-probabilities [images, edges] of the children of the root."""
        return self.ranker.checked(root_log_probs(self.ranker.trie, self.prompt_cache))

    def __call__(self, images: list[int], nodes: list[np.ndarray]) -> list[np.ndarray]:
        """Run nodes of each image. Returns the log-probabilities [edges] of their children, one array per image."""
        trie = self.ranker.trie
        if images != self.images:
            rows = [self.images.index(image) for image in images]
            self.prompt_cache.keep_rows(torch.as_tensor(rows, device=self.prompt_cache.mask.device))
            self.images, self.cached_nodes = images, self.cached_nodes[rows]
        width = max(len(image_nodes) for image_nodes in nodes)
        padded = np.full((len(nodes), width), -1)  # [images, new]
        for row, image_nodes in zip(padded, nodes, strict=True):
            row[: len(image_nodes)] = image_nodes
        self.cached_nodes = np.concatenate([self.cached_nodes, padded], axis=1)
        states = run_nodes(self.ranker, self.prompt_cache, padded, self.cached_nodes)  # [images, new, width]
        rows, tokens, counts = [], [], []
        for image, image_nodes in enumerate(nodes):
            children, parent_index = trie.children(image_nodes)  # both [edges]
            rows.append(image * width + parent_index)
            tokens.append(trie.target_ids[children])
            counts.append(len(children))
        log_probs = self.ranker.edge_log_probs(states.flatten(0, 1), np.concatenate(rows), np.concatenate(tokens))
        parts = np.split(log_probs, np.cumsum(counts)[:-1])
        for image, part in zip(images, parts, strict=True):
            with rows_from(image):
                self.ranker.checked(part[None])
        return parts


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
