"""CLIP by open_clip or transformers, SigLIP, a supervised ViT: `encode_images`, `class_features`, `classify`."""

import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from open_clip.pretrained import download_pretrained, get_pretrained_cfg
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vlmclassifier.benchmarks import BENCHMARKS, class_names
from vlmclassifier.devices import resolve_device, resolve_dtype
from vlmclassifier.models import ModelSpec, check_source, find_model, hub_error, local_checkpoint
from vlmclassifier.prompts import CAPTION
from vlmclassifier.records import UserError

TEXT_BATCH = 256
SUPERVISED = "torchvision/"  # how the source of a supervised classifier begins


class CLIP:
    """A contrastive image-text model with its image transform and tokenizer. Made by `load_clip`."""

    def __init__(self, model: torch.nn.Module, transform: Callable, tokenizer: Callable, spec: ModelSpec) -> None:
        self.model = model.eval()
        self.transform = transform
        self.tokenizer = tokenizer
        self.spec = spec
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype

    def prepare(self, images: Sequence[Image.Image]) -> Tensor:
        """Transformed pictures on the CPU: [batch, 3, height, width]."""
        return torch.stack([self.transform(image) for image in images])

    @torch.inference_mode()
    def encode_images(self, images: Sequence[Image.Image] | Tensor) -> Tensor:
        """Unit-length image features [batch, width] in float32, of pictures or of what `prepare` made of them."""
        pixel_values = images if isinstance(images, Tensor) else self.prepare(images)
        features = self._see(pixel_values.to(self.device, self.dtype))  # [batch, width]
        return F.normalize(features.float(), dim=-1)

    def _see(self, pixel_values: Tensor) -> Tensor:
        return self.model.encode_image(pixel_values)

    @torch.inference_mode()
    def class_features(self, names: Sequence[str], caption: str = CAPTION) -> Tensor:
        """Unit-length text features [classes, width] of one caption per class name, in float32."""
        features = self._read([caption.format(name) for name in names])
        return F.normalize(torch.cat(features).float(), dim=-1)

    def _read(self, captions: list[str]) -> list[Tensor]:
        """Text features, batch by batch.

        The text is cut to the longest prompt where attention is causal: what stands behind the end token is never read.
        """
        input_ids = self.tokenizer(captions)  # [classes, context]
        with _causal_text_cut(self.model.text, int(input_ids.nonzero()[:, 1].max()) + 1) as length:
            chunks = input_ids[:, :length].split(TEXT_BATCH)
            return [self.model.encode_text(chunk.to(self.device)) for chunk in chunks]

    def classify(
        self,
        images: Sequence[Image.Image] | Tensor,
        class_features: Tensor,
        candidates: Sequence[Sequence[int]] | None = None,
        top: int = 5,
    ) -> list[list[int]]:
        """The `top` best classes per picture, best first, by cosine similarity (paper section 1).

        `class_features`: [classes, width]. `candidates`: per picture the classes that may win; None for all.
        """
        return self.rank(self.encode_images(images), class_features, candidates, top)

    def rank(
        self,
        image_features: Tensor,
        class_features: Tensor,
        candidates: Sequence[Sequence[int]] | None = None,
        top: int = 5,
    ) -> list[list[int]]:
        """As `classify`, of pictures that `encode_images` has encoded [batch, width]."""
        similarity = image_features @ class_features.T  # [batch, classes]
        if candidates is None:
            return similarity.topk(min(top, similarity.shape[1])).indices.tolist()
        rankings = []
        for row, allowed in zip(similarity, candidates, strict=True):
            order = row[list(allowed)].topk(min(top, len(allowed))).indices.tolist()
            rankings.append([allowed[place] for place in order])
        return rankings


class TransformersCLIP(CLIP):
    """The same verbs on a transformers `CLIPModel`; padding is masked, so a text is as long as the longest one."""

    def prepare(self, images: Sequence[Image.Image]) -> Tensor:
        """Transformed pictures on the CPU: [batch, 3, height, width]."""
        return self.transform(list(images), return_tensors="pt")["pixel_values"]

    def _see(self, pixel_values: Tensor) -> Tensor:
        return self.model.visual_projection(self.model.vision_model(pixel_values).pooler_output)

    def _read(self, captions: list[str]) -> list[Tensor]:
        inputs = self.tokenizer(captions, padding=True, truncation=True, return_tensors="pt").to(self.device)
        chunks = zip(inputs["input_ids"].split(TEXT_BATCH), inputs["attention_mask"].split(TEXT_BATCH), strict=True)
        return [
            self.model.text_projection(self.model.text_model(input_ids=ids, attention_mask=mask).pooler_output)
            for ids, mask in chunks
        ]


