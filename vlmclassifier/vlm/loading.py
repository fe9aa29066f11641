"""From a checkpoint to a `VLM`."""

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlmclassifier.devices import resolve_device, resolve_dtype
from vlmclassifier.models import ModelSpec, checkpoint_folder, find_model
from vlmclassifier.records import UserError
from vlmclassifier.vlm.model import VLM

GPU_SHARE = 0.8  # of a GPU's free memory for weights; the rest is for activations and the cache


def load_vlm(model: str, weights: str | Path | None = None, device: str = "auto", dtype: str = "auto") -> VLM:
    """Load a registered model (`models.MODELS`), any other hub id or a folder.

    `weights`: a local folder; without it paths.toml, then the hub. `dtype` "auto" is bfloat16 on a GPU and float32 on
    the CPU. A model that is larger than one GPU is spread over all GPUs. Raises UserError when the checkpoint is
    missing, unsafe, incomplete or out of reach.
    """
    spec = find_model(model, "vlm")
    folder = checkpoint_folder(spec, Path(weights) if weights else None)
    place = torch.device(resolve_device(device))
    torch_dtype = getattr(torch, resolve_dtype(dtype, str(place)))
    try:
        network, info = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=torch_dtype,
            device_map=_device_map(folder, place),
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,
        )
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(_explanation(error, spec, folder, place)) from error
    _check(network, processor, info["missing_keys"], spec, folder)
    return VLM(network, processor, spec)


def _explanation(error: Exception, spec: ModelSpec, folder: Path, place: torch.device) -> str:
    """The one sentence for what transformers raised while loading."""
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"{spec.key} does not fit into the memory of {place}: use a smaller model, --dtype bfloat16, or more GPUs."
        )
    if isinstance(error, ImportError):
        return f"{spec.key} needs a package that is not installed ({first_line}): install it."
    if "trust_remote_code" in str(error):
        return (
            f"The checkpoint {folder} brings code of its own, which is never run here: choose one that transformers "
            "itself knows (often its name ends with -hf)."
        )
    if "Unrecognized configuration class" in str(error):
        return f"The checkpoint {folder} holds no model that answers questions about pictures: choose another --model."
    return f"The checkpoint {folder} of {spec.key} cannot be loaded ({first_line}): save it again."


def _check(network: torch.nn.Module, processor: object, missing: set[str], spec: ModelSpec, folder: Path) -> None:
    """Raise UserError for a checkpoint of another model, with missing weights, or that nobody knows how to ask."""
    if spec.architecture is not None and network.config.model_type != spec.architecture:
        raise UserError(
            f"The checkpoint {folder} holds a {network.config.model_type} model, but {spec.key} is of type "
            f"{spec.architecture}: mend --weights, --model or paths.toml."
        )
    if missing:
        names = sorted(missing)
        raise UserError(
            f"The checkpoint {folder} does not fit {spec.key}: {len(names)} weights such as {names[0]} are missing and "
            "would be random."
        )
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise UserError(
            f"The checkpoint {folder} has no image processor with a tokenizer: save its processor there too."
        )
    if spec.template is None and not getattr(processor, "chat_template", None):
        raise UserError(
            f"The processor of {spec.key} has no chat template, so it is unknown how to ask it: add "
            f"chat_template.jinja to {folder}, or an entry with a template to vlmclassifier/models.py."
        )


def _device_map(folder: Path, place: torch.device) -> str | dict[str, torch.device]:
    """One device where the weights fit, else all GPUs ("auto" of accelerate), unless a launcher deals out the GPUs."""
    if place.type != "cuda" or torch.cuda.device_count() == 1 or "LOCAL_RANK" in os.environ:
        return {"": place}
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    free, _ = torch.cuda.mem_get_info(place)
    return {"": place} if size < GPU_SHARE * free else "auto"
