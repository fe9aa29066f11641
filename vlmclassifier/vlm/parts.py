"""The parts of a vision-language model by their role: vision encoder, projector, language model."""

from typing import Any

from torch import nn

from vlmclassifier.records import UserError

VISION_PARTS = ("vision_tower", "vision_model", "visual")  # names of vision encoders in the families of transformers
# Names of projectors; Qwen-VL's stands within the vision part. BLIP-2's is a Q-Former with a linear layer behind it.
PROJECTORS = ("multi_modal_projector", "connector", "merger", "qformer")


def innermost_decoder(model: nn.Module) -> Any:
    """The decoder without its output embeddings. For BLIP-2, `get_decoder` returns the whole language model first."""
    decoder = model.get_decoder()
    while (inner := decoder.get_decoder()) is not decoder and inner is not None:
        decoder = inner
    return decoder


def is_vision_encoder(parameter: str) -> bool:
    """Whether a parameter, by its name, belongs to the vision encoder and not to projector or language model."""
    parts = parameter.split(".")
    return any(part in VISION_PARTS for part in parts) and not any("merger" in part for part in parts)


def find_projector(model: nn.Module) -> nn.Module:
    """The module that reads the vision encoder's output. Raises UserError for an architecture without a known one."""
    for name, module in model.named_modules():
        if name.split(".")[-1] in PROJECTORS:
            return module
    raise UserError(
        f"{type(model).__name__} has no part named {', '.join(PROJECTORS)}: its vision encoder's output is not found."
    )


def head_outputs(decoder: nn.Module) -> list[nn.Module]:
    """Of every layer the projection that reads the outputs of all attention heads side by side."""
    found = []
    for layer in decoder.layers:
        attention = layer.self_attn
        found.append(attention.o_proj if hasattr(attention, "o_proj") else attention.out_proj)
    return found
