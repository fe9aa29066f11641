"""Benchmark a fine-tuning step against transformers' plain Trainer, which computes the logits of all tokens.

    python scripts/bench/bench_training.py
    python scripts/bench/bench_training.py --size 7b --device cuda

Prints one JSON object on the last line: projector_vs_plain_trainer and lora_vs_plain_trainer, the time of a plain step
over ours, at about 600 tokens per row and a vocabulary of 32,000; medians over the steps, in turns, in one process (CPU
time of the process on the CPU). --size 7b builds LLaVA-1.5-7B's architecture with random weights: seconds per step of
--batch rows, model FLOP utilisation against --peak, and peak memory, for the projector and for LoRA of rank 128.
"""

import json
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vlmclassifier import cli
from vlmclassifier.generated_images import generated_image

QUESTION, VOCABULARY, IMAGE_TOKENS = "What type of object is in this photo?", 32_000, 576


@dataclass
class Args:
    size: Literal["small", "7b"] = "small"
    """small: 4 layers of width 256, for ratios; 7b: LLaVA-1.5-7B's architecture."""
    device: str = "cpu"
    """cpu or cuda."""
    batch: int = 8
    """Rows per forward pass (7b: 64 rows per step in parts of this size)."""
    steps: int = 5
    """Measured steps, after one that is not."""
    turns: int = 3
    """Turns of both trainers."""
    peak: float = 989e12
    """7b: peak FLOP per second of the device in bfloat16; the default is an H100's."""


def main(args: Args) -> None:
    """Measure and print."""
    import torch

    torch.set_num_threads(1)
    result: dict[str, Any] = {"benchmark": "training", "size": args.size, "tokens": IMAGE_TOKENS, "batch": args.batch}
    with tempfile.TemporaryDirectory() as folder:
        rows = make_rows(Path(folder), 64 if args.size == "7b" else args.batch)
        for name, choice in (("projector", "projector"), ("lora", "lora")):
            if args.size == "7b":
                result |= {f"{name}_{key}": value for key, value in measure_large(args, choice, rows, folder).items()}
                continue
            plain, ours = [], []
            for _ in range(args.turns):
                plain += step_seconds(args, build(args, choice), rows, Path(folder), is_plain=True)
                ours += step_seconds(args, build(args, choice), rows, Path(folder), is_plain=False)
            result[f"{name}_vs_plain_trainer"] = round(statistics.median(plain) / statistics.median(ours), 3)
            result[f"{name}_seconds"] = round(statistics.median(ours), 3)
    print(json.dumps(result))


def make_rows(folder: Path, count: int) -> list[dict[str, Any]]:
    """Rows about generated images with class names as answers."""
    names = ["cat", "sea lion", "black-footed ferret", "2012 Tesla Model S Sedan"]
    rows = []
    for number in range(count):
        generated_image(random.Random(number)).save(folder / f"{number}.png")
        rows.append({"id": str(number), "image": str(folder / f"{number}.png"), "root": str(folder),
                     "turns": [{"question": QUESTION, "answer": names[number % len(names)]}]})  # fmt: skip
    return rows


def build(args: Args, choice: str) -> Any:
    """A LLaVA model with random weights, with the trained parts of a choice."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from vlmclassifier.finetuning.parts import Lora, select_trained
    from vlmclassifier.models import MODELS
    from vlmclassifier.tiny import make_tiny
    from vlmclassifier.vlm import load_vlm

    is_large = args.size == "7b"
    vision = {} if not is_large else {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                                      "num_attention_heads": 16, "projection_dim": 768}  # fmt: skip
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    few = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}
    with tempfile.TemporaryDirectory() as folder:  # tokenizer and processor of the miniature
        make_tiny(MODELS["llava-1.5-7b"], Path(folder) / "tiny")
        vlm = load_vlm("llava-1.5-7b", Path(folder) / "tiny", "cpu")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=336, patch_size=14, **(vision or small)),
        text_config=LlamaConfig(vocab_size=VOCABULARY + 64, **(text if is_large else few)),
        image_token_id=vlm.model.config.image_token_id, image_seq_length=IMAGE_TOKENS,
    )  # fmt: skip
    torch.manual_seed(0)
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    with torch.device(args.device):
        model = LlavaForConditionalGeneration(config).to(dtype)
    size = {"shortest_edge": 336}
    vlm.processor.image_processor.size, vlm.processor.image_processor.crop_size = size, {"height": 336, "width": 336}
    vlm.processor.patch_size = 14
    vlm.model = model.eval()
    select_trained(model, choice, Lora(dropout=0.0) if is_large else Lora(16, 32, 0.0))
    return vlm


def step_seconds(args: Args, vlm: Any, rows: list[dict[str, Any]], folder: Path, is_plain: bool) -> list[float]:
    """Seconds of each measured step of the plain Trainer or of ours."""
    from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments

    from vlmclassifier.finetuning.collator import Collator
    from vlmclassifier.finetuning.trainer import VlmTrainer

    parts = max(1, len(rows) // args.batch)
    options = TrainingArguments(
        str(folder / "run"), per_device_train_batch_size=args.batch, gradient_accumulation_steps=parts,
        max_steps=args.steps + 1, save_strategy="no", report_to=[], logging_steps=1, remove_unused_columns=False,
        use_cpu=args.device == "cpu", bf16=args.device.startswith("cuda"), disable_tqdm=True,
    )  # fmt: skip
    collate = Collator(vlm)

    def without_ids(batch: list[dict[str, Any]]) -> dict[str, Any]:
        return {key: value for key, value in collate(batch).items() if key != "row_ids"}

    clock = time.process_time if args.device == "cpu" else time.perf_counter
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments: Any, **more: Any) -> None:
            """Note the time; the loss has been read, so that a device has finished."""
            if args.device != "cpu":
                import torch

                torch.cuda.synchronize()
            times.append(clock())

    if is_plain:
        trainer = Trainer(vlm.model, options, data_collator=without_ids, train_dataset=rows)
    else:
        trainer = VlmTrainer(vlm, options, collate, rows, {}, lora_rate=2e-4)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Clock())
    trainer.train()
    return [second - first for first, second in zip(times, times[1:], strict=False)]


def measure_large(args: Args, choice: str, rows: list[dict[str, Any]], folder: str) -> dict[str, float]:
    """Seconds per step, FLOP utilisation and peak memory of LLaVA-1.5-7B's architecture."""
    import torch

    vlm = build(args, choice)
    torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(step_seconds(args, vlm, rows, Path(folder), is_plain=False))
    language = sum(parameter.numel() for name, parameter in vlm.model.named_parameters()
                   if "language_model" in name and "embed_tokens" not in name)  # fmt: skip
    tokens = len(rows) * (IMAGE_TOKENS + 20)
    flops = 4 * language * tokens  # forward, and backward for the inputs alone: the large matrices are frozen
    memory = torch.cuda.max_memory_allocated() / 2**30
    return {"seconds": round(seconds, 3), "mfu": round(flops / seconds / args.peak, 3), "peak_gib": round(memory, 1)}


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
