"""Untrained controls: what a probe finds behind a language model and a projector that have learnt nothing.

A probe on hidden states also finds what the vision encoder knows and the rest merely passes through (section 3.2 of the
paper has no such control).
"""

import hashlib

import torch
from transformers import AutoModelForImageTextToText

from vlmclassifier.vlm.model import VLM

CONTROLS = ("random", "permuted")
VISION_PARTS = ("vision_tower", "vision_model", "visual")  # names of vision encoders in the families of transformers
PROJECTOR_PART = "merger"  # in the name of a projector that stands within the vision part (Qwen-VL)


def untrain(vlm: VLM, control: str, seed: int) -> None:
    """Replace the weights of language model and projector; the vision encoder keeps its own.

    "random": the library's initialisation of a new model. "permuted": the trained entries of every matrix in a random
    order, so that the scales stay. Depends on the seed, and for "permuted" on the parameter's name.
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
            if control == "random":
                parameter.copy_(fresh[name])
            elif parameter.ndim >= 2:
                digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
                order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
                parameter.copy_(parameter.flatten()[order].view_as(parameter))


def is_vision_encoder(parameter: str) -> bool:
    """Whether a parameter, by its name, belongs to the vision encoder and not to projector or language model."""
    parts = parameter.split(".")
    return any(part in VISION_PARTS for part in parts) and PROJECTOR_PART not in parameter
