"""Untrained controls: what a probe finds behind a language model and a projector that have learnt nothing.

A probe on hidden states also finds what the vision encoder knows and the rest merely passes through (section 3.2 of the
paper has no such control).
"""

import hashlib
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from vlmclassifier.records import UserError, first_line
from vlmclassifier.vlm.model import VLM
from vlmclassifier.vlm.parts import innermost_decoder, is_vision_encoder

CONTROLS = ("random", "permuted", "text_only")
INITIALISER_RANGE = 0.02  # of transformers' models, where their configuration has none


def untrain(vlm: VLM, control: str, seed: int) -> None:
    """Replace the weights of language model and projector; the vision encoder keeps its own.

    "random": the library's initialisation of a new model. "permuted": the trained entries of every matrix in a random
    order, so that the scales stay. Depends on the seed and on the parameter's name.
    """
    fresh = {}
    if control == "random":
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            fresh = dict(AutoModelForImageTextToText.from_config(vlm.model.config).named_parameters())
    with torch.no_grad():
        for name, parameter in vlm.model.named_parameters():
            if is_vision_encoder(name):
                continue
            generator = _generator(seed, name)
            if control == "random":
                values = fresh[name]
                if values.ndim >= 2 and not values.any():  # BLIP-2's query tokens: all image tokens would be the same
                    deviation = getattr(vlm.model.config, "initializer_range", None) or INITIALISER_RANGE
                    values = torch.randn(values.shape, generator=generator) * deviation
                parameter.copy_(values)
            elif parameter.ndim >= 2:
                order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
                parameter.copy_(parameter.flatten()[order].view_as(parameter))


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def use_text_only_language_model(vlm: VLM, folder: Path) -> None:
    """Give the VLM a language model as it was before visual training; the projector keeps its trained weights.

    `folder`: a checkpoint of the language model alone, such as Vicuna's for LLaVA-1.5. Tokens that the VLM has beyond
    its vocabulary keep their embeddings. Raises UserError for a folder of another architecture.
    """
    try:
        source = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} is no checkpoint of a language model ({first_line(error)}): fix --language-model."
        ) from None
    pairs = [(innermost_decoder(vlm.model), innermost_decoder(source))]
    pairs.append((vlm.model.get_output_embeddings(), source.get_output_embeddings()))
    with torch.no_grad():
        for target_module, source_module in pairs:
            targets, values = dict(target_module.named_parameters()), dict(source_module.named_parameters())
            if set(targets) != set(values):
                name = sorted(set(targets) ^ set(values))[0]
                raise UserError(f"{folder} is another architecture than {vlm.spec.key}'s language model: only one of "
                                f"them has {name}; fix --language-model.")  # fmt: skip
            for name, target in targets.items():
                _copy_rows(target, values[name], f"{folder}: {name}")


def _copy_rows(target: Tensor, values: Tensor, what: str) -> None:
    """Copy a tensor; of embeddings the target may have more rows."""
    if target.shape[1:] != values.shape[1:] or len(target) < len(values):
        raise UserError(
            f"{what} has the shape {tuple(values.shape)}, the VLM's language model {tuple(target.shape)}: use the "
            "language model that the VLM was made of."
        )
    target[: len(values)] = values.to(target)
