"""From training rows to batches: prompts with images by the model's processor, answers behind them, labels.

A row's prompt is exactly what the model is asked with at evaluation; the tokens of its answer are those that follow it.
Prompts are padded on the left, as the processor does it, answers on the right; padding is masked on both sides.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from vlmclassifier.images import open_image, random_crop
from vlmclassifier.prompts import TEMPLATES
from vlmclassifier.ranking.names import separator
from vlmclassifier.records import UserError
from vlmclassifier.vlm import VLM
from vlmclassifier.vlm.model import DEFAULT_SIZE

IGNORED = -100  # label of a token that is not predicted
# What the processor returns per token, and what a token of an answer gets there. PaliGemma attends to its prompt in
# both directions (type 0), to its answer in one (type 1); elsewhere type 0 is text.
TOKEN_KEYS = {"input_ids": None, "attention_mask": 1, "token_type_ids": 0, "mm_token_type_ids": 0}


class Encoded(NamedTuple):
    """The prompt of a row's first turn, and the tokens behind it."""

    prompt: str
    ids: list[int]
    is_label: list[bool]  # whether a token is predicted: those of the answers and their end tokens


def encode_row(vlm: VLM, row: Mapping[str, Any], suffix: str = "") -> Encoded:
    """Encode a row; `suffix`: what the processor appends to a prompt with an image.

    Raises UserError for a text-only row of a model that needs an image, and for an empty answer.
    """
    tokenizer, has_image = vlm.processor.tokenizer, bool(row["image"])
    if not has_image and hasattr(vlm.model, "qformer"):
        raise UserError(f"Row {row['id']} has no image, which {vlm.spec.key} cannot be trained without: remove it.")
    if not row["turns"] or not all(turn["answer"].strip() for turn in row["turns"]):
        raise UserError(f"Row {row['id']} has no answer: fix or remove it.")
    ids: list[int] = []
    is_label: list[bool] = []
    prompt = text = vlm.prompt(row["turns"][0]["question"], image=has_image)
    for place, turn in enumerate(row["turns"]):
        if place:
            question = next_prompt(vlm, turn["question"])
            tokens = tokenizer(question, add_special_tokens=False)["input_ids"]
            ids, is_label, text = ids + tokens, is_label + [False] * len(tokens), question
        tokens = answer_ids(tokenizer, text + suffix, turn["answer"])
        if not tokens:
            raise UserError(f"The answer {turn['answer']!r} of row {row['id']} has no tokens: rename it.")
        ids, is_label = ids + tokens + [end_token(vlm)], is_label + [True] * (len(tokens) + 1)
    return Encoded(prompt, ids, is_label)


def check_answers(vlm: VLM, answers: Sequence[str]) -> None:
    """Raise UserError for an answer that the tokenizer has no tokens for."""
    for answer in answers:
        if not answer_ids(vlm.processor.tokenizer, vlm.prompt("What?", image=False), answer):
            raise UserError(f"The class name {answer!r} has no tokens for {vlm.spec.key}: rename it.")


def end_token(vlm: VLM) -> int:
    """The token that ends an answer: the tokenizer's, which generation stops at."""
    return vlm.processor.tokenizer.eos_token_id


def answer_ids(tokenizer: Any, prompt: str, answer: str) -> list[int]:
    """The tokens of an answer behind a prompt, tokenised together with it as in the ranking of names."""
    space = separator(prompt)
    joint = tokenizer(f"{prompt}{space}{answer}", add_special_tokens=False)["input_ids"]
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    while before and before[-1] == tokenizer.eos_token_id and joint[-1:] == before[-1:]:
        before, joint = before[:-1], joint[:-1]  # a tokenizer that appends an end token
    if joint[: len(before)] == before:
        return joint[len(before) :]
    return tokenizer(f"{space}{answer}", add_special_tokens=False)["input_ids"]  # it would change the prompt's tokens


def next_prompt(vlm: VLM, question: str) -> str:
    """The text of a later question of a dialogue, without image and without the template's system sentence."""
    if vlm.spec.template is not None:
        template = TEMPLATES[vlm.spec.template].replace("<image>\n", "").replace("<image>", "")
        start = template.find("USER:")
        return template[max(start, 0) :].format(question=question, thought="")
    first = [{"role": "user", "content": [{"type": "text", "text": "Q"}]}]
    answered = [*first, {"role": "assistant", "content": [{"type": "text", "text": "A"}]}]
    asked = [*answered, {"role": "user", "content": [{"type": "text", "text": question}]}]
    render = vlm.processor.apply_chat_template
    before, text = render(answered), render(asked, add_generation_prompt=True)
    if not text.startswith(before):
        raise UserError(
            f"The chat template of {vlm.spec.key} renders a dialogue in another way than its parts: train it on rows "
            "of one turn."
        )
    return text[len(before) :]


