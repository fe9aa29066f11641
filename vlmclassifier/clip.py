"""CLIP (open_clip or transformers), SigLIP and a supervised ViT: `encode_images`, `class_features`, `classify`."""

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
from open_clip.tokenizer import get_clean_fn
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import BatchEncoding

from vlmclassifier.benchmarks import BENCHMARKS, class_names
from vlmclassifier.class_lists import first_index
from vlmclassifier.devices import BatchSplitter, resolve_device, resolve_dtype
from vlmclassifier.finite import check_finite
from vlmclassifier.images import UNPROCESSABLE, as_images, check_each, crop_elongated
from vlmclassifier.models import ModelSpec, check_source, find_model, hub_error, local_checkpoint
from vlmclassifier.prompts import CAPTION
from vlmclassifier.records import UserError, first_line

TEXT_BATCH = 256  # captions per forward pass of the text encoder
TORCHVISION_PREFIX = "torchvision/"  # of the source of a supervised classifier


class CLIP:
    """A contrastive image-text model with its image transform and tokenizer. Use `load_clip` to create one."""

    def __init__(self, model: torch.nn.Module, transform: Callable, tokenizer: Callable, spec: ModelSpec) -> None:
        self.model = model.eval()
        self.transform = transform
        steps = getattr(transform, "transforms", ())  # of open_clip; torchvision's and transformers' have a crop size
        self._crops_centre = any(type(step).__name__ == "CenterCrop" for step in steps) or bool(
            getattr(transform, "do_center_crop", hasattr(transform, "crop_size") and not steps)
        )
        self.tokenizer = tokenizer
        self.spec = spec
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self._splitter = BatchSplitter()

    def prepare(self, images: Sequence[Image.Image]) -> Tensor:
        """Transformed images [batch, 3, height, width] on the CPU. Raises RowError for one that cannot be."""
        images = [crop_elongated(image) for image in images] if self._crops_centre else list(images)
        try:
            return self._transform(images)
        except UNPROCESSABLE:
            check_each(images, lambda row: self._transform(images[row : row + 1]))
            raise

    def _transform(self, images: Sequence[Image.Image]) -> Tensor:
        return torch.stack([self.transform(image) for image in images])

    def encode_images(self, images: "Image.Image | str | Path | Sequence[Image.Image | str | Path] | Tensor") -> Tensor:
        """Image features [batch, width] of unit length in float32: of one image or path, a list, or `prepare`'s output.

        A batch that does not fit into the device's memory is split. Raises UserError when a single image does not fit.
        """
        is_prepared = isinstance(images, Tensor)
        pixel_values = images if is_prepared else self.prepare(as_images(images))  # [batch, 3, height, width]

        def encode_part(part: slice) -> list[Tensor]:
            return list(self._encode(pixel_values[part]))

        return torch.stack(self._splitter.run(encode_part, len(pixel_values)))  # [batch, width]

    @torch.inference_mode()
    def _encode(self, pixel_values: Tensor) -> Tensor:
        features = self._image_features(pixel_values.to(self.device, self.dtype))  # [batch, width]
        return self._unit_length(features, "An image feature")

    def _unit_length(self, features: Tensor, what: str, has_rows: bool = True) -> Tensor:
        """Features [rows, width] of unit length in float32. A vector of zeros has no direction: it becomes NaN."""
        features = features.float()
        return check_finite(features / features.norm(dim=-1, keepdim=True), what, self.dtype, has_rows)

    def _image_features(self, pixel_values: Tensor) -> Tensor:
        return self.model.encode_image(pixel_values)

    @torch.inference_mode()
    def class_features(self, names: Sequence[str], caption: str = CAPTION) -> Tensor:
        """Text features [classes, width] of unit length in float32, for one caption per class name."""
        features = torch.cat(self._text_features([caption.format(name) for name in names]))  # [classes, width]
        return self._unit_length(features, "A text feature", has_rows=False)

    def token_keys(self, names: Sequence[str], caption: str = CAPTION) -> list[tuple[int, ...]]:
        """The token ids that the text encoder reads for every name: equal where it cannot tell two names apart."""
        captions = [caption.format(name) for name in names]
        return [tuple(row) for row in self._tokens(captions).tolist()]

    def _tokens(self, captions: list[str]) -> Tensor:
        return self.tokenizer(captions)  # [captions, context]

    def _text_features(self, captions: list[str]) -> list[Tensor]:
        """Text features [chunk, width] of the captions, one tensor per chunk of at most TEXT_BATCH captions.

        If the attention is causal, the padding behind the longest caption is cut off: no token attends to it.
        """
        input_ids = self._tokens(captions)  # [classes, context]
        longest = int(input_ids.nonzero()[:, 1].max()) + 1  # padding is 0, the end token is not
        with _truncated_text_context(self.model.text, longest) as length:
            chunks = input_ids[:, :length].split(TEXT_BATCH)  # each [chunk, length]
            return [self.model.encode_text(chunk.to(self.device)) for chunk in chunks]

    def scores(self, image_features: Tensor, class_features: Tensor) -> Tensor:
        """Similarities [batch, classes] in float32, times the scale that the model was trained with.

        Their softmax over the classes is CLIP's probability of each. A supervised classifier's are its logits.
        """
        scale = getattr(self.model, "logit_scale", None)
        similarity = image_features.float() @ class_features.float().T
        return similarity if scale is None else similarity * scale.detach().float().exp().to(similarity.device)

    def classify(
        self,
        images: "Image.Image | str | Path | Sequence[Image.Image | str | Path] | Tensor",
        class_features: Tensor,
        candidates: Sequence[Sequence[int]] | None = None,
        top: int = 5,
    ) -> list[list[int]]:
        """The indices of the `top` best classes per image, best first, by cosine similarity (paper, section 2).

        `class_features`: [classes, width]. `candidates`: the class indices to choose among, one list per image; None
        for all classes. Raises UserError when a single image does not fit into the device's memory.
        """
        return self.rank(self.encode_images(images), class_features, candidates, top)

    def rank(
        self,
        image_features: Tensor,
        class_features: Tensor,
        candidates: Sequence[Sequence[int]] | None = None,
        top: int = 5,
    ) -> list[list[int]]:
        """The same as `classify`, for image features [batch, width] of `encode_images`."""
        similarity = image_features @ class_features.T  # [batch, classes]
        if candidates is None:
            return similarity.topk(min(top, similarity.shape[1])).indices.tolist()
        rankings = []
        for image_similarity, image_candidates in zip(similarity, candidates, strict=True):
            candidate_similarity = image_similarity[list(image_candidates)]  # [candidates]
            order = candidate_similarity.topk(min(top, len(image_candidates))).indices.tolist()
            rankings.append([image_candidates[index] for index in order])
        return rankings


