"""Build knowledge questions about images that need the class, stage by stage (section 4: ImageWikiQA).

    python imagewikiqa/build_questions.py --benchmark imagenet --articles wikipedia --contact me@example.org --dry-run
    python imagewikiqa/build_questions.py --benchmark imagenet --articles articles/ --model openai/gpt-4.1
    python imagewikiqa/build_questions.py --benchmark flowers --articles articles.jsonl --model Qwen/Qwen3-8B \
        --base-url http://localhost:8000/v1
    python imagewikiqa/build_questions.py --benchmark plane_figures --data-root ROOT/images --facts plane_figures
    python imagewikiqa/build_questions.py --audit imagewikiqa.jsonl

Stages, each a file in OUT: articles.jsonl (text per class); drafts.jsonl (five questions per class by the model, every
field checked, asked again where the reply is malformed); with_name.jsonl and without_name.jsonl (the model's answers
with the class name and without: kept are questions that it answers rightly with the name and wrongly without);
NAME.jsonl (each question with at most three images of its class, in the format of the released file) and card.md
(counts per stage and an audit). With --facts the questions are facts that are known, and no API is asked. The same
command continues, and asks for nothing twice. Next: answer.py --questions OUT/NAME.jsonl.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlmclassifier import cli
from vlmclassifier.arguments import DataArgs
from vlmclassifier.benchmarks import Evaluation
from vlmclassifier.models import ModelSpec, find_api
from vlmclassifier.paths import OUTPUTS
from vlmclassifier.questions.building import (
    SCHEMA,
    SHUFFLE_SEED,
    WITH_NAME,
    WITHOUT_NAME,
    WRITE,
    Draft,
    DraftError,
    audit,
    card,
    pair_with_images,
    parse_drafts,
    select,
    shuffled,
)
from vlmclassifier.questions.items import read_questions, with_name
from vlmclassifier.questions.parsing import contains_option, parse_paper
from vlmclassifier.questions.stages import Results, Stage
from vlmclassifier.questions.wikipedia import SERVER, download_articles
from vlmclassifier.records import UserError
from vlmclassifier.runs.provenance import fingerprint
from vlmclassifier.runs.record import replace_file

TRIES = 3  # replies to a request for questions, until one is well formed
FILTER_TOKENS, WRITE_TOKENS, LOCAL_BATCH = 16, 4_096, 64


@dataclass
class Args(DataArgs):
    """Arguments."""

    articles: str | None = None
    """Folder with CLASS.txt files, a file of JSON lines {"class", "text"}, or wikipedia: download them."""
    contact: str = ""
    """Your e-mail address or web page, which Wikipedia asks for in every request."""
    wikipedia_server: str = SERVER
    """The API of another wiki."""
    facts: str | None = None
    """Known facts in place of articles and models: plane_figures, or a file as pretrain_mini.py takes it."""
    language_model: Path | None = None
    """With --facts: a local causal language model (checkpoint folder) whose free answers filter the questions; default:
    they are not filtered."""
    model: str = "gpt-4-turbo"
    """The model that writes and filters the questions, as classify_api.py takes it."""
    model_id: str | None = None
    """The id to request in place of the model's own."""
    base_url: str | None = None
    """Another server with OpenAI's interface: http://HOST:PORT/v1."""
    key_variable: str | None = None
    """Environment variable with the key; default: the provider's own."""
    prices: tuple[float, float] | None = None
    """US dollars for a million tokens in and out, for the estimate."""
    concurrency: int = 16
    """Calls at a time."""
    characters: int = 12_000
    """Longest part of an article that the model reads."""
    per_question: int = 3
    """Images per question (the reference code has 10)."""
    rows: int | None = 2_000
    """Rows to keep in the end; "None": all."""
    seed: int = SHUFFLE_SEED
    """Seed of the order of choices, of the images and of the selection."""
    audit: Path | None = None
    """Only print the audit of a file of questions, such as the released one."""
    dry_run: bool = False
    """Get the articles, print how many requests there would be with a rough estimate of their cost, and stop."""
    name: str | None = None
    """Name of the questions; default: BENCHMARK_wikiqa."""
    out: Path | None = None
    """Folder; default: outputs/imagewikiqa/NAME."""


