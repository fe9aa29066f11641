"""Miniatures: the registered models' true architectures with random weights, a few hundred kilobytes each.

They classify nothing; they let every path be tried offline in seconds. Each folder is an ordinary checkpoint for
`from_pretrained` (or open_clip's `local-dir:`), and its config says that it is a miniature.
"""

import json
import shutil
import tempfile
from pathlib import Path

import torch

from vlmclassifier.models import MINIATURE, ModelSpec, is_miniature
from vlmclassifier.records import UserError
from vlmclassifier.tiny import papers, todays
from vlmclassifier.tiny.clips import make_open_clip
from vlmclassifier.tiny.parts import redraw_weights

VLM_BUILDERS = {  # by the model's architecture; pixtral is a llava with another tower
    "llava": papers.make_llava,
    "llava_next": papers.make_llava_next,
    "blip-2": papers.make_blip2,
    "instructblip": papers.make_instructblip,
    "qwen2_5_vl": todays.make_qwen2_5_vl,
    "qwen3_vl": todays.make_qwen3_vl,
    "internvl": todays.make_internvl,
    "llava_onevision": todays.make_llava_onevision,
    "smolvlm": todays.make_smolvlm,
    "idefics3": todays.make_idefics3,
    "paligemma": todays.make_paligemma,
    "gemma3": todays.make_gemma3,
}


def has_miniature(spec: ModelSpec) -> bool:
    """Whether `make_tiny` can write one: not of an API, nor where a model is trained here or comes in one size only."""
    return spec.kind != "api" and spec.source is not None and not spec.source.startswith("torchvision/")


def make_tiny(spec: ModelSpec, out: Path, seed: int = 0) -> Path:
    """Write the miniature of a registered model to the folder `out`; the same seed gives the same bytes.

    The folder appears when it is whole. Raises UserError where no miniature of the architecture is known, and where
    `out` holds anything but an older miniature.
    """
    if spec.source is None:
        raise UserError(f"{spec.key} is a miniature itself: training_analysis/pretrain_mini.py trains it.")
    if spec.kind == "api":
        raise UserError(f"There is no miniature of {spec.key}: it is behind an API.")
    if spec.source.startswith("torchvision/"):
        raise UserError(f"There is no miniature of {spec.key}: torchvision builds this architecture in one size only.")
    build = todays.make_pixtral if spec.key.startswith("pixtral") else VLM_BUILDERS.get(spec.architecture)
    if spec.kind == "vlm" and build is None:
        raise UserError(
            f"There is no miniature of {spec.key}: its architecture ({spec.architecture or 'unknown'}) has no builder; "
            "the models of vlmclassifier/models.py have one."
        )
    if out.exists() and any(out.iterdir()) and not is_miniature(out):
        raise UserError(f"{out} holds something that is not a miniature: choose another --out.")
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        work = Path(folder) / out.name
        work.mkdir()
        if spec.kind == "clip":
            config = make_open_clip(spec, work)
        else:
            model, processor = build(spec)
            redraw_weights(model, seed)
            model.save_pretrained(work)
            processor.save_pretrained(work)
            config = work / "config.json"
        marked = json.loads(config.read_text(encoding="utf-8")) | {MINIATURE: True}
        config.write_text(json.dumps(marked, indent=2) + "\n", encoding="utf-8")
        if out.exists():
            shutil.rmtree(out)
        work.rename(out)
    return out