class TransformersCLIP(CLIP):
    """The same interface for a transformers `CLIPModel`. Padding is masked, so captions are padded to the longest."""

    def _transform(self, images: Sequence[Image.Image]) -> Tensor:
        return self.transform(list(images), return_tensors="pt")["pixel_values"]

    def _image_features(self, pixel_values: Tensor) -> Tensor:
        return self.model.visual_projection(self.model.vision_model(pixel_values).pooler_output)

    def _inputs(self, captions: list[str]) -> BatchEncoding:
        return self.tokenizer(captions, padding=True, truncation=True, return_tensors="pt")

    def _tokens(self, captions: list[str]) -> Tensor:
        return self._inputs(captions)["input_ids"]  # [captions, tokens]

    def _text_features(self, captions: list[str]) -> list[Tensor]:
        inputs = self._inputs(captions).to(self.device)
        id_chunks = inputs["input_ids"].split(TEXT_BATCH)  # each [chunk, tokens]
        mask_chunks = inputs["attention_mask"].split(TEXT_BATCH)  # each [chunk, tokens]
        features = []
        for input_ids, attention_mask in zip(id_chunks, mask_chunks, strict=True):
            outputs = self.model.text_model(input_ids=input_ids, attention_mask=attention_mask)
            features.append(self.model.text_projection(outputs.pooler_output))  # [chunk, width]
        return features


class TransformersSigLIP(TransformersCLIP):
    """The same interface for a transformers `SiglipModel`, which was trained on captions padded to its context."""

    def _image_features(self, pixel_values: Tensor) -> Tensor:
        return self.model.vision_model(pixel_values).pooler_output

    def _inputs(self, captions: list[str]) -> BatchEncoding:
        context = self.model.config.text_config.max_position_embeddings
        # Lower case and no punctuation, as in its training: SigLIP's tokenizer does it, SigLIP2's (Gemma's) does not.
        captions = [get_clean_fn("canonicalize")(caption) for caption in captions]
        return self.tokenizer(captions, padding="max_length", max_length=context, truncation=True, return_tensors="pt")

    def _text_features(self, captions: list[str]) -> list[Tensor]:
        inputs = self._inputs(captions).to(self.device)
        chunks = inputs["input_ids"].split(TEXT_BATCH)  # each [chunk, context]
        return [self.model.text_model(input_ids=chunk).pooler_output for chunk in chunks]  # each [chunk, width]


