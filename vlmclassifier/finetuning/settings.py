"""The paper's settings of fine-tuning, and in which of them a training differs: tables compare nothing else."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmclassifier.benchmarks import BENCHMARKS
from vlmclassifier.models import MODELS
from vlmclassifier.records import UserError

# Epochs by benchmark (paper, section 4); "" is every other one.
EPOCHS = {"imagenet": 1, "": 50}
QFORMER_EPOCHS = {"imagenet": 10, "": 100}
LORA = {"rank": 128, "alpha": 256, "dropout": 0.05}
PAPER: dict[str, Any] = {
    "objective": "generation", "weight": 1.0, "steps": None, "learning_rate": 2e-5, "lora_rate": 2e-4, "warmup": 0.03,
    "weight_decay": 0.0, "effective_batch": 64, "max_length": None, "image_size": None, "augment": False,
    "skip_spikes": False, "split": "train",
}  # fmt: skip
QFORMER = PAPER | {"weight_decay": 0.05, "image_size": 364, "augment": True}
PAPERS_CAPTIONER = "gpt-4-turbo"
WORDINGS = ("base", "in_the_photo")  # of the paper and of its code
MIXTURE = ("imagenet", [["llava_v1_5_mix665k.json", 1.0]])  # benchmark, files with weights


def paper_epochs(train: str, benchmark: str) -> int:
    """The paper's number of passes over the train rows."""
    epochs = QFORMER_EPOCHS if train == "qformer" else EPOCHS
    return epochs.get(benchmark, epochs[""])


def deviations(config: Mapping[str, Any]) -> list[str]:
    """In what a training differs from the paper's, as tags; `config`: that of its training.json."""
    is_qformer = config["train"] == "qformer"
    found = []
    for name, value in (QFORMER if is_qformer else PAPER).items():
        own = config[name]
        if own != value and (name != "lora_rate" or config["lora"]):
            found.append(f"{name} {own:g}" if isinstance(own, float) else f"{name} {own}")
    benchmark = BENCHMARKS.get(config["benchmark"])
    papers = benchmark.train_images if benchmark else None
    if papers and config["train_images"] != papers:
        found.append(f"{config['train_images']:,} of {papers:,} train images")
    elif not papers and config["limit"]:
        found.append(f"limit {config['limit']}")
    spec = MODELS.get(config["model"])
    if spec and config["template"] not in (spec.template, "llava-v1"):
        found.append(f"template {config['template']}")
    if config["captions"] and config["captioner"] not in (None, PAPERS_CAPTIONER):
        found.append(f"captions by {config['captioner']}")
    epochs = paper_epochs(config["train"], config["benchmark"])
    if config["steps"] is None and config["epochs"] not in (None, epochs):
        found.append(f"{config['epochs']:g} epochs")
    if not config["captions"] and config["wording"] not in (*WORDINGS, *(["none"] if is_qformer else [])):
        found.append(f"wording {config['wording']}")
    if config["lora"]:
        found += [
            f"LoRA {name} {config['lora'][name]}" for name, value in LORA.items() if config["lora"][name] != value
        ]
    mixed = [[name, weight] for name, _, weight in config["mix"]]
    if mixed and (config["benchmark"], mixed) != MIXTURE:
        found.append("mixed with " + ", ".join(f"{weight:g} x {name}" for name, weight in mixed))
    return found


def accumulated_parts(effective_batch: int, batch_size: int) -> int:
    """Parts of a step that each process computes one after the other. Raises UserError where it does not divide."""
    together = batch_size * processes()
    parts, rest = divmod(effective_batch, together)
    if rest or not parts:
        raise UserError(
            f"--effective-batch {effective_batch} is no multiple of --batch-size {batch_size} x "
            f"{processes()} processes: change one of them."
        )
    return parts


def processes() -> int:
    """Processes of accelerate's launcher."""
    return int(os.environ.get("WORLD_SIZE", 1))


def mixed_files(mix: Sequence[str], image_root: Path | None) -> list[tuple[Path, float]]:
    """The files of the mixture, FILE or FILE=WEIGHT, with their weights. Raises UserError."""
    if mix and image_root is None:
        raise UserError("--mix needs --image-root, the folder that its image paths start from.")
    found = []
    for text in mix:
        file, _, weight = text.partition("=")
        found.append((Path(file), parse_weight(text, weight)))
    return found


def parse_weight(text: str, weight: str) -> float:
    """The weight of a part of the mixture. Raises UserError."""
    try:
        value = float(weight or 1)
    except ValueError:
        value = 0.0
    if not 0 < value < 1000:
        raise UserError(f"--mix {text}: the weight is no number above 0; write FILE.json=0.5.")
    return value


def digest(file: Path) -> str:
    """SHA-256 of a file. Raises UserError where it cannot be read."""
    try:
        with open(file, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): fix the path.") from None


def captioner_of(file: Path | None) -> str | None:
    """The model that wrote a file of captions; None where there is no record of make_captions.py beside it."""
    if file is None or not (record := file.with_name(f"{file.name}.json")).exists():
        return None
    return json.loads(record.read_text(encoding="utf-8")).get("model")


def check_gpus(device: str) -> None:
    """Raise UserError where Trainer would divide every batch over several GPUs, in a step larger than is printed."""
    import torch

    count = torch.cuda.device_count()
    if device.startswith("cuda") and count > 1 and processes() == 1:
        raise UserError(f"This process sees {count} GPUs: start it by accelerate launch, or choose one GPU by "
                        "CUDA_VISIBLE_DEVICES.")  # fmt: skip
