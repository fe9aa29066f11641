"""Check a GPU: bfloat16 answers compared with float32 on the CPU; throughput and memory of LLaVA-1.5-7B's architecture.

    python scripts/gpu_check.py
    python scripts/gpu_check.py --vlm outputs/plane_figures/seed-0/checkpoints/vlm --batch-sizes 1 8 32
    python scripts/gpu_check.py --smoke --models all --images 40    # bfloat16 on the CPU, by model family

Works offline: the large model is built on the device with random weights (real widths and layers, 576 image tokens),
and its images are noise. The last line is one JSON object, which is also written to --out: device, versions, answers
(the shares of equal answers, by model), training (the largest relative difference of a step's loss from the CPU's in
float32), throughput (images and new tokens per second and peak_gib, by batch size; "out of memory" if a batch does not
fit). The next tokens of a miniature have similar probabilities, so rounding changes its answers far more often than
those of a trained model. The step time of fine-tuning: scripts/bench/bench_training.py --size 7b --device cuda.
"""

import importlib.metadata
import json
import random
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from vlmclassifier import cli
from vlmclassifier.finetuning.gpu_check import check_training
from vlmclassifier.paths import OUTPUTS
from vlmclassifier.records import UserError

OUT_OF_MEMORY = "out of memory"
NEW_TOKENS = 16  # per answer in the comparison


@dataclass
class Args:
    vlm: Path | None = None
    """A small trained VLM for the comparison of answers, such as the quickstart's; default: random miniatures."""
    models: list[str] = field(default_factory=lambda: ["llava-1.5-7b"])
    """The VLMs of vlmclassifier/models.py whose miniatures are compared; all: all except the 13B models."""
    data_root: Path | None = None
    """Folder of images (*.jpg, *.jpeg, *.png, at any depth) for the comparison; default: generated images."""
    images: int = 64
    """Images in the comparison of answers."""
    batch_sizes: list[int] = field(default_factory=lambda: [1, 4, 8, 16, 32, 64])
    """Batch sizes for the measurement of the throughput."""
    new_tokens: int = 64
    """New tokens per image in the measurement of the throughput; no answer ends earlier."""
    repeats: int = 3
    """Measurements per batch size; the median is reported."""
    training: bool = True
    """Also train a miniature on the device, and sharded by FSDP2 (and DeepSpeed where it is installed)."""
    smoke: bool = False
    """Run the same steps on the CPU, with a small model instead of the 7B model."""
    seed: int = 0
    """Seed of weights and images."""
    out: Path = OUTPUTS / "gpu_check.json"
    """File for the JSON object."""


