"""A vision-language model with its processor: prompts, batches, greedy decoding, image features, context length."""

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from vlmclassifier.devices import BatchSplitter
from vlmclassifier.finite import check_finite
from vlmclassifier.images import UNPROCESSABLE, as_images, check_each, crop_elongated, pad_square
from vlmclassifier.models import ModelSpec
from vlmclassifier.prompts import TEMPLATES, THOUGHT, default_new_tokens
from vlmclassifier.records import ContextError, UserError
from vlmclassifier.thoughts import MARKS, SWITCHES, opened_by

DEFAULT_SIZE = (224, 224)  # width and height in pixels of a blank image, used where the image size has no effect
TEST_SIZES = (DEFAULT_SIZE, (1000, 300), (1000, 1000))  # sizes for testing whether the number of tokens depends on it


@dataclass(frozen=True)
class Batch:
    """Images, prompts, and the processor's output for them. The images are kept because the batch may be split."""

    images: list[Image.Image]
    prompts: list[str]
    inputs: dict[str, Tensor]  # on the CPU: input_ids [batch, tokens] with left padding, pixel_values, ...

    def __len__(self) -> int:
        return len(self.prompts)


class FiniteLogits(LogitsProcessor):
    """Looks at the logits of every new token, without waiting for the device; `check` raises at the end."""

    def __init__(self) -> None:
        self.checked: Tensor | None = None  # [batch] 0, or NaN for a row with a logit that was not finite

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Note the logits [batch, vocabulary] and return them unchanged."""
        # The largest is NaN where any logit is NaN. A single -inf is a token that cannot follow, not an error.
        zero_or_nan = 0 * scores.float().amax(dim=-1)  # [batch]
        self.checked = zero_or_nan if self.checked is None else self.checked + zero_or_nan
        return scores

    def check(self, dtype: torch.dtype) -> None:
        """Raise NotFiniteError where a logit was not finite."""
        check_finite(self.checked[:, None], "A logit of the answer", dtype)


class VLM:
    """A vision-language model with its processor. Use `load_vlm` to create one."""

    def __init__(self, model: torch.nn.Module, processor: object, spec: ModelSpec) -> None:
        self.model = model.eval()
        self.processor = processor
        self.spec = spec
        self.pads_square = False  # whether images are padded to squares, as by LLaVA's own code
        self._splitter = BatchSplitter()
        self._features_are_separable = True  # whether the features of several images can be split by image
        self.processor.tokenizer.padding_side = "left"  # so that new tokens directly follow the prompt
        # The marks of a thought, or parts of them, are special tokens in some models: answers keep them, so that the
        # thought can be told apart.
        marks = "\n".join(part for pair in MARKS for part in pair)
        added = self.processor.tokenizer.added_tokens_decoder
        self._special_ids = {number for number, token in added.items() if token.special and token.content not in marks}
        image_processor = self.processor.image_processor
        # LLaVA-NeXT's crops only the tiles that it has cut the whole image into.
        self._crops_centre = getattr(image_processor, "do_center_crop", None) and not hasattr(
            image_processor, "image_grid_pinpoints"
        )
        _complete_processor(self.processor, self.model.config)
        _set_greedy_decoding(self.model, self.processor.tokenizer)

    def prompt(self, question: str, chain_of_thought: bool = False, image: bool = True) -> str:
        """The whole prompt for one question, by the paper's template or else the processor's chat template.

        Thoughts are switched off where the chat template has a switch.

        The sentence for chain of thought begins the answer if the paper's template does so, else it ends the question
        (paper, section 2). With `image=False` the image placeholder and the newline after it are left out (paper,
        section 3.1). Raises UserError when the chat template does not render the question.
        """
        thought = THOUGHT if chain_of_thought else ""
        if not question and self.spec.template is not None:  # a caption follows the image
            return "<image>\n" if image and "<image>" in TEMPLATES[self.spec.template] else ""
        if self.spec.template is not None:
            text = TEMPLATES[self.spec.template].format(question=question, thought=thought)
            return text if image else text.replace("<image>\n", "").replace("<image>", "")
        content = [{"type": "image"}] if image else []
        content.append({"type": "text", "text": question + thought})
        template = str(self.processor.chat_template)
        switches = {name: False for name in SWITCHES if re.search(rf"\b{name}\b", template)}
        messages = [{"role": "user", "content": content}]
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True, **switches)
        if (question + thought).strip() not in text:
            raise UserError(
                f"The chat template of {self.spec.key} leaves out the question: it may read the content of a message "
                "as plain text; use a chat_template.jinja that renders content blocks of the type text."
            )
        return text

    def prompt_suffix(self, prompt: str) -> str:
        """The text that the processor appends to a prompt: PaliGemma's appends a newline.

        Raises UserError for any other change of the end of the prompt.
        """
        ids = self.process([Image.new("RGB", (64, 64))], [prompt])["input_ids"][0].tolist()
        for suffix in ("", "\n"):
            last_ids = self.processor.tokenizer(prompt + suffix)["input_ids"][-4:]
            if ids[-len(last_ids) :] == last_ids:
                return suffix
        raise UserError(
            f"The processor of {self.spec.key} changes the end of the prompt {prompt[-40:]!r}, so that an answer "
            "cannot continue it: use another prompt or --answer-prefix."
        )

    def resize_images(self, size: int | None) -> None:
        """Let BLIP-2 or InstructBLIP read larger images, with interpolated position embeddings (paper, section 4).

        `size`: side in pixels; None changes nothing. Raises UserError for another model, and for a side that its
        patches do not divide.
        """
        if size is None:
            return
        patch = self.model.config.vision_config.patch_size
        if not self._is_blip() or size % patch:
            raise UserError(
                f"{self.spec.key} cannot read images of {size} pixels: only BLIP-2 and InstructBLIP can, of a multiple "
                f"of {patch} pixels."
            )
        processor = self.processor.image_processor
        processor.size = type(processor.size)(height=size, width=size)

        def interpolate(module: torch.nn.Module, arguments: tuple, options: dict) -> tuple[tuple, dict]:
            return arguments, options | {"interpolate_pos_encoding": True}

        self.model.vision_model.register_forward_pre_hook(interpolate, with_kwargs=True)

    @property
    def logits_dtype(self) -> torch.dtype:
        """The dtype of the logits. BLIP-2 keeps other parts in float32 when its language model is in float16."""
        return self.model.get_output_embeddings().weight.dtype

    @property
    def opens_thought(self) -> bool:
        """Whether the chat template opens a thought although it is asked not to: a thinking model without a switch."""
        return opened_by(self.prompt("What?")) is not None

    def prepare(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Batch:
        """A batch for `generate`.

        Raises UserError when a row has no image token (the image would be ignored), and RowError for an image that the
        processor refuses.
        """
        images = [crop_elongated(image) for image in images] if self._crops_centre else list(images)
        try:
            return Batch(images, list(prompts), self.process(images, prompts))
        except UNPROCESSABLE:
            check_each(images, lambda row: self.process(images[row : row + 1], prompts[row : row + 1]))
            raise

    def process(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, Tensor]:
        """The processor's output on the CPU: input_ids [batch, tokens] with left padding, pixel_values, ...

        Raises UserError when a row has no image token.
        """
        if self.pads_square:
            images = [pad_square(image, self.processor.image_processor.image_mean) for image in images]
        bos_token = self.processor.tokenizer.bos_token
        # A chat template contains the begin token itself; the tokenizer would add a second one.
        options = {}
        if bos_token and prompts[0].startswith(bos_token):
            options["add_special_tokens"] = False
        inputs = self.processor(
            images=[[image] for image in images], text=list(prompts), padding=True, return_tensors="pt", **options
        )
        inputs.pop("labels", None)  # PaliGemma's processor always returns them
        if "qformer_input_ids" in inputs:
            # The processor pads them on the left, and the Q-Former would read the padding.
            question = self.processor.qformer_tokenizer(
                list(prompts), padding=True, padding_side="right", return_tensors="pt"
            )
            inputs["qformer_input_ids"] = question["input_ids"]  # [batch, question tokens]
            inputs["qformer_attention_mask"] = question["attention_mask"]  # [batch, question tokens]
        image_token_id = getattr(self.model.config, "image_token_id", None)
        if image_token_id is not None and not (inputs["input_ids"] == image_token_id).any(dim=1).all():
            raise UserError(
                f"The processor of {self.spec.key} puts no image token into the prompt: its tokenizer or "
                "processor_config.json does not belong to this checkpoint; save or download the processor again."
            )
        return inputs

    def generate(
        self, batch: Batch, max_new_tokens: int = 64, image_features: Sequence[Any] | None = None
    ) -> list[str]:  # fmt: skip
        """The answers by greedy decoding, without the prompt and up to the first end token.

        A batch that does not fit into the device's memory is split. `image_features`: one item of `encode_images` per
        row, so that the images are not encoded again. Raises ContextError when a prompt and its answer exceed the
        context, and UserError when a single row does not fit into the memory.
        """

        def generate_part(part: slice) -> list[str]:
            features = None if image_features is None else image_features[part]
            if part == slice(0, len(batch)):
                return self._generate(batch.inputs, max_new_tokens, features)
            return self._generate(self.process(batch.images[part], batch.prompts[part]), max_new_tokens, features)

        return self._splitter.run(generate_part, len(batch))

    def generate_text(self, inputs: dict[str, Tensor], max_new_tokens: int = 64) -> list[str]:
        """The answers to prompts without images, as `finetuning.collator.Collator.text_inputs` encodes them."""
        return self._generate(inputs, max_new_tokens, None)

    @torch.inference_mode()
    def _generate(
        self, inputs: dict[str, Tensor], max_new_tokens: int, image_features: Sequence[Any] | None
    ) -> list[str]:  # fmt: skip
        self._check_length(int(inputs["attention_mask"].sum(dim=1).max()), max_new_tokens)
        if "qformer_attention_mask" in inputs:
            self._check_qformer_length(inputs["qformer_attention_mask"].shape[1])
        inputs = self.to_device(inputs)
        length = inputs["input_ids"].shape[1]
        finite = FiniteLogits()
        options = {"max_new_tokens": max_new_tokens, "logits_processor": [finite]}
        if image_features is not None:
            del inputs["pixel_values"]
            features = join_features(image_features)
            if self._is_blip():
                new_tokens = self._generate_blip(inputs, features, options)  # [batch, new tokens]
                finite.check(self.logits_dtype)
                return [self._decode(row) for row in new_tokens.tolist()]
            inputs["mm_encoder_outputs"] = {"image": features}
        sequences = self.model.generate(**inputs, **options)  # [batch, tokens + new tokens]
        finite.check(self.logits_dtype)
        if not torch.equal(sequences[:, :length], inputs["input_ids"]):
            raise RuntimeError(f"{type(self.model).__name__}.generate does not return the prompt before the answer")
        return [self._decode(row) for row in sequences[:, length:].tolist()]

    def encode_images(self, images: Sequence[Image.Image], prompt: str) -> list[Any] | None:
        """The image features that the language model receives, one item per image, for several questions about each.

        The images are encoded together if the features can be split by image, else one by one. A batch that does not
        fit into the device's memory is split. None if the features depend on the question (InstructBLIP), or if the
        installed version of transformers does not accept precomputed features. Raises UserError when a single image
        does not fit into the memory.
        """
        if not self._features_are_reusable():
            return None
        return self._splitter.run(lambda part: self._encode_images(images[part], prompt), len(images))

    def _encode_images(self, images: Sequence[Image.Image], prompt: str) -> list[Any]:
        if self._features_are_separable and len(images) > 1:
            features = split_features(self.image_features(self.process(images, [prompt] * len(images))), len(images))
            if features is not None:
                return features
            self._features_are_separable = False  # one tensor with the tiles of all images: later images one by one
        return [self.image_features(self.process([image], [prompt])) for image in images]

    @torch.inference_mode()
    def image_features(self, inputs: dict[str, Tensor]) -> Any | None:
        """The image features that the language model receives, for the output of `process`.

        None in the same cases as in `encode_images`.
        """
        if not self._features_are_reusable():
            return None
        base = self.model if self._is_blip() else self.model.base_model
        parameters = inspect.signature(base.get_image_features).parameters
        image_inputs = {key: value for key, value in inputs.items() if key in parameters}
        return base.get_image_features(**self.to_device(image_inputs), return_dict=True)

    def _features_are_reusable(self) -> bool:
        accepts_features = "mm_encoder_outputs" in inspect.signature(self.model.forward).parameters
        return accepts_features and not hasattr(self.processor, "qformer_tokenizer")

    def ask(self, image: Image.Image | str | Path, question: str, chain_of_thought: bool = False) -> str:
        """The answer to one question about one image or file: up to 64 new tokens, 512 with chain of thought.

        These limits are the paper's (paper, section 2). Raises ContextError and UserError like `generate`.
        """
        return self.ask_all(image, [question], chain_of_thought)[0]

    def ask_all(
        self, image: Image.Image | str | Path, questions: Sequence[str], chain_of_thought: bool = False
    ) -> list[str]:  # fmt: skip
        """The answers to several questions about one image, which is encoded once; the same answers as by `ask`."""
        if not questions or not all(isinstance(question, str) for question in questions):
            raise UserError("A question is a text: give one, or a list of texts to ask_all.")
        (image,) = as_images(image)
        prompts = [self.prompt(question, chain_of_thought) for question in questions]
        image_features = None
        if len(prompts) > 1:
            encoded = self.encode_images([image], prompts[0])
            if encoded is not None:
                image_features = encoded * len(prompts)  # the same item for every row
        batch = self.prepare([image] * len(prompts), prompts)
        answers = self.generate(batch, default_new_tokens(chain_of_thought), image_features)
        return [answer.strip() for answer in answers]

    def image_size_matters(self, prompt: str) -> bool:
        """Whether the number of image tokens depends on the image size."""
        return len({self._length(Image.new("RGB", size), prompt) for size in TEST_SIZES}) > 1

    def check_context(self, prompts: Sequence[str], max_new_tokens: int, sizes: Sequence[tuple[int, int]] = ()) -> None:
        """Raise ContextError when the longest prompt and its answer exceed the context of the language model.

        `sizes`: widths and heights of the images in pixels, of which those that may have the most tokens are tried;
        empty if the number of tokens does not depend on the size. InstructBLIP's Q-Former reads the question too and
        has its own limit.
        """
        self._check_length(self.longest_prompt_length(prompts, sizes), max_new_tokens)
        if hasattr(self.processor, "qformer_tokenizer"):
            token_ids = self.processor.qformer_tokenizer(list(prompts))["input_ids"]
            self._check_qformer_length(max(len(ids) for ids in token_ids))

    def longest_prompt_length(self, prompts: Sequence[str], sizes: Sequence[tuple[int, int]] = ()) -> int:
        """The number of tokens, image tokens included, of the longest prompt with the image that has the most tokens.

        `sizes`: widths and heights of the images in pixels.
        """
        longest = max(prompts, key=lambda prompt: self._length(Image.new("RGB", DEFAULT_SIZE), prompt))
        sizes = largest_size_per_shape(sizes or (DEFAULT_SIZE,))
        return max(self._length(Image.new("RGB", size), longest) for size in sizes)

    def _length(self, image: Image.Image, prompt: str) -> int:
        """The number of tokens of a prompt with an image."""
        return self.process([image], [prompt])["input_ids"].shape[1]

    def _check_length(self, length: int, max_new_tokens: int) -> None:
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and length + max_new_tokens > context:
            raise ContextError(
                f"The longest prompt has {length} tokens and the answer up to {max_new_tokens}, but the context of "
                f"{self.spec.key} is {context}: this cell is N/A; lower --candidates or --max-new-tokens."
            )

    def _check_qformer_length(self, length: int) -> None:
        limit = self.model.config.qformer_config.max_position_embeddings
        if length > limit:
            raise ContextError(
                f"The longest prompt has {length} tokens for the Q-Former of {self.spec.key}, whose context is "
                f"{limit}: this cell is N/A; lower --candidates."
            )

    def _is_blip(self) -> bool:
        return hasattr(self.model, "qformer")

    def _generate_blip(self, inputs: dict[str, Tensor], features: Any, options: dict[str, Any]) -> Tensor:
        """New tokens [batch, new tokens] of BLIP-2 for precomputed image features.

        BLIP-2's own `generate` requires pixel values, so its language model is called with the same embeddings.
        """
        embeds = self.model.get_input_embeddings()(inputs["input_ids"])  # [batch, tokens, width]
        is_image_token = (inputs["input_ids"] == self.model.config.image_token_id)[..., None]  # [batch, tokens, 1]
        embeds = embeds.masked_scatter(is_image_token, features.pooler_output.to(embeds.dtype))
        return self.model.language_model.generate(
            inputs_embeds=embeds, attention_mask=inputs["attention_mask"], **options
        )

    def _decode(self, tokens: list[int]) -> str:
        """The text of new tokens up to the first end token."""
        ends, tokenizer = end_tokens(self.model.generation_config.eos_token_id), self.processor.tokenizer
        length = 0
        while length < len(tokens) and tokens[length] not in ends:
            length += 1
        return tokenizer.decode([token for token in tokens[:length] if token not in self._special_ids])

    def to_device(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inputs on the model's device; floating-point tensors are converted to the model's dtype."""
        moved = {}
        for key, value in inputs.items():
            value = value.to(self.model.device)
            moved[key] = value.to(self.model.dtype) if value.is_floating_point() else value
        return moved


