"""The pending batches of several prompt settings for the same images, one lease after the other."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL.Image import Image

from vlmclassifier.benchmarks import Evaluation
from vlmclassifier.images import image_sizes, open_image, prefetch
from vlmclassifier.prompts import PromptSetting
from vlmclassifier.records import ContextError, Example, Prediction, Question, images_named
from vlmclassifier.runs import Run, pending_together
from vlmclassifier.vlm.model import VLM, Batch

CONTEXT_CANDIDATES = 16  # prompts with the most characters, among which the one with the most tokens is searched


@dataclass
class PendingBatch:
    """The images of a lease that have no answer in one setting yet, with the questions of this setting."""

    setting: PromptSetting
    examples: list[Example]
    questions: list[Question]
    batch: Batch
    image_features: list[Any] | None = None  # one per row; None: `VLM.generate` encodes the images

    def predictions(self, answers: Sequence[str]) -> list[Prediction]:
        """The predictions to record, one per image of the batch, from the model's answers."""
        predictions = []
        for example, question, prompt, answer in zip(
            self.examples, self.questions, self.batch.prompts, answers, strict=True
        ):
            predictions.append(
                Prediction(example.id, example.label, example.class_index, prompt, question.choices, answer, None)
            )
        return predictions


def pending_batches(
    vlm: VLM, task: Evaluation, runs: Mapping[PromptSetting, Run], batch_size: int
) -> Iterator[PendingBatch]:  # fmt: skip
    """Yield every pending batch of the runs, while a background thread prepares the next ones.

    Several settings share each image: it is opened once, and encoded once if the features can be reused. Raises
    UserError for an image that cannot be opened, and for a prompt without an image token.
    """
    examples = {example.id: example for example in task.examples}

    def load(leases: list[list[str]]) -> tuple[dict[str, Image], list[PendingBatch]]:
        images: dict[str, Image] = {}
        batches = []
        for setting, ids in zip(runs, leases, strict=True):
            for example_id in ids:
                if example_id not in images:
                    example = examples[example_id]
                    images[example_id] = open_image(example.image, task.root, example.row)
            if ids:
                lease_images = [images[example_id] for example_id in ids]
                lease_examples = [examples[example_id] for example_id in ids]
                batches.append(_pending_batch(vlm, setting, lease_examples, lease_images))
        return images, batches

    for _, (images, batches) in prefetch(pending_together(list(runs.values()), batch_size), load):
        if len(runs) > 1:
            features = vlm.encode_images(list(images.values()), batches[0].batch.prompts[0])
            if features is not None:
                features_by_id = dict(zip(images, features, strict=True))
                for pending in batches:
                    pending.image_features = [features_by_id[example.id] for example in pending.examples]
        yield from batches


def _pending_batch(vlm: VLM, setting: PromptSetting, examples: list[Example], images: list[Image]) -> PendingBatch:
    questions = [setting.question(example) for example in examples]
    prompts = [vlm.prompt(question.text, setting.chain_of_thought) for question in questions]
    with images_named([example.place for example in examples]):
        return PendingBatch(setting, examples, questions, vlm.prepare(images, prompts))


def settings_too_long(
    vlm: VLM, task: Evaluation, settings: Sequence[PromptSetting], max_new_tokens: int
) -> dict[PromptSetting, str]:
    """The settings whose longest prompt exceeds the model's context, with the reason. To be called before any image."""
    too_long: dict[PromptSetting, str] = {}
    sizes = None
    for setting in settings:
        # With all names or none, the prompts of all images are equally long; K candidates are drawn for each image.
        examples = task.examples[:1] if setting.candidates in ("none", "all") else task.examples
        prompts = [vlm.prompt(setting.question(example).text, setting.chain_of_thought) for example in examples]
        longest_prompts = sorted(prompts, key=len)[-CONTEXT_CANDIDATES:]
        if sizes is None and vlm.image_size_matters(longest_prompts[-1]):
            sizes = image_sizes([example.image for example in task.examples])
        try:
            vlm.check_context(longest_prompts, max_new_tokens, sizes or ())
        except ContextError as error:
            too_long[setting] = str(error)
    return too_long
