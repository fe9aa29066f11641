"""Load a checkpoint as a `VLM`."""

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlmclassifier.devices import resolve_device, resolve_dtype
from vlmclassifier.models import ModelSpec, checkpoint_folder, find_model
from vlmclassifier.records import UserError, first_line
from vlmclassifier.vlm.model import VLM

GPU_SHARE = 0.8  # share of a GPU's free memory for weights; the rest is for activations and the KV cache


def load_vlm(model: str, weights: str | Path | None = None, device: str = "auto", dtype: str = "auto") -> VLM:
    """Load a registered model (`models.MODELS`), any other hub id, or a folder.

    `weights`: a local folder; by default the entry in paths.toml, else the hub. `dtype` "auto" is bfloat16 on a GPU and
    float32 on the CPU. A model that is larger than one GPU is distributed over all GPUs. Raises UserError when the
    checkpoint is missing, unsafe, incomplete, of another model, or cannot be downloaded.
    """
    spec = find_model(model, "vlm")
    folder = checkpoint_folder(spec, Path(weights) if weights else None)
    torch_device = torch.device(resolve_device(device))
    torch_dtype = getattr(torch, resolve_dtype(dtype, str(torch_device)))
    try:
        network, loading_info = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=torch_dtype,
            device_map=_device_map(folder, torch_device),
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(_loading_error_message(error, spec, folder, torch_device)) from error
    processor = _load_processor(spec, folder)
    _check_checkpoint(network, processor, loading_info["missing_keys"], spec, folder)
    return VLM(network, processor, spec)


def _load_processor(spec: ModelSpec, folder: Path) -> object:
    """The processor in a checkpoint folder. Raises UserError where there is none, as trainings leave folders."""
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # without a tokenizer or an image processor transformers raises any type
        raise UserError(
            f"The checkpoint folder {folder} of {spec.key} has no processor that can be loaded ({first_line(error)}): "
            "copy the tokenizer and processor files of the model that was trained into it (*.json, *.jinja, *.model)."
        ) from error
    tokenizer = getattr(processor, "tokenizer", None)
    if not getattr(processor, "chat_template", None) and getattr(tokenizer, "chat_template", None):
        processor.chat_template = tokenizer.chat_template  # older checkpoints have it in tokenizer_config.json only
    return processor


def _loading_error_message(error: Exception, spec: ModelSpec, folder: Path, device: torch.device) -> str:
    """The message for an exception that transformers raised while it loaded the checkpoint."""
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"{spec.key} does not fit into the memory of {device}: use a smaller model, --dtype bfloat16, or more GPUs."
        )
    if isinstance(error, ImportError):
        return f"{spec.key} needs a package that is not installed ({first_line(error)}): install it."
    if "trust_remote_code" in str(error):
        return (
            f"The checkpoint {folder} requires its own code, which is not run for safety: choose a checkpoint that "
            "transformers supports itself (its name often ends with -hf)."
        )
    if "does not recognize this architecture" in str(error):
        return (
            f"The checkpoint {folder} is of a type that the installed version of transformers does not know "
            f"({first_line(error)}): install a newer one, or choose another --model."
        )
    if "Unrecognized configuration class" in str(error):
        return f"The checkpoint {folder} does not contain an image-text-to-text model: choose another --model."
    return f"The checkpoint {folder} of {spec.key} cannot be loaded ({first_line(error)}): save or download it again."


def _check_checkpoint(
    network: torch.nn.Module, processor: object, missing_weights: set[str], spec: ModelSpec, folder: Path
) -> None:
    """Raise UserError for a checkpoint of another model, or without some weights, the processor or a prompt format."""
    if spec.architecture is not None and network.config.model_type != spec.architecture:
        raise UserError(
            f"The checkpoint {folder} contains a {network.config.model_type} model, but {spec.key} is of type "
            f"{spec.architecture}: fix --weights, --model or paths.toml."
        )
    if missing_weights:
        names = sorted(missing_weights)
        raise UserError(
            f"The checkpoint {folder} does not fit {spec.key}: {len(names)} weights such as {names[0]} are missing and "
            "would be random; save or download it again."
        )
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise UserError(
            f"The checkpoint {folder} has no image processor with a tokenizer: save the model's processor there too."
        )
    if spec.template is None and not getattr(processor, "chat_template", None):
        raise UserError(
            f"The processor of {spec.key} has no chat template, so the prompt format is unknown: add "
            f"chat_template.jinja to {folder}, or an entry with a template to vlmclassifier/models.py."
        )


def _device_map(folder: Path, device: torch.device) -> str | dict[str, torch.device]:
    """One device if the weights fit, else all GPUs ("auto" of accelerate).

    Always one device under a launcher, which assigns one GPU to each process.
    """
    if device.type != "cuda" or torch.cuda.device_count() == 1 or "LOCAL_RANK" in os.environ:
        return {"": device}
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))  # bytes
    free, _ = torch.cuda.mem_get_info(device)  # bytes
    return {"": device} if size < GPU_SHARE * free else "auto"
