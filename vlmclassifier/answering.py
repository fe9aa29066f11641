"""Answer the pending questions of a run with a local vision-language model: in words, or by ranking candidates."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from vlmclassifier.finetuning.collator import Collator
from vlmclassifier.finetuning.loss import row_losses
from vlmclassifier.images import image_sizes, open_image, prefetch
from vlmclassifier.questions.items import ChoiceQuestion, image_file
from vlmclassifier.questions.settings import QuestionSetting
from vlmclassifier.records import Prediction, UserError, images_named
from vlmclassifier.runs import Run
from vlmclassifier.vlm import VLM

OwnName = Callable[[ChoiceQuestion], str]
CONTEXT_CANDIDATES = 16  # prompts with the most characters, among which the one with the most tokens is searched


class Answerer:
    """Answers questions in one setting. `root`: the folder that image paths start from. `groups`: id -> group."""

    def __init__(
        self, vlm: VLM, setting: QuestionSetting, root: Path, groups: Mapping[str, int], max_new_tokens: int,
        own_name: OwnName | None = None,
    ) -> None:  # fmt: skip
        if not setting.has_image and hasattr(vlm.model, "qformer"):
            raise UserError(f"{vlm.spec.key} cannot answer without an image: leave out --given {setting.given}.")
        self.vlm, self.setting, self.root, self.groups = vlm, setting, root, groups
        self.max_new_tokens, self.own_name = max_new_tokens, own_name
        self.collator = Collator(vlm)

    def answer_pending(self, run: Run, questions: Sequence[ChoiceQuestion], batch_size: int) -> Iterator[int]:
        """Answer what a run has no row for; yields the number of rows of each batch when they are recorded."""
        of_id = {question.id: question for question in questions}
        for _, batch in prefetch(run.pending(batch_size), lambda ids: [self._load(of_id[one]) for one in ids]):
            with images_named([question.place for question, _ in batch]):
                run.append(self._rank(batch) if self.setting.is_ranked else self._generate(batch))
            yield len(batch)

    def _load(self, question: ChoiceQuestion) -> tuple[ChoiceQuestion, object]:
        if not self.setting.has_image or self.setting.is_ranked:  # of ranked rows the collator opens it
            return question, None
        return question, open_image(image_file(self.root, question), self.root, question.row)

    def prompt(self, question: ChoiceQuestion) -> str:
        """The whole prompt of a question."""
        text = self.setting.shown(question, self.own_name)
        return self.vlm.prompt(text, self.setting.has_thought, image=self.setting.has_image)

    def _generate(self, batch: Sequence[tuple[ChoiceQuestion, object]]) -> list[Prediction]:
        prompts = [self.prompt(question) for question, _ in batch]
        if self.setting.has_image:
            inputs = self.vlm.prepare([image for _, image in batch], prompts)
            answers = self.vlm.generate(inputs, self.max_new_tokens)
        else:
            answers = self.vlm.generate_text(self.collator.text_inputs(prompts), self.max_new_tokens)
        return [self._row(question, prompt, answer, None)
                for (question, _), prompt, answer in zip(batch, prompts, answers, strict=True)]  # fmt: skip

    @torch.inference_mode()
    def _rank(self, batch: Sequence[tuple[ChoiceQuestion, object]]) -> list[Prediction]:
        """Order the candidates by the log-probability of their tokens and the end token behind the prompt."""
        rows = []
        for question, _ in batch:
            text = self.setting.shown(question, self.own_name)
            image = str(image_file(self.root, question)) if self.setting.has_image else ""
            rows += [{"id": question.id, "image": image, "root": str(self.root),
                      "turns": [{"question": text, "answer": candidate}]}
                     for candidate in self.setting.candidates(question)]  # fmt: skip
        losses: list[float] = []
        for start in range(0, len(rows), len(batch)):
            losses += row_losses(self.vlm.model, self.collator(rows[start : start + len(batch)])).tolist()
        predictions, start = [], 0
        for question, _ in batch:
            own = losses[start : start + len(question.options)]
            start += len(own)
            if not all(loss == loss for loss in own):
                raise UserError(f"{question.place}: a log-probability is not finite: use --dtype float32 or bfloat16.")
            order = tuple(sorted(range(len(own)), key=own.__getitem__))
            best = self.setting.candidates(question)[order[0]]
            predictions.append(self._row(question, self.prompt(question), best, order))
        return predictions

    def _row(
        self, question: ChoiceQuestion, prompt: str, output: str, ranking: tuple[int, ...] | None
    ) -> Prediction:  # fmt: skip
        return self.setting.row(question, self.groups[question.id], prompt, output, ranking)

    def check_context(self, questions: Sequence[ChoiceQuestion]) -> None:
        """Raise ContextError when the longest prompt and its answer do not fit."""
        prompts = sorted((self.prompt(question) for question in questions), key=len)[-CONTEXT_CANDIDATES:]
        if not self.setting.has_image:
            return
        sizes = ()
        if self.vlm.image_size_matters(prompts[-1]):
            sizes = image_sizes([str(image_file(self.root, question)) for question in questions])
        self.vlm.check_context(prompts, 16 if self.setting.is_ranked else self.max_new_tokens, sizes)