def main(args: Args) -> None:
    """Check, run the stages that are not finished, write the questions and their card."""
    # ---- check
    cli.check_positive(limit=args.limit, concurrency=args.concurrency, per_question=args.per_question, rows=args.rows,
                       characters=args.characters)  # fmt: skip
    if args.audit:
        for key, value in audit(read_questions(args.audit)).items():
            print(f"{key}: {value}")
        return
    if (args.articles is None) == (args.facts is None):
        raise UserError("Give either --articles (a folder, a file or wikipedia) or --facts.")
    task = args.load_evaluation()
    name = args.name or f"{task.benchmark.key}_wikiqa"
    if name in ("articles", "drafts", "with_name", "without_name"):
        raise UserError(f"--name {name} is the name of a stage's file: choose another.")
    out = args.out or OUTPUTS / "imagewikiqa" / name
    stages: dict[str, int] = {"classes": len(set(task.names))}

    # ---- drafts
    if args.facts:
        drafts = fact_drafts(args, task)
        stages["drafts (facts)"] = len(drafts)
        filtered_by = fingerprint(args.language_model) if args.language_model else None
        source: dict[str, Any] = {"facts": args.facts, "language model": filtered_by}
        begin(out, source | {"benchmark": task.benchmark.key, "manifest": task.manifest_hash, "seed": args.seed})
        if args.language_model:
            answers = local_answers(args.language_model)
            drafts = keep_those_that_need_the_name(answers, FREE, drafts, out, stages)
    else:
        spec = find_api(args.model, args.model_id, args.base_url)
        source = {"articles": args.articles, "model": spec.source, "base_url": args.base_url}
        begin(out, source | {"benchmark": task.benchmark.key, "manifest": task.manifest_hash, "seed": args.seed,
                             "characters": args.characters}, write=not args.dry_run)  # fmt: skip
        articles = read_articles(args, task, out / "articles.jsonl")
        stages["articles"] = len(articles)
        print_estimate(args, spec, articles, out)
        if args.dry_run:
            return
        written = write_drafts(args, spec, articles, out)
        stages["drafts"] = len(written)
        answers = api_answers(args, client(args, spec, FILTER_TOKENS))
        drafts = keep_those_that_need_the_name(answers, LETTERS, written, out, stages)

    # ---- pair with images, select
    drafts = [shuffled(draft, args.seed, "final") for draft in drafts]
    images: dict[str, list[str]] = {}
    for example in task.examples:
        images.setdefault(example.label, []).append(example.id)
    paired = pair_with_images(drafts, images, args.per_question, args.seed)
    stages["rows with images"] = len(paired)
    questions = select(paired, args.rows, args.seed)
    stages["rows kept"] = len(questions)
    if not questions:
        raise UserError(f"No question is left: {', '.join(f'{stage} {count}' for stage, count in stages.items())}.")
    file = out / f"{name}.jsonl"
    replace_file(file, "".join(question.to_line() for question in questions))
    replace_file(out / "card.md", card(name, source | {"images": task.benchmark.key, "seed": args.seed}, stages,
                                       audit(read_questions(file))))  # fmt: skip
    print(f"{(out / 'card.md').read_text(encoding='utf-8')}\nWritten: {file} and card.md. Next: python "
          f"imagewikiqa/answer.py --questions {file} --image-root {task.root}")  # fmt: skip


def begin(out: Path, config: dict[str, Any], write: bool = True) -> None:
    """Record what is built. Raises UserError where the folder holds another construction, or something else."""
    file = out / "build.json"
    if file.exists():
        try:
            old = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(f"{file} cannot be read: move {out} away.") from None
        if keys := [key for key in {**old, **config} if old.get(key) != config.get(key)]:
            raise UserError(f"{out} holds another construction ({', '.join(keys)}): choose another --out.")
    elif out.exists() and any(one.name != "articles.jsonl" for one in out.iterdir()):  # these of a --dry-run
        raise UserError(f"{out} holds something else: choose another --out.")
    out.mkdir(parents=True, exist_ok=True)
    if write:
        replace_file(file, json.dumps(config, indent=1, ensure_ascii=False) + "\n")


def fact_drafts(args: Args, task: Evaluation) -> list[Draft]:
    """Questions about known facts, with answers of other classes as the wrong choices."""
    import random

    from vlmclassifier.mini.corpus import class_list_spec, plane_figures_spec

    is_embedded = args.facts == "plane_figures"
    spec = plane_figures_spec() if is_embedded else class_list_spec(task.names, Path(str(args.facts)))
    drafts = []
    for name in dict.fromkeys(task.names):
        for fact in spec.multiple_choice_facts(name):
            wrong = [answer for answer in spec.answers_by_kind[fact.kind] if answer != fact.answer]
            rng = random.Random(f"facts:{args.seed}:{name}:{fact.question}")
            options = (fact.answer, *rng.sample(wrong, min(3, len(wrong))))
            drafts.append(
                Draft(name, fact.question.format(subject="this object"), options, 0, f"{name}: {fact.answer}")
            )
    return drafts