class Collator:
    """Makes a batch of rows: the model's inputs, `labels`, and `row_ids`.

    `max_length`: the largest number of tokens; the end of an answer is cut, never an image token or a prompt.
    `augment`: a random crop and flip of every image, by this seed, the epoch (which the trainer sets) and the row.
    """

    def __init__(self, vlm: VLM, max_length: int | None = None, augment: int | None = None) -> None:
        context = getattr(vlm.model.config.get_text_config(), "max_position_embeddings", None)
        self.vlm, self.augment, self.epoch = vlm, augment, 0
        prompt, tokenizer = vlm.prompt("What?"), vlm.processor.tokenizer
        self.suffix = vlm.prompt_suffix(prompt)
        with_image = vlm.process([Image.new("RGB", DEFAULT_SIZE)], [prompt])["input_ids"][0].tolist()
        alone = tokenizer(vlm.prompt("What?", image=False))["input_ids"]
        self.adds_bos = tokenizer.bos_token_id in with_image and tokenizer.bos_token_id not in alone
        self.max_length = min(filter(None, (max_length, context)), default=None)
        self.pad = vlm.processor.tokenizer.pad_token_id or 0
        self.computes_positions = hasattr(vlm.model.base_model, "rope_deltas")  # Qwen-VL, from the attention mask
        self.answer_values = dict(TOKEN_KEYS)
        self.answer_values["token_type_ids"] = int(vlm.model.config.model_type == "paligemma")

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch. `labels` [batch, tokens] have IGNORED wherever nothing is predicted. Raises UserError."""
        encoded = [encode_row(self.vlm, row, self.suffix) for row in rows]
        inputs = self.prompts(rows, [one.prompt for one in encoded])
        encoded = [
            self._cut(*pair) for pair in zip(encoded, inputs["attention_mask"].sum(dim=1).tolist(), rows, strict=True)
        ]
        width = max(len(one.ids) for one in encoded)
        labels = torch.full_like(inputs["input_ids"], IGNORED)  # [batch, prompt]
        answers = torch.full((len(rows), width), self.pad)  # [batch, answer]
        is_real = torch.zeros((len(rows), width), dtype=torch.long)
        answer_labels = torch.full((len(rows), width), IGNORED)
        for number, one in enumerate(encoded):
            count = len(one.ids)
            answers[number, :count], is_real[number, :count] = torch.tensor(one.ids), 1
            answer_labels[number, :count] = torch.tensor(one.ids).masked_fill(~torch.tensor(one.is_label), IGNORED)
        for key, value in self.answer_values.items():
            if key in inputs:
                behind = {"input_ids": answers, "attention_mask": is_real}.get(
                    key, torch.full_like(answers, value or 0)
                )
                inputs[key] = torch.cat([inputs[key], behind], dim=1)  # [batch, prompt + answer]
        if not self.computes_positions:
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
        return inputs | {"labels": torch.cat([labels, answer_labels], dim=1), "row_ids": [row["id"] for row in rows]}

    def prompts(self, rows: Sequence[Mapping[str, Any]], prompts: Sequence[str]) -> dict[str, Tensor]:
        """The processor's output for prompts with and without images, padded on the left to one length."""
        with_image = [number for number, row in enumerate(rows) if row["image"]]
        text_only = [number for number, row in enumerate(rows) if not row["image"]]
        parts: list[tuple[list[int], dict[str, Tensor]]] = []
        if with_image:
            images = [self.open(rows[number]) for number in with_image]
            batch = self.vlm.prepare(images, [prompts[number] for number in with_image])
            parts.append((with_image, dict(batch.inputs)))
        if text_only:
            parts.append((text_only, self.text_inputs([prompts[number] for number in text_only])))
        length = max(inputs["input_ids"].shape[1] for _, inputs in parts)
        joined: dict[str, Tensor] = dict(parts[0][1]) if with_image else {}
        for key in TOKEN_KEYS:
            if not any(key in inputs for _, inputs in parts):
                continue
            fill = self.pad if key == "input_ids" else 0
            joined[key] = torch.full((len(rows), length), fill)
            for numbers, inputs in parts:
                values = inputs.get(key, torch.zeros_like(inputs["input_ids"]))
                joined[key][numbers, length - values.shape[1] :] = values
        return joined

    def open(self, row: Mapping[str, Any]) -> Any:
        """The image of a row."""
        image = open_image(row["image"], row["root"], f"row {row['id']}")
        return image if self.augment is None else random_crop(image, f"{self.augment}:{self.epoch}:{row['id']}")

    def text_inputs(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Prompts without images, with the begin token as beside an image."""
        tokenizer = self.vlm.processor.tokenizer
        options = {}
        if tokenizer.bos_token and prompts[0].startswith(tokenizer.bos_token):
            options["add_special_tokens"] = False
        found = dict(tokenizer(list(prompts), padding=True, return_tensors="pt", **options))
        if self.adds_bos and "add_special_tokens" not in options:  # PaliGemma's processor adds it, its tokenizer not
            texts = [tokenizer.bos_token + prompt for prompt in prompts]
            found = dict(tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False))
        if self.vlm.model.config.model_type == "paligemma":
            found["token_type_ids"] = torch.zeros_like(found["input_ids"])  # the type of the prompt
        return {key: value for key, value in found.items() if key in TOKEN_KEYS}

    def _cut(self, encoded: Encoded, prompt_length: int, row: Mapping[str, Any]) -> Encoded:
        """The row with at most `max_length` tokens. Raises UserError where nothing that is predicted would be left."""
        if self.max_length is None or prompt_length + len(encoded.ids) <= self.max_length:
            return encoded
        room = max(0, self.max_length - prompt_length)
        if not any(encoded.is_label[:room]):
            raise UserError(
                f"Row {row['id']} has a prompt of {prompt_length} tokens, and no room for its answer in "
                f"{self.max_length}: raise --max-length or remove the row."
            )
        return Encoded(encoded.prompt, encoded.ids[:room], encoded.is_label[:room])
