"""Checkpoints in other forms: projectors of LLaVA's original code, and fine-tuned weights merged into a whole model."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmclassifier.finetuning.weights import load_adapter
from vlmclassifier.identity import MERGED_FILE, TRAINING_RECORD, Adapter
from vlmclassifier.records import UserError, first_line
from vlmclassifier.vlm import VLM, Batch

# Names of the original code's mm_projector.bin, and of transformers' LLaVA.
ORIGINAL_PREFIXES = ("model.mm_projector.", "mm_projector.", "base_model.model.model.mm_projector.")
LAYERS = {"0": "linear_1", "2": "linear_2"}
TOLERANCE = 1e-5  # of the largest logit, between the merged model and the one with LoRA beside it, in float32


def read_original_projector(file: Path) -> dict[str, Tensor]:
    """The weights of a projector of LLaVA's original code by transformers' names: linear_1.weight and so on.

    A .bin file is read with `weights_only`: it cannot run code. Raises UserError for a file of another form.
    """
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            stored = load_file(file)
        else:
            stored = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types for a file that is no checkpoint or an unsafe one
        raise UserError(
            f"{file} is no file of weights that can be read safely ({first_line(error)}): download it again, or save "
            "its tensors as safetensors."
        ) from None
    stored = stored if isinstance(stored, Mapping) else {}
    found = {}
    for name, value in stored.items():
        for prefix in ORIGINAL_PREFIXES:
            layer, _, kind = str(name).removeprefix(prefix).partition(".")
            if str(name).startswith(prefix) and layer in LAYERS:
                found[f"{LAYERS[layer]}.{kind}"] = value
    wanted = {f"{layer}.{kind}" for layer in LAYERS.values() for kind in ("weight", "bias")}
    if set(found) != wanted:
        raise UserError(
            f"{file} is no projector of LLaVA's original code: it needs model.mm_projector.0.weight, .0.bias, "
            f".2.weight and .2.bias, and has {', '.join(sorted(map(str, stored))[:4]) or 'nothing'}."
        )
    return found


def put_projector(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Put a projector's weights into a LLaVA model of transformers. Raises UserError where they do not fit."""
    projector = llava_projector(model)
    for name, parameter in projector.named_parameters():
        if name not in weights or weights[name].shape != parameter.shape:
            shape = tuple(weights[name].shape) if name in weights else None
            raise UserError(
                f"{source} is of another architecture: its {name} has the shape {shape}, the model's projector "
                f"{tuple(parameter.shape)}; use the checkpoint that it was trained for."
            )
    with torch.no_grad():
        for name, parameter in projector.named_parameters():
            parameter.copy_(weights[name])


def original_projector(model: nn.Module) -> dict[str, Tensor]:
    """The projector of a LLaVA model of transformers by the original code's names."""
    layers = {value: key for key, value in LAYERS.items()}
    found = {}
    for name, parameter in llava_projector(model).named_parameters():
        layer, _, kind = name.partition(".")
        found[f"{ORIGINAL_PREFIXES[0]}{layers[layer]}.{kind}"] = parameter.detach().cpu().clone()
    return found


def llava_projector(model: nn.Module) -> nn.Module:
    """The two-layer projector of LLaVA. Raises UserError for another model."""
    projector = getattr(model.base_model, "multi_modal_projector", None)
    if projector is None or {name.split(".")[0] for name, _ in projector.named_parameters()} != set(LAYERS.values()):
        raise UserError(f"{type(model).__name__} has no projector like LLaVA's: only LLaVA's can be converted.")
    return projector


def merge_adapter(vlm: VLM, adapter: Adapter, batch: Batch | None = None) -> float:
    """Put fine-tuned weights into a model for good: LoRA is added to the matrices by PEFT.

    Returns the largest difference of the logits of `batch` between the model with LoRA beside it and the merged one, as
    a share of the largest logit. Raises UserError where it is above TOLERANCE in float32.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper

    load_adapter(vlm, adapter)
    beside = logits_of(vlm, batch) if batch is not None else None
    for name, module in list(vlm.model.named_modules()):
        if isinstance(module, LoraLayer) and not isinstance(module, ModulesToSaveWrapper):
            module.merge(safe_merge=True)  # refuses weights that are not finite
            parent = vlm.model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], module.get_base_layer())
    if hasattr(vlm.model, "peft_config"):
        del vlm.model.peft_config
    if hasattr(vlm.model, "_hf_peft_config_loaded"):
        vlm.model._hf_peft_config_loaded = False
    if beside is None:
        return 0.0
    difference = float((logits_of(vlm, batch) - beside).abs().max() / beside.abs().max())
    if vlm.logits_dtype == torch.float32 and not difference <= TOLERANCE:
        raise UserError(
            f"The merged model differs from the one with LoRA beside it by {difference:.2g} of the largest logit: keep "
            "the adapter (--adapter)."
        )
    return difference


@torch.inference_mode()
def logits_of(vlm: VLM, batch: Batch) -> Tensor:
    """Logits float32 [batch, tokens, vocabulary] of prompts."""
    return vlm.model(**vlm.to_device(batch.inputs), use_cache=False).logits.float().cpu()


def save_checkpoint(vlm: VLM, folder: Path, source: Path, record: Mapping[str, Any]) -> None:
    """Write a whole checkpoint that --weights takes; the folder appears when it is complete.

    `source`: the checkpoint that the model was loaded from, whose processor files are copied. `record`: what
    training.json says of it. Raises UserError for a folder that exists.
    """
    if folder.exists():
        raise UserError(f"{folder} exists: choose another --out or remove it.")
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    try:
        vlm.model.save_pretrained(new, safe_serialization=True)
        for file in processor_files(source):
            if not (new / file.name).exists():
                shutil.copyfile(file, new / file.name)
        text = json.dumps(dict(record), indent=1, ensure_ascii=False) + "\n"
        (new / TRAINING_RECORD).write_text(text, encoding="utf-8")
        (new / MERGED_FILE).write_text(json.dumps(record["merged"], indent=1) + "\n", encoding="utf-8")
        new.rename(folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def processor_files(folder: Path) -> Sequence[Path]:
    """The files of tokenizer and processor in a checkpoint: everything that is not weights."""
    return [
        file for pattern in ("*.json", "*.jinja", "*.model", "*.txt") for file in sorted(folder.glob(pattern))
        if not file.name.endswith(".index.json")
    ]  # fmt: skip