def read_articles(args: Args, task: Evaluation, file: Path) -> dict[str, str]:
    """Class -> text. Raises UserError where classes have none."""
    names = list(dict.fromkeys(task.names))
    stage = Stage(file, names)
    if args.articles == "wikipedia":
        failures = stage.run(lambda keys: download_articles(keys, args.contact, args.wikipedia_server), "articles")
        if failures:
            raise UserError(f"{len(failures)} articles could not be downloaded, such as {failures[0]}: run it again.")
    else:
        texts = given_articles(Path(str(args.articles)))
        drafted = Stage(file.with_name("drafts.jsonl"), names).rows
        for name in names:  # an article that was added or changed since
            if name in texts and name in stage.rows and stage.rows[name]["text"] != texts[name]:
                if name in drafted:
                    raise UserError(f"{args.articles}: the article of {name} has changed since its questions were "
                                    f"written: restore it, or choose another --out.")  # fmt: skip
                del stage.rows[name]
        stage.run(lambda keys: ((key, {"title": key, "text": texts.get(key)}) for key in keys), "articles")
    found = {name: stage.rows[name]["text"] for name in names if stage.rows[name]["text"]}
    missing = [name for name in names if name not in found]
    if missing:
        print(f"{len(missing)} of {len(names)} classes have no article and get no questions: "
              f"{', '.join(missing[:10])}{', ...' if len(missing) > 10 else ''}")  # fmt: skip
    if not found:
        raise UserError(f"{args.articles} has no article of any class: name the files CLASS.txt.")
    return found


