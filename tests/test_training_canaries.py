"""Protects: each known bug of training VLMs has a canary that fails when the bug is put back, and only that one."""

import functools
import itertools

import pytest
import torch
import torch.utils.checkpoint
from conftest import noise

from vlmclassifier import load_vlm
from vlmclassifier.checkpoints import logits_of, merge_adapter
from vlmclassifier.finetuning import collator, parts, trainer, weights
from vlmclassifier.finetuning.collator import IGNORED, Collator
from vlmclassifier.finetuning.loss import row_losses, summed_loss
from vlmclassifier.finetuning.parts import Lora
from vlmclassifier.identity import Adapter
from vlmclassifier.vlm.parts import find_projector

KEY, TIED = "llava-1.5-7b", "gemma3-4b"
QUESTION = "What type of object is in this photo?"
LORA = Lora(2, 4, 0.0)


class Setup:
    """A miniature, rows about images, and an empty folder."""

    def __init__(self, tiny, folder):
        self.tiny, self.root, self.count = tiny, folder, itertools.count()
        self.rows = []
        for number, answer in enumerate(["cat", "a long name of things", "dog", "a sea lion of the deep"]):
            noise((60, 60), number).save(folder / f"{number}.png")
            self.rows.append({"id": str(number), "image": str(folder / f"{number}.png"), "root": str(folder),
                              "turns": [{"question": QUESTION, "answer": answer}]})  # fmt: skip

    def vlm(self, key=KEY):
        return load_vlm(key, self.tiny / key)

    def folder(self):
        return self.root / f"folder-{next(self.count)}"

    def trained(self, choice):
        """A model whose trained parameters have changed, and the folder they are saved in."""
        vlm, folder = self.vlm(), self.folder()
        with torch.no_grad():
            for parameter in parts.select_trained(vlm.model, choice, LORA).values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        config = {"train": choice, "template": "llava-1.5", "pad_square": False}
        lora = {"rank": 2, "alpha": 4, "dropout": 0.0} if "lora" in choice else None
        weights.save_trained(vlm.model, folder, {"config": config, "lora": lora})
        vlm.model.eval()
        return vlm, folder, Adapter(folder, {"config": config, "lora": lora})

    def prompt(self, vlm):
        return vlm.prepare([noise((60, 60))], [vlm.prompt(QUESTION)])


def the_loss_does_not_depend_on_the_parts(setup):
    """Rows of different lengths, in one part, two or four."""
    vlm = setup.vlm()
    parts.select_trained(vlm.model, "projector", LORA)
    options = trainer.TrainingArguments(str(setup.folder()), report_to=[], use_cpu=True, disable_tqdm=True)
    make, losses = Collator(vlm), []
    runner = trainer.VlmTrainer(vlm, options, make, setup.rows, {})
    for size in (4, 2, 1):
        batches = [make(setup.rows[start : start + size]) for start in range(0, 4, size)]
        items = sum((batch["labels"][:, 1:] != IGNORED).sum() for batch in batches)
        losses.append(sum(runner.compute_loss(vlm.model, batch, num_items_in_batch=items).item() for batch in batches))
    assert max(losses) - min(losses) < 1e-4


def prompts_and_image_tokens_are_masked(setup):
    vlm = setup.vlm()
    batch = Collator(vlm)(setup.rows[:2])
    length = setup.prompt(vlm).inputs["input_ids"].shape[1]
    assert (batch["labels"][:, :length] == IGNORED).all() and (batch["labels"][:, length:] != IGNORED).any(dim=1).all()
    assert (batch["labels"][batch["input_ids"] == vlm.model.config.image_token_id] == IGNORED).all()


