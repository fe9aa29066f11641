"""Activation patching: the hidden states of one image, put into the ranking's pass over another image."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vlmclassifier.ranking.ranker import Ranker
from vlmclassifier.records import UserError
from vlmclassifier.vlm import Batch
from vlmclassifier.vlm.hidden import text_behind_image

POSITIONS = ("last", "text", "image", "all")  # text: the tokens behind the image, without the last
SAME_INPUTS = ("input_ids", "image_grid_thw")  # 2 x 8 patches are as many as 8 x 2, at other positions
DEEPSTACK = "deepstack_visual_embeds"  # Qwen3-VL adds image features behind its first layers too

Patch = Callable[[Tensor], Tensor]  # hidden states [batch, tokens, width] -> what replaces them


class Donors(NamedTuple):
    """What a pass over the donors' prompts leaves behind."""

    batch: Batch
    states: list[Tensor]  # of each layer [batch, tokens, width]: what the first layer reads, then the layers' outputs
    deepstack: Sequence[Tensor] | None  # image features that the decoder adds behind its first layers


def run_donors(ranker: Ranker, donors: Batch) -> Donors:
    """Run the donors' prompts and keep their states at every layer. Raises UserError for a model without a tree."""
    if ranker.method != "tree":
        raise UserError(f"{ranker.vlm.spec.key} is not ranked with tree attention masks, so it cannot be patched.")
    decoder = ranker.decoder.decoder
    states: dict[int, Tensor] = {}
    deepstack: list[Any] = []

    def keeper(layer: int) -> Patch:
        def keep(values: Tensor) -> Tensor:
            states[layer] = values
            return values

        return keep

    def keep_deepstack(module: nn.Module, arguments: tuple, options: dict) -> None:
        deepstack.append(options.get(DEEPSTACK))

    with ExitStack() as stack:
        for layer in range(len(decoder.layers) + 1):
            stack.enter_context(patched(decoder, layer, keeper(layer)))
        stack.callback(decoder.register_forward_pre_hook(keep_deepstack, with_kwargs=True).remove)
        ranker.prefill(donors)
    return Donors(donors, [states[layer] for layer in range(len(states))], deepstack[0])


def patched_log_probs(ranker: Ranker, recipients: Batch, donors: Donors, layer: int, positions: str) -> np.ndarray:
    """Log-probabilities float32 [images, names] of recipients whose states at some positions are the donors'.

    `layer`: 0 is what the first layer reads, k the output of the k-th layer. `positions`: one of POSITIONS. The cached
    keys and values of the layers below stay the recipients': the names' own tokens read them. Raises UserError where
    the prompts of a pair are not equally long.
    """
    for key in SAME_INPUTS:
        if key in recipients.inputs and not torch.equal(recipients.inputs[key], donors.batch.inputs[key]):
            raise UserError("The prompts of recipient and donor differ: patch images with equally many tokens.")
    decoder = ranker.decoder.decoder
    is_patched = position_mask(ranker, recipients, positions)  # [batch, tokens]

    def replace(states: Tensor) -> Tensor:
        return torch.where(is_patched.to(states.device)[..., None], donors.states[layer], states)

    reads_image = positions in ("image", "all")  # then the image's later features are the donor's too
    later = donors.deepstack if reads_image else None
    with patched(decoder, layer, replace), exchanged_deepstack(decoder, later, layer):
        cache = ranker.prefill(recipients)
    return ranker.checked(ranker.path_log_probs(cache))


def position_mask(ranker: Ranker, batch: Batch, positions: str) -> Tensor:
    """Which tokens are patched: bool [batch, tokens]."""
    is_prompt = batch.inputs["attention_mask"].bool()
    is_image = (batch.inputs["input_ids"] == ranker.vlm.model.config.image_token_id) & is_prompt
    is_last = torch.zeros_like(is_prompt)
    is_last[:, -1] = True
    return {
        "last": is_last, "image": is_image, "all": is_prompt, "text": text_behind_image(is_prompt, is_image),
    }[positions]  # fmt: skip


@contextmanager
def patched(decoder: Any, layer: int, patch: Patch) -> Iterator[None]:
    """Within it, the states at one layer pass through `patch`."""

    def on_input(module: nn.Module, arguments: tuple, options: dict) -> tuple[tuple, dict]:
        if arguments:
            return (patch(arguments[0]), *arguments[1:]), options
        return arguments, options | {"hidden_states": patch(options["hidden_states"])}

    def on_output(module: nn.Module, arguments: tuple, output: Any) -> Any:
        return (patch(output[0]), *output[1:]) if isinstance(output, tuple) else patch(output)

    if layer == 0:
        handle = decoder.layers[0].register_forward_pre_hook(on_input, with_kwargs=True)
    else:
        handle = decoder.layers[layer - 1].register_forward_hook(on_output)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def exchanged_deepstack(decoder: Any, donors: Sequence[Tensor] | None, layer: int) -> Iterator[None]:
    """Within it, a decoder adds the donors' image features behind its layers where the states do not hold them yet.

    The states at layer k, which are taken at the output of the k-th layer, hold the features of the layers before it.
    """

    def on_call(module: nn.Module, arguments: tuple, options: dict) -> tuple[tuple, dict]:
        if donors is None:
            return arguments, options
        own = options[DEEPSTACK]
        mixed = [donors[number] if number >= layer - 1 else own[number] for number in range(len(own))]
        return arguments, options | {DEEPSTACK: mixed}

    handle = decoder.register_forward_pre_hook(on_call, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def draw_donors(
    ids: Sequence[str], labels: Sequence[str], tops: Sequence[int], lengths: Sequence[Any], same_class: bool, seed: int
) -> list[int | None]:  # fmt: skip
    """A donor for every image: one of another class, or with `same_class` of its own, with another top name.

    `tops`: what the model ranks first for each image. `lengths`: equal for images whose prompts have equally many
    tokens, which a pair must have. Depends on (seed, id) and the other images. None where there is no such image.
    """
    donors: list[int | None] = []
    for number, example_id in enumerate(ids):
        possible = [
            other for other in range(len(ids))
            if tops[other] != tops[number] and (labels[other] == labels[number]) == same_class
            and lengths[other] == lengths[number] and other != number
        ]  # fmt: skip
        donors.append(random.Random(f"{seed}:{example_id}").choice(possible) if possible else None)
    return donors


def prompt_lengths(batch: Batch) -> list[tuple[int, ...]]:
    """What the prompts of two images must share to be patched: numbers of tokens, and of image patches by axis."""
    lengths = [(int(length),) for length in batch.inputs["attention_mask"].sum(dim=1)]
    if "image_grid_thw" in batch.inputs:
        grids = batch.inputs["image_grid_thw"].tolist()
        lengths = [(*length, *grid) for length, grid in zip(lengths, grids, strict=True)]
    return lengths
