"""Protects: our training loss is that of TRL's trainer where TRL is given the same tokens.

Where they differ (docs/correctness.md) is asserted too, so that a change of TRL shows.
"""

import pytest
import torch
from PIL import Image
from test_training_canaries import LORA, Setup

from vlmclassifier.finetuning import parts
from vlmclassifier.finetuning.collator import IGNORED, Collator
from vlmclassifier.finetuning.loss import row_losses

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.slow


def example(vlm, row, end=None):
    """A row as TRL takes it; it adds no begin token and no end token to a prompt with an image."""
    tokenizer, (turn,) = vlm.processor.tokenizer, row["turns"]
    prompt, begin = vlm.prompt(turn["question"]), tokenizer.bos_token or ""
    ids = vlm.process([Image.open(row["image"])], [prompt])["input_ids"][0].tolist()
    if tokenizer.bos_token_id not in ids or prompt.startswith(begin):
        begin = ""
    space = "" if prompt.endswith((" ", "\n")) else " "
    completion = f"{space}{turn['answer']}{tokenizer.eos_token if end is None else end}"
    return {"images": [Image.open(row["image"]).convert("RGB")], "prompt": begin + prompt, "completion": completion}


def trainer_of(vlm, rows, folder, size=4):
    from datasets import Dataset

    options = trl.SFTConfig(
        str(folder), report_to=[], use_cpu=True, max_length=None, gradient_checkpointing=False, bf16=False,
        disable_tqdm=True, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size, max_steps=1,
        learning_rate=0.0, logging_steps=1, save_strategy="no",
    )  # fmt: skip
    data = Dataset.from_list([example(vlm, row) for row in rows])
    return trl.SFTTrainer(vlm.model, options, train_dataset=data, processing_class=vlm.processor)


@pytest.mark.parametrize("key", ["llava-1.5-7b", "internvl3-8b"])
def test_the_loss_is_that_of_trl(key, tiny, tmp_path):
    """Over several divisions of a step."""
    setup = Setup(tiny, tmp_path)
    vlm = setup.vlm(key)
    parts.select_trained(vlm.model, "projector", LORA)
    batch = Collator(vlm)(setup.rows)
    items = (batch["labels"] != IGNORED).sum()
    vlm.model.eval()
    with torch.no_grad():
        ours = (row_losses(vlm.model, batch).sum() / items).item()
    for size in (4, 2, 1):  # of a step of four rows of different lengths
        trainer = trainer_of(vlm, setup.rows, tmp_path / "trl", size)
        trainer.train()
        (loss,) = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert loss == pytest.approx(ours, rel=1e-5)


def test_where_trl_differs(tiny, tmp_path):
    """No end token of its own, and a limit on the length that cuts image tokens."""
    setup = Setup(tiny, tmp_path)
    vlm = setup.vlm()
    image, end = vlm.model.config.image_token_id, vlm.processor.tokenizer.eos_token_id
    collator = trainer_of(vlm, setup.rows, tmp_path / "trl").data_collator
    labels = collator([example(vlm, setup.rows[0], end="")])["labels"][0]
    assert labels[labels != IGNORED][-1] != end
    whole = collator([example(vlm, setup.rows[0])])["input_ids"]
    collator.max_length = 12
    cut = collator([example(vlm, setup.rows[0])])["input_ids"]
    assert (cut == image).sum() < (whole == image).sum()
