"""Output files of the paper's own code, made run folders of this project: so its answers are scored like ours.

A line is {"image", "label", "split", "output", "pred"} of its local models, or one of the three forms of its API runs:
"pred" alone, "output" alone, or an OpenAI answer (`choices`, at the top or in `response.body`) whose label may stand in
`custom_id` only. Where the benchmark's manifest is there, pictures and labels are compared with it.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from vlmclassifier.benchmarks import Benchmark, class_names, data_root, find_benchmark, find_manifest, load_examples
from vlmclassifier.models import MODELS, ModelSpec, find_api, find_model
from vlmclassifier.prompts import Way, parse_candidates
from vlmclassifier.records import Prediction, UserError
from vlmclassifier.runs import open_run, read_record

LISTED = 'Choose one from "'  # what stands before the candidates in the question of these files
INSTRUCTION_END = "[/INST]"  # some lines of LLaVA-NeXT Mistral still hold the question before it


def import_run(
    file: Path, folder: Path, model: str, benchmark: str, classes: Path | None, way: Way, chain_of_thought: bool
) -> list[str]:
    """Write the answers in `file` as a finished run into `folder`; return sentences on what it holds.

    `way`: how the file's questions were asked, which its lines do not say. Of rows about the same picture the first
    counts.

    Raises UserError for an unknown model, a file that cannot be read, a row of another form, a label that is not in the
    class list or not the manifest's, rows that contradict `way`, and a folder that holds another import.
    """
    spec = _spec(model)
    task = find_benchmark(benchmark, classes)
    names = class_names(task)
    if spec.kind == "clip" and way.candidates == "none":
        raise UserError("CLIP always chooses among class names: give --candidates all or a number.")
    rows = _rows(file)
    first: dict[str, Prediction] = {}
    for number, row in rows:
        prediction = _prediction(row, number, file, names, way)
        first.setdefault(prediction.example_id, prediction)
    said = [f"{len(first):,} answers", *_doubts(rows, first, way, task)]
    splits = sorted({str(row.get("split", task.test_split)) for _, row in rows})
    config = _config(spec, task, names, splits, file) | asdict(way) | {"chain_of_thought": chain_of_thought}
    if (folder / "run.json").exists() and read_record(folder)["config"] != config:
        raise UserError(
            f"{folder} holds another import, of other content or another model: remove that folder, or rename {file}."
        )
    run = open_run(folder, config, list(first))
    if new := [row for identity, row in first.items() if identity not in run.done]:
        run.append(new)
    run.finish()
    return said


def _doubts(rows: list[tuple[int, dict]], first: dict[str, Prediction], way: Way, task: Benchmark) -> list[str]:
    """What the rows leave open, in words. Raises UserError for a label that is not the manifest's."""
    said = []
    if repeats := len(rows) - len(first):
        said.append(f"{repeats:,} rows about a picture that had one already are left out")
    if way.candidates != "none" and all(row.choices is None or not row.prompt for row in first.values()):
        said.append(f"no row holds its question, so that --candidates {way.candidates} is believed")
    root = data_root(task)
    try:
        file = find_manifest(task, root)
    except UserError:
        return [*said, f"the manifest of {task.title} is not there, so that pictures and labels are believed"]
    examples = load_examples(task, class_names(task), root, "all")
    exact = {_plain(example.id): example.label for example in examples}
    endings = Counter(map(_ending, exact))
    alone = {_ending(image): label for image, label in exact.items() if endings[_ending(image)] == 1}
    labels = {identity: exact.get(_plain(identity), alone.get(_ending(identity))) for identity in first}
    known = {identity: label for identity, label in labels.items() if label is not None}
    for identity, label in known.items():
        if first[identity].label != label:
            raise UserError(
                f"{identity} has the label {first[identity].label!r} in the imported file and {label!r} in {file}: is "
                "it another benchmark or another version of it?"
            )
    if unknown := len(first) - len(known):
        said.append(f"{unknown:,} of the pictures are not in {file}")
    tested = sum(example.split == task.test_split for example in examples)
    return [*said, f"{len(known):,} are in {file}, whose {task.test_split} split has {tested:,}"]


def _plain(image: str) -> str:
    return image.removeprefix("./")


def _ending(image: str) -> str:
    """Folder and file name: what ./data/Flowers102/jpg/image_00001.jpg and jpg/image_00001.jpg share."""
    return "/".join(image.split("/")[-2:])


def _spec(model: str) -> ModelSpec:
    """A registered model by its key or source, one behind an API, else OWNER/NAME for a vision-language model."""
    known = {spec.source: spec for spec in MODELS.values()} | MODELS
    if model in known:
        return known[model]
    if model.count("/") != 1:
        raise UserError(
            f"--model {model} is no key of vlmclassifier/models.py: choose one of {', '.join(MODELS)}, or OWNER/NAME."
        )
    providers = {spec.provider for spec in MODELS.values()}
    return find_api(model) if model.split("/")[0] in providers else find_model(model, "vlm")


