"""Decoding with tree attention masks: cached prompts are continued along many paths in one forward pass."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from vlmclassifier.vlm import VLM
from vlmclassifier.vlm.parts import innermost_decoder

SPARE_TOKENS = 256  # tree tokens by which a cache buffer grows, at least
LOGITS_PER_SLICE = 2**22  # logits that are kept in float32 at a time


class TreeLayer(DynamicLayer):
    """A layer of the KV cache with spare capacity: tree tokens are added and removed without copying the prompt."""

    def __init__(self, prompt: DynamicLayer) -> None:
        super().__init__()
        self.lazy_initialization(prompt.keys, prompt.values)
        self._buffers = (prompt.keys, prompt.values)  # both [batch, heads, capacity, width]
        self.keys, self.values = self._buffers  # views of the buffers: [batch, heads, length, width]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [batch, heads, new, width]. Returns all of them, as views of the buffers."""
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        if end > self._buffers[0].shape[-2]:
            additional = end - start + max(SPARE_TOKENS, end - start)
            self._buffers = (_enlarge(self.keys, additional), _enlarge(self.values, additional))
        self._set_length(end)
        self.keys[:, :, start:] = key_states
        self.values[:, :, start:] = value_states
        return self.keys, self.values

    def keep_tokens(self, length: int, positions: Tensor) -> None:
        """Keep the first `length` tokens, and of the tokens after them those at `positions` [kept]."""
        positions = positions.to(self.keys.device)
        keys, values = (buffer[:, :, positions + length] for buffer in self._buffers)  # [batch, heads, kept, width]
        self._set_length(length + len(positions))
        self.keys[:, :, length:] = keys
        self.values[:, :, length:] = values

    def keep_rows(self, rows: Tensor) -> None:
        """Keep only these rows [kept] of the batch."""
        length, rows = self.keys.shape[-2], rows.to(self.keys.device)
        self._buffers = tuple(buffer[rows] for buffer in self._buffers)
        self._set_length(length)

    def _set_length(self, length: int) -> None:
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)


def _enlarge(states: Tensor, additional: int) -> Tensor:
    """Keys or values [batch, heads, length, width] with uninitialised capacity for additional tokens behind them."""
    empty = states.new_empty((*states.shape[:2], additional, states.shape[3]))
    return torch.cat([states, empty], dim=2)


class PromptCache:
    """The KV cache of a batch of prompts with left padding, and of the tree tokens that were run after them."""

    def __init__(self, cache: DynamicCache, mask: Tensor, last_position: Tensor, logits: Tensor) -> None:
        if not torch.is_grad_enabled():  # a gradient needs the keys and values as they were
            cache.layers = [TreeLayer(layer) for layer in cache.layers]
        self.cache = cache
        self.mask = mask  # bool [batch, prompt]
        self.positions = mask.long().cumsum(1) - 1  # [batch, prompt] positions of the tokens; -1 in the padding
        self.last_position = last_position  # [batch, 1] position of the last token, as the decoder counts it
        self.logits = logits  # float32 [batch, vocabulary], after the last token
        self.depth = mask.new_zeros((mask.shape[0], 0), dtype=torch.long)  # [batch, tree] of the cached tree tokens

    @property
    def length(self) -> int:
        """The number of tokens of the padded prompts."""
        return self.mask.shape[1]

    @torch.inference_mode()
    def keep_tree_tokens(self, positions: Tensor) -> None:
        """Keep only the tree tokens at these positions [kept] among the tree tokens, the same in every row."""
        if len(positions) == self.depth.shape[1]:
            return
        for layer in self.cache.layers:
            layer.keep_tokens(self.length, positions)
        self.depth = self.depth[:, positions]

    @torch.inference_mode()
    def keep_rows(self, rows: Tensor) -> None:
        """Keep only these rows [kept] of the batch."""
        for layer in self.cache.layers:
            layer.keep_rows(rows)
        self.mask = self.mask[rows]
        self.positions = self.positions[rows]
        self.last_position = self.last_position[rows]
        self.logits = self.logits[rows]
        self.depth = self.depth[rows]


