"""A mini LLaVA: `LlavaForConditionalGeneration` on the mini CLIP's vision encoder, trained in LLaVA's two stages."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPModel,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vlmclassifier.mini.corpus import Text, chat_prompt
from vlmclassifier.mini.language import collate, encode, length_batches, next_token_loss
from vlmclassifier.mini.optimisation import Optimisation, one_core_threads
from vlmclassifier.mini.recipes import VlmRecipe
from vlmclassifier.mini.training_images import TrainingImages, augment, keyed_generator
from vlmclassifier.prompts import WORDINGS

FEATURE_BATCH = 512  # images
REPLY_BATCH = 64  # images


def build_llava(
    clip: CLIPModel, lm: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> LlavaForConditionalGeneration:
    """Join CLIP's vision encoder and a language model by an untrained 2-layer projector.

    The projector's input are the patch features of the vision encoder's second-to-last layer.
    """
    vision = clip.config.vision_config
    vision_config, text_config = vision.to_dict(), lm.config.to_dict()
    for config in (vision_config, text_config):
        config.pop("_name_or_path", None)  # the folder of the part must not be recorded in the new checkpoint
    config = LlavaConfig(
        vision_config=vision_config, text_config=text_config, image_token_index=tokenizer.image_token_id,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2, vision_feature_layer=-2,
        vision_feature_select_strategy="default", tie_word_embeddings=True,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(clip.vision_model.state_dict())
    model.model.language_model.load_state_dict(lm.model.state_dict())
    model.tie_weights()
    return model


def build_processor(
    model: LlavaForConditionalGeneration, image_processor: CLIPImageProcessor, tokenizer: PreTrainedTokenizerFast
) -> LlavaProcessor:
    """Return LLaVA's own processor, which expands the image token of a prompt to one token for each patch."""
    return LlavaProcessor(
        image_processor, tokenizer, patch_size=model.config.vision_config.patch_size,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip


def view_features(model: LlavaForConditionalGeneration, images: TrainingImages, views: int, seed: int) -> Tensor:
    """Compute the projector's inputs once, with the frozen vision encoder: [views, images, patches, width].

    The first view is the image itself; the others are augmented.
    """

    @torch.inference_mode()
    def encode_view(job: tuple[int, Tensor]) -> Tensor:
        view, rows = job
        pixel_values = images.pixel_values(rows)
        if view > 0:
            pixel_values = augment(pixel_values, keyed_generator(f"view:{seed}:{view}:{int(rows[0])}"))
        hidden_states = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states[-2]
        return hidden_states[:, 1:]  # without the class token

    jobs = []
    for view in range(views):
        for rows in torch.arange(len(images.labels)).split(FEATURE_BATCH):
            jobs.append((view, rows))
    with one_core_threads() as pool:
        features = list(pool.map(encode_view, jobs))
    return torch.cat(features).unflatten(0, (views, -1))


class EncodedTexts:
    """The token ids of some texts and the features of their images.

    An image that several texts are about is used in its views one after the other.
    """

    def __init__(
        self, texts: Sequence[Text], image_rows: Mapping[str, int], tokenizer: PreTrainedTokenizerFast,
        features: Tensor, image_tokens: int | None = None,
    ) -> None:  # fmt: skip
        """`image_rows`: image id -> its index in `features`, [views, images, patches, width].

        `image_tokens`: how many of them stand before a prompt; default: one for each patch, where its image token is.
        """
        image_token = tokenizer.image_token_id
        views, _, patches, _ = features.shape
        self.features = features
        self.rows: list[tuple[list[int], int]] = []  # token ids, number of prompt tokens
        self.view_and_image: list[tuple[int, int] | None] = []  # indices into `features`; None without an image
        uses: Counter[str] = Counter()
        for text, (ids, prompt_length) in zip(texts, encode(texts, tokenizer), strict=True):
            if text.image is None:
                self.view_and_image.append(None)
            else:  # the template has one image token, the model needs one for each patch
                if image_tokens:
                    ids, prompt_length = [image_token] * image_tokens + ids, prompt_length + image_tokens
                else:
                    position = ids.index(image_token)
                    ids = ids[:position] + [image_token] * patches + ids[position + 1 :]
                    prompt_length += patches - 1
                self.view_and_image.append((uses[text.image] % views, image_rows[text.image]))
                uses[text.image] += 1
            self.rows.append((ids, prompt_length))
        self.predicted_tokens = [len(ids) - prompt_length for ids, prompt_length in self.rows]

    def image_features(self, part: Sequence[int]) -> Tensor | None:
        """Return the image features of some rows, [images, patches, width], or None when no row has an image."""
        views, images = [], []
        for row in part:
            indices = self.view_and_image[row]
            if indices is not None:
                views.append(indices[0])
                images.append(indices[1])
        return self.features[views, images] if images else None


class Trainable(NamedTuple):
    """The parts of a vision-language model whose image features are computed once."""

    project: Callable[[Tensor], Tensor]  # features of the vision encoder -> embeddings [images, image tokens, width]
    projectors: Sequence[nn.Module]
    language_model: nn.Module
    lm_head: nn.Linear
    image_token: int
    pad: int
    name: str  # of the progress bar


def trainable(model: LlavaForConditionalGeneration) -> Trainable:
    """The parts of a LLaVA."""
    base = model.model
    return Trainable(base.multi_modal_projector, [base.multi_modal_projector], base.language_model, model.lm_head,
                     model.config.image_token_id, model.config.text_config.pad_token_id, "LLaVA")  # fmt: skip


def train_stage(
    model: nn.Module, parts: Trainable, texts: EncodedTexts, stage: str, recipe: VlmRecipe, seed: int
) -> list[float]:  # fmt: skip
    """Train one stage and return the loss per predicted token of every step.

    `stage`: "pretrain" trains the projector only, "instruct" the language model, too.
    """
    model.requires_grad_(False)
    if stage == "pretrain":
        trained_modules = list(parts.projectors)
        steps, muon_lr, adamw_lr = recipe.pretrain_steps, recipe.pretrain_lr, recipe.pretrain_lr
    else:
        trained_modules = [*parts.projectors, parts.language_model, parts.lm_head]
        steps, muon_lr, adamw_lr = recipe.steps, recipe.muon_lr, recipe.adamw_lr
    for module in trained_modules:
        module.requires_grad_(True)
    optimisation = Optimisation(trained_modules, muon_lr, adamw_lr)
    batches = length_batches([len(ids) for ids, _ in texts.rows], recipe.batch, steps, seed)

    def summed_loss(part: Sequence[int]) -> Tensor:
        input_ids, labels = collate([texts.rows[row] for row in part], parts.pad)  # [rows, tokens]
        embeds = parts.language_model.embed_tokens(input_ids)  # [rows, tokens, width]
        features = texts.image_features(part)
        if features is not None:
            is_image = (input_ids == parts.image_token)[..., None]  # [rows, tokens, 1]
            embeds = embeds.masked_scatter(is_image, parts.project(features))
        hidden_states = parts.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        return next_token_loss(hidden_states, labels, parts.lm_head)

    def step(number: int) -> float:
        return optimisation.backward_batch(summed_loss, batches[number], texts.predicted_tokens)

    losses = optimisation.run(step, steps, f"{parts.name}, {stage}")
    model.requires_grad_(True)
    return losses


@torch.inference_mode()
def share_of_replies_with_a_name(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, images: TrainingImages, names: Sequence[str],
    count: int = 256,
) -> float:  # fmt: skip
    """Return the share (0 to 1) of replies that contain any class name.

    The model answers the base question for `count` train images.
    """
    rows = torch.randperm(len(images.labels), generator=torch.Generator().manual_seed(0))[:count]
    prompt = chat_prompt(WORDINGS["base"], image=True)
    image_token, patches = processor.image_token, model.config.image_seq_length
    inputs = processor.tokenizer(prompt.replace(image_token, image_token * patches), return_tensors="pt")
    prompt_length = inputs["input_ids"].shape[1]
    replies = []
    model.eval()
    for part in rows.split(REPLY_BATCH):
        batch = {key: value.expand(len(part), -1) for key, value in inputs.items()}
        out = model.generate(**batch, pixel_values=images.pixel_values(part), max_new_tokens=16, do_sample=False)
        replies += processor.batch_decode(out[:, prompt_length:], skip_special_tokens=True)
    lowercase_names = [name.lower() for name in names]
    replies_with_a_name = 0
    for reply in replies:
        if any(name in reply.lower() for name in lowercase_names):
            replies_with_a_name += 1
    return replies_with_a_name / len(replies)
