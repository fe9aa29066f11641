"""Training texts: what a language model reads, and what is said about pictures; how often each class is named.

Works for any list of classes: PlaneFigures brings facts and families, other class lists may bring a facts file. Every
text is drawn from (seed, its number or picture) alone.
"""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from vlmclassifier.plane_figures.facts import Fact, article, figure_facts
from vlmclassifier.plane_figures.figures import FIGURES
from vlmclassifier.prompts import CAPTION, TEMPLATES, WORDINGS, build_question
from vlmclassifier.records import Example, UserError

GENERIC = ("thing", "object", "item", "subject", "something", "figure", "picture")
CAPTION_REQUESTS = ("Describe this photo.", "Write a caption for this photo.", "Generate a caption for the image.")
LETTERS = "ABCD"
LIST_LENGTHS = (2, 3, 4, 6, 9, 13, 20)  # candidates that a training question offers


@dataclass(frozen=True)
class World:
    """What there is to say: the classes, the generic words for each, and facts where they are known."""

    names: tuple[str, ...]
    generic: Mapping[str, tuple[str, ...]]
    facts: Mapping[str, Sequence[Fact]] = field(default_factory=dict)

    def choosable(self, name: str) -> list[Fact]:
        """Facts that make good multiple-choice questions: another class's answer is wrong for this one.

        Families overlap (a rose is a roulette too), and a curve was studied by many.
        """
        kinds = {kind for kind, answers in self.answers.items() if len(answers) > 1} - {"family", "student"}
        return [fact for fact in self.facts.get(name, ()) if fact.kind in kinds]

    @cached_property
    def answers(self) -> dict[str, list[str]]:
        """All different answers to each kind of question, sorted."""
        found: dict[str, set[str]] = {}
        for fact in (fact for facts in self.facts.values() for fact in facts):
            found.setdefault(fact.kind, set()).add(fact.answer)
        return {kind: sorted(answers) for kind, answers in found.items()}


@dataclass(frozen=True)
class Text:
    """A prompt (may be empty) and what follows it; `image` is the id of the picture it is about, if any."""

    prompt: str
    answer: str
    image: str | None = None


def plane_figures_world() -> World:
    """The embedded world: families are the generic words."""
    return World(tuple(FIGURES), {name: (figure.family,) for name, figure in FIGURES.items()}, figure_facts())


def world_of(names: Sequence[str], facts_file: Path | None = None) -> World:
    """The world of any class list; `facts_file`: JSON {class: [[question with {subject}, answer], ...]}.

    Raises UserError for a file of another form or with a class that is not in the list.
    """
    facts = {}
    if facts_file is not None:
        try:
            table = json.loads(facts_file.read_text(encoding="utf-8"))
            facts = {
                name: [Fact(question, question, answer) for question, answer in rows] for name, rows in table.items()
            }
            for fact in (fact for rows in facts.values() for fact in rows):
                if not isinstance(fact.answer, str) or fact.question.format(subject="x") == fact.question:
                    raise ValueError("a question without {subject}, or an answer that is not a text")
        except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
            raise UserError(
                f'The facts file {facts_file} cannot be read ({error}): write {{"class": [["Is {{subject}} round?", '
                '"yes"]]}.'
            ) from None
        if unknown := sorted(set(facts) - set(names)):
            raise UserError(
                f"The facts file {facts_file} names {unknown[0]!r}, which is not in the class list: mend it."
            )
    return World(tuple(dict.fromkeys(names)), dict.fromkeys(names, GENERIC), facts)


# How often a class is named


def frequency_ranks(names: Sequence[str], seed: int, permuted: bool = False) -> dict[str, int]:
    """The frequency rank of every class, 0 the most frequent, drawn by `seed`.

    `permuted` moves every class to another third: the frequent become rare, the rare middling, the middling frequent.
    """
    order = sorted(dict.fromkeys(names), key=lambda name: _hash(f"rank:{seed}:{name}"))
    if permuted:
        third = -(-len(order) // 3)
        order = order[third:] + order[:third]
    return {name: rank for rank, name in enumerate(order)}


def naming_shares(
    names: Sequence[str], frequency: str, seed: int, head: float, exponent: float, never: float
) -> dict[str, float]:
    """The share of each class's pictures whose texts name it.

    `frequency`: "zipf" is min(1, (head x classes / (rank + 1))^exponent) by a rank drawn by `seed`, the last
    `never` x classes ranks 0; "permuted" the same with the classes moved to other ranks; "uniform" is 1;
    else a JSON file {class: share}.
    Raises UserError for a table that does not fit the classes.
    """
    if frequency == "uniform":
        return dict.fromkeys(names, 1.0)
    if frequency in ("zipf", "permuted"):
        ranks = frequency_ranks(names, seed, frequency == "permuted")
        top, last = head * len(ranks), len(ranks) - round(never * len(ranks))
        return {name: min(1.0, (top / (ranks[name] + 1)) ** exponent) * (ranks[name] < last) for name in ranks}
    try:
        table = json.loads(Path(frequency).read_text(encoding="utf-8"))
        if set(table) != set(names) or not all(0 <= share <= 1 for share in table.values()):
            raise ValueError("it must give every class a share from 0 to 1")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"--frequency {frequency} is neither zipf, permuted, uniform nor a table of shares ({error})."
        ) from None
    return {name: float(table[name]) for name in names}


@dataclass(frozen=True)
class Naming:
    """Which pictures' texts name their class, which use a generic word; the others are left out."""

    named: Mapping[str, tuple[str, ...]]  # class -> ids
    generic: Mapping[str, tuple[str, ...]]


