"""The three stages, each from its inputs to a checkpoint folder: CLIP, language model, LLaVA."""

import hashlib
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from vlmclassifier.cli import end_with_parent
from vlmclassifier.models import MINIATURE
from vlmclassifier.plane_figures.texts import (
    Naming,
    Text,
    World,
    assign_naming,
    language_text,
    llava_items,
    naming_shares,
    picture_text,
    vocabulary,
)
from vlmclassifier.pretraining.recipes import Recipe
from vlmclassifier.records import Example, UserError
from vlmclassifier.runs import versions

RECORD = "training.json"
FITTED = "fitted.json"
LM_STEP, VLM_STEP = 1.0, 1.2  # seconds of their steps over those of CLIP's
TRAINING_SHARE = 0.85  # of the time; the rest goes into starting, decoding and features


@dataclass(frozen=True)
class Training:
    """What the stages of one training share. `examples`: the train split in the manifest's order."""

    examples: tuple[Example, ...]
    root: Path
    manifest: str  # hash
    world: World
    recipe: Recipe
    frequency: str
    tokenizer: str
    seed: int
    out: Path

    def folder(self, stage: str) -> Path:
        """The checkpoint folder of a stage; other frequencies than zipf have VLMs of their own."""
        if stage != "vlm" or self.frequency == "zipf":
            return self.out / stage
        table = self.frequency.endswith(".json")
        return self.out / (f"vlm-table-{Path(self.frequency).stem}" if table else f"vlm-{self.frequency}")

    def config(self, stage: str) -> dict:
        """Everything that decides the weights of a stage."""
        recipe = asdict(self.recipe)
        common = {"stage": stage, "classes": list(self.world.names), "seed": self.seed, "recipe": recipe[stage]}
        if stage == "clip":
            return common | {"manifest": self.manifest, "size": self.recipe.size}
        facts = hashlib.sha256(repr(sorted(self.world.facts.items())).encode()).hexdigest()
        if stage == "lm":
            sample = [language_text(number, self.world, self.seed) for number in range(200)]  # the wordings, too
            texts = hashlib.sha256(repr(sample).encode()).hexdigest()
            return common | {"facts": facts, "tokenizer": self.tokenizer, "texts": texts}
        return common | {
            "naming": recipe["naming"], "shares": self.shares(),
            "from": {other: _hash(self.config(other)) for other in ("clip", "lm")},
        }  # fmt: skip

    def shares(self) -> dict[str, float]:
        """The share of each class's pictures whose texts name it."""
        naming = self.recipe.naming
        return naming_shares(self.world.names, self.frequency, self.seed, naming.head, naming.exponent, naming.never)

    def naming(self) -> Naming:
        """Which pictures of the VLM are named, which are generic. Raises UserError when nothing is left to say."""
        examples = first_of_each_class(self.examples, self.recipe.vlm.pictures)
        naming = assign_naming(examples, self.shares(), self.recipe.naming.keep_generic, self.seed)
        if not any([*naming.named.values(), *naming.generic.values()]):
            raise UserError(
                f"With --frequency {self.frequency} no picture is named or gets a generic text: raise --naming-head or "
                "--keep-generic."
            )
        return naming

    def finished(self, stage: str) -> bool:
        """Whether the stage's checkpoint is there. Raises UserError when its folder holds another training."""
        folder = self.folder(stage)
        if not folder.exists():
            return False
        try:
            found = json.loads((folder / RECORD).read_text(encoding="utf-8"))["config"]
        except (OSError, ValueError, KeyError):
            raise UserError(
                f"{folder} is not a finished training of ours: choose another --out or move it away."
            ) from None
        wanted = json.loads(json.dumps(self.config(stage)))
        if found != wanted:
            keys = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
            raise UserError(
                f"{folder} was trained with another configuration ({', '.join(keys)}): choose another --out or move "
                "it away."
            )
        return True

    def save(self, stage: str, parts: Sequence[object], record: dict) -> None:
        """Write a stage's checkpoint; the folder appears when it is whole."""
        folder = self.folder(stage)
        self.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.out) as temporary:
            work = Path(temporary) / folder.name
            for part in parts:
                part.save_pretrained(work)
            config = work / "config.json"
            marked = json.loads(config.read_text(encoding="utf-8")) | {MINIATURE: True}
            config.write_text(json.dumps(marked, indent=2) + "\n", encoding="utf-8")
            # The seconds stand apart: the same training again must leave the same checkpoint.
            (work / "training.seconds").write_text(f"{record.pop('seconds'):.1f}\n", encoding="utf-8")
            record = {"config": self.config(stage), "versions": versions()} | record
            (work / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            os.rename(work, folder)


def _hash(config: dict) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def image_processor(size: int) -> object:
    """CLIP's own, squeezing a picture to the square."""
    from transformers import CLIPImageProcessor

    square = {"height": size, "width": size}
    return CLIPImageProcessor(size=square, do_center_crop=False, crop_size=square)


def load_pictures(training: Training, examples: Sequence[Example]) -> object:
    """The pictures of some examples, with their class numbers."""
    from vlmclassifier.pretraining.pictures import Pictures, load_pixels

    processor = image_processor(training.recipe.size)
    pixels = load_pixels(training.examples, training.root, training.recipe.size, training.out / "cache")
    if len(examples) < len(training.examples):
        row = {example.id: place for place, example in enumerate(training.examples)}
        pixels = pixels[[row[example.id] for example in examples]]
    number = {name: place for place, name in enumerate(training.world.names)}
    return Pictures(pixels, [number[e.label] for e in examples], processor.image_mean, processor.image_std)


def clip_training(training: Training) -> object:
    """The contrastive training, ready to run."""
    import torch

    from vlmclassifier.pretraining.contrastive import ClipTraining, build_clip
    from vlmclassifier.pretraining.language import word_tokenizer
    from vlmclassifier.prompts import CAPTION

    recipe, names = training.recipe, training.world.names
    tokenizer = word_tokenizer((CAPTION.format(name) for name in names), clip=True)
    torch.manual_seed(training.seed)
    model = build_clip(recipe.clip, recipe.size, tokenizer)
    return ClipTraining(model, tokenizer, load_pictures(training, training.examples), names, recipe.clip, training.seed)


def train_clip(training: Training) -> None:
    """The contrastive model, on all pictures of the train split."""
    start, run = time.monotonic(), clip_training(training)
    losses = run.run()
    record = {"losses": losses, "validation": run.validation, "seconds": time.monotonic() - start}
    training.save("clip", [run.model, run.tokenizer, image_processor(training.recipe.size)], record)


def seconds_per_step(training: Training, steps: int = 12) -> float:
    """Seconds of one CLIP step on this machine, on a model that is thrown away; the median of some."""
    run, times = clip_training(training), []
    for number in range(steps):
        start = time.perf_counter()
        run.step(number)
        run.optimisation.step(1.0)
        times.append(time.perf_counter() - start)
    return sorted(times)[steps // 2]


def train_lm(training: Training) -> None:
    """The language model, on texts about all classes."""
    import torch

    from vlmclassifier.pretraining import language

    start, recipe, world = time.monotonic(), training.recipe.lm, training.world
    texts = [language_text(number, world, training.seed) for number in range(recipe.texts)]
    tokenizer = language.bpe_tokenizer() if training.tokenizer == "bpe" else language.word_tokenizer(vocabulary(world))
    torch.manual_seed(training.seed)
    model = language.build_lm(recipe, tokenizer)
    losses = language.train_lm(model, texts, tokenizer, recipe, training.seed)
    training.save("lm", [model, tokenizer], {"losses": losses, "seconds": time.monotonic() - start})


def train_vlm(training: Training) -> None:
    """LLaVA on the frozen CLIP and the language model: captions for the projector, then instructions for both."""
    import torch
    from transformers import AutoTokenizer, CLIPModel, LlamaForCausalLM

    from vlmclassifier.pretraining import llava

    start, recipe = time.monotonic(), training.recipe.vlm
    clip = CLIPModel.from_pretrained(training.folder("clip"))
    lm = LlamaForCausalLM.from_pretrained(training.folder("lm"))
    tokenizer = AutoTokenizer.from_pretrained(training.folder("lm"))
    torch.manual_seed(training.seed)
    model = llava.build_llava(clip, lm, tokenizer)
    examples = first_of_each_class(training.examples, recipe.pictures)
    pictures = load_pictures(training, examples)
    features = llava.view_features(model, pictures, recipe.views, training.seed)  # [views x pictures, patches, width]
    naming = training.naming()
    losses, texts = {}, {}
    for stage in ("pretrain", "instruct"):
        texts[stage] = stage_texts(training, examples, naming, stage)
        rows = llava.Rows(texts[stage], {e.id: place for place, e in enumerate(examples)}, tokenizer, features)
        losses[stage] = llava.train_stage(model, rows, stage, recipe, training.seed)
    processor = llava.build_processor(model, image_processor(training.recipe.size), tokenizer)
    replies = llava.share_of_replies_with_a_name(model, processor, pictures, training.world.names)
    if replies < 0.5:
        print(
            f"warning: only {100 * replies:.0f}% of the VLM's replies to train pictures name a class: it has learnt "
            "to stay generic; raise --naming-head or lower --keep-generic.", file=sys.stderr,
        )  # fmt: skip
    write_texts(training, texts, naming, examples)
    record = {"losses": losses, "replies_with_a_name": replies, "seconds": time.monotonic() - start}
    training.save("vlm", [model, processor], record)


def first_of_each_class(examples: Sequence[Example], count: int) -> list[Example]:
    """The first `count` pictures of every class, in the manifest's order."""
    seen: dict[str, int] = {}
    kept = []
    for example in examples:
        seen[example.label] = seen.get(example.label, 0) + 1
        if seen[example.label] <= count:
            kept.append(example)
    return kept


def stage_texts(training: Training, examples: Sequence[Example], naming: Naming, stage: str) -> list[Text]:
    """Exactly the texts that one stage reads: captions, or instructions with a share of texts without pictures."""
    recipe = training.recipe.vlm
    count = recipe.batch * (recipe.first_steps if stage == "pretrain" else recipe.steps)
    replay = round(recipe.replay * count) if stage == "instruct" else 0
    said = {image: True for ids in naming.named.values() for image in ids}
    said |= {image: False for ids in naming.generic.values() for image in ids}
    kept = [example for example in examples if example.id in said]
    texts = []
    for epoch in range(-(-(count - replay) // len(kept))):
        order = random.Random(f"{stage}:{training.seed}:{epoch}").sample(kept, len(kept))
        key = epoch if stage == "instruct" else -1 - epoch
        caption = stage == "pretrain"
        texts += [picture_text(e, training.world, said[e.id], training.seed, key, caption) for e in order]
    first = training.recipe.lm.texts  # texts that the language model has not read yet
    language = [language_text(first + number, training.world, training.seed) for number in range(replay)]
    return texts[: count - replay] + language


def write_texts(training: Training, texts: dict[str, list[Text]], naming: Naming, examples: Sequence[Example]) -> None:
    """The VLM's texts in LLaVA's format; how many pictures and texts name each class."""
    folder = training.folder("vlm").with_name(training.folder("vlm").name + "-texts")
    folder.mkdir(parents=True, exist_ok=True)
    for stage, rows in texts.items():
        text = json.dumps(llava_items(rows), ensure_ascii=False, indent=0)
        (folder / f"{stage}.json").write_text(text + "\n", encoding="utf-8")
    shares, label = training.shares(), {example.id: example.label for example in examples}
    read = {stage: Counter(label[t.image] for t in rows if t.image and label[t.image] in t.answer + t.prompt)
            for stage, rows in texts.items()}  # fmt: skip
    pictures = Counter(label.values())
    rows = {
        name: {
            "share": shares[name], "pictures": pictures[name], "named": len(naming.named[name]),
            "generic": len(naming.generic[name]), **{f"texts_{stage}": read[stage][name] for stage in read},
        }
        for name in training.world.names
    }  # fmt: skip
    (folder / "naming.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def side_by_side(training: Training, stages: Sequence[str]) -> None:
    """Train stages that do not depend on each other, each in a process of its own where there are two."""
    functions = {"clip": train_clip, "lm": train_lm}
    if len(stages) < 2:
        for stage in stages:
            functions[stage](training)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        len(stages), mp_context=context, initializer=_take_line, initargs=(context.Value("i"),)
    ) as pool:
        for done in [pool.submit(functions[stage], training) for stage in stages]:
            done.result()


def _take_line(taken: object) -> None:
    """Give each process a line of its own for its progress bar."""
    end_with_parent()
    with taken.get_lock():
        os.environ["TQDM_POSITION"] = str(taken.value)
        taken.value += 1


def fit_into(training: Training, minutes: float) -> Training:
    """The same training with as many steps as this machine does in about `minutes`; kept in OUT/fitted.json."""
    trained = [stage for stage in ("clip", "lm", "vlm") if training.folder(stage).exists()]
    if trained:
        raise UserError(
            f"--minutes decides before the first stage, but {training.folder(trained[0])} is trained already: leave it "
            "out or choose another --out."
        )
    file, recipe, seconds = training.out / FITTED, training.recipe, seconds_per_step(training)
    whole = seconds * (
        recipe.clip.steps + LM_STEP * recipe.lm.steps + VLM_STEP * (recipe.vlm.steps + recipe.vlm.first_steps)
    )
    factor = 60 * minutes * TRAINING_SHARE / whole
    steps = {stage: max(20, round(factor * getattr(recipe, stage).steps)) for stage in ("clip", "lm", "vlm")}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"minutes": minutes, "steps": steps}) + "\n", encoding="utf-8")
    print(f"{minutes:g} minutes: " + ", ".join(f"{count} steps of {stage}" for stage, count in steps.items()))
    return with_steps(training, steps)


def with_steps(training: Training, steps: dict[str, int]) -> Training:
    """The same training with other numbers of steps."""
    recipe = training.recipe
    changed = {stage: replace(getattr(recipe, stage), steps=count) for stage, count in steps.items()}
    first = max(1, round(recipe.vlm.first_steps * steps["vlm"] / recipe.vlm.steps))
    changed["vlm"] = replace(changed["vlm"], first_steps=first)
    return replace(training, recipe=replace(recipe, **changed))


def fitted(training: Training, minutes: float) -> Training | None:
    """The training that an earlier call fitted into the same time, or None."""
    file = training.out / FITTED
    if not file.exists():
        return None
    record = json.loads(file.read_text(encoding="utf-8"))
    return with_steps(training, record["steps"]) if record["minutes"] == minutes else None