class TransformersSigLIP(TransformersCLIP):
    """The same verbs on a transformers `SiglipModel`, whose text tower has learnt on texts padded to its context."""

    def _see(self, pixel_values: Tensor) -> Tensor:
        return self.model.vision_model(pixel_values).pooler_output

    def _read(self, captions: list[str]) -> list[Tensor]:
        context = self.model.config.text_config.max_position_embeddings
        inputs = self.tokenizer(
            captions, padding="max_length", max_length=context, truncation=True, return_tensors="pt"
        ).to(self.device)
        return [self.model.text_model(input_ids=ids).pooler_output for ids in inputs["input_ids"].split(TEXT_BATCH)]


class Supervised(CLIP):
    """The supervised baseline of the reference: a classifier of ImageNet's 1,000 classes behind the same verbs.

    A picture's features are the logits, a class's feature picks its own: the product is the class's logit.
    """

    @torch.inference_mode()
    def encode_images(self, images: Sequence[Image.Image] | Tensor) -> Tensor:
        """Logits [batch, 1000] in float32; of two classes with one name, the first has the larger of both."""
        pixel_values = images if isinstance(images, Tensor) else self.prepare(images)
        logits = self.model(pixel_values.to(self.device, self.dtype)).float()  # [batch, 1000]
        first = self._first()
        for place, name in enumerate(self._names()):
            logits[:, first[name]] = torch.maximum(logits[:, first[name]], logits[:, place])
        return logits

    def class_features(self, names: Sequence[str], caption: str = CAPTION) -> Tensor:
        """One row per class that picks its logit: [classes, 1000]. Raises UserError for another benchmark's names."""
        first, known = self._first(), len(self._names())
        strange = [name for name in names if name not in first]
        if strange:
            raise UserError(
                f"{self.spec.key} knows ImageNet's 1,000 classes only, not {strange[0]!r}: use --benchmark imagenet."
            )
        return F.one_hot(torch.tensor([first[name] for name in names]), known).float().to(self.device)

    @staticmethod
    @cache
    def _names() -> tuple[str, ...]:
        return tuple(class_names(BENCHMARKS["imagenet"]))

    @classmethod
    def _first(cls) -> dict[str, int]:
        return {name: place for place, name in reversed(list(enumerate(cls._names())))}


@contextmanager
def _causal_text_cut(text: torch.nn.Module, length: int) -> Iterator[int | None]:
    """Let open_clip's causal text tower take `length` tokens; None where the tower needs its whole context."""
    mask = getattr(text, "attn_mask", None)
    if mask is None or text.cls_emb is not None or text.pool_type not in ("argmax", "eos"):
        yield None
        return
    text.attn_mask = mask[:length, :length]  # the tower cuts its positions by itself, but not this mask
    try:
        yield length
    finally:
        text.attn_mask = mask


def load_clip(model: str, weights: str | Path | None = None, device: str = "auto", dtype: str = "auto") -> CLIP:
    """Load a registered model or any open_clip NAME/TAG from a local file or folder, paths.toml or the hub.

    A folder holds open_clip_config.json and safetensors, or a transformers CLIPModel or SiglipModel with its tokenizer
    and image processor; a file belongs to the architecture NAME: safetensors, a pickle (opened with weights_only=True)
    or OpenAI's own TorchScript archives. Raises UserError when the weights are missing, unsafe, unfit or out of reach.
    """
    spec = find_model(model, "clip")
    checkpoint = checkpoint_path(spec, Path(weights) if weights else None)
    if spec.source is not None and spec.source.startswith(SUPERVISED):
        return _load_supervised(spec, checkpoint, resolve_device(device), dtype)
    if checkpoint.is_dir() and not (checkpoint / "open_clip_config.json").is_file():
        return _load_transformers(spec, checkpoint, resolve_device(device), dtype)
    if spec.source is None:
        raise UserError(f"{checkpoint} is a file: {spec.key} wants the folder that pretrain_mini.py has written.")
    architecture, _, tag = spec.source.partition("/")
    if _is_torchscript(checkpoint):
        with tempfile.TemporaryDirectory() as folder:
            return load_clip(model, _weights_of_torchscript(checkpoint, Path(folder)), device, dtype)
    name, file = (f"local-dir:{checkpoint.resolve()}", None) if checkpoint.is_dir() else (architecture, str(checkpoint))
    place = resolve_device(device)
    precision = {"float32": "fp32", "bfloat16": "pure_bf16", "float16": "pure_fp16"}[resolve_dtype(dtype, place)]
    # Without a tag open_clip does not know the transform that belongs to a file of registered weights.
    settings = get_pretrained_cfg(architecture, tag) if not checkpoint.is_dir() else {}
    transform = {
        f"image_{key}": settings[key] for key in ("mean", "std", "interpolation", "resize_mode") if settings.get(key)
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            network, _, preprocess = open_clip.create_model_and_transforms(
                name, pretrained=file, device=place, precision=precision, weights_only=True,
                force_custom_text=True,  # this form of the text tower accepts a text shorter than its context
                force_quick_gelu=bool(settings.get("quick_gelu")), **transform,
            )  # fmt: skip
            tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # open_clip raises many kinds, down to RuntimeError, for weights of another model
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"The weights {checkpoint} do not load as {spec.key} ({first_line}).") from error
    return CLIP(network, preprocess, tokenizer, spec)


