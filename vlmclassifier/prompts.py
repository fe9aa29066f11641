"""What is asked: wordings, candidate lists, chat templates (paper sections 1 and 2)."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from vlmclassifier.records import Example, Question, UserError

WORDINGS = {
    "base": "What type of object is in this photo?",
    "alternative_1": "Identify the object in this image.",
    "alternative_2": "What is the main object depicted in this photograph?",
    "alternative_3": "Can you name the specific item pictured here?",  # in the reference code only
}

# {thought} is empty or THOUGHT. A model without an entry here uses its processor's own chat template.
TEMPLATES = {
    "llava-1.5": "USER: <image>\n{question}\nASSISTANT:{thought}",
    "llava-next-vicuna": (
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the human's questions. USER: <image>\n{question} ASSISTANT:{thought}"
    ),
    "llava-next-mistral": "[INST] <image>\n{question}[/INST]{thought}",
    "blip": "Question: {question}{thought} Answer:",
    "paligemma": "<image>answer en {question}{thought}",  # the form that the mix checkpoints were trained on
}
THOUGHT = " Let's think step by step."
CAPTION = "a photo of a {}"  # CLIP's prompt, without ensembling


@dataclass(frozen=True)
class Way:
    """One way of asking about a picture."""

    candidates: str  # none, all or K
    order: str  # of the candidates: random or fixed
    wording: str  # a key of WORDINGS


def ways(
    candidates: Sequence[str],
    order: Sequence[str],
    wording: Sequence[str],
    names: Sequence[str],
    chain_of_thought: bool = False,
    seed: int = 0,
) -> dict[str, Way]:
    """Every combination, by the name of its setting; the order counts only where candidates are listed.

    Raises UserError for candidates that are neither none, all nor a number that fits `names`.
    """
    asked: dict[str, Way] = {}
    for way in itertools.starmap(Way, itertools.product(candidates, order, wording)):
        parse_candidates(way.candidates, names)
        setting = setting_name(way.candidates, way.wording, way.order, chain_of_thought, seed)
        asked.setdefault(setting, way)
    return asked


def parse_candidates(candidates: str, names: Sequence[str]) -> int | None:
    """Number of candidates for --candidates none|all|K: None for none, all distinct names for all.

    Raises UserError when K is not a number, below 2 or above the number of distinct names.
    """
    distinct = len(set(names))
    if candidates in ("none", "all"):
        return None if candidates == "none" else distinct
    if not candidates.isdecimal():
        raise UserError(f"--candidates {candidates} is neither none, all nor a number: write one of these.")
    if not 2 <= int(candidates) <= distinct:
        raise UserError(f"--candidates {candidates} is outside 2 to {distinct}, the number of class names: lower it.")
    return int(candidates)


def draw_candidates(
    example: Example, names: Sequence[str], count: int, order: str = "random", seed: int = 0
) -> tuple[str, ...]:
    """`count` distinct class names, the true one among them, drawn by (seed, example id) alone.

    `order`: "random" shuffles them per image, "fixed" keeps the order of the class list (paper section 2).
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


def build_question(
    example: Example,
    names: Sequence[str],
    candidates: int | None,
    wording: str = "base",
    order: str = "random",
    seed: int = 0,
) -> Question:
    """The question about one picture; a closed world appends the list of candidates (paper section 1).

    One pair of quotes holds the whole list, as in the paper's runs: a name that has a comma is not set apart.
    """
    text = WORDINGS[wording]
    if candidates is None:
        return Question(text, None, example.label)
    choices = draw_candidates(example, names, candidates, order, seed)
    return Question(f'{text} Choose one from "{", ".join(choices)}".', choices, example.label)


def new_tokens(chain_of_thought: bool) -> int:
    """The paper's limit of new tokens (section 1)."""
    return 512 if chain_of_thought else 64


def setting_name(
    candidates: str, wording: str = "base", order: str = "random", chain_of_thought: bool = False, seed: int = 0
) -> str:
    """The name of a way of asking, in the words of `paper.csv` where it has them: "open_world", "20_classes"."""
    worlds = {"none": "open_world", "all": "closed_world"}
    parts = [worlds.get(candidates, f"{candidates}_classes")]
    if wording != "base":
        parts.append(f"prompt_{wording}")
    if order == "fixed" and candidates != "none":
        parts.append("label_fixed_order")
    if chain_of_thought:
        parts.append("cot")
    if seed != 0 and candidates != "none":
        parts.append(f"seed_{seed}")
    return "-".join(parts)
