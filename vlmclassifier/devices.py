"""Which device and number format a model runs in."""

import os

import torch

from vlmclassifier.records import UserError


def resolve_device(device: str) -> str:
    """The torch device of --device: "auto" and "cuda" are this process's GPU (LOCAL_RANK under a launcher).

    "auto" without a GPU is the CPU. Raises UserError where a GPU is asked for and torch sees none.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: torch sees no CUDA GPU here; use --device cpu.")
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if device == "auto":
        return "cpu"
    try:
        return str(torch.device(device))
    except RuntimeError:
        raise UserError(f"--device {device} is no device: write auto, cpu, cuda or cuda:N.") from None


def resolve_dtype(dtype: str, device: str) -> str:
    """The name of the torch dtype of --dtype: "auto" is bfloat16 on a GPU and float32 on the CPU."""
    return ("bfloat16" if device.startswith("cuda") else "float32") if dtype == "auto" else dtype
