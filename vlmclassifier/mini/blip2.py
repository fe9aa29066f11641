"""A mini BLIP-2: `Blip2ForConditionalGeneration` on the mini CLIP's image features and the mini language model.

BLIP-2's vision encoder is of another architecture than CLIP's (a class of its own, without the normalisation before the
first layer), so it is first trained to return CLIP's features, as EVA's is. Then, as in LLaVA's two stages and on the
same texts, Q-Former and projection are trained on captions, and with the language model on instructions.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessor,
    CLIPModel,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from vlmclassifier.mini.corpus import Text
from vlmclassifier.mini.llava import Trainable
from vlmclassifier.mini.optimisation import PARTS, Optimisation, one_core_threads
from vlmclassifier.mini.recipes import BlipRecipe
from vlmclassifier.mini.training_images import TrainingImages

FEATURE_BATCH = 512  # images
IMAGE_TOKEN = "<image>"


def build_blip2(
    clip: CLIPModel, lm: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: BlipRecipe
) -> Blip2ForConditionalGeneration:
    """Join a vision encoder with the weights of CLIP's first layers, an untrained Q-Former and a language model.

    The vision encoder has one layer less than CLIP's: its output stands for CLIP's second-to-last layer.
    """
    vision, text_config = clip.config.vision_config, lm.config.to_dict()
    text_config.pop("_name_or_path", None)  # the folder of the part must not be recorded in the new checkpoint
    shared = {"hidden_size": vision.hidden_size, "intermediate_size": vision.intermediate_size,
              "num_attention_heads": vision.num_attention_heads, "hidden_act": "gelu"}  # fmt: skip
    config = Blip2Config(
        vision_config=shared | {"num_hidden_layers": vision.num_hidden_layers - 1, "image_size": vision.image_size,
                                "patch_size": vision.patch_size, "qkv_bias": True},
        qformer_config=shared | {"num_hidden_layers": recipe.layers, "encoder_hidden_size": vision.hidden_size,
                                 "cross_attention_frequency": 1, "vocab_size": 2, "hidden_dropout_prob": 0.0,
                                 "attention_probs_dropout_prob": 0.0},
        text_config=text_config, num_query_tokens=recipe.queries, image_token_index=tokenizer.image_token_id,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = Blip2ForConditionalGeneration(config)
    model.language_model.load_state_dict(lm.state_dict())
    model.language_model.tie_weights()
    nn.init.normal_(model.query_tokens, std=0.5)  # its own start, of zeros, gives every query the same gradient
    _copy_vision(clip, model)
    return model


@torch.no_grad()
def _copy_vision(clip: CLIPModel, model: Blip2ForConditionalGeneration) -> None:
    """Start from CLIP's weights: all but the normalisation before its first layer has a place."""
    source, target = clip.vision_model.state_dict(), model.vision_model
    embeddings = target.embeddings
    embeddings.patch_embedding.weight.copy_(source["embeddings.patch_embedding.weight"])
    embeddings.patch_embedding.bias.zero_()
    embeddings.class_embedding.copy_(source["embeddings.class_embedding"][None, None])
    embeddings.position_embedding.copy_(source["embeddings.position_embedding.weight"][None])
    for number, layer in enumerate(target.encoder.layers):
        prefix = f"encoder.layers.{number}."
        for kind in ("weight", "bias"):
            parts = [source[f"{prefix}self_attn.{name}_proj.{kind}"] for name in "qkv"]
            getattr(layer.self_attn.qkv, kind).copy_(torch.cat(parts))
            getattr(layer.self_attn.projection, kind).copy_(source[f"{prefix}self_attn.out_proj.{kind}"])
            for name in ("layer_norm1", "layer_norm2"):
                getattr(getattr(layer, name), kind).copy_(source[f"{prefix}{name}.{kind}"])
            for name in ("fc1", "fc2"):
                getattr(getattr(layer.mlp, name), kind).copy_(source[f"{prefix}mlp.{name}.{kind}"])


def build_processor(tokenizer: PreTrainedTokenizerFast, size: int, queries: int) -> Blip2Processor:
    """Return BLIP-2's own processor, which puts the image tokens before the prompt."""
    # In BLIP-2's tokenizers the image token is a special token without a name.
    own = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>", padding_side="left", model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    image_processor = BlipImageProcessor(size={"height": size, "width": size})
    return Blip2Processor(image_processor, own, num_query_tokens=queries)


def train_vision(
    model: Blip2ForConditionalGeneration, clip: CLIPModel, images: TrainingImages, recipe: BlipRecipe, seed: int
) -> list[float]:
    """Train the vision encoder to return CLIP's normalised features of the second-to-last layer; its loss by step."""
    rows = images.training_order(
        torch.arange(len(images.labels)), recipe.vision_steps * recipe.vision_batch, False, seed
    )
    model.requires_grad_(False)
    model.vision_model.requires_grad_(True)
    optimisation = Optimisation([model.vision_model], recipe.vision_lr, recipe.vision_lr)

    def loss_of(part: Tensor) -> Tensor:
        pixel_values = images.pixel_values(part)
        with torch.no_grad():
            target = clip.vision_model(pixel_values, output_hidden_states=True).hidden_states[-2]
        found = model.vision_model(pixel_values).last_hidden_state  # [images, 1 + patches, width]
        share = len(part) / recipe.vision_batch
        return share * F.mse_loss(found, F.layer_norm(target, target.shape[-1:]))

    def step(number: int) -> float:
        batch = rows[number * recipe.vision_batch : (number + 1) * recipe.vision_batch]
        losses = optimisation.map_parts(loss_of, batch.chunk(PARTS))
        optimisation.backward(losses)
        return sum(loss.item() for loss in losses)

    losses = optimisation.run(step, recipe.vision_steps, "BLIP-2, vision")
    model.requires_grad_(True)
    return losses


def image_features(model: Blip2ForConditionalGeneration, images: TrainingImages) -> Tensor:
    """Compute the Q-Former's inputs once, with the frozen vision encoder: [1, images, 1 + patches, width]."""

    @torch.inference_mode()
    def encode(rows: Tensor) -> Tensor:
        return model.vision_model(images.pixel_values(rows)).last_hidden_state

    with one_core_threads() as pool:
        features = list(pool.map(encode, torch.arange(len(images.labels)).split(FEATURE_BATCH)))
    return torch.cat(features)[None]


def without_image_token(texts: Sequence[Text]) -> list[Text]:
    """The texts without the image token in their prompts: BLIP-2's image tokens stand before the prompt."""
    return [replace(text, prompt=text.prompt.replace(f"{IMAGE_TOKEN}\n", "")) for text in texts]


def trainable(model: Blip2ForConditionalGeneration) -> Trainable:
    """What the stages of LLaVA's training need to know of a BLIP-2."""

    def project(features: Tensor) -> Tensor:
        queries = model.query_tokens.expand(len(features), -1, -1)
        out = model.qformer(query_embeds=queries, encoder_hidden_states=features).last_hidden_state
        return model.language_projection(out)  # [images, queries, width]

    projectors = [model.qformer, model.language_projection, nn.ParameterList([model.query_tokens])]
    return Trainable(project, projectors, model.language_model.model, model.language_model.lm_head,
                     model.config.image_token_index, model.config.text_config.pad_token_id, "BLIP-2")  # fmt: skip