class SupervisedClassifier(CLIP):
    """The supervised baseline of the reference code: a classifier of ImageNet's 1,000 classes with the same interface.

    The features of an image are its logits, and the feature of a class is one-hot: their product is the logit of the
    class.
    """

    @torch.inference_mode()
    def _encode(self, pixel_values: Tensor) -> Tensor:
        """Logits [batch, 1000] in float32. If classes share a name, the first one gets the largest of their logits."""
        logits = self.model(pixel_values.to(self.device, self.dtype)).float()  # [batch, 1000]
        check_finite(logits, "A logit", self.dtype)
        names = _imagenet_names()
        first = first_index(names)
        for index, name in enumerate(names):
            logits[:, first[name]] = torch.maximum(logits[:, first[name]], logits[:, index])
        return logits

    def class_features(self, names: Sequence[str], caption: str = CAPTION) -> Tensor:
        """One-hot features [classes, 1000] that select the logits of the classes; `caption` has no effect.

        Raises UserError for a name that is not an ImageNet class.
        """
        imagenet_names = _imagenet_names()
        first = first_index(imagenet_names)
        unknown = [name for name in names if name not in first]
        if unknown:
            raise UserError(
                f"{self.spec.key} can only classify ImageNet's 1,000 classes, not {unknown[0]!r}: use --benchmark "
                "imagenet."
            )
        indices = torch.tensor([first[name] for name in names])  # [classes]
        return F.one_hot(indices, len(imagenet_names)).float().to(self.device)  # [classes, 1000]

    def token_keys(self, names: Sequence[str], caption: str = CAPTION) -> list[str]:
        """The names themselves: this model reads no text."""
        return list(names)


@cache
def _imagenet_names() -> tuple[str, ...]:
    return class_names(BENCHMARKS["imagenet"])


@contextmanager
def _truncated_text_context(text_encoder: torch.nn.Module, length: int) -> Iterator[int | None]:
    """Make open_clip's causal text encoder accept `length` tokens; yields None if it needs its whole context."""
    mask = getattr(text_encoder, "attn_mask", None)  # [context, context]
    if mask is None or text_encoder.cls_emb is not None or text_encoder.pool_type not in ("argmax", "eos"):
        yield None
        return
    # The encoder truncates its position embeddings itself, but not this mask.
    text_encoder.attn_mask = mask[:length, :length]
    try:
        yield length
    finally:
        text_encoder.attn_mask = mask


def load_clip(model: str, weights: str | Path | None = None, device: str = "auto", dtype: str = "auto") -> CLIP:
    """Load a registered model or any open_clip NAME/TAG from a local file or folder, paths.toml or the hub.

    A folder contains open_clip_config.json and safetensors, or a transformers CLIPModel or SiglipModel with its
    tokenizer and image processor. A file contains weights of the architecture NAME: safetensors, a pickle (opened with
    weights_only=True) or one of OpenAI's TorchScript archives. Raises UserError when the weights are missing, unsafe,
    of another model, or cannot be downloaded.
    """
    spec = find_model(model, "clip")
    checkpoint = checkpoint_path(spec, Path(weights) if weights else None)
    if spec.source is not None and spec.source.startswith(TORCHVISION_PREFIX):
        return _load_supervised(spec, checkpoint, resolve_device(device), dtype)
    if checkpoint.is_dir() and not (checkpoint / "open_clip_config.json").is_file():
        return _load_transformers(spec, checkpoint, resolve_device(device), dtype)
    if spec.source is None:
        raise UserError(
            f"{checkpoint} is a file: set --weights of {spec.key} to the folder that pretrain_mini.py has written."
        )
    architecture, _, tag = spec.source.partition("/")
    if _is_torchscript(checkpoint):
        with tempfile.TemporaryDirectory() as folder:
            return load_clip(model, _convert_torchscript(checkpoint, Path(folder)), device, dtype)
    if checkpoint.is_dir():
        name, file = f"local-dir:{checkpoint.resolve()}", None
        pretrained_config = {}
    else:
        name, file = architecture, str(checkpoint)
        # open_clip is given no tag, so the image transform of registered weights has to be passed to it.
        pretrained_config = get_pretrained_cfg(architecture, tag)
    transform_options = {}
    for key in ("mean", "std", "interpolation", "resize_mode"):
        if pretrained_config.get(key):
            transform_options[f"image_{key}"] = pretrained_config[key]
    device = resolve_device(device)
    precision = {"float32": "fp32", "bfloat16": "pure_bf16", "float16": "pure_fp16"}[resolve_dtype(dtype, device)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            network, _, transform = open_clip.create_model_and_transforms(
                name, pretrained=file, device=device, precision=precision, weights_only=True,
                force_custom_text=True,  # this class of text encoder accepts captions shorter than its context
                force_quick_gelu=bool(pretrained_config.get("quick_gelu")), **transform_options,
            )  # fmt: skip
            tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # open_clip raises many exception types for weights of another model
        raise UserError(
            f"The weights {checkpoint} do not load as {spec.key} ({first_line(error)}): fix --model, --weights or "
            "paths.toml."
        ) from error
    return CLIP(network, transform, tokenizer, spec)


def _load_transformers(spec: ModelSpec, folder: Path, device: str, dtype: str) -> TransformersCLIP:
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, CLIPModel, SiglipModel

    classes = {"clip": (CLIPModel, TransformersCLIP), "siglip": (SiglipModel, TransformersSigLIP)}
    try:
        model_type = AutoConfig.from_pretrained(folder).model_type
        if model_type not in classes:
            raise UserError(
                f"The checkpoint {folder} contains a {model_type} model, not a CLIP or SigLIP model: fix --weights or "
                "paths.toml."
            )
        model_class, wrapper_class = classes[model_type]
        network, loading_info = model_class.from_pretrained(
            folder, dtype=getattr(torch, resolve_dtype(dtype, device)), use_safetensors=True, output_loading_info=True
        )
        processor, tokenizer = AutoImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"The checkpoint {folder} does not load as a transformers model ({first_line(error)}): save or "
            "download it again, "
            "or fix --weights or paths.toml."
        ) from error
    if loading_info["missing_keys"]:
        raise UserError(
            f"The checkpoint {folder} is an incomplete {model_class.__name__}, for example without "
            f"{sorted(loading_info['missing_keys'])[0]}: fix --weights or paths.toml."
        )
    return wrapper_class(network.to(device), processor, tokenizer, spec)


