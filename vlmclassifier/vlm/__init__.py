"""Vision-language models: one class for every transformers image-text model."""

from vlmclassifier.vlm.loading import load_vlm
from vlmclassifier.vlm.model import VLM

__all__ = ["VLM", "load_vlm"]
