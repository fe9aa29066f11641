"""Hidden states of the language model, by plain forward hooks: features of an image without a single logit."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from vlmclassifier.finite import check_finite
from vlmclassifier.records import UserError
from vlmclassifier.vlm.model import VLM, Batch

LAST_LAYER = "last"  # the output of the decoder, behind its final norm: what the head reads


class _EnoughComputed(Exception):
    """Ends a forward pass before the head."""


def innermost_decoder(model: nn.Module) -> Any:
    """The decoder without its output embeddings. For BLIP-2, `get_decoder` returns the whole language model first."""
    decoder = model.get_decoder()
    while (inner := decoder.get_decoder()) is not decoder and inner is not None:
        decoder = inner
    return decoder


def layer_names(vlm: VLM) -> list[str]:
    """The layers whose states can be kept: "0" (what the first layer reads), "1", ..., and LAST_LAYER."""
    return [*(str(number) for number in range(len(innermost_decoder(vlm.model).layers) + 1)), LAST_LAYER]


@torch.inference_mode()
def hidden_states(vlm: VLM, batch: Batch, layers: Sequence[str] = (LAST_LAYER,)) -> dict[str, Tensor]:
    """States [batch, tokens, width] of some layers for one forward pass over the prompts, with left padding.

    The pass ends behind the decoder, so that no logits are computed. All hooks are removed afterwards. Raises UserError
    for a layer that the model does not have, and NotFiniteError.
    """
    decoder, states = innermost_decoder(vlm.model), {}
    unknown = sorted(set(layers) - set(layer_names(vlm)))
    if unknown:
        raise UserError(
            f"{vlm.spec.key} has no layer {unknown[0]}: its layers are 0 to {len(decoder.layers)} and last."
        )
    mask = batch.inputs["attention_mask"].bool()  # [batch, tokens]
    inputs = vlm.to_device(batch.inputs)
    if hasattr(vlm.model.base_model, "rope_deltas"):  # Qwen-VL computes its three-dimensional positions itself
        vlm.model.base_model.rope_deltas = None
    else:  # not every model leaves the padding on the left out of its positions
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)  # [batch, tokens]
    with _hooks(decoder, layers, states), suppress(_EnoughComputed):
        vlm.model(**inputs, use_cache=False)
    for name, values in states.items():
        real = values.masked_fill(~mask.to(values.device)[..., None], 0)  # states of the padding mean nothing
        check_finite(real, f"A hidden state of layer {name}", values.dtype)
    return states


@contextmanager
def _hooks(decoder: nn.Module, layers: Sequence[str], states: dict[str, Tensor]) -> Iterator[None]:
    """Within it, a forward pass of the decoder fills `states` and raises _EnoughComputed at its end."""

    def keep_input(module: nn.Module, arguments: tuple, options: dict) -> None:
        states["0"] = arguments[0] if arguments else options["hidden_states"]

    def keep_output(name: str) -> Any:
        def keep(module: nn.Module, arguments: tuple, output: Any) -> None:
            states[name] = output[0] if isinstance(output, tuple) else output

        return keep

    def keep_last(module: nn.Module, arguments: tuple, output: Any) -> None:
        if LAST_LAYER in layers:
            states[LAST_LAYER] = output.last_hidden_state
        raise _EnoughComputed

    handles = [decoder.register_forward_hook(keep_last)]
    if "0" in layers:
        handles.append(decoder.layers[0].register_forward_pre_hook(keep_input, with_kwargs=True))
    for number, layer in enumerate(decoder.layers, start=1):
        if str(number) in layers:
            handles.append(layer.register_forward_hook(keep_output(str(number))))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def pooled_features(
    vlm: VLM, batch: Batch, positions: Sequence[int] = (), layers: Sequence[str] = (LAST_LAYER,)
) -> dict[str, Tensor]:
    """The features of a batch, each [batch, width] on the CPU in the dtype of the states.

    "last_token", "avg_token" (the mean over all tokens of the prompt) and "image_token" (the mean over the image's) of
    the last layer, "position_N" for every position (0 is the first token of the prompt, -1 the last), and the first
    three of other layers as "layer_L.last_token" and so on (paper, section 3.2). Padding never enters a mean. Raises
    UserError for a position outside of a prompt.
    """
    states = hidden_states(vlm, batch, layers)
    mask = batch.inputs["attention_mask"].bool()  # [batch, tokens]
    is_image = batch.inputs["input_ids"] == vlm.model.config.image_token_id  # [batch, tokens]
    features = {}
    for layer, values in states.items():
        prefix = "" if layer == LAST_LAYER else f"layer_{layer}."
        features[f"{prefix}last_token"] = values[:, -1]
        features[f"{prefix}avg_token"] = _masked_mean(values, mask)
        features[f"{prefix}image_token"] = _masked_mean(values, is_image & mask)
    if positions:
        lengths = mask.sum(dim=1)  # [batch]
        for position in positions:
            features[f"position_{position}"] = _at_position(states[LAST_LAYER], lengths, position)
    return {name: values.cpu() for name, values in features.items()}


def _masked_mean(states: Tensor, mask: Tensor) -> Tensor:
    """The mean [batch, width] of states [batch, tokens, width] over the tokens of a mask, summed in float32."""
    weights = mask.to(states.device)[..., None].float()  # [batch, tokens, 1]
    sums = (states.float() * weights).masked_fill(weights == 0, 0).sum(dim=1)  # [batch, width]
    return (sums / weights.sum(dim=1)).to(states.dtype)


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
