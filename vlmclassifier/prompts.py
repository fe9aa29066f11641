"""The questions: wordings, candidate lists, chat templates (paper, sections 2 and 3.1)."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property

from vlmclassifier.records import Example, Question, UserError

WORDINGS = {
    "base": "What type of object is in this photo?",
    "alternative_1": "Identify the object in this image.",
    "alternative_2": "What is the main object depicted in this photograph?",
    "alternative_3": "Can you name the specific item pictured here?",  # in the reference code only
}
# Questions that models are fine-tuned on (paper, section 4, and the reference code); they are no part of the study of
# wordings. BLIP-2's classification rows of the reference code have none: a caption follows the image.
TRAINED_WORDINGS = {
    "in_the_photo": "What type of object is in the photo?",
    "caption": "Generate a caption for the image.",
    "none": "",
}
QUESTIONS = WORDINGS | TRAINED_WORDINGS

# {thought} is empty or THOUGHT. A model without an entry here uses its processor's own chat template.
TEMPLATES = {
    "llava-1.5": "USER: <image>\n{question}\nASSISTANT:{thought}",
    "llava-v1": (  # of LLaVA's own code: the paper's Table 10
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\n{question} ASSISTANT:{thought}"
    ),
    "llava-next-vicuna": (
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the human's questions. USER: <image>\n{question} ASSISTANT:{thought}"
    ),
    "llava-next-mistral": "[INST] <image>\n{question}[/INST]{thought}",
    "blip": "Question: {question}{thought} Answer:",
    "mini-blip": "USER: {question}\nASSISTANT:{thought}",  # of pretrain_mini.py's BLIP-2, whose image comes first
    "paligemma": "<image>answer en {question}{thought}",  # the form that the mix checkpoints were trained on
}
THOUGHT = " Let's think step by step."
CAPTION = "a photo of a {}"  # CLIP's prompt, without ensembling
ORDERS = ("random", "fixed")


@dataclass(frozen=True)
class PromptSetting:
    """One setting of the question about every image of a benchmark. Made once, from the command line.

    Raises UserError for candidates that are neither none, all nor a number that fits the class list.
    """

    names: tuple[str, ...] = field(repr=False)  # the class list
    candidates: str = "none"  # none (open world), all (closed world), or K
    order: str = "random"  # of the candidates: random per image, or fixed as in the class list
    wording: str = "base"  # a key of QUESTIONS
    chain_of_thought: bool = False
    seed: int = 0  # of the candidate lists; each list depends on (seed, example id) alone

    def __post_init__(self) -> None:
        distinct = len(set(self.names))
        if self.candidates in ("none", "all"):
            return
        if not self.candidates.isdecimal():
            raise UserError(f"--candidates {self.candidates} is neither none, all nor a number: write one of these.")
        if not 2 <= int(self.candidates) <= distinct:
            raise UserError(
                f"--candidates {self.candidates} is outside 2 to {distinct}, the number of class names: change it."
            )

    @cached_property
    def count(self) -> int | None:
        """The number of candidates; None in the open world."""
        if self.candidates == "none":
            return None
        return len(set(self.names)) if self.candidates == "all" else int(self.candidates)

    @cached_property
    def name(self) -> str:
        """The setting column of `paper.csv` where it has this setting: "open_world", "closed_world", "20_classes"."""
        worlds = {"none": "open_world", "all": "closed_world"}
        parts = [worlds.get(self.candidates, f"{self.candidates}_classes")]
        if self.wording != "base":
            parts.append(f"prompt_{self.wording}")
        if self.order == "fixed" and self.candidates != "none":
            parts.append("label_fixed_order")
        if self.chain_of_thought:
            parts.append("cot")
        if self.seed != 0 and self.candidates != "none":
            parts.append(f"seed_{self.seed}")
        return "-".join(parts)

    @property
    def config(self) -> dict[str, str | bool | int]:
        """The setting's part of run.json; `from_config` is the inverse."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "names"}

    @classmethod
    def from_config(cls, config: dict) -> "PromptSetting":
        """The setting of a run, from its run.json."""
        own = {one.name: config[one.name] for one in fields(cls) if one.name != "names"}
        return cls(tuple(config["classes"]), **own)

    def choices(self, example: Example) -> tuple[str, ...] | None:
        """The candidates for one image, the true name among them; None in the open world."""
        if self.count is None:
            return None
        return draw_candidates(example, self.names, self.count, self.order, self.seed)

    def question(self, example: Example) -> Question:
        """The question about one image; a closed world appends the list of candidates (paper, section 2).

        One pair of quotes holds the whole list, as in the paper's runs: a name with a comma is not marked.
        """
        text, choices = QUESTIONS[self.wording], self.choices(example)
        if choices is None:
            return Question(text, None)
        return Question(f'{text} Choose one from "{", ".join(choices)}".', choices)


def prompt_settings(
    names: Sequence[str], candidates: Sequence[str], orders: Sequence[str] = ("random",),
    wordings: Sequence[str] = ("base",), chain_of_thought: bool = False, seed: int = 0,
) -> list[PromptSetting]:  # fmt: skip
    """Every combination, each name once: the order counts only where candidates are listed. Raises UserError."""
    settings: dict[str, PromptSetting] = {}
    for combination in itertools.product(candidates, orders, wordings):
        setting = PromptSetting(tuple(names), *combination, chain_of_thought, seed)
        settings.setdefault(setting.name, setting)
    return list(settings.values())


def clip_settings(names: Sequence[str], candidates: Sequence[str], seed: int = 0) -> list[PromptSetting]:
    """The settings of CLIP, which reads no question: only the set of candidates matters.

    Where all classes are candidates nothing is drawn, so the seed is no part of the setting. Raises UserError.
    """
    if "none" in candidates:
        raise UserError("CLIP always chooses among class names: use --candidates all or a number.")
    return [
        PromptSetting(tuple(names), count, seed=0 if count == "all" else seed) for count in dict.fromkeys(candidates)
    ]


def draw_candidates(
    example: Example, names: Sequence[str], count: int, order: str = "random", seed: int = 0
) -> tuple[str, ...]:
    """`count` distinct class names, the true one among them, drawn by (seed, example id) alone.

    `order`: "random" shuffles them per image, "fixed" keeps the order of the class list (paper, section 3.1).
    """
    distinct = list(dict.fromkeys(names))
    rng = random.Random(f"{seed}:{example.id}")  # a string seed is hashed the same on every machine
    others = [name for name in distinct if name != example.label]
    drawn = [example.label, *rng.sample(others, count - 1)]
    if order == "random":
        rng.shuffle(drawn)
        return tuple(drawn)
    chosen = set(drawn)
    return tuple(name for name in distinct if name in chosen)


def default_new_tokens(chain_of_thought: bool) -> int:
    """The paper's limit of new tokens: 64, with chain of thought 512 (section 2)."""
    return 512 if chain_of_thought else 64
