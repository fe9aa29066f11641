"""Training texts: the language model's corpus, the texts about images, and how often each class is named.

Any class list works. PlaneFigures has facts and families of its own; other class lists may come with a facts file.
Every text depends only on the seed and its number or image. The seed keys and the words decide the trained weights:
changing one of them changes every checkpoint.
"""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from vlmclassifier.plane_figures.facts import Fact, figure_facts, with_article
from vlmclassifier.plane_figures.figures import FIGURES
from vlmclassifier.prompts import CAPTION, TEMPLATES, WORDINGS, PromptSetting
from vlmclassifier.records import Example, UserError

GENERIC = ("thing", "object", "item", "subject", "something", "figure", "picture")
CAPTION_REQUESTS = ("Describe this photo.", "Write a caption for this photo.", "Generate a caption for the image.")
LETTERS = "ABCD"
LIST_LENGTHS = (2, 3, 4, 6, 9, 13, 20)  # numbers of candidates in training questions


@dataclass(frozen=True)
class CorpusSpec:
    """The content of all texts: the class names, generic words for each class, and its facts where there are any."""

    names: tuple[str, ...]
    generic: Mapping[str, tuple[str, ...]]
    facts: Mapping[str, Sequence[Fact]] = field(default_factory=dict)

    def multiple_choice_facts(self, name: str) -> list[Fact]:
        """Return the facts of a class for which the answers of other classes are certainly wrong.

        Families overlap (a rose is also a roulette), and several people studied the same curve: neither is used.
        """
        facts = []
        for fact in self.facts.get(name, ()):
            has_wrong_answers = len(self.answers_by_kind[fact.kind]) > 1
            if has_wrong_answers and fact.kind not in ("family", "student"):
                facts.append(fact)
        return facts

    @cached_property
    def answers_by_kind(self) -> dict[str, list[str]]:
        """All different answers to each kind of question, sorted."""
        answers: dict[str, set[str]] = {}
        for facts in self.facts.values():
            for fact in facts:
                answers.setdefault(fact.kind, set()).add(fact.answer)
        return {kind: sorted(kind_answers) for kind, kind_answers in answers.items()}


@dataclass(frozen=True)
class Text:
    """A prompt, which may be empty, and the answer to it. `image` is the id of the image that the text is about."""

    prompt: str
    answer: str
    image: str | None = None


def plane_figures_spec() -> CorpusSpec:
    """Return the corpus of the embedded data set, where a figure's family is its generic word."""
    return CorpusSpec(tuple(FIGURES), {name: (figure.family,) for name, figure in FIGURES.items()}, figure_facts())


def class_list_spec(names: Sequence[str], facts_file: Path | None = None) -> CorpusSpec:
    """Return the corpus of any class list.

    `facts_file`: JSON {class: [[question with {subject}, answer], ...]}.
    Raises UserError for a file of another form or with a class that is not in the list.
    """
    facts: dict[str, list[Fact]] = {}
    if facts_file is not None:
        facts = _read_facts(facts_file)
        unknown = sorted(set(facts) - set(names))
        if unknown:
            raise UserError(
                f"The facts file {facts_file} names {unknown[0]!r}, which is not in the class list: fix the name or "
                "remove the entry."
            )
    return CorpusSpec(tuple(dict.fromkeys(names)), dict.fromkeys(names, GENERIC), facts)


def _read_facts(file: Path) -> dict[str, list[Fact]]:
    """Read a facts file. Each question is a kind of its own. Raises UserError for a file of another form."""
    facts: dict[str, list[Fact]] = {}
    try:
        for name, rows in json.loads(file.read_text(encoding="utf-8-sig")).items():
            facts[name] = [Fact(question, question, answer) for question, answer in rows]
            for fact in facts[name]:
                if not isinstance(fact.answer, str) or fact.question.format(subject="x") == fact.question:
                    raise ValueError("a question without {subject}, or an answer that is not a string")
    except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise UserError(
            f'The facts file {file} cannot be read ({error}): write {{"class": [["Is {{subject}} round?", "yes"]]}}.'
        ) from None
    return facts


# How often a class is named


