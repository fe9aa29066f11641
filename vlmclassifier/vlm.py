"""Vision-language models: one class for every transformers image-text model."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from vlmclassifier.devices import resolve_device, resolve_dtype
from vlmclassifier.models import ModelSpec, checkpoint_folder, find_model
from vlmclassifier.prompts import TEMPLATES, THOUGHT, new_tokens
from vlmclassifier.records import ContextError, UserError

GPU_SHARE = 0.8  # of a GPU's free memory for weights; the rest is for activations and the cache


class VLM:
    """A vision-language model with its processor. Made by `load_vlm`."""

    def __init__(self, model: torch.nn.Module, processor: object, spec: ModelSpec) -> None:
        self.model = model.eval()
        self.processor = processor
        self.spec = spec
        self.processor.tokenizer.padding_side = "left"  # new tokens follow the prompt without a gap
        _fill_processor(self.processor, self.model.config)
        _decode_greedily(self.model, self.processor.tokenizer)

    def prompt(self, question: str, chain_of_thought: bool = False) -> str:
        """The whole text for one question in the model's template (paper section 1)."""
        thought = THOUGHT if chain_of_thought else ""
        return TEMPLATES[self.spec.template].format(question=question, thought=thought)

    def prepare(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, Tensor]:
        """Processor output on the CPU: input_ids [batch, tokens], padded on the left, pixel_values and the rest.

        Raises UserError when a row holds no image token: the picture would be dropped without a word.
        """
        inputs = self.processor(images=list(images), text=list(prompts), padding=True, return_tensors="pt")
        image_token = getattr(self.model.config, "image_token_id", None)
        if image_token is not None and not (inputs["input_ids"] == image_token).any(dim=1).all():
            raise UserError(
                f"The processor of {self.spec.key} puts no image token into the prompt: its tokenizer or "
                "processor_config.json does not belong to this checkpoint."
            )
        return inputs

    @torch.inference_mode()
    def generate(self, inputs: dict[str, Tensor], max_new_tokens: int = 64) -> list[str]:
        """Greedy answers to what `prepare` made, without the prompt and cut at the first end token."""
        inputs = {key: self._to_device(value) for key, value in inputs.items()}
        length = inputs["input_ids"].shape[1]
        sequences = self.model.generate(**inputs, max_new_tokens=max_new_tokens)
        if not torch.equal(sequences[:, :length], inputs["input_ids"]):
            raise RuntimeError(f"{type(self.model).__name__}.generate does not return the prompt before the answer")
        return [self._decode(row) for row in sequences[:, length:].tolist()]  # [batch, <= max_new_tokens]

    def ask(self, image: Image.Image, question: str, chain_of_thought: bool = False) -> str:
        """The answer to one question about one picture: 64 new tokens, 512 with chain of thought (paper section 1)."""
        inputs = self.prepare([image], [self.prompt(question, chain_of_thought)])
        return self.generate(inputs, new_tokens(chain_of_thought))[0].strip()

    def check_context(self, prompts: Sequence[str], max_new_tokens: int) -> None:
        """Raise ContextError when the longest prompt and its answer do not fit into the language model's positions."""
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        blank = Image.new("RGB", (224, 224))
        length = max(self.prepare([blank], [prompt])["input_ids"].shape[1] for prompt in prompts)
        if context is not None and length + max_new_tokens > context:
            raise ContextError(
                f"The longest prompt has {length} tokens and the answer up to {max_new_tokens}, but the context of "
                f"{self.spec.key} is {context}: this cell is N/A; lower --candidates or --max-new-tokens."
            )

    def _decode(self, tokens: list[int]) -> str:
        ends = self.model.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
        return self.processor.tokenizer.decode(tokens[:end], skip_special_tokens=True)

    def _to_device(self, value: Tensor) -> Tensor:
        value = value.to(self.model.device)
        return value.to(self.model.dtype) if value.is_floating_point() else value


def load_vlm(model: str, weights: str | Path | None = None, device: str = "auto", dtype: str = "auto") -> VLM:
    """Load a registered model (`models.MODELS`) from a local folder, paths.toml or the hub.

    `dtype` "auto" is bfloat16 on a GPU and float32 on the CPU. A model that is larger than one GPU is spread over all
    GPUs. Raises UserError when the checkpoint is missing, unsafe, incomplete or out of reach.
    """
    spec = find_model(model, "vlm")
    folder = checkpoint_folder(spec, Path(weights) if weights else None)
    place = torch.device(resolve_device(device))
    torch_dtype = getattr(torch, resolve_dtype(dtype, str(place)))
    try:
        network, info = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=torch_dtype,
            device_map=_device_map(folder, place),
            use_safetensors=True,
            output_loading_info=True,
        )
        processor = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"The checkpoint {folder} of {spec.key} cannot be loaded ({first_line}): save it again."
        ) from error
    if network.config.model_type != spec.architecture:
        raise UserError(
            f"The checkpoint {folder} holds a {network.config.model_type} model, but {spec.key} is of type "
            f"{spec.architecture}: mend --weights, --model or paths.toml."
        )
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise UserError(
            f"The checkpoint {folder} does not fit {spec.key}: {len(names)} weights such as {names[0]} are missing and "
            "would be random."
        )
    return VLM(network, processor, spec)


def _device_map(folder: Path, place: torch.device) -> str | dict[str, torch.device]:
    """One device where the weights fit, else all GPUs ("auto" of accelerate), unless a launcher deals out the GPUs."""
    if place.type != "cuda" or torch.cuda.device_count() == 1 or "LOCAL_RANK" in os.environ:
        return {"": place}
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    free, _ = torch.cuda.mem_get_info(place)
    return {"": place} if size < GPU_SHARE * free else "auto"


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
