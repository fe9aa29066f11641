"""Why are visually-grounded language models bad at image classification? The study's shared package.

Three verbs for a Python session: `open_image`, `load_vlm`, `load_clip`. The last two import torch when first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmclassifier.clip import load_clip
    from vlmclassifier.images import open_image
    from vlmclassifier.vlm import load_vlm

__all__ = ["load_clip", "load_vlm", "open_image"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'vlmclassifier' has no attribute {name!r}")
    from importlib import import_module

    home = {"load_clip": "clip", "load_vlm": "vlm", "open_image": "images"}[name]
    return getattr(import_module(f"vlmclassifier.{home}"), name)