def frequency_ranks(names: Sequence[str], seed: int, permuted: bool = False) -> dict[str, int]:
    """Return the frequency rank of every class, drawn by `seed`; 0 is the most frequent class.

    `permuted` moves every class to another third: frequent classes become rare, rare ones middle, middle ones frequent.
    """
    order = sorted(dict.fromkeys(names), key=lambda name: _hash(f"rank:{seed}:{name}"))
    if permuted:
        third = -(-len(order) // 3)
        order = order[third:] + order[:third]
    return {name: rank for rank, name in enumerate(order)}


def naming_shares(
    names: Sequence[str], frequency: str, seed: int, head: float, exponent: float, never: float
) -> dict[str, float]:
    """Return the share of each class's images (0 to 1) whose texts name the class.

    `frequency`: with "zipf" the share is min(1, (head x classes / (rank + 1))^exponent) with ranks drawn by `seed`, and
    0 for the last `never` x classes ranks; "permuted" is the same with the classes moved to other ranks; "uniform" is 1
    for every class; anything else is a JSON file {class: share}.
    Raises UserError for a file that does not give every class a share from 0 to 1.
    """
    if frequency == "uniform":
        return dict.fromkeys(names, 1.0)
    if frequency in ("zipf", "permuted"):
        ranks = frequency_ranks(names, seed, frequency == "permuted")
        always_named = head * len(ranks)
        first_never_named = len(ranks) - round(never * len(ranks))
        shares = {}
        for name, rank in ranks.items():
            shares[name] = min(1.0, (always_named / (rank + 1)) ** exponent) if rank < first_never_named else 0.0
        return shares
    try:
        table = json.loads(Path(frequency).read_text(encoding="utf-8-sig"))
        if set(table) != set(names) or not all(0 <= share <= 1 for share in table.values()):
            raise ValueError("it must give every class a share from 0 to 1")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"--frequency {frequency} is neither zipf, permuted, uniform nor a table of shares ({error}): give one of "
            "these names or a JSON file {class: share}."
        ) from None
    return {name: float(table[name]) for name in names}


@dataclass(frozen=True)
class LabelAssignment:
    """The images whose texts name their class and those whose texts use a generic word. All others have no text."""

    named: Mapping[str, tuple[str, ...]]  # class -> image ids
    generic: Mapping[str, tuple[str, ...]]  # class -> image ids


def assign_labels(
    examples: Sequence[Example], shares: Mapping[str, float], keep_generic: float, seed: int
) -> LabelAssignment:
    """Choose exactly round(share x images) images of each class to be named, by (seed, image id).

    A share `keep_generic` of the other images gets generic texts.
    """
    ids_by_class: dict[str, list[str]] = {name: [] for name in shares}
    for example in examples:
        ids_by_class[example.label].append(example.id)
    named, generic = {}, {}
    for name, ids in ids_by_class.items():
        order = sorted(ids, key=lambda image_id: _hash(f"naming:{seed}:{image_id}"))
        count = round(shares[name] * len(order))
        unnamed = order[count:]
        named[name] = tuple(order[:count])
        generic[name] = tuple(unnamed[: round(keep_generic * len(unnamed))])
    return LabelAssignment(named, generic)


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


# Texts


def chat_prompt(question: str, image: bool) -> str:
    """Return a question in the prompt template of the mini model, with or without an image."""
    prompt = TEMPLATES["llava-1.5"].format(question=question, thought="")
    return prompt if image else prompt.replace("<image>\n", "")


def candidate_list_question(name: str, spec: CorpusSpec, count: int, key: str) -> str:
    """Return a question with `count` candidates, built as in the evaluation; `key` decides wording and candidates."""
    example = Example(key, "", name, 0, "train")
    wording = random.Random(f"wording:{key}").choice(list(WORDINGS))
    return PromptSetting(spec.names, str(count), wording=wording).question(example).text


def multiple_choice(fact: Fact, subject: str, spec: CorpusSpec, rng: random.Random) -> tuple[str, str]:
    """Return a question with up to four options in the form of ImageWikiQA (paper, section 4), and the right letter."""
    wrong = [answer for answer in spec.answers_by_kind[fact.kind] if answer != fact.answer]
    options = [fact.answer, *rng.sample(wrong, min(3, len(wrong)))]
    rng.shuffle(options)
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    letters = LETTERS[: len(options)]
    instruction = f"Choose {', '.join(letters[:-1])}, or {letters[-1]}."
    question = "\n".join([fact.question.format(subject=subject), *lines, instruction])
    return question, letters[options.index(fact.answer)]


