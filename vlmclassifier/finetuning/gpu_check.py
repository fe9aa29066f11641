"""The part of gpu_check.py that trains: losses on the device against the CPU's, and sharded by FSDP2 and DeepSpeed."""

import importlib.util
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from vlmclassifier.generated_images import generated_image
from vlmclassifier.paths import PROJECT_ROOT

STEPS, BATCH, IMAGES = 3, 8, 32
NOT_MEASURED = "not measured"
CONFIGURATIONS = {"fsdp2": "fsdp2.yaml", "zero2": "zero2.yaml"}  # in training_analysis/


def check_training(folder: Path, device: str) -> dict[str, float | str]:
    """The largest relative difference of a step's loss from the CPU's in float32, by way of training.

    Trains a miniature's projector and LoRA by finetune_vlm.py for STEPS steps. `folder`: an empty folder. A sharded
    training that fails is reported by its last line.
    """
    from vlmclassifier.models import MODELS
    from vlmclassifier.tiny import make_tiny

    weights = make_tiny(MODELS["llava-1.5-7b"], folder / "tiny")
    data = write_data(folder / "data")
    command = ["training_analysis/finetune_vlm.py", "--model", "llava-1.5-7b", "--weights", weights, *data,
               "--train", "projector+lora", "--lora-rank", 4, "--lora-alpha", 8, "--lora-dropout", 0, "--steps", STEPS,
               "--held-out", 0, "--effective-batch", BATCH]  # fmt: skip
    reference = train([*command, "--device", "cpu", "--dtype", "float32", "--batch-size", BATCH], folder / "cpu")
    if isinstance(reference, str):
        return {"cpu": reference}
    found: dict[str, float | str] = {}
    for dtype in ("float32", "bfloat16"):
        losses = train([*command, "--device", device, "--dtype", dtype, "--batch-size", BATCH], folder / dtype)
        found[dtype] = difference(losses, reference)
    for name, file in CONFIGURATIONS.items():
        if device == "cpu" or (name == "zero2" and importlib.util.find_spec("deepspeed") is None):
            found[name] = NOT_MEASURED
            continue
        import torch

        count = 1 << (min(torch.cuda.device_count(), BATCH).bit_length() - 1)  # divides the batch
        launch = ["-m", "accelerate.commands.launch", "--config_file", f"training_analysis/{file}", "--num_processes",
                  count]  # fmt: skip
        losses = train([*launch, *command, "--dtype", "bfloat16", "--batch-size", BATCH // count], folder / name)
        found[f"{name}, {count} GPUs, bfloat16"] = difference(losses, reference)
    print(f"training: {found}", flush=True)
    return found


def write_data(folder: Path) -> list[object]:
    """A manifest of generated images of two classes, as options."""
    folder.mkdir(parents=True)
    rows = []
    for number in range(IMAGES):
        generated_image(random.Random(number)).save(folder / f"{number}.png")
        split = "train" if number < IMAGES - 4 else "test"
        rows.append({"image": f"{number}.png", "label": ["cat", "sea lion"][number % 2], "split": split})
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "classes.json").write_text('["cat", "sea lion"]', encoding="utf-8")
    return ["--benchmark", folder / "mine.jsonl", "--classes", folder / "classes.json"]


def train(command: Sequence[object], out: Path) -> list[float] | str:
    """The losses of a training in a process of its own, or the last line of its message."""
    from vlmclassifier.finetuning.spikes import read_steps

    words = [sys.executable, *map(str, command), "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(PROJECT_ROOT)}
    if "-m" not in words:  # one process uses one GPU
        environment.setdefault("CUDA_VISIBLE_DEVICES", "0")
    done = subprocess.run(words, cwd=PROJECT_ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return next((line for line in lines if line.startswith("error: ")), lines[-1])
    return [step.loss for step in read_steps(out / "loss.csv")]


def difference(losses: list[float] | str, reference: list[float]) -> float | str:
    """The largest relative difference, or the message of a training that failed."""
    if isinstance(losses, str):
        return losses
    return round(max(abs(a - b) / b for a, b in zip(losses, reference, strict=True)), 6)
