"""Hidden states of the language model, by plain forward hooks: features of an image without a single logit."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from vlmclassifier.devices import BatchSplitter
from vlmclassifier.finite import check_finite
from vlmclassifier.records import UserError
from vlmclassifier.vlm.model import VLM, Batch
from vlmclassifier.vlm.parts import find_projector, head_outputs, innermost_decoder

LAST_LAYER = "last"  # the output of the decoder, behind its final norm: what the head reads
PROJECTOR = "projector"  # the token embeddings with the projector's outputs in the places of the image tokens
VISION = "vision"  # what the projector reads of the vision encoder
HEADS = "heads"  # the outputs of all attention heads of all layers at the last token, before they are mixed


class _EnoughComputed(Exception):
    """Ends a forward pass before the head."""


def layer_names(vlm: VLM) -> list[str]:
    """The layers whose states can be kept: PROJECTOR, "0" (what the first layer reads), "1", ..., LAST_LAYER."""
    count = len(innermost_decoder(vlm.model).layers)
    return [PROJECTOR, *(str(number) for number in range(count + 1)), LAST_LAYER]


@torch.inference_mode()
def hidden_states(vlm: VLM, batch: Batch, layers: Sequence[str] = (LAST_LAYER,)) -> dict[str, Any]:
    """States [batch, tokens, width] of some layers for one forward pass over the prompts, with left padding.

    With VISION also what the projector reads (see `_vision_means`), with HEADS the heads' outputs [batch, layers *
    width]. The pass ends behind the decoder, so that no logits are computed. All hooks are removed afterwards. Raises
    UserError for a layer that the model does not have, and NotFiniteError.
    """
    decoder, states = innermost_decoder(vlm.model), {}
    unknown = sorted(set(layers) - {*layer_names(vlm), VISION, HEADS})
    if unknown:
        raise UserError(
            f"{vlm.spec.key} has no layer {unknown[0]}: its layers are vision, projector, 0 to {len(decoder.layers)} "
            "and last."
        )
    mask = batch.inputs["attention_mask"].bool()  # [batch, tokens]
    inputs = vlm.to_device(batch.inputs)
    if hasattr(vlm.model.base_model, "rope_deltas"):  # Qwen-VL computes its three-dimensional positions itself
        vlm.model.base_model.rope_deltas = None
    else:  # not every model leaves the padding on the left out of its positions
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)  # [batch, tokens]
    with _hooks(vlm.model, decoder, layers, states), suppress(_EnoughComputed):
        vlm.model(**inputs, use_cache=False)
    if HEADS in layers:
        states[HEADS] = torch.cat([states.pop(f"{HEADS} {number}") for number in range(len(decoder.layers))], dim=1)
        check_finite(states[HEADS], "The output of an attention head", states[HEADS].dtype)
    for name, values in states.items():
        if name in (VISION, HEADS):
            continue
        real = values.masked_fill(~mask.to(values.device)[..., None], 0)  # states of the padding mean nothing
        check_finite(real, f"A hidden state of layer {name}", values.dtype)
    return states


@contextmanager
def _hooks(model: nn.Module, decoder: nn.Module, layers: Sequence[str], states: dict[str, Any]) -> Iterator[None]:
    """Within it, a forward pass fills `states` and raises _EnoughComputed behind the decoder."""

    def keep_input(name: str, argument: str, last_token: bool = False) -> Any:
        def keep(module: nn.Module, arguments: tuple, options: dict) -> None:
            values = options[argument] if argument in options else arguments[0]
            states[name] = values[:, -1].clone() if last_token else values  # a view would keep all tokens' values

        return keep

    def keep_output(name: str) -> Any:
        def keep(module: nn.Module, arguments: tuple, output: Any) -> None:
            states[name] = output[0] if isinstance(output, tuple) else output

        return keep

    def keep_last(module: nn.Module, arguments: tuple, output: Any) -> None:
        if LAST_LAYER in layers:
            states[LAST_LAYER] = output.last_hidden_state
        raise _EnoughComputed

    before = lambda module, hook: module.register_forward_pre_hook(hook, with_kwargs=True)  # noqa: E731
    handles = [decoder.register_forward_hook(keep_last)]
    if VISION in layers:
        handles.append(before(find_projector(model), keep_input(VISION, "encoder_hidden_states")))
    if PROJECTOR in layers:
        handles.append(before(decoder, keep_input(PROJECTOR, "inputs_embeds")))
    if "0" in layers:
        handles.append(before(decoder.layers[0], keep_input("0", "hidden_states")))
    for number, layer in enumerate(decoder.layers, start=1):
        if str(number) in layers:
            handles.append(layer.register_forward_hook(keep_output(str(number))))
    for number, projection in enumerate(head_outputs(decoder) if HEADS in layers else ()):
        handles.append(before(projection, keep_input(f"{HEADS} {number}", "input", last_token=True)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class FeatureExtractor:
    """The features of batches of images: `extractor(batch)`; a batch that does not fit into the memory is split.

    `positions`: single tokens to keep, `layers`: of `layer_names`, VISION or HEADS.
    """

    def __init__(self, vlm: VLM, positions: Sequence[int] = (), layers: Sequence[str] = (LAST_LAYER,)) -> None:
        self.vlm, self.positions, self.layers = vlm, positions, layers
        self._splitter = BatchSplitter()

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """The features of a batch, each [batch, width] on the CPU in the dtype of the states.

        "last_token", "avg_token" (the mean over all tokens of the prompt) and "image_token" (the mean over the image's)
        of the last layer, and "position_N" for every position (0 is the first token of the prompt, -1 the last; paper,
        section 3.2). Of another layer L the first three as "layer_L.last_token" and so on, with the means over the text
        before and behind the image, the last token left out, where a prompt has such. Of the vision encoder and the
        projector the mean over the image alone. "heads": the outputs of the attention heads. Padding never enters a
        mean. Raises UserError for a position outside of a prompt.
        """

        def part_of(rows: slice) -> list[dict[str, Tensor]]:
            part = batch
            if rows != slice(0, len(batch)):
                part = self.vlm.prepare(batch.images[rows], batch.prompts[rows])
            features = self._features(part)
            return [{name: values[row] for name, values in features.items()} for row in range(len(part))]

        rows = self._splitter.run(part_of, len(batch))
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _features(self, batch: Batch) -> dict[str, Tensor]:
        states = hidden_states(self.vlm, batch, self.layers)
        mask = batch.inputs["attention_mask"].bool()  # [batch, tokens]
        is_image = (batch.inputs["input_ids"] == self.vlm.model.config.image_token_id) & mask  # [batch, tokens]
        features = {}
        if VISION in states:
            features[f"layer_{VISION}.image_token"] = self._vision_means(batch, states.pop(VISION))
        if HEADS in states:
            features[HEADS] = states.pop(HEADS)
        kinds = {"avg_token": mask, "image_token": is_image}
        for layer, values in states.items():
            if layer == PROJECTOR:
                features[f"layer_{PROJECTOR}.image_token"] = masked_mean(values, is_image)
                continue
            prefix, masks = "", kinds
            if layer != LAST_LAYER:
                prefix, masks = f"layer_{layer}.", kinds | text_masks(mask, is_image)
            features[f"{prefix}last_token"] = values[:, -1]
            features |= {f"{prefix}{kind}": masked_mean(values, tokens) for kind, tokens in masks.items()}
        lengths = mask.sum(dim=1)  # [batch]
        for position in self.positions:
            features[f"position_{position}"] = _at_position(states[LAST_LAYER], lengths, position)
        return {name: values.cpu() for name, values in features.items()}

    def _vision_means(self, batch: Batch, values: Tensor) -> Tensor:
        """The mean [batch, width] over the patches of every image, of what the projector reads.

        That is [batch, patches, width], or packed [patches of all images, width] (Qwen-VL). Where an image has several
        tiles, the images are encoded again one by one: which tiles belong to which image is known to the model alone.
        """
        if values.ndim == 3 and len(values) == len(batch):
            means = values.float().mean(dim=1)
        elif values.ndim == 2 and "image_grid_thw" in batch.inputs:
            counts = batch.inputs["image_grid_thw"].prod(dim=1).tolist()  # [batch] patches of each image
            means = torch.stack([part.float().mean(dim=0) for part in values.split(counts)])
        else:
            means = torch.stack(
                [self._single_vision_mean(*row) for row in zip(batch.images, batch.prompts, strict=True)]
            )
        return check_finite(means, "The vision encoder's output", values.dtype).to(values.dtype)

    def _single_vision_mean(self, image: Any, prompt: str) -> Tensor:
        found: dict[str, Tensor] = {}

        def keep(module: nn.Module, arguments: tuple) -> None:
            found[VISION] = arguments[0]

        handle = find_projector(self.vlm.model).register_forward_pre_hook(keep)
        try:
            self.vlm.image_features(self.vlm.process([image], [prompt]))
        finally:
            handle.remove()
        return found[VISION].float().flatten(0, -2).mean(dim=0)


def text_masks(mask: Tensor, is_image: Tensor) -> dict[str, Tensor]:
    """The tokens of a prompt before and behind its image, without the last: bool [batch, tokens] each.

    A kind that not every prompt has is left out.
    """
    from_image_on = is_image.cumsum(dim=1) > 0  # [batch, tokens]
    masks = {"text_before_image": mask & ~from_image_on, "text_behind_image": text_behind_image(mask, is_image)}
    return {kind: tokens for kind, tokens in masks.items() if tokens.any(dim=1).all()}


def text_behind_image(mask: Tensor, is_image: Tensor) -> Tensor:
    """The tokens of a prompt behind the last image token, without the prompt's last: bool [batch, tokens]."""
    behind = (is_image.flip(1).cumsum(dim=1).flip(1) == 0) & mask  # no image token at or behind it
    behind[:, -1] = False
    return behind


def masked_mean(states: Tensor, mask: Tensor) -> Tensor:
    """The mean [batch, width] of states [batch, tokens, width] over the tokens of a mask, summed in float32."""
    mask = mask.to(states.device)[..., None]  # [batch, tokens, 1]
    sums = states.float().masked_fill(~mask, 0).sum(dim=1)  # [batch, width]
    return (sums / mask.sum(dim=1)).to(states.dtype)


def _at_position(states: Tensor, lengths: Tensor, position: int) -> Tensor:
    """The states [batch, width] at one position of each prompt; the padding is on the left."""
    shortest = int(lengths.min())
    if not -shortest <= position < shortest:
        raise UserError(
            f"Position {position} is outside of a prompt of {shortest} tokens: leave it out of --positions."
        )
    offsets = states.shape[1] - lengths if position >= 0 else torch.full_like(lengths, states.shape[1])
    rows = torch.arange(len(lengths))
    return states[rows.to(states.device), (offsets + position).to(states.device)]
