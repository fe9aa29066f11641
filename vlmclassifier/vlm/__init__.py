"""Vision-language models: the class `VLM` for every image-text-to-text model of transformers."""

from vlmclassifier.vlm.loading import load_vlm
from vlmclassifier.vlm.model import VLM, Batch

__all__ = ["VLM", "Batch", "load_vlm"]