def _load_supervised(spec: ModelSpec, file: Path, device: str, dtype: str) -> SupervisedClassifier:
    import torchvision
    from safetensors.torch import load_file

    name = spec.source.split("/")[1]
    try:
        with torch.device("meta"):
            network = torchvision.models.get_model(name)
        if file.suffix == ".safetensors":
            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
        network.load_state_dict(state, assign=True)
    except Exception as error:  # a corrupt pickle can raise any exception type
        raise UserError(
            f"The weights {file} do not load as torchvision's {name} ({first_line(error)}): fix --weights or "
            "paths.toml."
        ) from error
    transform = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    network = network.requires_grad_(False).to(device, getattr(torch, resolve_dtype(dtype, device)))
    return SupervisedClassifier(network, transform, None, spec)


def _is_torchscript(checkpoint: Path) -> bool:
    if not checkpoint.is_file() or not zipfile.is_zipfile(checkpoint):
        return False
    with zipfile.ZipFile(checkpoint) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _convert_torchscript(checkpoint: Path, folder: Path) -> Path:
    """Save the weights of a TorchScript archive as safetensors in `folder`, and return that file.

    open_clip refuses such an archive if it is called with weights_only=True.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TorchScript is deprecated, but released weights use it
        state = torch.jit.load(checkpoint, map_location="cpu").state_dict()
    not_weights = ("input_resolution", "context_length", "vocab_size", "attn_mask")  # hyperparameters and a constant
    weights = {name: tensor.contiguous() for name, tensor in state.items() if name not in not_weights}
    save_file(weights, folder / "weights.safetensors")
    return folder / "weights.safetensors"


def checkpoint_path(spec: ModelSpec, weights: Path | None = None) -> Path:
    """The local file or folder of a CLIP model's weights, downloaded if no local one is given.

    Raises UserError when the weights do not exist or cannot be downloaded, and in the cases of `local_checkpoint`.
    """
    path = local_checkpoint(spec, weights)
    if path is not None:
        return path
    check_source(spec)
    if spec.source.startswith(TORCHVISION_PREFIX):
        raise UserError(
            f"{spec.key} is read from a local file of torchvision's weights: pass it with --weights or add it to "
            "[models] in paths.toml."
        )
    architecture, tag = spec.source.split("/")
    pretrained_config = get_pretrained_cfg(architecture, tag)
    if not pretrained_config:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none: no such architecture"
        raise UserError(
            f"open_clip has no weights {spec.source}: the tags of {architecture} are {tags}; choose one of "
            "open_clip.list_pretrained()."
        )
    try:
        return Path(download_pretrained(pretrained_config))
    except Exception as error:  # urllib and the hub client raise many exception types
        raise hub_error(spec, error) from error
