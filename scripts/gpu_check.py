"""Check a GPU: bfloat16 answers against float32 on the CPU; throughput and memory of LLaVA-1.5-7B's architecture.

    python scripts/gpu_check.py
    python scripts/gpu_check.py --vlm outputs/plane_figures/seed-0/checkpoints/vlm --batch-sizes 1 8 32

Works offline: the large model is built on the device with random weights (true widths and layers, 576 image tokens),
its pictures are noise. The last line, and --out, is one JSON object: device, versions, answers (share that are equal),
throughput (by batch size: pictures and new tokens per second, peak_gib; "out of memory" where it does not fit).
"""

import importlib.metadata
import json
import random
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from vlmclassifier import cli
from vlmclassifier.records import UserError
from vlmclassifier.tables import OUTPUTS

OUT_OF_MEMORY = "out of memory"


@dataclass
class Args:
    vlm: Path | None = None
    """A small VLM of yours for the comparison of answers, such as the quickstart's; without it a random miniature."""
    pictures: int = 64
    """Pictures in the comparison of answers."""
    batch_sizes: list[int] = field(default_factory=lambda: [1, 4, 8, 16, 32, 64])
    """Batch sizes whose throughput is measured."""
    new_tokens: int = 64
    """New tokens per picture in the measurement; no answer ends earlier."""
    repeats: int = 3
    """Measurements per batch size; the median counts."""
    smoke: bool = False
    """The same steps on the CPU, with a miniature in place of the 7B model."""
    seed: int = 0
    """Seed of weights and pictures."""
    out: Path = OUTPUTS / "gpu_check.json"
    """Where the JSON object is written."""


def main(args: Args) -> None:
    """Answers, then throughput."""
    cli.check_positive(pictures=args.pictures, new_tokens=args.new_tokens, repeats=args.repeats)
    if not args.batch_sizes or min(args.batch_sizes) < 1:
        raise UserError("--batch-sizes wants numbers of at least 1: write for instance --batch-sizes 1 8.")
    import torch

    if not args.smoke and not torch.cuda.is_available():
        raise UserError("torch sees no CUDA GPU here: run this where there is one, or try the steps with --smoke.")
    device = "cpu" if args.smoke else "cuda"
    record = {
        "device": "cpu" if args.smoke else torch.cuda.get_device_name(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "answers": compare_answers(args, device),
        "throughput": {},
    }
    write(record, args.out)
    try:
        model = build(args, device)
    except torch.OutOfMemoryError:
        record["throughput"] = OUT_OF_MEMORY
    else:
        record["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        for size in args.batch_sizes:
            record["throughput"][str(size)] = throughput(model, size, args, device)
            write(record, args.out)  # what is measured stays, whatever comes next
    write(record, args.out)
    print(f"Written: {args.out}. Put the numbers, with date and machine, into docs/measurements.md.")
    print(json.dumps(record))


def write(record: dict, file: Path) -> None:
    """Write the JSON object as far as it is known."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def compare_answers(args: Args, device: str) -> dict:
    """Shares of equal answers of a small VLM: float32 on the CPU is the reference."""
    from make_pictures import draw

    from vlmclassifier.models import MODELS
    from vlmclassifier.tiny import make_tiny
    from vlmclassifier.vlm import load_vlm

    images = [draw(random.Random(f"{args.seed}:{number}")) for number in range(args.pictures)]
    with tempfile.TemporaryDirectory() as folder:
        weights = args.vlm or make_tiny(MODELS["llava-1.5-7b"], Path(folder) / "tiny", args.seed)

        def answers(place: str, dtype: str, size: int) -> list[str]:
            vlm, found = load_vlm("llava-1.5-7b", weights, place, dtype), []
            prompt = vlm.prompt("What type of object is in this photo?")
            for start in range(0, len(images), size):
                part = images[start : start + size]
                found += vlm.generate(vlm.prepare(part, [prompt] * len(part)), 16)
            return found

        reference = answers("cpu", "float32", 8)
        others = {"float32": (device, "float32", 8), "bfloat16": (device, "bfloat16", 8),
                  "bfloat16, one by one": (device, "bfloat16", 1)}  # fmt: skip
        equal = {name: answers(*how) for name, how in others.items()}
    print(f"answers of {args.vlm or 'a random miniature'} compared with float32 on the CPU", flush=True)
    return {name: sum(a == b for a, b in zip(found, reference, strict=True)) / len(images)
            for name, found in equal.items()}  # fmt: skip


def build(args: Args, device: str) -> object:
    """LLaVA-1.5-7B on the device, with random weights; with --smoke the same classes, small."""
    import torch
    from transformers import CLIPVisionConfig, GenerationConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    text = {}
    if args.smoke:
        vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
        text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(image_size=336, patch_size=14, projection_dim=768, **vision)
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(vocab_size=32064, **text),
                         image_token_index=32000)  # fmt: skip
    torch.manual_seed(args.seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)  # no end token
    return model


def throughput(model: object, size: int, args: Args, device: str) -> dict | str:
    """Pictures and new tokens per second at one batch size, and the peak memory; or that it does not fit."""
    import torch

    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    prompt = [1, *[32000] * 576, *range(100, 116)]  # begin token, picture, a short question
    inputs = {
        "input_ids": torch.tensor([prompt] * size, device=device),
        "attention_mask": torch.ones(size, len(prompt), dtype=torch.long, device=device),
        "pixel_values": torch.randn(size, 3, 336, 336, device=device, dtype=torch.bfloat16),
    }
    times = []
    try:
        for _ in range(args.repeats + 1):  # the first one warms up
            start = time.perf_counter()
            with torch.inference_mode():
                sequences = model.generate(**inputs, max_new_tokens=args.new_tokens)
            sequences.cpu()  # waits for the device
            times.append(time.perf_counter() - start)
    except torch.OutOfMemoryError:
        print(f"batch {size}: {OUT_OF_MEMORY}", flush=True)
        return OUT_OF_MEMORY
    seconds = sorted(times[1:])[args.repeats // 2]
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    found = {"pictures_per_second": round(size / seconds, 3),
             "new_tokens_per_second": round(size * args.new_tokens / seconds, 1),
             "peak_gib": None if peak is None else round(peak, 2)}  # fmt: skip
    print(f"batch {size}: {found}", flush=True)
    return found


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
