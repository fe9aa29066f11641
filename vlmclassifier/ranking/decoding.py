"""The one place that calls a decoder with tree masks: a cached prompt, continued along many paths at once."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from vlmclassifier.vlm import VLM

ROOM = 256  # tree tokens that a cache has room for, at least
SLICE = 2**22  # logits that are held in float32 at a time


class TreeLayer(DynamicLayer):
    """A cache layer with room for tree tokens: they are written in place, and given up without a copy of the prompt."""

    def __init__(self, prompt: DynamicLayer) -> None:
        super().__init__()
        self.lazy_initialization(prompt.keys, prompt.values)
        self._room = (prompt.keys, prompt.values)  # buffers [batch, heads, length and more, width]
        self.keys, self.values = self._room

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [batch, heads, new, width]; returns all keys and values, as views of the buffers."""
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        if end > self._room[0].shape[-2]:
            more = end - start + max(ROOM, end - start)
            self._room = tuple(
                torch.cat([held, held.new_empty((*held.shape[:2], more, held.shape[3]))], dim=2)
                for held in (self.keys, self.values)
            )
        self._show(end)
        self.keys[:, :, start:] = key_states
        self.values[:, :, start:] = value_states
        return self.keys, self.values

    def keep(self, length: int, places: Tensor) -> None:
        """Keep the first `length` tokens and those at `places` behind them."""
        some = places.to(self.keys.device) + length
        kept = [held[:, :, some] for held in self._room]
        self._show(length + len(places))
        self.keys[:, :, length:], self.values[:, :, length:] = kept

    def keep_rows(self, rows: Tensor) -> None:
        """Keep only some rows of the batch."""
        end, some = self.keys.shape[-2], rows.to(self.keys.device)
        self._room = tuple(held[some] for held in self._room)
        self._show(end)

    def _show(self, end: int) -> None:
        self.keys, self.values = (held[:, :, :end] for held in self._room)


class Prefix:
    """The cache of some prompts (padded on the left) and of the tree tokens that were run behind them."""

    def __init__(self, cache: DynamicCache, mask: Tensor, last: Tensor, logits: Tensor) -> None:
        cache.layers = [TreeLayer(layer) for layer in cache.layers]
        self.cache = cache
        self.mask = mask  # bool [batch, prompt]
        self.place = mask.long().cumsum(1) - 1  # [batch, prompt] position of every token, -1 in the padding
        self.last = last  # [batch, 1] or [batch, 3, 1]: position of the last token as the decoder counts it
        self.logits = logits  # float32 [batch, vocabulary], behind the last token
        self.depth = mask.new_zeros((mask.shape[0], 0), dtype=torch.long)  # [batch, tree] of the tree tokens held

    @property
    def length(self) -> int:
        """Tokens of the padded prompt."""
        return self.mask.shape[1]

    @torch.inference_mode()
    def keep_tree(self, places: Tensor) -> None:
        """Keep only the tree tokens at these places [kept], the same ones in every row."""
        if len(places) == self.depth.shape[1]:
            return
        for layer in self.cache.layers:
            layer.keep(self.length, places)
        self.depth = self.depth[:, places]

    @torch.inference_mode()
    def keep_rows(self, rows: Tensor) -> None:
        """Keep only some of the batch's rows [kept]."""
        for layer in self.cache.layers:
            layer.keep_rows(rows)
        self.mask, self.place, self.last = self.mask[rows], self.place[rows], self.last[rows]
        self.logits, self.depth = self.logits[rows], self.depth[rows]