def padding_on_either_side_changes_no_loss(setup):
    """A short prompt beside a long one is padded on the left, a short answer beside a long one on the right."""
    vlm = setup.vlm()
    long = setup.rows[1] | {"turns": [{"question": QUESTION * 3, "answer": "a long name of things"}]}
    with torch.no_grad():
        together = row_losses(vlm.model, Collator(vlm)([setup.rows[0], long]))[0]
        alone = row_losses(vlm.model, Collator(vlm)([setup.rows[0]]))[0]
    assert abs(together - alone) < 1e-3


def answers_end_with_the_end_token(setup):
    vlm = setup.vlm()
    for labels in Collator(vlm)(setup.rows)["labels"]:
        assert labels[labels != IGNORED][-1] == vlm.processor.tokenizer.eos_token_id


def lora_comes_back(setup):
    """No key is missing, and the logits change from the base's to the trained model's."""
    vlm, folder, _ = setup.trained("lora")
    other = setup.vlm()
    before = logits_of(other, setup.prompt(other))
    weights.load_trained(other.model, folder)
    other.model.eval()
    after, trained = logits_of(other, setup.prompt(other)), logits_of(vlm, setup.prompt(vlm))
    assert torch.equal(after, trained) and not torch.allclose(after, before, atol=1e-3)


def the_projector_survives_save_reload_and_merge(setup):
    vlm, folder, adapter = setup.trained("projector+lora")
    reloaded, merged = setup.vlm(), setup.vlm()
    weights.load_trained(reloaded.model, folder)
    merge_adapter(merged, adapter)
    for name, parameter in find_projector(vlm.model).named_parameters():
        for other in (reloaded, merged):
            assert torch.equal(find_projector(other.model).get_parameter(name), parameter)


def tied_heads_stay_tied(setup):
    vlm = setup.vlm(TIED)
    assert vlm.model.get_input_embeddings().weight is vlm.model.get_output_embeddings().weight
    parts.select_trained(vlm.model, "all", LORA)
    assert vlm.model.get_input_embeddings().weight is vlm.model.get_output_embeddings().weight


def checkpointed_layers_have_gradients(setup):
    """The embeddings are frozen, so that nothing that enters the first layer needs a gradient."""
    vlm = setup.vlm()
    trained = parts.select_trained(vlm.model, "lora", LORA)
    parts.checkpoint_activations(vlm.model)
    vlm.model.train()
    summed_loss(vlm.model, vlm.model, Collator(vlm)(setup.rows[:1])).backward()
    assert all(parameter.grad is not None for name, parameter in trained.items() if "lora_B" in name)


def a_frozen_vision_encoder_keeps_no_graph(setup):
    vlm, seen = setup.vlm(), []
    parts.select_trained(vlm.model, "projector", LORA)
    find_projector(vlm.model).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].requires_grad))
    summed_loss(vlm.model, vlm.model, Collator(vlm)(setup.rows[:1]))
    assert seen == [False]


def truncation_keeps_every_image_token(setup):
    vlm = setup.vlm()
    whole = Collator(vlm)(setup.rows[1:2])
    cut = Collator(vlm, whole["input_ids"].shape[1] - 2)(setup.rows[1:2])
    image = vlm.model.config.image_token_id
    assert cut["input_ids"].shape[1] == whole["input_ids"].shape[1] - 2
    assert (cut["input_ids"] == image).sum() == (whole["input_ids"] == image).sum()


def lora_is_float32_beside_bfloat16(setup):
    vlm = load_vlm(KEY, setup.tiny / KEY, "cpu", "bfloat16")
    trained = parts.select_trained(vlm.model, "projector+lora", LORA)
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    assert vlm.model.get_input_embeddings().weight.dtype == torch.bfloat16


def mean_of_each_part(patch):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = summed_loss(model, self.vlm.model, inputs) / (inputs["labels"] != IGNORED).sum()
        return loss * len(inputs["labels"]) / 4

    patch.setattr(trainer.VlmTrainer, "compute_loss", compute_loss)


def changed_batches(change):
    """A bug that changes what the collator returns."""

    def put_back(patch):
        original = Collator.__call__
        patch.setattr(Collator, "__call__", lambda self, rows: change(self, original(self, rows)))

    return put_back


