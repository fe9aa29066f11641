"""Miniatures of the contrastive models: the classes of open_clip, and EVA of timm."""

import json
from pathlib import Path

from vlmclassifier.models import ModelSpec
from vlmclassifier.tiny.parts import IMAGE_SIZE, WIDTH


def make_open_clip(spec: ModelSpec, out: Path) -> Path:
    """Write a small model of the same classes as a folder for open_clip. Returns its configuration file."""
    import open_clip
    from safetensors.torch import save_file

    config = open_clip.get_model_config(spec.source.split("/")[0])
    config["embed_dim"] = WIDTH
    config["text_cfg"] |= {"width": WIDTH, "heads": 2, "layers": 2}
    if "timm_model_name" in config["vision_cfg"]:
        # The smallest EVA of timm, because open_clip cannot pass a width to timm. Its class is `Eva`, as for the giant.
        config["vision_cfg"] |= {"timm_model_name": "eva02_tiny_patch14_224"}
    else:
        config["vision_cfg"] |= {"image_size": IMAGE_SIZE, "layers": 3, "width": 2 * WIDTH, "head_width": WIDTH}
    model_class = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    model = model_class(**config)
    if model_class is open_clip.CustomTextCLIP:
        config["custom_text"] = True
    architecture, tag = spec.source.split("/")
    pretrained_config = open_clip.get_pretrained_cfg(architecture, tag)
    transform = {}
    for key in ("mean", "std", "interpolation", "resize_mode"):
        if pretrained_config.get(key):
            transform[key] = pretrained_config[key]
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, out / "open_clip_model.safetensors")
    text = json.dumps({"model_cfg": config, "preprocess_cfg": transform}, indent=2)
    (out / "open_clip_config.json").write_text(text + "\n", encoding="utf-8")
    return out / "open_clip_config.json"