class TreeDecoder:
    """The decoder and the output embeddings of a vision-language model, for prompts and for trees of tokens."""

    def __init__(self, vlm: VLM) -> None:
        self.model = vlm.model
        self.decoder = innermost_decoder(vlm.model)
        self.head = vlm.model.get_output_embeddings()
        config = self.decoder.config
        self.softcap = getattr(config, "final_logit_softcapping", None)
        self.applies_softcap = self.softcap is not None
        self.window = getattr(config, "sliding_window", None)
        layer_types = set(getattr(config, "layer_types", None) or ())
        # A decoder with several types of layers takes one mask per type, the others take one mask.
        self.layer_types = sorted(layer_types) if layer_types - {"full_attention"} else None

    @torch.inference_mode()
    def prefill(self, inputs: Mapping[str, Tensor]) -> PromptCache:
        """As `differentiable_prefill`, without gradients."""
        return self.differentiable_prefill(inputs)

    def differentiable_prefill(self, inputs: Mapping[str, Tensor], network: Any = None) -> PromptCache:
        """Run prompts and keep their KV cache.

        `inputs`: the processor's output on the device; without an image only `input_ids` and `attention_mask`, both
        [batch, prompt]. `network`: the model where it is wrapped for training.
        """
        mask = inputs["attention_mask"].bool()  # [batch, prompt]
        position_ids = (mask.long().cumsum(1) - 1).clamp(min=0)  # [batch, prompt]
        core = self.model.base_model
        uses_mrope = hasattr(core, "rope_deltas")  # Qwen-VL computes its three-dimensional positions itself
        if uses_mrope:
            core.rope_deltas = None
        network = network or self.model
        if "pixel_values" not in inputs and hasattr(self.model, "qformer"):
            network = self.model.language_model  # the forward pass of BLIP-2 and InstructBLIP requires an image
        positions = {} if uses_mrope else {"position_ids": position_ids}
        raw_logits: list[Tensor] = []  # before the softcap
        hook = self.head.register_forward_hook(lambda module, arguments, logits: raw_logits.append(logits))
        try:
            # The cache has no config, so that layers with a sliding window keep all tokens: masks apply the window.
            outputs = network(**inputs, **positions, past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1)
        finally:  # also after running out of memory: the hook would keep the logits of all later batches
            hook.remove()
        outputs = getattr(outputs, "language_model_outputs", outputs)
        last_position = position_ids[:, -1:]  # [batch, 1]
        if uses_mrope and core.rope_deltas is not None:
            last_position = last_position + core.rope_deltas.view(-1, 1).to(last_position.device)
        logits = outputs.logits[:, -1]  # [batch, vocabulary]
        # Not every model applies the softcap of its config: transformers 5.17 does not do it for PaliGemma.
        self.applies_softcap = self.softcap is not None and not torch.equal(raw_logits[-1][:, -1], logits)
        return PromptCache(outputs.past_key_values, mask, last_position, logits.float())

    @torch.inference_mode()
    def run_tree(self, prompt_cache: PromptCache, input_ids: Tensor, depth: Tensor, visible: Tensor) -> Tensor:
        """As `differentiable_tree`, without gradients."""
        return self.differentiable_tree(prompt_cache, input_ids, depth, visible)

    def differentiable_tree(
        self, prompt_cache: PromptCache, input_ids: Tensor, depth: Tensor, visible: Tensor
    ) -> Tensor:  # fmt: skip
        """Run tree tokens [batch, new] at these depths [batch, new], and add them to the cache.

        `visible`: bool [batch, new, tree], the tree tokens that each new token attends to, where tree counts the cached
        tokens and then the new ones. Returns hidden states [batch, new, width] for `log_probs`.
        """
        tree_depth = torch.cat([prompt_cache.depth, depth], dim=1)  # [batch, tree]
        prompt_mask = prompt_cache.mask[:, None].expand(-1, depth.shape[1], -1)  # [batch, new, prompt]
        attended = torch.cat([prompt_mask, visible], dim=2)  # [batch, new, keys]
        last_position = prompt_cache.positions[:, -1:]  # [batch, 1]
        key_positions = torch.cat([prompt_cache.positions, last_position + tree_depth], dim=1)  # [batch, keys]
        distance = (last_position + depth)[:, :, None] - key_positions[:, None]  # [batch, new, keys]
        masks = {"full_attention": attended}
        if self.window is not None:
            masks["sliding_attention"] = attended & (distance < self.window)
        dtype = next(self.decoder.parameters()).dtype
        masks = {layer_type: _additive_mask(mask, dtype) for layer_type, mask in masks.items()}
        if self.layer_types is not None:
            attention_mask = {layer_type: masks[layer_type] for layer_type in self.layer_types}
        elif self.window is not None:
            attention_mask = masks["sliding_attention"]
        else:
            attention_mask = masks["full_attention"]
        position_ids = prompt_cache.last_position + depth  # [batch, new]
        if hasattr(self.model.base_model, "rope_deltas"):
            position_ids = position_ids.expand(3, -1, -1)  # [3, batch, new]
        outputs = self.decoder(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=prompt_cache.cache, use_cache=True,
        )  # fmt: skip
        prompt_cache.depth = tree_depth
        return outputs.last_hidden_state

    @torch.inference_mode()
    def log_probs(self, hidden_states: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
        """As `differentiable_log_probs`, without gradients."""
        return self.differentiable_log_probs(hidden_states, rows, tokens)

    def differentiable_log_probs(self, hidden_states: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
        """Log-probabilities of `tokens` [edges] after the hidden states in `rows` [edges] of [states, width].

        `rows` must be sorted. The output embeddings are applied in slices, so that the memory does not grow with the
        number of states. The softmax is computed in float32, because bfloat16 would make ties. Returns float32 [edges].
        """
        vocabulary = self.head.weight.shape[0]
        step = max(1, LOGITS_PER_SLICE // vocabulary)
        parts = []
        for start in range(0, len(hidden_states), step):
            logits = self.head(hidden_states[start : start + step])  # [step, vocabulary]
            if self.applies_softcap:
                logits = torch.tanh(logits / self.softcap) * self.softcap
            logits = logits.float()
            low, high = torch.searchsorted(rows, torch.tensor([start, start + step], device=rows.device)).tolist()
            parts.append(token_log_probs(logits, rows[low:high] - start, tokens[low:high]))
        return torch.cat(parts)


def token_log_probs(logits: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities of `tokens` [edges] in `rows` [edges] of logits [states, vocabulary]; never above 0."""
    return (logits[rows, tokens] - logits.logsumexp(dim=-1)[rows]).clamp(max=0)


def _additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask [batch, new, keys] as numbers to add to the attention scores: [batch, 1, new, keys].

    Eager attention silently computes wrong results with a boolean mask of four dimensions.
    """
    blocked = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    return blocked[:, None]
