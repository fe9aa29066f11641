"""Store hidden states of a vision-language model, or image features of CLIP, for probes (section 3.2, Tables 3, 10).

    python feature_analysis/extract_features.py --model llava-1.5-7b --benchmark flowers --split train
    python feature_analysis/extract_features.py --model llava-1.5-7b --benchmark flowers
    python feature_analysis/extract_features.py --model clip-vit-l-336 --benchmark flowers --split train
    python feature_analysis/extract_features.py --model ViT-B-32/laion2b_s34b_b79k --kind clip --benchmark flowers
    python feature_analysis/extract_features.py --benchmark flowers --template llava-v1 --positions 0 100 600 -2 -1
    python feature_analysis/extract_features.py --benchmark flowers --layers all --control random --seed 3

One forward pass per image, which ends before the head. Keeps of the language model's last layer, behind its final norm,
the last token, the mean over all tokens and the mean over the image's tokens; --positions adds single tokens, --layers
all adds every layer, the projector and the vision encoder, --heads the outputs of the attention heads. --model pixels
stores images of 16 x 16 pixels, a baseline of all probes. Writes outputs/feature_analysis/NAME/{run.json, rows.jsonl,
features-*.safetensors}: shards of 256 images in the dtype of the run, keyed by image, which probe.py memory-maps. It
can be stopped at any time: the same command continues. Start it several times, or under scripts/multi_gpu.sh, and the
processes share the work.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlmclassifier import cli
from vlmclassifier.arguments import AdapterArgs, DataArgs, ModelArgs, RunArgs, run_config, run_name
from vlmclassifier.benchmarks import Evaluation
from vlmclassifier.identity import Adapter, read_adapter
from vlmclassifier.images import open_image, prefetch
from vlmclassifier.models import MODELS, ModelSpec, checkpoint_folder, find_model
from vlmclassifier.prompts import TEMPLATES, WORDINGS
from vlmclassifier.records import Example, UserError, images_named
from vlmclassifier.runs.features import SHARD_ROWS, FeatureRun, open_features
from vlmclassifier.runs.provenance import fingerprint

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_FEATURE = "image"  # the one feature of a CLIP model (its image embedding of unit length) and of pixels
PIXELS, SIDE = "pixels", 16  # --model pixels: images of 16 x 16 pixels


@dataclass
class Args(RunArgs, DataArgs, AdapterArgs, ModelArgs):
    """Arguments."""

    kind: Literal["vlm", "clip"] = "vlm"
    """What a --model is that is not registered: vlm (hub id or folder) or clip (open_clip's NAME/TAG or folder)."""
    positions: tuple[int, ...] = ()
    """Single tokens of the prompt to keep: 0 is the first, -1 the last."""
    layers: tuple[str, ...] = ("last",)
    """Layers to keep: last (behind the final norm), numbers (0 is what the first layer reads), projector, vision (the
    encoder), or all."""
    heads: bool = False
    """Keep the outputs of all attention heads at the last token, for locate.py heads."""
    wording: Literal[tuple(WORDINGS)] = "base"
    """Wording of the question (vlmclassifier/prompts.py)."""
    template: Literal[tuple(TEMPLATES)] | None = None
    """Prompt template (vlmclassifier/prompts.py); default: the model's own."""
    control: Literal["random", "permuted", "text_only"] | None = None
    """Untrained control: language model and projector at the library's initialisation, or with the trained entries of
    every matrix permuted, or the language model before visual training; the vision encoder stays."""
    language_model: Path | None = None
    """--control text_only: checkpoint of the language model that the VLM was made of."""
    seed: int = 0
    """Seed of the control."""


def main(args: Args) -> None:
    """Check everything, extract what is pending, say what comes next."""
    # ---- check
    cli.check_positive(limit=args.limit, batch_size=args.batch_size)
    spec = find_any_model(args.model, args.kind)
    is_vlm = spec.kind == "vlm"
    checkpoint = find_checkpoint(spec, args.weights)
    adapter = read_adapter(args.adapter, spec, checkpoint) if is_vlm else None
    spec = adapter.spec(spec) if adapter else spec
    if args.template:
        own = TEMPLATES.get(spec.template or "", "")
        if ("<image>" in own) != ("<image>" in TEMPLATES[args.template]):
            raise UserError(
                f"--template {args.template} does not fit {spec.key}, which marks the image in another way."
            )
        spec = replace(spec, template=args.template)
    if not is_vlm and (args.positions or args.layers != ("last",) or args.heads or args.template or args.control):
        raise UserError(
            f"{spec.key} is no vision-language model: --positions, --layers, --heads, --template and --control are of "
            "language models."
        )
    if (args.control == "text_only") != (args.language_model is not None):
        raise UserError("--control text_only and --language-model DIR go together: give both or neither.")
    task = args.load_evaluation()

    from vlmclassifier.devices import resolve_device, resolve_dtype  # seconds of torch

    # ---- open the run
    device = resolve_device(args.device)
    options: dict[str, Any] = {}
    if is_vlm:
        template = TEMPLATES[spec.template] if spec.template else None
        options = {"template": template, "wording": args.wording, "positions": list(args.positions),
                   "layers": list(args.layers), "heads": args.heads}  # fmt: skip
    if args.control:
        source = f"{fingerprint(args.language_model)}" if args.language_model else f"seed {args.seed}"
        tag = f"untrained: {args.control}" + (f" (seed {args.seed})" if args.seed else "")
        options |= {"control": f"{args.control}, {source}", "tags": [tag]}
    config = run_config(
        "extract_features", "features", spec, task, args.limit, checkpoint=checkpoint, adapter=adapter,
        default_dtype=resolve_dtype("auto", device), dtype=resolve_dtype(args.dtype, device), **options,
    )  # fmt: skip
    folder = args.run_folder("feature_analysis", run_name(spec, task, checkpoint, adapter), setting_name(args))
    run = open_features(folder, config, task.order, task.labels, args.batch_size)

    # ---- extract
    if not run.complete:
        extract(args, spec, checkpoint, adapter, task, run)
    run.finish_features()
    if cli.is_main_process():
        print(f"Features of {len(run.order)} images: {run.folder}. Next: python feature_analysis/probe.py --train DIR "
              "--test DIR, with the folders of the train and the test split")  # fmt: skip


def find_any_model(key: str, kind: Literal["vlm", "clip"]) -> ModelSpec:
    """The spec of a model; `kind`: of one that is not registered. Raises UserError."""
    if key == PIXELS:
        return ModelSpec(PIXELS, "clip", None)
    return find_model(key, "clip" if key in MODELS and MODELS[key].kind == "clip" else kind)


def find_checkpoint(spec: ModelSpec, weights: Path | None) -> Path | None:
    """The local checkpoint of a model of either kind; pixels have none."""
    if spec.key == PIXELS:
        return None
    if spec.kind == "vlm":
        return checkpoint_folder(spec, weights)
    from vlmclassifier.clip import checkpoint_path

    return checkpoint_path(spec, weights)


def setting_name(args: Args) -> str:
    """What the default folder of a run says about its options."""
    parts = ["features"]
    parts += [args.template] if args.template else []
    parts += [f"prompt_{args.wording}"] if args.wording != "base" else []
    parts += [f"{args.control}_{args.seed}"] if args.control else []
    parts += ["heads"] if args.heads else []
    parts += ["positions"] if args.positions else []
    parts += ["layers"] if args.layers != ("last",) else []
    return "-".join(parts)


def extract(
    args: Args, spec: ModelSpec, checkpoint: Path | None, adapter: Adapter | None, task: Evaluation, run: FeatureRun
) -> None:  # fmt: skip
    """Compute the features of every pending range of images, batch by batch, and write its shard."""
    import torch

    examples = {example.id: example for example in task.examples}
    if spec.key == PIXELS:
        prepare, compute = small_images, lambda values: {IMAGE_FEATURE: values}
    elif spec.kind == "clip":
        prepare, compute = clip_functions(args, checkpoint, task.names, run)
    else:
        prepare, compute = vlm_functions(args, spec, checkpoint, adapter, run)

    def pieces() -> Iterator[tuple[list[str], list[Example]]]:
        """A batch at a time of every range, with the ids of the range."""
        for ids in run.pending(SHARD_ROWS):
            for start in range(0, len(ids), args.batch_size):
                yield ids, [examples[i] for i in ids[start : start + args.batch_size]]

    def load(piece: tuple[list[str], list[Example]]) -> Any:
        with images_named([example.place for example in piece[1]]):
            return prepare([open_image(example.image, task.root, example.row) for example in piece[1]])

    parts: dict[str, list[Tensor]] = {}
    count = 0  # images of the current range that have been computed
    with cli.progress([run], f"{spec.key} on {task.benchmark.title}, features") as update:
        for (ids, batch), inputs in prefetch(pieces(), load):
            with images_named([example.place for example in batch]):
                for name, values in compute(inputs).items():
                    parts.setdefault(name, []).append(values)
            count += len(batch)
            if count == len(ids):
                features = {name: torch.cat(values) for name, values in parts.items()}
                run.write_shard([examples[i] for i in ids], features)
                parts, count = {}, 0
                update()


def vlm_functions(
    args: Args, spec: ModelSpec, checkpoint: Path, adapter: Adapter | None, run: FeatureRun
) -> tuple[Any, Any]:  # fmt: skip
    """How images of a VLM become a batch, and a batch features."""
    import torch

    from vlmclassifier.finetuning.weights import load_adapter
    from vlmclassifier.vlm import load_vlm
    from vlmclassifier.vlm.controls import untrain, use_text_only_language_model
    from vlmclassifier.vlm.hidden import HEADS, VISION, FeatureExtractor, layer_names
    from vlmclassifier.vlm.parts import innermost_decoder

    vlm = load_vlm(args.model, checkpoint, args.device, args.dtype)
    load_adapter(vlm, adapter)
    vlm.spec = spec  # with the template of --template
    if args.language_model:
        use_text_only_language_model(vlm, args.language_model)
    elif args.control:
        untrain(vlm, args.control, args.seed)
    prompt = vlm.prompt(WORDINGS[args.wording])
    layers = [VISION, *layer_names(vlm)] if "all" in args.layers else list(dict.fromkeys(("last", *args.layers)))
    if args.heads:
        config = innermost_decoder(vlm.model).config
        run.write_constants({"head_shape": torch.tensor([config.num_hidden_layers, config.num_attention_heads])})
        layers.append(HEADS)

    def prepare(images: Sequence[Any]) -> Any:
        return vlm.prepare(images, [prompt] * len(images))

    return prepare, FeatureExtractor(vlm, args.positions, layers)


def clip_functions(args: Args, checkpoint: Path, names: Sequence[str], run: FeatureRun) -> tuple[Any, Any]:
    """The same for a CLIP model; the features of the class names are kept beside the images'."""
    from vlmclassifier.clip import load_clip

    clip = load_clip(args.model, checkpoint, args.device, args.dtype)
    run.write_constants({"class_features": clip.class_features(names).cpu()})
    return clip.prepare, lambda pixel_values: {IMAGE_FEATURE: clip.encode_images(pixel_values).cpu()}


def small_images(images: Sequence[Any]) -> "Tensor":
    """Images of 16 x 16 pixels as rows of numbers from 0 to 1: [images, 768]."""
    import numpy as np
    import torch

    pixels = np.stack([np.asarray(image.convert("RGB").resize((SIDE, SIDE))) for image in images])
    return torch.from_numpy(pixels).flatten(1).float() / 255


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
