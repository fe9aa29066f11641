"""Why are visually-grounded language models bad at image classification? The study's shared package.

Verbs for a Python session: `open_image`, `load_vlm`, `load_clip`, `rank_names`. The last three import torch when first
used. A VLM has `ask`, a CLIP `class_features` and `classify`; images are paths or PIL images.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmclassifier.clip import load_clip
    from vlmclassifier.images import open_image
    from vlmclassifier.ranking import rank_names
    from vlmclassifier.vlm import load_vlm

__all__ = ["load_clip", "load_vlm", "open_image", "rank_names"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'vlmclassifier' has no attribute {name!r}")
    from importlib import import_module

    home = {"load_clip": "clip", "load_vlm": "vlm", "open_image": "images", "rank_names": "ranking"}[name]
    return getattr(import_module(f"vlmclassifier.{home}"), name)


def __dir__() -> list[str]:
    return __all__