def join_features(features: Sequence[Any]) -> Any:
    """The image features of several rows, joined to those of one batch."""
    first = features[0]
    batch = type(first)(pooler_output=_join_rows([row.pooler_output for row in features]))
    if getattr(first, "deepstack_features", None) is not None:  # of Qwen3-VL: one item per layer
        batch.deepstack_features = []
        for layer in range(len(first.deepstack_features)):
            batch.deepstack_features.append(_join_rows([row.deepstack_features[layer] for row in features]))
    return batch


def _join_rows(rows: Sequence[Any]) -> Any:
    """Join the features of rows, each a tensor [1 or tiles, ...] or a list with one tensor per image."""
    if isinstance(rows[0], Tensor):
        return torch.cat(list(rows))
    joined = []
    for tensors in rows:
        joined.extend(tensors)
    return joined


def split_features(features: Any, count: int) -> list[Any] | None:
    """The inverse of `join_features` for `count` images; None if one tensor contains the tiles of several images."""
    layers = getattr(features, "deepstack_features", None) or []
    if any(len(values) != count for values in (features.pooler_output, *layers)):
        return None
    rows = []
    for index in range(count):
        part = slice(index, index + 1)
        row = type(features)(pooler_output=features.pooler_output[part])
        if layers:
            row.deepstack_features = [layer[part] for layer in layers]
        rows.append(row)
    return rows


