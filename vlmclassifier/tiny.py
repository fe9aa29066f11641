"""Miniatures: the registered models' true architectures with random weights, a few hundred kilobytes each.

They classify nothing; they let every path be tried offline in seconds. Each folder is an ordinary checkpoint for
`from_pretrained` (or open_clip's `local-dir:`), and its config says that it is a miniature.
"""

import json
import math
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessor,
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vlmclassifier.benchmarks import PAPER_BENCHMARKS, class_names
from vlmclassifier.models import MINIATURE, ModelSpec, is_miniature
from vlmclassifier.prompts import TEMPLATES, THOUGHT, WORDINGS
from vlmclassifier.records import UserError

IMAGE_SIZE, PATCH, WIDTH, VOCABULARY, QUERIES = 56, 14, 32, 600, 4
VISION = {
    "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": IMAGE_SIZE, "patch_size": PATCH,
}  # fmt: skip


def make_tiny(spec: ModelSpec, out: Path, seed: int = 0) -> Path:
    """Write the miniature of a registered model to the folder `out`; the same seed gives the same bytes.

    The folder appears when it is whole. Raises UserError where no miniature of the architecture is known, and where
    `out` holds anything but an older miniature.
    """
    if spec.source is None:
        raise UserError(f"{spec.key} is a miniature itself: training_analysis/pretrain_mini.py trains it.")
    if spec.kind == "vlm" and spec.architecture not in VLM_BUILDERS:
        raise UserError(f"There is no miniature of {spec.key}: {spec.architecture} has no builder in tiny.py.")
    if out.exists() and any(out.iterdir()) and not is_miniature(out):
        raise UserError(f"{out} holds something that is not a miniature: choose another --out.")
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        work = Path(folder) / out.name
        work.mkdir()
        if spec.kind == "clip":
            _make_open_clip(spec, work)
        else:
            model, processor = VLM_BUILDERS[spec.architecture]()
            redraw_weights(model, seed)
            model.save_pretrained(work)
            processor.save_pretrained(work)
            _mark(work / "config.json")
        if out.exists():
            shutil.rmtree(out)
        work.rename(out)
    return out


@torch.no_grad()
def redraw_weights(model: nn.Module, seed: int = 0) -> None:
    """Redraw weights so that the answer depends on the picture: libraries initialise so small that it would not.

    Matrices get std 1/sqrt(fan in), embeddings and query tokens std 1, tied embeddings hidden^-0.5.
    """
    generator = torch.Generator().manual_seed(seed)
    output = model.get_output_embeddings()
    tied = output is not None and output.weight is model.get_input_embeddings().weight
    for name, parameter in sorted(model.named_parameters()):
        if parameter.ndim < 2:
            continue
        embedding = "embed" in name or "query_tokens" in name
        if tied and parameter is output.weight:
            std = parameter.shape[1] ** -0.5
        elif embedding and "patch" not in name:
            std = 1.0
        else:
            std = 1 / math.sqrt(parameter[0].numel())
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def train_tokenizer(special: Iterable[str], bos: str, eos: str, pad: str, **named: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 600 tokens trained on the class names and prompts, with a begin token in front of a text."""
    texts = [name for benchmark in PAPER_BENCHMARKS.values() for name in class_names(benchmark)]
    texts += [*WORDINGS.values(), *TEMPLATES.values(), THOUGHT]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(special), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad, padding_side="left",
        extra_special_tokens=named,
    )  # fmt: skip


def _make_llava() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    special = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    tokenizer = train_tokenizer(special, "<s>", "</s>", "<pad>", image_token="<image>")
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "projection_dim": WIDTH, **VISION},
        text_config={
            "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 4096,
            "vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=(IMAGE_SIZE // PATCH) ** 2,
        vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=size)
    processor = LlavaProcessor(
        image_processor, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config), processor


def _make_blip2() -> tuple[Blip2ForConditionalGeneration, Blip2Processor]:
    # OPT's begin and end token are one. "<image>" stays an unnamed special token, as in the released processor.
    tokenizer = train_tokenizer(["<s>", "<pad>", "</s>", "<unk>", "<image>"], "</s>", "</s>", "<pad>")
    config = Blip2Config(
        vision_config=VISION,
        qformer_config={
            "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2,
            "encoder_hidden_size": WIDTH, "vocab_size": len(tokenizer),
        },
        text_config={
            "model_type": "opt", "hidden_size": WIDTH, "word_embed_proj_dim": WIDTH, "ffn_dim": 2 * WIDTH,
            "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 2048,
            "vocab_size": len(tokenizer), "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1,
        },
        num_query_tokens=QUERIES, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    image_processor = BlipImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    return Blip2ForConditionalGeneration(config), Blip2Processor(image_processor, tokenizer, num_query_tokens=QUERIES)


VLM_BUILDERS = {"llava": _make_llava, "blip-2": _make_blip2}  # by ModelSpec.architecture


def _make_open_clip(spec: ModelSpec, out: Path) -> None:
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
    _mark(out / "open_clip_config.json")


def _mark(file: Path) -> None:
    config = json.loads(file.read_text(encoding="utf-8")) | {MINIATURE: True}
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