class TreeDecoder:
    """A vision-language model as prompt reader, decoder and head."""

    def __init__(self, vlm: VLM) -> None:
        self.model = vlm.model
        self.decoder = _innermost(vlm.model)
        self.head = vlm.model.get_output_embeddings()
        config = self.decoder.config
        self.softcap = getattr(config, "final_logit_softcapping", None)
        self.caps = self.softcap is not None
        self.window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None)
        # Decoders of several kinds of layers take a mask per kind, the others one mask.
        self.kinds = sorted(set(kinds)) if kinds and set(kinds) != {"full_attention"} else None

    @torch.inference_mode()
    def read(self, inputs: Mapping[str, Tensor]) -> Prefix:
        """Run prompts (what `VLM.prepare` made, or `input_ids` and `attention_mask` alone) and keep their cache."""
        mask = inputs["attention_mask"].bool()  # [batch, prompt]
        position_ids = (mask.long().cumsum(1) - 1).clamp(min=0)
        core = self.model.base_model
        turning = hasattr(core, "rope_deltas")  # Qwen-VL's three-dimensional positions, which it works out itself
        if turning:
            core.rope_deltas = None
        network = self.model
        if "pixel_values" not in inputs and hasattr(network, "qformer"):
            network = network.language_model  # the BLIPs' own forward insists on a picture
        more = {} if turning else {"position_ids": position_ids}
        # A cache without a config: no layer forgets what its window has passed; the mask below has the window.
        raw: list[Tensor] = []
        watch = self.head.register_forward_hook(lambda module, given, logits: raw.append(logits))
        try:
            outputs = network(**inputs, **more, past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1)
        finally:  # after a batch that did not fit, too: it would hold on to all later logits
            watch.remove()
        outputs = getattr(outputs, "language_model_outputs", outputs)
        last = position_ids[:, -1:]  # [batch, 1]
        if turning and core.rope_deltas is not None:
            last = last + core.rope_deltas.view(-1, 1).to(last.device)
        logits = outputs.logits[:, -1]  # [batch, vocabulary]
        # Whether a model puts its config's cap on them: transformers 5.17 forgets PaliGemma's.
        self.caps = self.softcap is not None and not torch.equal(raw[-1][:, -1], logits)
        return Prefix(outputs.past_key_values, mask, last, logits.float())

    @torch.inference_mode()
    def run(self, prefix: Prefix, tokens: Tensor, depth: Tensor, visible: Tensor) -> Tensor:
        """Run tree tokens [batch, new] at their depths [batch, new]; they join the prefix's cache.

        `visible`: bool [batch, new, held + new], which tree tokens each of them sees. Returns hidden states
        [batch, new, width], for `log_probs`.
        """
        depths = torch.cat([prefix.depth, depth], dim=1)  # [batch, held + new]
        seen = torch.cat([prefix.mask[:, None].expand(-1, depth.shape[1], -1), visible], dim=2)
        end = prefix.place[:, -1:]
        keys = torch.cat([prefix.place, end + depths], dim=1)  # [batch, keys] positions
        distance = (end + depth)[:, :, None] - keys[:, None]  # [batch, new, keys]
        masks = {"full_attention": seen}
        if self.window is not None:
            masks["sliding_attention"] = seen & (distance < self.window)
        dtype = next(self.decoder.parameters()).dtype
        masks = {kind: _additive(mask, dtype) for kind, mask in masks.items()}
        mask = {kind: masks[kind] for kind in self.kinds} if self.kinds else list(masks.values())[-1]
        position_ids = prefix.last + depth  # [batch, new]
        if hasattr(self.model.base_model, "rope_deltas"):
            position_ids = position_ids.expand(3, -1, -1)  # [3, batch, new]
        outputs = self.decoder(
            input_ids=tokens, attention_mask=mask, position_ids=position_ids, past_key_values=prefix.cache,
            use_cache=True,
        )  # fmt: skip
        prefix.depth = depths
        return outputs.last_hidden_state

    @torch.inference_mode()
    def log_probs(self, hidden_states: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
        """Log-probabilities of tokens [edges] behind hidden states [states, width], whose places `rows` [edges] names.

        `rows` must not fall. The head runs in slices, so that its memory does not grow with the states; the softmax is
        in float32, since in bfloat16 it makes ties. Returns float32 [edges].
        """
        vocabulary = self.head.weight.shape[0]
        step = max(1, SLICE // vocabulary)
        parts = []
        for start in range(0, len(hidden_states), step):
            logits = self.head(hidden_states[start : start + step])  # [step, vocabulary]
            if self.caps:
                logits = torch.tanh(logits / self.softcap) * self.softcap
            logits = logits.float()
            low, high = torch.searchsorted(rows, torch.tensor([start, start + step], device=rows.device)).tolist()
            parts.append(gathered(logits, rows[low:high] - start, tokens[low:high]))
        return torch.cat(parts)


def gathered(logits: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
    """log softmax of `tokens` [edges] in the rows [edges] of logits [states, vocabulary]; rounding stays below 0."""
    return (logits[rows, tokens] - logits.logsumexp(dim=-1)[rows]).clamp(max=0)


def _innermost(model: nn.Module) -> Any:
    """The decoder without its head: BLIP-2 names the whole language model of OPT its decoder."""
    decoder = model.get_decoder()
    while (inner := decoder.get_decoder()) is not decoder and inner is not None:
        decoder = inner
    return decoder


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask [batch, new, keys] as numbers to add to attention scores [batch, 1, new, keys].

    A boolean mask of four dimensions is silently wrong in eager attention.
    """
    blocked = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    return blocked[:, None]