def largest_size_per_shape(sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The largest image size (width, height) of every aspect ratio: those that can have the most tokens."""
    largest: dict[float, tuple[int, int]] = {}
    for size in sizes:
        # Rounded to steps of 7%: the numbers of tiles and patches depend on the aspect ratio.
        aspect_ratio = round(math.log2(size[0] / size[1]), 1)
        largest[aspect_ratio] = max(largest.get(aspect_ratio, size), size, key=math.prod)
    return sorted(largest.values())


def end_tokens(*sources: int | Sequence[int] | None) -> list[int]:
    """The end tokens of all sources: stored settings, the config and the tokenizer do not always agree."""
    found: set[int] = set()
    for source in sources:
        if source is not None:
            found |= {source} if isinstance(source, int) else set(source)
    return sorted(found)


def _set_greedy_decoding(model: torch.nn.Module, tokenizer: object) -> None:
    """Replace the generation settings stored with a checkpoint; its end tokens are kept, and those of the tokenizer.

    All stored settings are replaced, because `generate` completes a config that is passed to it from the stored one,
    so that sampling or penalties would come back, and because BLIP-2 uses those of its inner language model.
    """
    eos = end_tokens(
        model.generation_config.eos_token_id, model.config.get_text_config().eos_token_id, tokenizer.eos_token_id
    )
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = eos[0] if eos else 0
    greedy = GenerationConfig(
        do_sample=False, num_beams=1, bos_token_id=tokenizer.bos_token_id, eos_token_id=eos or None, pad_token_id=pad
    )
    for module in model.modules():
        if hasattr(module, "generation_config"):
            module.generation_config = greedy


def _complete_processor(processor: object, config: object) -> None:
    """Set what processors of older checkpoints leave to the model's config: otherwise the image is silently ignored."""
    if getattr(processor, "num_query_tokens", 0) is None:
        processor.num_query_tokens = config.num_query_tokens
    if getattr(processor, "patch_size", 0) is None:
        processor.patch_size = config.vision_config.patch_size
    if getattr(processor, "vision_feature_select_strategy", "") is None:
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