def _config(spec: ModelSpec, task: Benchmark, names: Sequence[str], splits: list[str], file: Path) -> dict[str, Any]:
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    config = {
        "script": "table --import-file", "imported": file.name, "sha256": digest, "kind": spec.kind, "model": spec.key,
        "miniature": False, "benchmark": task.key, "split": ", ".join(splits), "limit": None, "seed": 0,
        "classes": list(names),
    }  # fmt: skip
    return config | ({"model_id": spec.source, "base_url": None} if spec.kind == "api" else {})


def _rows(file: Path) -> list[tuple[int, dict]]:
    """The file's JSON objects with their row numbers."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--import-file {file} cannot be read as text ({error}): name a file of JSON lines.") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{file} row {number} is not JSON ({error}): mend or remove the row.") from None
        if not isinstance(row, dict):
            raise UserError(f"{file} row {number} is not a JSON object: mend or remove the row.")
        rows.append((number, row))
    if not rows:
        raise UserError(f"{file} has no rows: name an output file of the paper's code.")
    return rows


def _prediction(row: dict, number: int, file: Path, names: Sequence[str], way: Way) -> Prediction:
    where = f"{file} row {number}"
    answer, prompt = _answer(row, where), str(row.get("question") or (row.get("output") if "pred" in row else "") or "")
    label, identity = _label(row, names, where), row.get("image") or row.get("custom_id") or f"row {number}"
    index = row.get("label_idx")
    if index is not None and not (isinstance(index, int) and 0 <= index < len(names) and names[index] == label):
        raise UserError(f"{where}: label_idx {index} is not the class {label!r} of the list: mend the row.")
    choices, wanted = _choices(row, prompt, names), parse_candidates(way.candidates, names)
    if choices is not None and len(choices) != (wanted or 0):
        raise UserError(
            f"{where} was asked with {len(choices)} candidates, --candidates is {way.candidates}: mend the option."
        )
    if choices is None and wanted == len(set(names)):
        choices = tuple(dict.fromkeys(names))  # all of them, in an order that the row does not tell
    first = names.index(label) if index is None else index
    return Prediction(str(identity), label, first, prompt, choices, answer, None, None)


def _answer(row: dict, where: str) -> str:
    if isinstance(row.get("pred"), str):
        return row["pred"].rsplit(INSTRUCTION_END, 1)[-1].strip()
    if isinstance(row.get("output"), str):
        return row["output"]
    with suppress(KeyError, IndexError, TypeError):
        body = row if "choices" in row else row["response"]["body"]
        text = body["choices"][0]["message"]["content"]
        if text is None or isinstance(text, str):
            return text or ""
    raise UserError(f"{where} has no answer, neither 'pred' nor 'output' nor OpenAI's 'choices': mend or remove it.")


def _label(row: dict, names: Sequence[str], where: str) -> str:
    """The row's label; in a custom_id "...-...-LABEL-..." a label may hold hyphens itself."""
    known = set(names)
    if isinstance(row.get("label"), str):
        if row["label"] in known:
            return row["label"]
        near = get_close_matches(row["label"], names, 1, 0.0)[0]
        raise UserError(
            f"{where}: the label {row['label']!r} is not in the class list, where {near!r} is nearest: mend it, or is "
            "it another --benchmark?"
        )
    parts = str(row.get("custom_id", "")).split("-")
    for end in range(len(parts), 2, -1):  # the longest first
        if (label := "-".join(parts[2:end])) in known:
            return label
    raise UserError(f"{where} has no label of the class list, neither in 'label' nor as third part of 'custom_id'.")


def _choices(row: dict, prompt: str, names: Sequence[str]) -> tuple[str, ...] | None:
    """The candidates of a row: its own list, else those that its question names; None where there are none."""
    given, known, found = row.get("choices"), set(names), []
    if isinstance(given, list) and given and all(isinstance(name, str) and name in known for name in given):
        return tuple(given)
    if LISTED not in prompt:
        return None
    parts = prompt.split(LISTED, 1)[1].split('"', 1)[0].split(", ")
    most = 1 + max(name.count(", ") for name in names)  # a name may hold a comma itself
    while parts:
        fitting = [size for size in range(min(most, len(parts)), 0, -1) if ", ".join(parts[:size]) in known]
        if not fitting:
            return None  # a list of other names
        found.append(", ".join(parts[: fitting[0]]))
        parts = parts[fitting[0] :]
    return tuple(found)
