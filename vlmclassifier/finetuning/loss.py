"""The loss on answer tokens, with logits computed for them alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmclassifier.finetuning.collator import IGNORED

NOT_INPUTS = ("labels", "row_ids", "classes")  # of a batch: no inputs of the model


def next_labels(labels: Tensor) -> Tensor:
    """What each position predicts [batch, tokens]: the label of the next one; IGNORED for the last."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


@contextmanager
def gathered_head(head: nn.Module, is_predicting: Tensor) -> Iterator[None]:
    """Within it, the head reads the hidden states of some positions alone: its logits are [1, positions, vocabulary].

    `is_predicting`: bool [batch, tokens]. The model's own forward pass stays as it is, under any wrapper; what follows
    the head in it, such as a softcap, is applied to these logits.
    """

    def gather(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        states = arguments[0]  # [batch, tokens, width]
        return (states[is_predicting.to(states.device)][None], *arguments[1:])

    handle = head.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


def answer_logits(model: nn.Module, core: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The logits [positions, vocabulary] in float32 of all answer tokens of a batch, and the tokens [positions].

    `model`: what is called, maybe wrapped (DDP); `core`: the model itself.
    """
    targets = next_labels(batch["labels"])  # [batch, tokens]
    is_predicting = targets != IGNORED
    inputs = {key: value for key, value in batch.items() if key not in NOT_INPUTS}
    if hasattr(core.base_model, "rope_deltas"):
        core.base_model.rope_deltas = None  # of the batch before
    with gathered_head(core.get_output_embeddings(), is_predicting):
        outputs = model(**inputs, use_cache=False)
    logits = outputs.logits.reshape(-1, outputs.logits.shape[-1])  # [positions, vocabulary]
    return logits.float(), targets[is_predicting]


def summed_loss(model: nn.Module, core: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The summed cross-entropy of the answer tokens of a batch."""
    logits, tokens = answer_logits(model, core, batch)
    return F.cross_entropy(logits, tokens, reduction="sum")


def row_losses(core: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The summed cross-entropy of each row [batch], to find the one that is not finite."""
    logits, tokens = answer_logits(core, core, batch)
    losses = F.cross_entropy(logits, tokens, reduction="none")  # [positions]
    row = (next_labels(batch["labels"]) != IGNORED).nonzero()[:, 0]  # [positions]
    return torch.zeros(len(batch["labels"]), device=losses.device).index_add(0, row.to(losses.device), losses)


def zero_of(parameters: Iterator[nn.Parameter] | list[nn.Parameter]) -> Tensor:
    """Zero, with a zero gradient for each parameter.

    A batch without images does not use the projector: without a gradient DDP would wait for it, and a training of the
    projector alone would have no loss to differentiate.
    """
    return sum((0.0 * parameter.sum() for parameter in parameters), start=torch.zeros(()))