def label_everything(self, batch):
    is_first = batch["attention_mask"].cumsum(dim=1) == 1  # nothing predicts it
    return batch | {"labels": batch["input_ids"].masked_fill((batch["attention_mask"] == 0) | is_first, IGNORED)}


def attend_to_padding(self, batch):
    ones = torch.ones_like(batch["attention_mask"])
    return batch | {"attention_mask": ones, "position_ids": ones.cumsum(dim=1) - 1}


def cut_the_front(self, batch):
    if self.max_length is None or self.max_length > 100:
        return batch
    return {key: value[:, 1:] if getattr(value, "ndim", 0) == 2 else value for key, value in batch.items()}


def no_end_token(patch):
    original = collator.encode_row

    def encode(*arguments):
        prompt, ids, is_label = original(*arguments)
        return collator.Encoded(prompt, ids[:-1], is_label[:-1])

    patch.setattr(collator, "encode_row", encode)


def forget_lora(patch):
    """As a loader that is not strict about names."""
    original = weights.load_trained

    def load(model, folder):
        original(model, folder)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.zero_()

    patch.setattr(weights, "load_trained", load)


def forget_the_projector(patch):
    """As PEFT's own saving does without modules_to_save."""
    original = weights.save_trained

    def save(model, folder, record, write=True):
        original(model, folder, record, write)
        if (folder / weights.ADAPTER_FILE).exists():
            (folder / weights.TRAINED_FILE).unlink(missing_ok=True)

    patch.setattr(weights, "save_trained", save)


def changed_selection(change):
    def put_back(patch):
        original = parts.select_trained

        def select(model, choice, *more):
            trained = original(model, choice, *more)
            change(model, choice)
            return trained

        patch.setattr(parts, "select_trained", select)

    return put_back


def untie(model, choice):
    if choice == "all":
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())


def thaw_the_vision_encoder(model, choice):
    if choice == "projector":
        model.model.vision_tower.requires_grad_(True)


def reentrant(patch):
    """As torch's older checkpointing without inputs that need gradients."""
    function = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=True)
    patch.setattr(parts, "checkpoint_activations", lambda model: model._set_gradient_checkpointing(True, function))


def keep_the_models_dtype(model, choice):
    for parameter in model.parameters():
        parameter.data = parameter.data.to(model.dtype)


BUGS = {
    the_loss_does_not_depend_on_the_parts: mean_of_each_part,
    prompts_and_image_tokens_are_masked: changed_batches(label_everything),
    padding_on_either_side_changes_no_loss: changed_batches(attend_to_padding),
    answers_end_with_the_end_token: no_end_token,
    lora_comes_back: forget_lora,
    the_projector_survives_save_reload_and_merge: forget_the_projector,
    tied_heads_stay_tied: changed_selection(untie),
    checkpointed_layers_have_gradients: reentrant,
    a_frozen_vision_encoder_keeps_no_graph: changed_selection(thaw_the_vision_encoder),
    truncation_keeps_every_image_token: changed_batches(cut_the_front),
    lora_is_float32_beside_bfloat16: changed_selection(keep_the_models_dtype),
}


@pytest.fixture
def setup(tiny, tmp_path):
    return Setup(tiny, tmp_path)


@pytest.mark.parametrize("canary", BUGS, ids=lambda canary: canary.__name__)
def test_a_canary_fails_when_its_bug_is_put_back(canary, setup, monkeypatch):
    canary(setup)
    BUGS[canary](monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        canary(setup)


@pytest.mark.slow
@pytest.mark.parametrize("canary", BUGS, ids=lambda canary: canary.__name__)
def test_no_other_canary_fails(canary, setup, monkeypatch):
    BUGS[canary](monkeypatch)
    for other in BUGS:
        if other is not canary:
            other(setup)
