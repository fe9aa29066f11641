"""Whether a checkpoint is the model that its name in the registry stands for: sizes, training records, fingerprints."""

import json
from pathlib import Path
from typing import Any

from vlmclassifier.models import MODELS, ModelSpec, is_miniature
from vlmclassifier.paths import listed_fingerprint

# What a training leaves in a folder: such weights are not the released ones, whatever the folder is called.
TRAINING_FILES = ("trainer_state.json", "training_args.bin", "optimizer.pt", "training.json", "adapter_config.json")


def checkpoint_tags(spec: ModelSpec, checkpoint: Path) -> list[str]:
    """What makes a checkpoint differ from the registered model, as tags of its runs; empty where nothing is known.

    Raises UserError for a config that is not a JSON object.
    """
    if is_miniature(checkpoint):
        return ["miniature"]
    if spec.key not in MODELS or spec.source is None:
        return []
    tags = []
    if any((checkpoint / name).exists() for name in TRAINING_FILES):
        tags.append("trained further")
    if spec.sizes is not None and (sizes := model_sizes(spec, checkpoint)) not in (None, spec.sizes):
        tags.append(f"{sizes[0]} wide, {sizes[1]} layers")
    return tags


def model_sizes(spec: ModelSpec, checkpoint: Path) -> tuple[int, int] | None:
    """Width and number of layers of the language model, of CLIP its image encoder; None where they are not stored."""
    if checkpoint.is_file():  # of weights, whose shapes the architecture of the registry decides
        return None
    file = checkpoint / "open_clip_config.json"
    try:
        if spec.kind == "clip" and file.is_file():
            vision: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["model_cfg"]["vision_cfg"]
            return vision["width"], vision["layers"]
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
        part = config.vision_config if spec.kind == "clip" else config.get_text_config()
        return part.hidden_size, part.num_hidden_layers
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # loading it says what is wrong
        return None


def is_verified(spec: ModelSpec, fingerprint: str) -> bool:
    """Whether the registry, or [fingerprints] of paths.toml, lists this fingerprint for the model."""
    return fingerprint in spec.fingerprints or fingerprint == listed_fingerprint(spec.key)
