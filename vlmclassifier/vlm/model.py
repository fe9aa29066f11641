"""A vision-language model with its processor: prompts, batches, greedy answers, image features, the context."""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig

from vlmclassifier.models import ModelSpec
from vlmclassifier.prompts import TEMPLATES, THOUGHT, new_tokens
from vlmclassifier.records import ContextError, UserError

BLANK = (224, 224)  # width and height of the picture that stands for all where their size does not matter
SHAPES = (BLANK, (1000, 300), (1000, 1000))  # pictures that take equally many tokens where size does not matter


class VLM:
    """A vision-language model with its processor. Made by `load_vlm`."""

    def __init__(self, model: torch.nn.Module, processor: object, spec: ModelSpec) -> None:
        self.model = model.eval()
        self.processor = processor
        self.spec = spec
        self._mixes_pictures = False
        self.processor.tokenizer.padding_side = "left"  # new tokens follow the prompt without a gap
        _fill_processor(self.processor, self.model.config)
        _decode_greedily(self.model, self.processor.tokenizer)

    def prompt(self, question: str, chain_of_thought: bool = False, picture: bool = True) -> str:
        """The whole text for one question: the paper's template, else the chat template of the model's processor.

        Chain of thought opens the answer where the paper's template does so, else it ends the question (paper
        section 1). Without `picture` its placeholder and the newline behind it are left out (paper section 2).
        """
        thought = THOUGHT if chain_of_thought else ""
        if self.spec.template is not None:
            text = TEMPLATES[self.spec.template].format(question=question, thought=thought)
            return text if picture else text.replace("<image>\n", "").replace("<image>", "")
        content = [{"type": "image"}] * picture + [{"type": "text", "text": question + thought}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def prepare(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, Tensor]:
        """Processor output on the CPU: input_ids [batch, tokens], padded on the left, pixel_values and the rest.

        Raises UserError when a row holds no image token: the picture would be dropped without a word.
        """
        bos = self.processor.tokenizer.bos_token
        # A chat template writes the begin token itself; the tokenizer would add a second one.
        once = {"add_special_tokens": False} if bos and prompts[0].startswith(bos) else {}
        inputs = self.processor(
            images=[[image] for image in images], text=list(prompts), padding=True, return_tensors="pt", **once
        )
        inputs.pop("labels", None)  # PaliGemma's processor makes them in any case
        if "qformer_input_ids" in inputs:  # the processor pads them on the left, where the Q-Former would see them
            read = self.processor.qformer_tokenizer(
                list(prompts), padding=True, padding_side="right", return_tensors="pt"
            )
            inputs["qformer_input_ids"] = read["input_ids"]  # [batch, question tokens]
            inputs["qformer_attention_mask"] = read["attention_mask"]
        image_token = getattr(self.model.config, "image_token_id", None)
        if image_token is not None and not (inputs["input_ids"] == image_token).any(dim=1).all():
            raise UserError(
                f"The processor of {self.spec.key} puts no image token into the prompt: its tokenizer or "
                "processor_config.json does not belong to this checkpoint."
            )
        return inputs

    @torch.inference_mode()
    def generate(
        self, inputs: dict[str, Tensor], max_new_tokens: int = 64, image_features: Sequence[Any] | None = None
    ) -> list[str]:
        """Greedy answers to what `prepare` made, without the prompt and cut at the first end token.

        `image_features`: one of `image_features()` per row; the pictures are then not encoded again. Raises
        ContextError when a row and its answer exceed the context.
        """
        self._check_length(int(inputs["attention_mask"].sum(dim=1).max()), max_new_tokens)
        if "qformer_attention_mask" in inputs:
            self._check_qformer(inputs["qformer_attention_mask"].shape[1])
        inputs = {key: self._to_device(value) for key, value in inputs.items()}
        length = inputs["input_ids"].shape[1]
        if image_features is not None:
            del inputs["pixel_values"]
            seen = joined(image_features)
            if self._is_blip():
                return [self._decode(row) for row in self._generate_blip(inputs, seen, max_new_tokens).tolist()]
            inputs["mm_encoder_outputs"] = {"image": seen}
        sequences = self.model.generate(**inputs, max_new_tokens=max_new_tokens)
        if not torch.equal(sequences[:, :length], inputs["input_ids"]):
            raise RuntimeError(f"{type(self.model).__name__}.generate does not return the prompt before the answer")
        return [self._decode(row) for row in sequences[:, length:].tolist()]  # [batch, <= max_new_tokens]

    @torch.inference_mode()
    def image_features(self, inputs: dict[str, Tensor]) -> Any | None:
        """What the language model is given of ONE picture that `prepare` made, for several questions about it.

        None where it depends on the question (InstructBLIP), and where the installed transformers cannot take it.
        """
        takes = "mm_encoder_outputs" in inspect.signature(self.model.forward).parameters
        if "qformer_input_ids" in inputs or not takes:
            return None
        base = self.model if self._is_blip() else self.model.base_model
        wanted = inspect.signature(base.get_image_features).parameters
        given = {key: self._to_device(value) for key, value in inputs.items() if key in wanted}
        return base.get_image_features(**given, return_dict=True)

    def encode(self, images: Sequence[Image.Image], prompt: str) -> list[Any] | None:
        """`image_features` of several pictures, encoded together where the model keeps them apart; else None."""
        if not self._mixes_pictures:
            whole = self.image_features(self.prepare(images, [prompt] * len(images)))
            if whole is None:
                return None
            apart = split(whole, len(images))
            if apart is not None:
                return apart
            self._mixes_pictures = True  # tiles of several in one tensor: not tried again
        return [self.image_features(self.prepare([image], [prompt])) for image in images]

    def ask(self, image: Image.Image, question: str, chain_of_thought: bool = False) -> str:
        """The answer to one question about one picture: 64 new tokens, 512 with chain of thought (paper section 1)."""
        return self.ask_all(image, [question], chain_of_thought)[0]

    def ask_all(self, image: Image.Image, questions: Sequence[str], chain_of_thought: bool = False) -> list[str]:
        """The answers to several questions about one picture, which is encoded once; as `ask` gives them."""
        prompts = [self.prompt(question, chain_of_thought) for question in questions]
        seen = self.image_features(self.prepare([image], prompts[:1])) if len(prompts) > 1 else None
        inputs = self.prepare([image] * len(prompts), prompts)
        shared = None if seen is None else [seen] * len(prompts)
        return [answer.strip() for answer in self.generate(inputs, new_tokens(chain_of_thought), shared)]

    def image_size_matters(self, prompt: str) -> bool:
        """Whether the number of a picture's tokens depends on its size."""
        return len({self._length(Image.new("RGB", size), prompt) for size in SHAPES}) > 1

    def check_context(self, prompts: Sequence[str], max_new_tokens: int, sizes: Sequence[tuple[int, int]] = ()) -> None:
        """Raise ContextError when the longest prompt and its answer do not fit into the language model's positions.

        `sizes`: width and height of the pictures, of which those that may take most tokens are tried; none where they
        do not matter. InstructBLIP's Q-Former, which reads the question too, has a limit of its own.
        """
        self._check_length(self.longest(prompts, sizes), max_new_tokens)
        if hasattr(self.processor, "qformer_tokenizer"):
            self._check_qformer(max(len(ids) for ids in self.processor.qformer_tokenizer(list(prompts))["input_ids"]))

    def longest(self, prompts: Sequence[str], sizes: Sequence[tuple[int, int]] = ()) -> int:
        """Tokens, those of the picture included, of the longest prompt with the picture that takes most."""
        longest = max(prompts, key=lambda prompt: self._length(Image.new("RGB", BLANK), prompt))
        return max(self._length(Image.new("RGB", size), longest) for size in extremes(sizes or (BLANK,)))

    def _length(self, image: Image.Image, prompt: str) -> int:
        return self.prepare([image], [prompt])["input_ids"].shape[1]

    def _check_length(self, length: int, max_new_tokens: int) -> None:
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and length + max_new_tokens > context:
            raise ContextError(
                f"The longest prompt has {length} tokens and the answer up to {max_new_tokens}, but the context of "
                f"{self.spec.key} is {context}: this cell is N/A; lower --candidates or --max-new-tokens."
            )

    def _check_qformer(self, length: int) -> None:
        limit = self.model.config.qformer_config.max_position_embeddings
        if length > limit:
            raise ContextError(
                f"The longest prompt has {length} tokens for the Q-Former of {self.spec.key}, whose context is "
                f"{limit}: this cell is N/A; lower --candidates."
            )

    def _is_blip(self) -> bool:
        return hasattr(self.model, "qformer")

    def _generate_blip(self, inputs: dict[str, Tensor], seen: Any, max_new_tokens: int) -> Tensor:
        """BLIP-2's own `generate` insists on pixels: its language model continues the same embeddings."""
        embeds = self.model.get_input_embeddings()(inputs["input_ids"])  # [batch, tokens, width]
        places = (inputs["input_ids"] == self.model.config.image_token_id)[..., None]
        embeds = embeds.masked_scatter(places, seen.pooler_output.to(embeds.dtype))
        return self.model.language_model.generate(
            inputs_embeds=embeds, attention_mask=inputs["attention_mask"], max_new_tokens=max_new_tokens
        )

    def _decode(self, tokens: list[int]) -> str:
        ends = self.model.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
        return self.processor.tokenizer.decode(tokens[:end], skip_special_tokens=True)

    def _to_device(self, value: Tensor) -> Tensor:
        value = value.to(self.model.device)
        return value.to(self.model.dtype) if value.is_floating_point() else value


def joined(features: Sequence[Any]) -> Any:
    """The image features of several rows as those of one batch."""

    def join(
        values: Sequence[Any],
    ) -> Any:  # a tensor per picture or for all tiles, or a list with a tensor per picture
        return torch.cat(list(values)) if isinstance(values[0], Tensor) else [t for value in values for t in value]

    first = features[0]
    whole = type(first)(pooler_output=join([one.pooler_output for one in features]))
    if getattr(first, "deepstack_features", None) is not None:  # Qwen3-VL's: the same for every level
        levels = zip(*(one.deepstack_features for one in features), strict=True)
        whole.deepstack_features = [join(level) for level in levels]
    return whole


def split(features: Any, count: int) -> list[Any] | None:
    """The inverse of `joined`: those of each of `count` pictures, or None where tiles of several are in one tensor."""
    levels = getattr(features, "deepstack_features", None) or []
    if any(len(values) != count for values in (features.pooler_output, *levels)):
        return None
    apart = []
    for place in range(count):
        part = slice(place, place + 1)
        apart.append(type(features)(pooler_output=features.pooler_output[part]))
        if levels:
            apart[-1].deepstack_features = [level[part] for level in levels]
    return apart


def extremes(sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Of many picture sizes (width, height) those that can take most tokens: the largest of every shape."""
    largest: dict[float, tuple[int, int]] = {}
    for size in sizes:
        shape = round(math.log2(size[0] / size[1]), 1)  # steps of 7%: tiles and patches follow the shape
        largest[shape] = max(largest.get(shape, size), size, key=math.prod)
    return sorted(largest.values())


def _decode_greedily(model: torch.nn.Module, tokenizer: object) -> None:
    """Replace the generation settings stored with a checkpoint; only its end tokens are kept.

    A config passed to `generate` is filled up from the stored one, so sampling or penalties would come back; and BLIP-2
    generates with the settings of its inner language model.
    """
    stored, text = model.generation_config, model.config.get_text_config()
    ends = next(e for e in (stored.eos_token_id, text.eos_token_id, tokenizer.eos_token_id, []) if e is not None)
    first_end = ends if isinstance(ends, int) else next(iter(ends), 0)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else first_end
    greedy = GenerationConfig(
        do_sample=False, num_beams=1, bos_token_id=tokenizer.bos_token_id, eos_token_id=ends, pad_token_id=pad
    )
    for module in model.modules():
        if hasattr(module, "generation_config"):
            module.generation_config = greedy


def _fill_processor(processor: object, config: object) -> None:
    """Give a processor what older checkpoints leave to the model's config; without it a picture is dropped silently."""
    if getattr(processor, "num_query_tokens", 0) is None:
        processor.num_query_tokens = config.num_query_tokens
    if getattr(processor, "patch_size", 0) is None:
        processor.patch_size = config.vision_config.patch_size
    if getattr(processor, "vision_feature_select_strategy", "") is None:
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
