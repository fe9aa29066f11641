"""Whether a checkpoint is the model that its name in the registry stands for, and what fine-tuned weights belong to."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlmclassifier.models import MODELS, ModelSpec, is_miniature
from vlmclassifier.paths import listed_fingerprint
from vlmclassifier.records import UserError, first_line
from vlmclassifier.runs.provenance import fingerprint

# What a training leaves in a folder: such weights are not the released ones, whatever the folder is called.
TRAINING_FILES = ("trainer_state.json", "training_args.bin", "optimizer.pt", "training.json", "adapter_config.json")


def checkpoint_tags(spec: ModelSpec, checkpoint: Path) -> list[str]:
    """What makes a checkpoint differ from the registered model, as tags of its runs; empty where nothing is known.

    Raises UserError for a config that is not a JSON object.
    """
    if is_miniature(checkpoint):
        return ["miniature"]
    if spec.key not in MODELS or spec.source is None:
        return []
    tags = []
    if any((checkpoint / name).exists() for name in TRAINING_FILES):
        tags.append("trained further")
    if spec.sizes is not None and (sizes := model_sizes(spec, checkpoint)) not in (None, spec.sizes):
        tags.append(f"{sizes[0]} wide, {sizes[1]} layers")
    return tags


def model_sizes(spec: ModelSpec, checkpoint: Path) -> tuple[int, int] | None:
    """Width and number of layers of the language model, of CLIP its image encoder; None where they are not stored."""
    if checkpoint.is_file():  # of weights, whose shapes the architecture of the registry decides
        return None
    file = checkpoint / "open_clip_config.json"
    try:
        if spec.kind == "clip" and file.is_file():
            vision: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["model_cfg"]["vision_cfg"]
            return vision["width"], vision["layers"]
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
        part = config.vision_config if spec.kind == "clip" else config.get_text_config()
        return part.hidden_size, part.num_hidden_layers
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # loading it says what is wrong
        return None


def is_verified(spec: ModelSpec, digest: str) -> bool:
    """Whether the registry, or [fingerprints] of paths.toml, lists this fingerprint for the model."""
    return digest in spec.fingerprints or digest == listed_fingerprint(spec.key)


TRAINING_RECORD = "training.json"
MERGED_FILE = "merged.json"  # in a checkpoint of merge.py: what was merged into what


def training_record(folder: Path) -> dict[str, Any]:
    """The record of a folder of training_analysis/finetune_vlm.py. Raises UserError where there is none."""
    try:
        record = json.loads((folder / TRAINING_RECORD).read_text(encoding="utf-8"))
        if not isinstance(record["config"]["train"], str):
            raise ValueError("no configuration of a fine-tuning")
        return record
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} holds no weights of training_analysis/finetune_vlm.py ({first_line(error)}): give the folder "
            "best or last of a training."
        ) from None


@dataclass(frozen=True)
class Adapter:
    """Fine-tuned weights of a checkpoint, with the record of their training."""

    folder: Path
    record: dict[str, Any]
    is_merged: bool = False  # whether the folder is a whole checkpoint, by merge.py

    @property
    def config(self) -> dict[str, Any]:
        """What run.json says of them: the table's setting comes from it."""
        trained = self.record["config"]
        epoch = self.record.get("epochs", {}).get("epoch")
        return {
            "fingerprint": fingerprint(self.folder), "train": trained["train"], "benchmark": trained["benchmark"],
            "wording": "caption" if trained["captions"] else trained.get("wording", "base"),
            "captions": bool(trained["captions"]), "mix": self.mixed, "rule": self.folder.name,
            "epoch": epoch,
        }  # fmt: skip

    @property
    def mixed(self) -> list[str]:
        """The files of conversations that were trained on beside the benchmark."""
        return [name for name, _, _ in self.record["config"]["mix"]]

    @property
    def tags(self) -> list[str]:
        """What tables call them, and in what their training differs from the paper's."""
        return [self.tag, *self.record.get("deviations", [])]

    @property
    def tag(self) -> str:
        """What tables call them."""
        trained = self.record["config"]
        what = "captions of " if trained["captions"] else ""
        mixed = f" + {', '.join(self.mixed)}" if self.mixed else ""
        return f"fine-tuned: {trained['train']} on {what}{trained['benchmark']}{mixed}, {self.folder.name}"

    def prompt_options(self, template: str | None, pad_square: bool, image_size: int | None) -> dict[str, Any]:
        """Template, padding and image size of a further training: those that were trained where none are given."""
        trained = self.record["config"]
        return {
            "template": template or trained["template"], "pad_square": pad_square or trained["pad_square"],
            "image_size": image_size or trained.get("image_size"),
        }  # fmt: skip

    def spec(self, spec: ModelSpec) -> ModelSpec:
        """The model with the prompt template that it was trained with."""
        return replace(spec, template=self.record["config"]["template"])


def read_adapter(folder: Path | None, spec: ModelSpec, checkpoint: Path) -> Adapter | None:
    """The fine-tuned weights in a folder, or those that are merged into the checkpoint itself; None where it has none.

    Raises UserError where they belong to another checkpoint.
    """
    if folder is None:
        is_merged = checkpoint.is_dir() and (checkpoint / MERGED_FILE).exists()
        return Adapter(checkpoint, training_record(checkpoint), True) if is_merged else None
    adapter = Adapter(folder, training_record(folder))
    trained = adapter.record["config"]
    if trained["checkpoint"] != fingerprint(checkpoint):
        raise UserError(
            f"{folder} was trained on another checkpoint of {trained['model']} than {checkpoint}: give the one that "
            "was trained (--model, --weights)."
        )
    return adapter