def given_articles(place: Path) -> dict[str, str]:
    """Class -> text of a folder of CLASS.txt files or of a file of JSON lines. Raises UserError."""
    try:
        if place.is_dir():
            files = sorted(place.glob("*.txt"))
            return {file.stem.replace("_", " "): file.read_text(encoding="utf-8") for file in files}
        rows = [json.loads(line) for line in place.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not all(isinstance(row["text"], str) for row in rows):
            raise TypeError("a text that is none")
        return {row["class"]: row["text"] for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f'{place} cannot be read as articles ({error}): a line is {{"class", "text"}}.') from None


def client(args: Args, spec: ModelSpec, tokens: int, schema: dict[str, Any] | None = None) -> Any:
    """The API with a token limit and a form of the answer."""
    from vlmclassifier.api import Settings, load_api

    return load_api(spec, Settings(tokens, json_schema=schema), args.base_url, args.key_variable)


def write_drafts(args: Args, spec: ModelSpec, articles: dict[str, str], out: Path) -> list[Draft]:
    """The model's questions about every class."""
    from vlmclassifier.api.concurrency import results_in_threads

    api, stage = client(args, spec, WRITE_TOKENS, SCHEMA), Stage(out / "drafts.jsonl", list(articles))

    def write(name: str) -> dict[str, Any]:
        problem = ""
        for number in range(1, TRIES + 1):
            text, _ = api.ask(None, WRITE.format(name=name, article=articles[name][: args.characters]))
            try:
                drafts = parse_drafts(text, name)
                return {"drafts": [asdict(draft) for draft in drafts], "tries": number, "problem": None}
            except DraftError as error:
                problem = str(error)
        return {"drafts": [], "tries": TRIES, "problem": problem}

    finish_stage(stage.run(lambda keys: results_in_threads(keys, write, args.concurrency), "questions"))
    problems = {key: row["problem"] for key, row in stage.rows.items() if row["problem"]}
    if problems:
        key = next(iter(problems))
        print(f"{len(problems)} classes got no questions in {TRIES} replies, such as {key}: {problems[key]}")
    drafts = [Draft(**row | {"options": tuple(row["options"])}) for key in stage.keys
              for row in stage.rows[key]["drafts"]]  # fmt: skip
    different = {draft.key: draft for draft in drafts}
    return [shuffled(draft, args.seed, "written") for draft in different.values()]


@dataclass(frozen=True)
class Filter:
    """How a model is asked and judged: a prompt with the name, one without, and whether an answer is right."""

    with_name: Callable[[Draft], str]
    without_name: Callable[[Draft], str]
    is_right: Callable[[str, Draft], bool]


LETTERS = Filter(
    lambda draft: with_name(draft.text(WITH_NAME), draft.class_name), lambda draft: draft.text(WITHOUT_NAME),
    lambda answer, draft: parse_paper(answer, draft.options) == draft.answer,
)  # fmt: skip
FREE = Filter(
    lambda draft: with_name(draft.question, f"the {draft.class_name}"), lambda draft: draft.question,
    lambda answer, draft: contains_option(answer, draft.options, draft.answer),
)  # fmt: skip
Answers = Callable[[Sequence[tuple[str, str]]], Iterator[tuple[str, Any]]]  # (key, prompt) -> (key, text or exception)


def api_answers(args: Args, api: Any) -> Answers:
    """Answers of a model behind an API."""
    from vlmclassifier.api.concurrency import results_in_threads

    def answers(prompts: Sequence[tuple[str, str]]) -> Iterator[tuple[str, Any]]:
        for (key, _), result in results_in_threads(prompts, lambda pair: api.ask(None, pair[1])[0], args.concurrency):
            yield key, result

    return answers


def local_answers(folder: Path) -> Answers:
    """Greedy answers of a causal language model in the prompt template of the mini models."""

    def answers(prompts: Sequence[tuple[str, str]]) -> Iterator[tuple[str, Any]]:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from vlmclassifier.mini.corpus import chat_prompt

        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        for start in range(0, len(prompts), LOCAL_BATCH):
            part = prompts[start : start + LOCAL_BATCH]
            inputs = tokenizer([chat_prompt(text, image=False) for _, text in part], padding=True, return_tensors="pt")
            inputs.pop("token_type_ids", None)
            with torch.inference_mode():
                out = model.generate(**inputs, max_new_tokens=FILTER_TOKENS, do_sample=False)
            texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            yield from zip([key for key, _ in part], texts, strict=True)

    return answers


def keep_those_that_need_the_name(
    answers: Answers, how: Filter, drafts: Sequence[Draft], out: Path, stages: dict[str, int]
) -> list[Draft]:  # fmt: skip
    """The questions that a model answers rightly with the class name and wrongly without it."""
    of_key = {draft.key: draft for draft in drafts}
    kept = list(of_key)
    for name, prompt, needed in (("with_name", how.with_name, True), ("without_name", how.without_name, False)):
        stage = Stage(out / f"{name}.jsonl", kept)

        def results(keys: Sequence[str], prompt: Callable[[Draft], str] = prompt) -> Results:
            for key, answer in answers([(key, prompt(of_key[key])) for key in keys]):
                yield key, answer if isinstance(answer, Exception) else {"answer": answer}

        finish_stage(stage.run(results, name))
        kept = [key for key in kept if how.is_right(stage.rows[key]["answer"], of_key[key]) == needed]
        stages[f"kept: {'right with the name' if needed else 'wrong without it'}"] = len(kept)
    return [of_key[key] for key in kept]


def finish_stage(failures: Sequence[Exception]) -> None:
    """Raise UserError for requests that got no answer."""
    if failures:
        raise UserError(
            f"{len(failures)} requests got no answer, such as: {failures[0]}; the same command asks for them again."
        )


def print_estimate(args: Args, spec: ModelSpec, articles: dict[str, str], out: Path) -> None:
    """Calls and tokens of the writing and filtering that is still to be done."""
    from vlmclassifier.api.costs import ANSWER_TOKENS, QUESTIONS_TOKENS, estimated_usage, recorded_usage, total_usage

    drafts = Stage(out / "drafts.jsonl", list(articles))
    prompts = [WRITE.format(name=name, article=articles[name][: args.characters]) for name in drafts.pending]
    written = sum(len(drafts.rows[name]["drafts"]) for name in articles if name in drafts.rows)
    answered = sum(len(Stage(out / f"{name}.jsonl", []).rows) for name in ("with_name", "without_name"))
    filters = ["x" * 400] * max(0, 2 * (5 * len(prompts) + written) - answered)  # with the name and without
    provider, none = str(spec.provider), recorded_usage([])
    usage = total_usage([
        estimated_usage(provider, texts, [], 0, none, tokens)
        for texts, tokens in ((prompts, QUESTIONS_TOKENS), (filters, ANSWER_TOKENS))
    ])  # fmt: skip
    print(f"{len(articles)} classes with articles, {len(prompts)} without questions. Estimate, {spec.source}: "
          f"{usage.sentence(args.prices or spec.prices)}")  # fmt: skip


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