def _load_transformers(spec: ModelSpec, folder: Path, place: str, dtype: str) -> TransformersCLIP:
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, CLIPModel, SiglipModel

    kinds = {"clip": (CLIPModel, TransformersCLIP), "siglip": (SiglipModel, TransformersSigLIP)}
    try:
        model_type = AutoConfig.from_pretrained(folder).model_type
        model_class, verbs = kinds.get(model_type, (None, None))
        if model_class is None:
            raise UserError(
                f"The checkpoint {folder} holds a {model_type} model, neither a CLIP nor a SigLIP: mend --weights or "
                "paths.toml."
            )
        network, info = model_class.from_pretrained(
            folder, dtype=getattr(torch, resolve_dtype(dtype, place)), use_safetensors=True, output_loading_info=True
        )
        processor, tokenizer = AutoImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"The checkpoint {folder} does not load as a transformers model ({first_line}).") from error
    if info["missing_keys"]:
        raise UserError(f"The checkpoint {folder} is not a whole {model_class.__name__}: mend --weights or paths.toml.")
    return verbs(network.to(place), processor, tokenizer, spec)


def _load_supervised(spec: ModelSpec, file: Path, place: str, dtype: str) -> Supervised:
    import torchvision
    from safetensors.torch import load_file

    name = spec.source.split("/")[1]
    try:
        with torch.device("meta"):
            network = torchvision.models.get_model(name)
        state = (
            load_file(file)
            if file.suffix == ".safetensors"
            else torch.load(file, map_location="cpu", weights_only=True)
        )
        network.load_state_dict(state, assign=True)
    except Exception as error:  # a torn pickle raises nearly anything
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"The weights {file} do not load as torchvision's {name} ({first_line}).") from error
    transform = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    network = network.requires_grad_(False).to(place, getattr(torch, resolve_dtype(dtype, place)))
    return Supervised(network, transform, None, spec)


def _is_torchscript(checkpoint: Path) -> bool:
    if not checkpoint.is_file() or not zipfile.is_zipfile(checkpoint):
        return False
    with zipfile.ZipFile(checkpoint) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _weights_of_torchscript(checkpoint: Path, folder: Path) -> Path:
    """The weights of a TorchScript archive as safetensors: open_clip with weights_only=True refuses the archive."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TorchScript is on its way out; the released archives stay
        state = torch.jit.load(checkpoint, map_location="cpu").state_dict()
    others = ("input_resolution", "context_length", "vocab_size", "attn_mask")  # settings and a constant
    save_file({k: v.contiguous() for k, v in state.items() if k not in others}, folder / "weights.safetensors")
    return folder / "weights.safetensors"


def checkpoint_path(spec: ModelSpec, weights: Path | None = None) -> Path:
    """The local file or folder of a CLIP model's weights, downloaded where no local one is named."""
    path = local_checkpoint(spec, weights)
    if path is not None:
        return path
    check_source(spec)
    if spec.source.startswith(SUPERVISED):
        raise UserError(
            f"{spec.key} is read from a local file of torchvision's weights: pass it with --weights or name it in "
            "paths.toml below [models]."
        )
    architecture, tag = spec.source.split("/")
    settings = get_pretrained_cfg(architecture, tag)
    if not settings:
        known = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none: no such architecture"
        raise UserError(f"open_clip has no weights {spec.source}: the tags of {architecture} are {known}.")
    try:
        return Path(download_pretrained(settings))
    except Exception as error:  # urllib and the hub client raise many kinds
        raise hub_error(spec, error) from error
