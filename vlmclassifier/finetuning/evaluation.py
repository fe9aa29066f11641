"""Answers of the model in training to its own kind of rows, by generation."""

import os
from typing import Any

import torch

from vlmclassifier.images import open_image
from vlmclassifier.records import Prediction
from vlmclassifier.scoring import contains
from vlmclassifier.vlm import VLM


def mixed_precision(vlm: VLM) -> torch.autocast:
    """Autocast as in training, where trained parts are in float32 beside a model in bfloat16; nothing otherwise."""
    dtypes = {parameter.dtype for parameter in vlm.model.parameters()}
    return torch.autocast(vlm.model.device.type, torch.bfloat16, enabled=len(dtypes) > 1)


def count_right(vlm: VLM, rows: Any, batch_size: int, new_tokens: int) -> tuple[int, int]:
    """Right answers, by containment (paper, section 2), and rows, of this process's part of the rows."""
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    right = n = 0
    for start in range(rank * batch_size, len(rows), processes * batch_size):
        batch = [rows[number] for number in range(start, min(start + batch_size, len(rows)))]
        images = [open_image(row["image"], row["root"], f"row {row['id']}") for row in batch]
        prompts = [vlm.prompt(row["turns"][0]["question"]) for row in batch]
        with mixed_precision(vlm):
            answers = vlm.generate(vlm.prepare(images, prompts), new_tokens)
        for row, answer in zip(batch, answers, strict=True):
            right += contains(Prediction(row["id"], row["label"], 0, "", None, answer, None))
        n += len(batch)
    return right, n
