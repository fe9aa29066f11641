"""The three training stages, each from its inputs to a checkpoint folder: CLIP, language model, LLaVA."""

import hashlib
import json
import math
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partialmethod
from pathlib import Path

from vlmclassifier.cli import end_with_parent, worker_context
from vlmclassifier.mini.corpus import (
    CorpusSpec,
    LabelAssignment,
    Text,
    assign_labels,
    image_text,
    language_text,
    llava_items,
    naming_shares,
    vocabulary_texts,
)
from vlmclassifier.mini.recipes import BlipRecipe, Recipe
from vlmclassifier.models import MINIATURE
from vlmclassifier.records import Example, UserError
from vlmclassifier.runs.provenance import versions

STAGES = ("clip", "lm", "vlm")
RECORD_FILE = "training.json"


@dataclass(frozen=True)
class Training:
    """The inputs that all stages of one training share."""

    examples: tuple[Example, ...]  # the train split in the manifest's order
    root: Path  # data root
    manifest: str  # hash of the manifest
    corpus: CorpusSpec
    recipe: Recipe
    frequency: str  # zipf, permuted, uniform or a JSON file
    tokenizer: str  # words or bpe
    seed: int
    out: Path
    blip: BlipRecipe = BlipRecipe()

    def folder(self, stage: str) -> Path:
        """Return the checkpoint folder of a stage. Every frequency except zipf has a VLM folder of its own."""
        if stage != "vlm" or self.frequency == "zipf":
            return self.out / stage
        if self.frequency.endswith(".json"):
            return self.out / f"vlm-table-{Path(self.frequency).stem}"
        return self.out / f"vlm-{self.frequency}"

    def config(self, stage: str) -> dict:
        """Return everything that decides the weights of a stage."""
        recipe = asdict(self.recipe)
        common = {"stage": stage, "classes": list(self.corpus.names), "seed": self.seed, "recipe": recipe.get(stage)}
        if stage == "clip":
            return common | {"manifest": self.manifest, "size": self.recipe.size}
        if stage == "lm":
            facts = hashlib.sha256(repr(sorted(self.corpus.facts.items())).encode()).hexdigest()
            # A sample of the texts changes with the prompt wordings, which the facts do not include.
            sample = [language_text(number, self.corpus, self.seed) for number in range(200)]
            texts = hashlib.sha256(repr(sample).encode()).hexdigest()
            return common | {"facts": facts, "tokenizer": self.tokenizer, "texts": texts}
        blip = {"recipe": recipe["vlm"], "blip": asdict(self.blip)} if stage == "blip" else {}
        return common | blip | {
            "naming": recipe["naming"], "shares": self.shares(),
            "from": {other: _hash(self.config(other)) for other in ("clip", "lm")},
        }  # fmt: skip

    def shares(self) -> dict[str, float]:
        """Return the share of each class's images whose texts name the class."""
        naming = self.recipe.naming
        return naming_shares(self.corpus.names, self.frequency, self.seed, naming.head, naming.exponent, naming.never)

    def label_assignment(self) -> LabelAssignment:
        """Return which of the VLM's training images are named and which are generic.

        Raises UserError when no image has a text.
        """
        examples = first_images_per_class(self.examples, self.recipe.vlm.images)
        assignment = assign_labels(examples, self.shares(), self.recipe.naming.keep_generic, self.seed)
        if not any([*assignment.named.values(), *assignment.generic.values()]):
            raise UserError(
                f"With --frequency {self.frequency} no image is named or gets a generic text: raise --naming-head or "
                "--keep-generic."
            )
        return assignment

    def finished(self, stage: str) -> bool:
        """Return whether the stage's checkpoint exists.

        Raises UserError when its folder contains the checkpoint of another training, or something else.
        """
        folder = self.folder(stage)
        if not folder.exists():
            return False
        try:
            recorded = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))["config"]
        except (OSError, ValueError, KeyError):
            raise UserError(
                f"{folder} is not a finished training of this project: choose another --out or move it away."
            ) from None
        current = json.loads(json.dumps(self.config(stage)))
        if recorded != current:
            keys = sorted(key for key in recorded.keys() | current.keys() if recorded.get(key) != current.get(key))
            raise UserError(
                f"{folder} was trained with another configuration ({', '.join(keys)}): choose another --out or move "
                "it away."
            )
        return True

    def save(self, stage: str, parts: Sequence[object], record: dict, seconds: float) -> None:
        """Write a stage's checkpoint. The folder appears only when it is complete.

        `parts`: objects with `save_pretrained`; `record`: what training.json contains beside configuration and
        versions; `seconds`: the training time.
        """
        folder = self.folder(stage)
        self.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.out) as temporary:
            unfinished = Path(temporary) / folder.name
            for part in parts:
                part.save_pretrained(unfinished)
            config_file = unfinished / "config.json"
            config = json.loads(config_file.read_text(encoding="utf-8")) | {MINIATURE: True}
            config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            # The time has a file of its own, which is not part of the checkpoint's hash: a repeated training must
            # write the same checkpoint.
            (unfinished / "training.seconds").write_text(f"{seconds:.1f}\n", encoding="utf-8")
            record = {"config": self.config(stage), "versions": versions()} | record
            (unfinished / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            os.rename(unfinished, folder)


def _hash(config: dict) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def image_processor(size: int) -> object:
    """Return CLIP's image processor, set to resize images to `size` x `size` pixels without cropping."""
    from transformers import CLIPImageProcessor

    square = {"height": size, "width": size}
    return CLIPImageProcessor(size=square, do_center_crop=False, crop_size=square)


def load_training_images(training: Training, examples: Sequence[Example]) -> object:
    """Return the TrainingImages of some examples of the train split, labelled with class numbers."""
    from vlmclassifier.mini.training_images import TrainingImages, load_pixels

    processor = image_processor(training.recipe.size)
    pixels = load_pixels(training.examples, training.root, training.recipe.size, training.out / "cache")
    if len(examples) < len(training.examples):
        row_of_id = {example.id: row for row, example in enumerate(training.examples)}
        pixels = pixels[[row_of_id[example.id] for example in examples]]
    class_number = {name: number for number, name in enumerate(training.corpus.names)}
    labels = [class_number[example.label] for example in examples]
    return TrainingImages(pixels, labels, processor.image_mean, processor.image_std)


def build_clip_training(training: Training) -> object:
    """Return the ClipTraining of an untrained CLIP, on all images of the train split."""
    import torch

    from vlmclassifier.mini.contrastive import ClipTraining, build_clip
    from vlmclassifier.mini.language import word_tokenizer
    from vlmclassifier.prompts import CAPTION

    recipe, names = training.recipe, training.corpus.names
    tokenizer = word_tokenizer((CAPTION.format(name) for name in names), clip=True)
    torch.manual_seed(training.seed)
    model = build_clip(recipe.clip, recipe.size, tokenizer)
    images = load_training_images(training, training.examples)
    return ClipTraining(model, tokenizer, images, names, recipe.clip, training.seed)


def train_clip(training: Training) -> None:
    """Train CLIP on all images of the train split and save it."""
    start = time.monotonic()
    clip_training = build_clip_training(training)
    losses = clip_training.run()
    record = {"losses": losses, "validation": clip_training.validation}
    parts = [clip_training.model, clip_training.tokenizer, image_processor(training.recipe.size)]
    training.save("clip", parts, record, time.monotonic() - start)


def train_lm(training: Training) -> None:
    """Train the language model on texts about all classes and save it."""
    import torch

    from vlmclassifier.mini import language

    start, recipe, corpus = time.monotonic(), training.recipe.lm, training.corpus
    texts = [language_text(number, corpus, training.seed) for number in range(recipe.texts)]
    if training.tokenizer == "bpe":
        tokenizer = language.bpe_tokenizer()
    else:
        tokenizer = language.word_tokenizer(vocabulary_texts(corpus))
    torch.manual_seed(training.seed)
    model = language.build_lm(recipe, tokenizer)
    losses = language.train_lm(model, texts, tokenizer, recipe, training.seed)
    training.save("lm", [model, tokenizer], {"losses": losses}, time.monotonic() - start)


def train_vlm(training: Training) -> None:
    """Train LLaVA on the frozen CLIP and the language model and save it.

    Stage "pretrain" trains the projector on captions, stage "instruct" projector and language model on instructions.
    """
    import torch
    from transformers import AutoTokenizer, CLIPModel, LlamaForCausalLM

    from vlmclassifier.mini import llava

    start, recipe = time.monotonic(), training.recipe.vlm
    clip = CLIPModel.from_pretrained(training.folder("clip"))
    lm = LlamaForCausalLM.from_pretrained(training.folder("lm"))
    tokenizer = AutoTokenizer.from_pretrained(training.folder("lm"))
    torch.manual_seed(training.seed)
    model = llava.build_llava(clip, lm, tokenizer)
    examples = first_images_per_class(training.examples, recipe.images)
    images = load_training_images(training, examples)
    image_rows = {example.id: row for row, example in enumerate(examples)}
    features = llava.view_features(model, images, recipe.views, training.seed)  # [views, images, patches, width]
    assignment = training.label_assignment()
    losses, texts = {}, {}
    for stage in ("pretrain", "instruct"):
        texts[stage] = stage_texts(training, examples, assignment, stage)
        encoded_texts = llava.EncodedTexts(texts[stage], image_rows, tokenizer, features)
        losses[stage] = llava.train_stage(
            model, llava.trainable(model), encoded_texts, stage, recipe, training.seed
        )  # fmt: skip
    processor = llava.build_processor(model, image_processor(training.recipe.size), tokenizer)
    named_share = llava.share_of_replies_with_a_name(model, processor, images, training.corpus.names)
    if named_share < 0.5:
        print(
            f"warning: only {100 * named_share:.0f}% of the VLM's replies to train images name a class: it has learnt "
            "to answer with generic words; raise --naming-head or lower --keep-generic.", file=sys.stderr,
        )  # fmt: skip
    write_texts(training, texts, assignment, examples)
    record = {"losses": losses, "replies_with_a_name": named_share}
    training.save("vlm", [model, processor], record, time.monotonic() - start)


def train_blip(training: Training) -> None:
    """Train BLIP-2 on CLIP's features, the language model and LLaVA's texts, and save it."""
    import torch
    from transformers import AutoTokenizer, CLIPModel, LlamaForCausalLM

    from vlmclassifier.mini import blip2, llava

    start, recipe, seed = time.monotonic(), training.recipe.vlm, training.seed
    clip = CLIPModel.from_pretrained(training.folder("clip"))
    lm = LlamaForCausalLM.from_pretrained(training.folder("lm"))
    tokenizer = AutoTokenizer.from_pretrained(training.folder("lm"))
    torch.manual_seed(seed)
    model = blip2.build_blip2(clip, lm, tokenizer, training.blip)
    examples = first_images_per_class(training.examples, recipe.images)
    images = load_training_images(training, examples)
    losses = {"vision": blip2.train_vision(model, clip, images, training.blip, seed)}
    features = blip2.image_features(model, images)  # [1, images, 1 + patches, width]
    image_rows = {example.id: row for row, example in enumerate(examples)}
    assignment = training.label_assignment()
    for stage in ("pretrain", "instruct"):
        texts = blip2.without_image_token(stage_texts(training, examples, assignment, stage))
        encoded_texts = llava.EncodedTexts(texts, image_rows, tokenizer, features, training.blip.queries)
        losses[stage] = llava.train_stage(model, blip2.trainable(model), encoded_texts, stage, recipe, seed)
    processor = blip2.build_processor(tokenizer, training.recipe.size, training.blip.queries)
    training.save("blip", [model, processor], {"losses": losses}, time.monotonic() - start)


def first_images_per_class(examples: Sequence[Example], count: int) -> list[Example]:
    """Return the first `count` images of every class, in the manifest's order."""
    counts: Counter[str] = Counter()
    chosen = []
    for example in examples:
        counts[example.label] += 1
        if counts[example.label] <= count:
            chosen.append(example)
    return chosen


def stage_texts(
    training: Training, examples: Sequence[Example], assignment: LabelAssignment, stage: str
) -> list[Text]:  # fmt: skip
    """Return exactly the texts that one stage trains on.

    Stage "pretrain": captions. Stage "instruct": instructions, with a share of texts without images at the end.
    """
    recipe = training.recipe.vlm
    is_pretrain = stage == "pretrain"
    count = recipe.batch * (recipe.pretrain_steps if is_pretrain else recipe.steps)
    replay = 0 if is_pretrain else round(recipe.replay * count)
    is_named = {}
    for ids in assignment.named.values():
        is_named |= dict.fromkeys(ids, True)
    for ids in assignment.generic.values():
        is_named |= dict.fromkeys(ids, False)
    usable = [example for example in examples if example.id in is_named]
    texts = []
    for epoch in range(math.ceil((count - replay) / len(usable))):
        order = random.Random(f"{stage}:{training.seed}:{epoch}").sample(usable, len(usable))
        text_epoch = -1 - epoch if is_pretrain else epoch  # the two stages draw different texts
        for example in order:
            named = is_named[example.id]
            texts.append(image_text(example, training.corpus, named, training.seed, text_epoch, caption=is_pretrain))
    texts = texts[: count - replay]
    first_unused = training.recipe.lm.texts  # the language model was trained on the texts before this number
    for number in range(first_unused, first_unused + replay):
        texts.append(language_text(number, training.corpus, training.seed))
    return texts


def write_texts(
    training: Training, texts: dict[str, list[Text]], assignment: LabelAssignment, examples: Sequence[Example]
) -> None:
    """Write the VLM's training texts in LLaVA's format, and how many images and texts name each class.

    `texts`: stage -> its texts.
    """
    vlm_folder = training.folder("vlm")
    folder = vlm_folder.with_name(f"{vlm_folder.name}-texts")
    folder.mkdir(parents=True, exist_ok=True)
    for stage, stage_list in texts.items():
        items = json.dumps(llava_items(stage_list), ensure_ascii=False, indent=0)
        (folder / f"{stage}.json").write_text(items + "\n", encoding="utf-8")

    label_of = {example.id: example.label for example in examples}
    naming_texts: dict[str, Counter[str]] = {}  # stage -> class -> texts that name it
    for stage, stage_list in texts.items():
        naming_texts[stage] = Counter()
        for text in stage_list:
            if text.image and label_of[text.image] in text.answer + text.prompt:
                naming_texts[stage][label_of[text.image]] += 1
    shares, images = training.shares(), Counter(label_of.values())
    rows = {}
    for name in training.corpus.names:
        rows[name] = {
            "share": shares[name], "images": images[name], "named": len(assignment.named[name]),
            "generic": len(assignment.generic[name]),
        }  # fmt: skip
        for stage, counts in naming_texts.items():
            rows[name][f"texts_{stage}"] = counts[name]
    (folder / "naming.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def train_in_parallel(training: Training, stages: Sequence[str]) -> None:
    """Train the stages "clip" and "lm", which do not depend on each other: two of them in two processes."""
    functions = {"clip": train_clip, "lm": train_lm}
    if len(stages) < 2:
        for stage in stages:
            functions[stage](training)
        return
    context = worker_context("vlmclassifier.mini.contrastive", "vlmclassifier.mini.llava")
    next_line = context.Value("i")
    with ProcessPoolExecutor(
        len(stages), mp_context=context, initializer=_init_stage_process, initargs=(next_line,)
    ) as pool:
        futures = [pool.submit(functions[stage], training) for stage in stages]
        for future in futures:
            future.result()


def _init_stage_process(next_line: object) -> None:
    """Give each process its own line for its progress bar. `next_line`: the first unused line, shared."""
    from tqdm import tqdm

    end_with_parent()
    with next_line.get_lock():
        tqdm.__init__ = partialmethod(tqdm.__init__, position=next_line.value)
        next_line.value += 1
