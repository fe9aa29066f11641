"""Miniatures of the contrastive models: open_clip's own classes, timm's EVA."""

import json
from pathlib import Path

from vlmclassifier.models import ModelSpec
from vlmclassifier.tiny.parts import IMAGE_SIZE, WIDTH


def make_open_clip(spec: ModelSpec, out: Path) -> Path:
    """Write open_clip's folder of a small model of the same classes; return its configuration file."""
    import open_clip
    from safetensors.torch import save_file

    config = open_clip.get_model_config(spec.source.split("/")[0])
    config["embed_dim"] = WIDTH
    config["text_cfg"] |= {"width": WIDTH, "heads": 2, "layers": 2}
    if "timm_model_name" in config["vision_cfg"]:
        # The smallest EVA that timm names; open_clip passes no widths on to timm. It is of the giant's class `Eva`.
        config["vision_cfg"] |= {"timm_model_name": "eva02_tiny_patch14_224"}
    else:
        config["vision_cfg"] |= {"image_size": IMAGE_SIZE, "layers": 3, "width": 2 * WIDTH, "head_width": WIDTH}
    model_class = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    model = model_class(**config)
    if model_class is open_clip.CustomTextCLIP:
        config["custom_text"] = True
    settings = open_clip.get_pretrained_cfg(*spec.source.split("/"))
    transform = {key: settings[key] for key in ("mean", "std", "interpolation", "resize_mode") if settings.get(key)}
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, out / "open_clip_model.safetensors")
    text = json.dumps({"model_cfg": config, "preprocess_cfg": transform}, indent=2)
    (out / "open_clip_config.json").write_text(text + "\n", encoding="utf-8")
    return out / "open_clip_config.json"