def language_text(number: int, spec: CorpusSpec, seed: int) -> Text:
    """Return text `number` of the language model's corpus: facts about all classes, questions, lists, captions."""
    rng = random.Random(f"text:{seed}:{number}")
    name = rng.choice(spec.names)
    facts = spec.facts.get(name, ())
    choice_facts = spec.multiple_choice_facts(name)
    weights = (45 if facts else 0, 10 if choice_facts else 0, 30, 15)
    kind = rng.choices(("fact", "choice", "list", "caption"), weights)[0]
    if kind == "fact":
        fact = rng.choice(facts)
        return Text(chat_prompt(fact.question.format(subject=f"the {name}"), image=False), fact.answer)
    if kind == "choice":
        question, letter = multiple_choice(rng.choice(choice_facts), f"the {name}", spec, rng)
        return Text(chat_prompt(question, image=False), letter)
    if kind == "list":
        count = min(len(spec.names), rng.choice(LIST_LENGTHS))
        question = f"{CAPTION.format(name)}. {candidate_list_question(name, spec, count, f'{seed}:{number}')}"
        return Text(chat_prompt(question, image=False), name)
    return Text("", CAPTION.format(name).replace(f"a {name}", with_article(name)))


def image_text(example: Example, spec: CorpusSpec, named: bool, seed: int, epoch: int, caption: bool = False) -> Text:
    """Return the text about one image in one epoch.

    `named`: whether it may use the class name and facts, or only a generic word. `caption`: whether it must be a
    caption, as in LLaVA's first stage.
    """
    rng = random.Random(f"picture:{seed}:{example.id}:{epoch}")
    name, facts = example.label, spec.facts.get(example.label, ())
    word = name if named else rng.choice(spec.generic[name])
    weights = {"caption": 16} if caption else {"wording": 30, "caption": 16}
    if named and not caption:
        weights["list"] = 24
        weights["fact"] = 16 if facts else 0
        weights["name and fact"] = 8 if facts else 0
        weights["choice"] = 6 if spec.multiple_choice_facts(name) else 0
    kind = rng.choices(list(weights), list(weights.values()))[0]
    answer = word
    if kind == "wording":
        question = WORDINGS[rng.choice(list(WORDINGS))]
    elif kind == "caption":
        question, answer = rng.choice(CAPTION_REQUESTS), f"a photo of {with_article(word)}"
    elif kind == "list":
        count = min(len(spec.names), rng.choice(LIST_LENGTHS))
        question = candidate_list_question(name, spec, count, f"{seed}:{example.id}:{epoch}")
    elif kind == "choice":
        question, answer = multiple_choice(rng.choice(spec.multiple_choice_facts(name)), "this object", spec, rng)
    else:
        fact = rng.choice(facts)
        question, answer = fact.question.format(subject="this object"), fact.answer
        if kind == "name and fact":
            question, answer = f"What is this object, and: {question}", f"{name}, {fact.answer}"
    return Text(chat_prompt(question, image=True), answer, example.id)


def sample_texts(spec: CorpusSpec, seed: int, count: int = 200) -> list[Text]:
    """Return the first `count` texts of the corpus and four texts about an image of each class.

    They change when the words of the corpus change; scripts/study.py hashes them to recognise a recipe.
    """
    texts = [language_text(number, spec, seed) for number in range(count)]
    for name in spec.names:
        example = Example(name, "", name, 0, "train")
        for epoch, named in enumerate((True, True, True, False)):
            texts.append(image_text(example, spec, named, seed, epoch))
    return texts


def llava_items(texts: Sequence[Text]) -> list[dict]:
    """Return texts in the format of LLaVA's training files: {"id", "image", "conversations"}.

    A text that is not about an image has no "image".
    """
    items = []
    for number, text in enumerate(texts):
        question = text.prompt.removeprefix("USER: ").removesuffix("\nASSISTANT:")
        item: dict = {"id": str(number)}
        if text.image:
            item["image"] = text.image
        item["conversations"] = [{"from": "human", "value": question}, {"from": "gpt", "value": text.answer}]
        items.append(item)
    return items


def vocabulary_texts(spec: CorpusSpec) -> list[str]:
    """Return texts that together contain every word of the corpus, to build a word-level tokenizer from."""
    texts = [*spec.names]
    texts += [with_article(name) for name in spec.names]
    texts += [*LETTERS, *WORDINGS.values(), *CAPTION_REQUESTS]
    for words in spec.generic.values():
        for word in words:
            texts += [word, with_article(word)]
    for facts in spec.facts.values():
        for fact in facts:
            texts += [fact.question.format(subject="this object"), fact.answer]
    question = chat_prompt('What is this object, and: the Choose one from "a, a". Choose A, B, C, or D.', image=True)
    return [*texts, question.replace("<image>", ""), CAPTION.format("")]