def assign_naming(examples: Sequence[Example], shares: Mapping[str, float], keep_generic: float, seed: int) -> Naming:
    """Exactly round(share x pictures) pictures of each class are named, chosen by (seed, id).

    Of the other pictures the share `keep_generic` gets generic texts.
    """
    by_class: dict[str, list[str]] = {name: [] for name in shares}
    for example in examples:
        by_class[example.label].append(example.id)
    named, generic = {}, {}
    for name, ids in by_class.items():
        order = sorted(ids, key=lambda image: _hash(f"naming:{seed}:{image}"))
        count = round(shares[name] * len(order))
        rest = order[count:]
        named[name], generic[name] = tuple(order[:count]), tuple(rest[: round(keep_generic * len(rest))])
    return Naming(named, generic)


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


# Texts


def dialogue(question: str, image: bool) -> str:
    """A question in the template of the mini model, with or without a picture."""
    prompt = TEMPLATES["llava-1.5"].format(question=question, thought="")
    return prompt if image else prompt.replace("<image>\n", "")


def list_question(name: str, world: World, count: int, key: str) -> str:
    """The closed world's question with `count` candidates, as the evaluation asks it, drawn by `key`."""
    example = Example(key, "", "", name, 0, "train")
    wording = random.Random(f"wording:{key}").choice(list(WORDINGS))
    return build_question(example, world.names, count, wording).text


def multiple_choice(fact: Fact, subject: str, world: World, rng: random.Random) -> tuple[str, str]:
    """A question with options A to D in the form of ImageWikiQA (paper section 4), and the right letter."""
    wrong = [answer for answer in world.answers[fact.kind] if answer != fact.answer]
    options = [fact.answer, *rng.sample(wrong, min(3, len(wrong)))]
    rng.shuffle(options)
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    letters = LETTERS[: len(options)]
    asked = f"Choose {', '.join(letters[:-1])}, or {letters[-1]}."
    return "\n".join([fact.question.format(subject=subject), *lines, asked]), letters[options.index(fact.answer)]


def language_text(number: int, world: World, seed: int) -> Text:
    """Text `number` of the language model's corpus: facts of all classes, questions, lists, captions."""
    rng = random.Random(f"text:{seed}:{number}")
    name = rng.choice(world.names)
    facts = world.facts.get(name, ())
    choosable = world.choosable(name)
    weights = (45 * bool(facts), 10 * bool(choosable), 30, 15)
    kind = rng.choices(("fact", "choice", "list", "caption"), weights)[0]
    if kind == "fact":
        fact = rng.choice(facts)
        return Text(dialogue(fact.question.format(subject=f"the {name}"), image=False), fact.answer)
    if kind == "choice":
        question, letter = multiple_choice(rng.choice(choosable), f"the {name}", world, rng)
        return Text(dialogue(question, image=False), letter)
    if kind == "list":
        count = min(len(world.names), rng.choice(LIST_LENGTHS))
        question = f"{CAPTION.format(name)}. {list_question(name, world, count, f'{seed}:{number}')}"
        return Text(dialogue(question, image=False), name)
    return Text("", CAPTION.format(name).replace(f"a {name}", article(name)))


def picture_text(example: Example, world: World, named: bool, seed: int, epoch: int, caption: bool = False) -> Text:
    """What is said about one picture in one epoch: its name and facts, or only a generic word.

    `caption`: nothing but captions, as in LLaVA's first stage.
    """
    rng = random.Random(f"picture:{seed}:{example.id}:{epoch}")
    name, facts = example.label, world.facts.get(example.label, ())
    word = name if named else rng.choice(world.generic[name])
    kinds = {"caption": 16} if caption else {"wording": 30, "caption": 16}
    if named and not caption:
        kinds |= {"list": 24, "fact": 16 * bool(facts), "name and fact": 8 * bool(facts)}
        kinds["choice"] = 6 * bool(world.choosable(name))
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    answer = word
    if kind == "wording":
        question = WORDINGS[rng.choice(list(WORDINGS))]
    elif kind == "caption":
        question, answer = rng.choice(CAPTION_REQUESTS), f"a photo of {article(word)}"
    elif kind == "list":
        question = list_question(
            name, world, min(len(world.names), rng.choice(LIST_LENGTHS)), f"{seed}:{example.id}:{epoch}"
        )
    elif kind == "choice":
        question, answer = multiple_choice(rng.choice(world.choosable(name)), "this object", world, rng)
    else:
        fact = rng.choice(facts)
        question, answer = fact.question.format(subject="this object"), fact.answer
        if kind == "name and fact":
            question, answer = f"What is this object, and: {question}", f"{name}, {fact.answer}"
    return Text(dialogue(question, image=True), answer, example.id)


def llava_items(texts: Sequence[Text]) -> list[dict]:
    """Texts in the form of LLaVA's training files: {"id", "image", "conversations"}; plain texts are answers."""
    items = []
    for number, text in enumerate(texts):
        question = text.prompt.removeprefix("USER: ").removesuffix("\nASSISTANT:")
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": text.answer}]
        items.append({"id": str(number), **({"image": text.image} if text.image else {}), "conversations": turns})
    return items


def vocabulary(world: World) -> list[str]:
    """Texts that hold every word of the world: what a word-level tokenizer is built from."""
    texts = [*world.names, *(article(name) for name in world.names), *LETTERS, *WORDINGS.values(), *CAPTION_REQUESTS]
    texts += [word for words in world.generic.values() for generic in words for word in (generic, article(generic))]
    for facts in world.facts.values():
        for fact in facts:
            texts += [fact.question.format(subject="this object"), fact.answer]
    question = dialogue('What is this object, and: the Choose one from "a, a". Choose A, B, C, or D.', image=True)
    return [*texts, question.replace("<image>", ""), CAPTION.format("")]
