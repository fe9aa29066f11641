"""Miniatures: the real architectures of the registered models with random weights, a few hundred kilobytes each.

Their answers are meaningless; they are for testing every code path offline in seconds. Each folder is an ordinary
checkpoint for `from_pretrained` (or open_clip's `local-dir:`), and its config marks it as a miniature.
"""

import json
import shutil
import tempfile
from pathlib import Path

import torch

from vlmclassifier.models import MINIATURE, ModelSpec, is_miniature
from vlmclassifier.records import UserError
from vlmclassifier.tiny import current_models, paper_models
from vlmclassifier.tiny.clip_models import make_open_clip
from vlmclassifier.tiny.parts import redraw_weights

VLM_BUILDERS = {  # by the architecture of the model; Pixtral has the architecture llava, but another vision encoder
    "llava": paper_models.make_llava,
    "llava_next": paper_models.make_llava_next,
    "blip-2": paper_models.make_blip2,
    "instructblip": paper_models.make_instructblip,
    "qwen2_5_vl": current_models.make_qwen2_5_vl,
    "qwen3_vl": current_models.make_qwen3_vl,
    "internvl": current_models.make_internvl,
    "llava_onevision": current_models.make_llava_onevision,
    "smolvlm": current_models.make_smolvlm,
    "idefics3": current_models.make_idefics3,
    "paligemma": current_models.make_paligemma,
    "gemma3": current_models.make_gemma3,
}


def has_miniature(spec: ModelSpec) -> bool:
    """Whether `make_tiny` can write a miniature: not for APIs, locally trained models and torchvision's classifiers."""
    return spec.kind != "api" and spec.source is not None and not spec.source.startswith("torchvision/")


def make_tiny(spec: ModelSpec, out: Path, seed: int = 0) -> Path:
    """Write the miniature of a registered model to the folder `out`, and return `out`.

    The same seed gives the same bytes. The folder is renamed to `out` when it is complete; an older miniature there is
    replaced. Raises UserError when the model has no miniature, or when `out` contains anything else.
    """
    if spec.source is None:
        raise UserError(f"{spec.key} is a miniature itself: training_analysis/pretrain_mini.py trains it.")
    if spec.kind == "api":
        raise UserError(f"There is no miniature of {spec.key}, which is behind an API: choose another --model.")
    if spec.source.startswith("torchvision/"):
        raise UserError(
            f"There is no miniature of {spec.key}: torchvision builds this architecture in one size only; choose "
            "another --model."
        )
    build = current_models.make_pixtral if spec.key.startswith("pixtral") else VLM_BUILDERS.get(spec.architecture)
    if spec.kind == "vlm" and build is None:
        raise UserError(
            f"There is no miniature of {spec.key}: its architecture ({spec.architecture or 'unknown'}) has no builder; "
            "choose a model of vlmclassifier/models.py, or add a builder to VLM_BUILDERS in vlmclassifier/tiny."
        )
    if out.exists() and any(out.iterdir()) and not is_miniature(out):
        raise UserError(f"{out} contains something that is not a miniature: choose another --out.")
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary_folder:
        unfinished = Path(temporary_folder) / out.name
        unfinished.mkdir()
        if spec.kind == "clip":
            config_file = make_open_clip(spec, unfinished)
        else:
            model, processor = build(spec)
            redraw_weights(model, seed)
            model.save_pretrained(unfinished)
            processor.save_pretrained(unfinished)
            config_file = unfinished / "config.json"
        config = json.loads(config_file.read_text(encoding="utf-8")) | {MINIATURE: True}
        config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if out.exists():
            shutil.rmtree(out)
        unfinished.rename(out)
    return out
