"""Trained weights in a folder: LoRA as PEFT stores it, other trained parameters by name, and what they belong to."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmclassifier.finetuning.parts import LORA_MARK, Lora, linear_names, lora_config
from vlmclassifier.identity import TRAINING_RECORD, Adapter
from vlmclassifier.records import UserError, first_line
from vlmclassifier.vlm import VLM

TRAINED_FILE = "trained.safetensors"  # trained parameters that are not LoRA's
ADAPTER_FILE = "adapter_model.safetensors"  # with adapter_config.json, by PEFT's names
PEFT_PREFIX = "base_model.model."  # of the names in PEFT's files
ADAPTER_NAME = "default"


def save_trained(model: nn.Module, folder: Path, record: Mapping[str, Any], write: bool = True) -> None:
    """Write the trained parameters of a model and a record of the training; the folder appears when it is complete.

    `record`: what training.json holds, with "lora" (rank, alpha, dropout) or None. An earlier folder stays until then.
    `write`: False on the processes that only take part in gathering shards.
    """
    from safetensors.torch import save_file

    states = {name: whole(parameter) for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not write:
        return
    lora = {name: value for name, value in states.items() if LORA_MARK in name}
    others = {name: value for name, value in states.items() if LORA_MARK not in name}
    new = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        new.mkdir(parents=True)
        if others:
            save_file(others, new / TRAINED_FILE)
        if lora:
            names = {PEFT_PREFIX + name.replace(f".{ADAPTER_NAME}.", "."): value for name, value in lora.items()}
            save_file(names, new / ADAPTER_FILE)
            lora_config(Lora(**record["lora"]), plain_linear_names(model)).save_pretrained(new)
        text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        (new / TRAINING_RECORD).write_text(text, encoding="utf-8")
        if folder.exists():
            old = folder.with_name(f".{folder.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
            new.rename(folder)
            shutil.rmtree(old)
        else:
            new.rename(folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def whole(parameter: Tensor) -> Tensor:
    """A parameter on the CPU; a shard of FSDP2 is gathered from all processes first."""
    value = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return value.detach().cpu().contiguous()


def plain_linear_names(model: nn.Module) -> list[str]:
    """The names of the decoder's linear layers as they are without LoRA."""
    return [name for name in linear_names(model) if LORA_MARK not in name and ".base_layer" not in name] or [
        name.removesuffix(".base_layer") for name in linear_names(model) if name.endswith(".base_layer")
    ]


def load_adapter(vlm: VLM, adapter: Adapter | None) -> None:
    """Put fine-tuned weights into a model, with the template and the padding of images that they were trained with."""
    if adapter is None:
        return
    if not adapter.is_merged:
        load_trained(vlm.model, adapter.folder)
    vlm.model.eval()
    vlm.spec, vlm.pads_square = adapter.spec(vlm.spec), adapter.record["config"]["pad_square"]
    vlm.resize_images(adapter.record["config"].get("image_size"))


def load_trained(model: nn.Module, folder: Path) -> None:
    """Put the weights of `save_trained` into a model, whose LoRA layers are there already or are added.

    Raises UserError for files that cannot be read, and for weights of another architecture: every one must fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    states: dict[str, Tensor] = {}
    try:
        if (folder / TRAINED_FILE).exists():
            states |= load_file(folder / TRAINED_FILE)
        if (folder / ADAPTER_FILE).exists():
            _add_lora_of(model, folder)
            for name, value in load_file(folder / ADAPTER_FILE).items():
                stem, _, end = name.removeprefix(PEFT_PREFIX).rpartition(".")
                states[f"{stem}.{ADAPTER_NAME}.{end}"] = value
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be read ({first_line(error)}): train it again or copy it again.") from None
    parameters = dict(model.named_parameters())
    if not states:
        raise UserError(f"{folder} holds neither {TRAINED_FILE} nor {ADAPTER_FILE}: copy it again.")
    for name, value in states.items():
        if name not in parameters or parameters[name].shape != value.shape:
            found = "no such weight" if name not in parameters else f"the shape {tuple(parameters[name].shape)}"
            raise UserError(
                f"{folder} is of another architecture: its {name} has the shape {tuple(value.shape)}, the model has "
                f"{found}; give the checkpoint that was trained (--weights)."
            )
    missing = [name for name in parameters if LORA_MARK in name and name not in states]
    if missing:
        raise UserError(f"{folder} lacks the weights of {missing[0]}: copy it again.")
    with torch.no_grad():
        for name, value in states.items():
            parameters[name].copy_(value)


def _add_lora_of(model: nn.Module, folder: Path) -> None:
    """Add the LoRA layers of a folder's configuration where a model has none."""
    from peft import PeftConfig, inject_adapter_in_model

    if any(LORA_MARK in name for name, _ in model.named_parameters()):
        return
    config = PeftConfig.from_pretrained(str(folder))
    unknown = set(config.target_modules) - {name for name, _ in model.named_modules()}
    if unknown:
        raise UserError(
            f"{folder} is of another architecture: the model has no layer {sorted(unknown)[0]}; give the checkpoint "
            "that was trained (--weights)."
        )
    config.inference_mode = True
    inject_adapter_in_model(config, model)
    model.train(model.training)  # new layers are in training mode, with dropout
