"""Which parameters are trained: projector, Q-Former, language model, LoRA, found by the role of their module."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlmclassifier.records import UserError
from vlmclassifier.vlm.parts import PROJECTORS, innermost_decoder, is_vision_encoder

CHOICES = ("projector", "projector+lora", "lora", "qformer", "all")
ROLES = ("vision encoder", "Q-Former", "projector", "language model", "LoRA")
QFORMER = ("qformer", "query_tokens")  # parts of the BLIPs; their projector is a linear layer behind them
LINEAR_PROJECTOR = "language_projection"
TRAINED_DTYPE = torch.float32  # in bfloat16 small steps would be rounded away
LORA_MARK = "lora_"  # in the names of the parameters that PEFT adds


@dataclass(frozen=True)
class Lora:
    """LoRA on all linear layers of the language model (paper, section 4: rank 128, alpha 256)."""

    rank: int = 128
    alpha: int = 256
    dropout: float = 0.05  # of the reference code


def role_of(parameter: str, is_blip: bool) -> str:
    """The role of a parameter, by its name: one of ROLES."""
    parts = parameter.split(".")
    if any(LORA_MARK in part for part in parts):
        return "LoRA"
    if is_vision_encoder(parameter):
        return "vision encoder"
    if is_blip and any(part in QFORMER for part in parts):
        return "Q-Former"
    if any(part in PROJECTORS or part == LINEAR_PROJECTOR or "merger" in part for part in parts):
        return "projector"
    return "language model"


def roles_of(choice: str) -> tuple[str, ...]:
    """The roles that a choice of --train trains. The vision encoder is never trained."""
    return {
        "projector": ("projector",), "projector+lora": ("projector", "LoRA"), "lora": ("LoRA",),
        "qformer": ("Q-Former", "projector"), "all": ("Q-Former", "projector", "language model"),
    }[choice]  # fmt: skip


def select_trained(model: nn.Module, choice: str, lora: Lora, seed: int = 0) -> dict[str, nn.Parameter]:
    """Freeze everything but the parts of a choice, and return these parameters by name, in float32.

    LoRA's layers are added in place, so that the model keeps its class; its random matrices depend on the seed. Weights
    that are trained are kept in float32, whose steps bfloat16 would round away. Raises UserError where the model has no
    such part.
    """
    is_blip = hasattr(model, "qformer")
    if choice == "qformer" and not is_blip:
        raise UserError(f"{type(model).__name__} has no Q-Former: use --train projector.")
    model.requires_grad_(False)
    if "LoRA" in roles_of(choice):
        add_lora(model, lora, seed)
    trained = {}
    for name, parameter in model.named_parameters():  # tied weights are named once
        if role_of(name, is_blip) in roles_of(choice):
            parameter.requires_grad_(True)
            parameter.data = parameter.data.to(TRAINED_DTYPE)
            trained[name] = parameter
    missing = [role for role in roles_of(choice) if role not in {role_of(name, is_blip) for name in trained}]
    if choice != "all" and missing:
        raise UserError(f"{type(model).__name__} has no part that is known as {missing[0]}: choose another --train.")
    return trained


def add_lora(model: nn.Module, lora: Lora, seed: int = 0) -> None:
    """Add LoRA to every linear layer of the decoder, not to vision encoder, projector or head."""
    from peft import inject_adapter_in_model

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(lora_config(lora, linear_names(model)), model)


def lora_config(lora: Lora, targets: Sequence[str]) -> Any:
    """PEFT's configuration for some layers, by full name: its "all-linear" would take the vision encoder's too."""
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, bias="none", target_modules=list(targets)
    )  # fmt: skip


def linear_names(model: nn.Module) -> list[str]:
    """The full names of the decoder's linear layers."""
    decoder = innermost_decoder(model)
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    return [
        f"{prefix}.{name}" for name, module in decoder.named_modules() if isinstance(module, nn.Linear)
    ]  # fmt: skip


def checkpoint_activations(model: nn.Module) -> None:
    """Compute activations again in the backward pass, also behind frozen embeddings, whose outputs need no gradient."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # the newer name
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(options)


def frozen_modules(model: nn.Module) -> list[nn.Module]:
    """The outermost modules without a trained parameter: they stay in evaluation mode, without dropout."""
    found: list[nn.Module] = []

    def collect(module: nn.Module) -> None:
        if not any(parameter.requires_grad for parameter in module.parameters()):
            found.append(module)
            return
        for child in module.children():
            collect(child)

    collect(model)
    return found


def parameter_table(model: nn.Module) -> str:
    """How many parameters of each role are trained, as a Markdown table."""
    from tabulate import tabulate

    is_blip = hasattr(model, "qformer")
    totals, trained = dict.fromkeys(ROLES, 0), dict.fromkeys(ROLES, 0)
    for name, parameter in model.named_parameters():
        role = role_of(name, is_blip)
        totals[role] += parameter.numel()
        trained[role] += parameter.numel() * parameter.requires_grad
    rows = [(role, f"{totals[role]:,}", f"{trained[role]:,}") for role in ROLES if totals[role]]
    rows.append(("all", f"{sum(totals.values()):,}", f"{sum(trained.values()):,}"))
    return tabulate(rows, ["part", "parameters", "trained"], tablefmt="pipe", colalign=("left", "right", "right"))
