"""A mini LLaVA on the mini CLIP's eyes: `LlavaForConditionalGeneration`, trained in LLaVA's two stages."""

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPModel,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vlmclassifier.plane_figures.texts import Text, dialogue
from vlmclassifier.pretraining.language import batches, collate, encode, next_token_loss
from vlmclassifier.pretraining.optimisation import Optimisation, one_core_threads
from vlmclassifier.pretraining.pictures import Pictures, augment, keyed_generator
from vlmclassifier.pretraining.recipes import VlmRecipe
from vlmclassifier.prompts import WORDINGS

FEATURE_BATCH = 512


def build_llava(
    clip: CLIPModel, lm: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> LlavaForConditionalGeneration:
    """The two models joined by an untrained 2-layer projector on the second-to-last layer's patches."""
    vision = clip.config.vision_config
    # Where the parts were loaded from is no part of the model.
    parts = {"vision_config": vision.to_dict(), "text_config": lm.config.to_dict()}
    for part in parts.values():
        part.pop("_name_or_path", None)
    config = LlavaConfig(
        **parts, image_token_index=tokenizer.image_token_id,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2, vision_feature_layer=-2,
        vision_feature_select_strategy="default", tie_word_embeddings=True,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(clip.vision_model.state_dict())
    model.model.language_model.load_state_dict(lm.model.state_dict())
    model.tie_weights()
    return model


def build_processor(
    model: LlavaForConditionalGeneration, images: CLIPImageProcessor, tokenizer: PreTrainedTokenizerFast
) -> LlavaProcessor:
    """LLaVA's own processor, which puts as many image tokens into the prompt as there are patches."""
    return LlavaProcessor(
        images, tokenizer, patch_size=model.config.vision_config.patch_size,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip


def view_features(model: LlavaForConditionalGeneration, pictures: Pictures, views: int, seed: int) -> Tensor:
    """What the frozen tower gives the projector, once for all: [views, pictures, patches, width].

    The first view is the picture itself, the others are augmented.
    """

    @torch.inference_mode()
    def see(job: tuple[int, Tensor]) -> Tensor:
        view, rows = job
        pixel_values = pictures.values(rows)
        if view:
            pixel_values = augment(pixel_values, keyed_generator(f"view:{seed}:{view}:{int(rows[0])}"))
        hidden = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states[-2]
        return hidden[:, 1:]  # without the class token

    parts = torch.arange(len(pictures.labels)).split(FEATURE_BATCH)
    with one_core_threads() as pool:
        found = list(pool.map(see, [(view, rows) for view in range(views) for rows in parts]))
    return torch.cat(found).unflatten(0, (views, -1))


class Rows:
    """Encoded texts and the features of their pictures; repeated mentions of a picture take turns in its views."""

    def __init__(
        self, texts: Sequence[Text], places: Mapping[str, int], tokenizer: PreTrainedTokenizerFast, features: Tensor
    ) -> None:
        image, (views, _, patches, _) = tokenizer.image_token_id, features.shape
        self.features, self.encoded, mentions = features, [], Counter()
        self.places: list[tuple[int, int] | None] = []  # view and picture
        for text, (ids, given) in zip(texts, encode(texts, tokenizer), strict=True):
            self.places.append(None)
            if text.image is not None:  # one image token in the template, one for each patch in the model
                at = ids.index(image)
                ids, given = ids[:at] + [image] * patches + ids[at + 1 :], given + patches - 1
                self.places[-1] = (mentions[text.image] % views, places[text.image])
                mentions[text.image] += 1
            self.encoded.append((ids, given))
        self.predicted = [len(ids) - given for ids, given in self.encoded]

    def seen(self, part: Sequence[int]) -> Tensor | None:
        """Features of the pictures of some rows, [pictures, patches, width], or None where no row has one."""
        places = [self.places[row] for row in part if self.places[row] is not None]
        if not places:
            return None
        views, pictures = zip(*places, strict=True)
        return self.features[list(views), list(pictures)]


def train_stage(
    model: LlavaForConditionalGeneration, rows: Rows, stage: str, recipe: VlmRecipe, seed: int
) -> list[float]:
    """Stage "pretrain" trains the projector alone, "instruct" the language model too; returns the loss per token."""
    inner, head, image = model.model, model.lm_head, model.config.image_token_id
    model.requires_grad_(False)
    first = stage == "pretrain"
    trained = [inner.multi_modal_projector, *([] if first else [inner.language_model, head])]
    for module in trained:
        module.requires_grad_(True)
    steps = recipe.first_steps if first else recipe.steps
    rates = (recipe.first_rate, recipe.first_rate) if first else (recipe.matrix_rate, recipe.other_rate)
    optimisation = Optimisation(trained, *rates)
    order = batches([len(ids) for ids, _ in rows.encoded], recipe.batch, steps, seed)
    pad = model.config.text_config.pad_token_id

    def loss_of(part: Sequence[int]) -> Tensor:
        input_ids, labels = collate([rows.encoded[row] for row in part], pad)  # [rows, tokens]
        embeds = inner.language_model.embed_tokens(input_ids)  # [rows, tokens, width]
        seen = rows.seen(part)
        if seen is not None:
            embeds = embeds.masked_scatter((input_ids == image)[..., None], inner.multi_modal_projector(seen))
        hidden_states = inner.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        return next_token_loss(hidden_states, labels, head)

    def step(number: int) -> float:
        return optimisation.summed_step(loss_of, order[number], rows.predicted)

    losses = optimisation.run(step, steps, f"LLaVA, {stage}")
    model.requires_grad_(True)
    return losses


@torch.inference_mode()
def share_of_replies_with_a_name(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, pictures: Pictures, names: Sequence[str],
    count: int = 256,
) -> float:  # fmt: skip
    """The share of answers to the base question that name any class, on `count` train pictures of any classes."""
    rows = torch.randperm(len(pictures.labels), generator=torch.Generator().manual_seed(0))[:count]
    prompt = dialogue(WORDINGS["base"], image=True)
    image_token, patches = processor.image_token, model.config.image_seq_length
    inputs = processor.tokenizer(prompt.replace(image_token, image_token * patches), return_tensors="pt")
    replies = []
    model.eval()
    for part in rows.split(64):
        repeated = {key: value.expand(len(part), -1) for key, value in inputs.items()}
        out = model.generate(**repeated, pixel_values=pictures.values(part), max_new_tokens=16, do_sample=False)
        replies += processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    lower = [name.lower() for name in names]
    return sum(any(name in reply.lower() for name in lower) for reply in replies) / len(replies)