def main(args: Args) -> None:
    """Compare answers, then measure the throughput."""
    cli.check_positive(images=args.images, new_tokens=args.new_tokens, repeats=args.repeats)
    if not args.batch_sizes or min(args.batch_sizes) < 1:
        raise UserError("--batch-sizes must be numbers of at least 1, for example --batch-sizes 1 8.")
    import torch

    if not args.smoke and not torch.cuda.is_available():
        raise UserError("torch sees no CUDA GPU on this machine: use a machine with a GPU, or try --smoke.")
    device = "cpu" if args.smoke else "cuda"
    record = {
        "device": "cpu" if args.smoke else torch.cuda.get_device_name(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "answers": compare_answers(args, device),
        "throughput": {},
    }
    if args.training:
        with tempfile.TemporaryDirectory() as folder:
            record["training"] = check_training(Path(folder), device)
    write_record(record, args.out)
    try:
        model = build_llava_7b(args, device)
    except torch.OutOfMemoryError:
        record["throughput"] = OUT_OF_MEMORY
    else:
        record["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        for size in args.batch_sizes:
            record["throughput"][str(size)] = measure_throughput(model, size, args, device)
            write_record(record, args.out)  # after every measurement, so that a later crash does not lose it
    write_record(record, args.out)
    print(f"Written: {args.out}. Add the numbers, with the date and the machine, to docs/measurements.md.")
    print(json.dumps(record))


def write_record(record: dict, file: Path) -> None:
    """Write the JSON object with the results so far."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def compare_answers(args: Args, device: str) -> dict[str, dict[str, float]]:
    """The shares of equal answers, by model: of float32 and bfloat16 on the device compared with float32 on the CPU."""
    from vlmclassifier.models import MODELS
    from vlmclassifier.tiny import make_tiny

    vlms = [key for key, spec in MODELS.items() if spec.kind == "vlm" and spec.source]
    without_13b = [key for key in vlms if "13b" not in key]
    models = without_13b if args.models == ["all"] else args.models
    unknown = [key for key in models if key not in vlms]
    if unknown:
        raise UserError(f"--models {unknown[0]} has no miniature: choose among {', '.join(without_13b)}, or all.")
    images, shares = load_images(args), {}
    with tempfile.TemporaryDirectory() as folder:
        for key in models:
            weights = args.vlm or make_tiny(MODELS[key], Path(folder) / key, args.seed)
            reference = generate_answers(key, weights, images, "cpu", "float32", 8)
            float32 = generate_answers(key, weights, images, device, "float32", 8)
            bfloat16 = generate_answers(key, weights, images, device, "bfloat16", 8)
            bfloat16_single = generate_answers(key, weights, images, device, "bfloat16", 1)
            shares[key] = {
                "float32": share_equal(float32, reference),
                "bfloat16": share_equal(bfloat16, reference),
                "bfloat16, one by one": share_equal(bfloat16_single, reference),
                "bfloat16, batch of 8 against one by one": share_equal(bfloat16, bfloat16_single),
            }
            print(f"{args.vlm or key}: {shares[key]}", flush=True)
    return shares


def load_images(args: Args) -> list:
    """The images for the comparison of answers."""
    from vlmclassifier.generated_images import generated_image
    from vlmclassifier.images import open_image

    if args.data_root is None:
        return [generated_image(random.Random(f"{args.seed}:{number}")) for number in range(args.images)]
    suffixes = {".jpg", ".jpeg", ".png"}
    files = sorted(file for file in args.data_root.rglob("*") if file.suffix.lower() in suffixes)
    if not files:
        raise UserError(f"--data-root {args.data_root} contains no images: choose another folder.")
    sample = random.Random(args.seed).sample(files, min(args.images, len(files)))
    return [open_image(file, args.data_root) for file in sample]


def generate_answers(key: str, weights: Path, images: list, device: str, dtype: str, batch_size: int) -> list[str]:
    """The answers to the base question about the images."""
    from vlmclassifier.prompts import WORDINGS
    from vlmclassifier.vlm import load_vlm

    vlm, answers = load_vlm(key, weights, device, dtype), []
    prompt = vlm.prompt(WORDINGS["base"])
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        answers += vlm.generate(vlm.prepare(batch, [prompt] * len(batch)), NEW_TOKENS)
    return answers


def share_equal(answers: list[str], reference: list[str]) -> float:
    """The share of answers that equal those of the reference."""
    equal = sum(answer == expected for answer, expected in zip(answers, reference, strict=True))
    return round(equal / len(answers), 4)


def build_llava_7b(args: Args, device: str) -> object:
    """LLaVA-1.5-7B with random weights on the device; with --smoke a small model of the same classes."""
    import torch
    from transformers import CLIPVisionConfig, GenerationConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision_sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    text_sizes = {}  # the defaults of LlamaConfig are the 7B model
    if args.smoke:
        vision_sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
        text_sizes = dict(vision_sizes)
    vision_config = CLIPVisionConfig(image_size=336, patch_size=14, projection_dim=768, **vision_sizes)
    text_config = LlamaConfig(vocab_size=32064, **text_sizes)
    config = LlavaConfig(vision_config=vision_config, text_config=text_config, image_token_index=32000)
    torch.manual_seed(args.seed)
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(default_dtype)
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)  # without an end token
    return model


def measure_throughput(model: object, batch_size: int, args: Args, device: str) -> dict | str:
    """Images and new tokens per second and the peak memory with one batch size; OUT_OF_MEMORY if it does not fit."""
    import torch

    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    prompt = [1, *[32000] * 576, *range(100, 116)]  # begin token, image tokens, a short question
    inputs = {
        "input_ids": torch.tensor([prompt] * batch_size, device=device),  # [batch, tokens]
        "attention_mask": torch.ones(batch_size, len(prompt), dtype=torch.long, device=device),  # [batch, tokens]
        "pixel_values": torch.randn(batch_size, 3, 336, 336, device=device, dtype=torch.bfloat16),
    }
    times = []
    try:
        for _ in range(args.repeats + 1):  # the first one is a warm-up
            start = time.perf_counter()
            with torch.inference_mode():
                sequences = model.generate(**inputs, max_new_tokens=args.new_tokens)
            sequences.cpu()  # waits for the device
            times.append(time.perf_counter() - start)
    except torch.OutOfMemoryError:
        print(f"batch {batch_size}: {OUT_OF_MEMORY}", flush=True)
        return OUT_OF_MEMORY
    seconds = sorted(times[1:])[args.repeats // 2]
    peak_gib = None
    if device == "cuda":
        peak_gib = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    result = {
        "images_per_second": round(batch_size / seconds, 3),
        "new_tokens_per_second": round(batch_size * args.new_tokens / seconds, 1), "peak_gib": peak_gib,
    }  # fmt: skip
    print(f"batch {batch_size}: {result}", flush=True)
    return result


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
