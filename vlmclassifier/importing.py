"""Output files of the paper's own code, made run folders of this project: so its answers are scored like ours.

A line is {"image", "label", "split", "output", "pred"} of its local models, or one of the three forms of its API runs:
"pred" alone, "output" alone, or an OpenAI answer (`choices`, at the top or in `response.body`) whose label may be in
`custom_id` only. Where the benchmark's manifest exists, images and labels are compared with it.
"""

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from vlmclassifier.arguments import run_config
from vlmclassifier.benchmarks import Benchmark, Evaluation, data_root, find_manifest, load_examples
from vlmclassifier.models import MODELS, ModelSpec, find_api, find_model
from vlmclassifier.prompts import PromptSetting
from vlmclassifier.records import Prediction, UserError
from vlmclassifier.runs import open_run, read_record

LIST_START = 'Choose one from "'  # what precedes the candidates in the question of these files
INSTRUCTION_END = "[/INST]"  # some lines of LLaVA-NeXT Mistral still hold the question before it


def import_run(file: Path, folder: Path, spec: ModelSpec, task: Benchmark, setting: PromptSetting) -> list[str]:
    """Write the answers in `file` as a finished run into `folder`; return remarks on what it holds.

    `setting`: that of the file's questions, which its lines do not say. Of rows about the same image the first counts.

    Raises UserError for a file that cannot be read, a row of another form, a label that is not in the class list or not
    the manifest's, rows that contradict `setting`, and a folder that holds another import.
    """
    rows = _rows(file)
    first: dict[str, Prediction] = {}
    for number, row in rows:
        prediction = _prediction(row, number, file, setting)
        first.setdefault(prediction.example_id, prediction)
    remarks = [f"{len(first):,} answers", *_remarks(rows, first, setting, task)]
    splits = sorted({str(row.get("split", task.test_split)) for _, row in rows})
    config = _config(spec, task, setting, ", ".join(splits), file)
    if (folder / "run.json").exists() and read_record(folder)["config"] != config:
        raise UserError(
            f"{folder} holds another import, of other content or another model: remove that folder, or rename {file}."
        )
    run = open_run(folder, config, list(first))
    if new := [row for identity, row in first.items() if identity not in run.done]:
        run.append(new)
    run.finish()
    return remarks


def find_imported_model(model: str) -> ModelSpec:
    """A registered model by its key or source, one behind an API, else OWNER/NAME for a vision-language model.

    Raises UserError for any other name.
    """
    known = {spec.source: spec for spec in MODELS.values()} | MODELS
    if model in known:
        return known[model]
    if model.count("/") != 1:
        raise UserError(
            f"--model {model} is no key of vlmclassifier/models.py: choose one of {', '.join(MODELS)}, or OWNER/NAME."
        )
    providers = {spec.provider for spec in MODELS.values()}
    return find_api(model) if model.split("/")[0] in providers else find_model(model, "vlm")


def _config(spec: ModelSpec, task: Benchmark, setting: PromptSetting, split: str, file: Path) -> dict[str, Any]:
    tags = () if split == task.test_split else (f"split {split}",)
    evaluation = Evaluation(task, setting.names, data_root(task), split, "", [], tags)  # their manifest is not known
    return run_config(
        "import_outputs", spec.kind, spec, evaluation, None, setting=setting, tags=("imported",), template=None,
        imported=file.name, sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
    )  # fmt: skip


def _remarks(
    rows: list[tuple[int, dict]], first: dict[str, Prediction], setting: PromptSetting, task: Benchmark
) -> list[str]:  # fmt: skip
    """What the rows leave open, in words. Raises UserError for a label that is not the manifest's."""
    remarks = []
    if repeats := len(rows) - len(first):
        remarks.append(f"{repeats:,} rows about an image that had one already are left out")
    if setting.count and all(row.choices is None or not row.prompt for row in first.values()):
        remarks.append(f"no row holds its question, so --candidates {setting.candidates} is taken on trust")
    root = data_root(task)
    try:
        file = find_manifest(task, root)
    except UserError:
        return [*remarks, f"the manifest of {task.title} is missing, so images and labels are taken on trust"]
    examples = load_examples(task, setting.names, root, "all")
    by_path = {_plain(example.id): example.label for example in examples}
    endings = Counter(_ending(path) for path in by_path)
    by_ending = {_ending(path): label for path, label in by_path.items() if endings[_ending(path)] == 1}
    labels = {identity: by_path.get(_plain(identity), by_ending.get(_ending(identity))) for identity in first}
    known = {identity: label for identity, label in labels.items() if label is not None}
    for identity, label in known.items():
        if first[identity].label != label:
            raise UserError(
                f"{identity} has the label {first[identity].label!r} in the imported file and {label!r} in {file}: is "
                "it another benchmark or another version of it?"
            )
    if unknown := len(first) - len(known):
        remarks.append(f"{unknown:,} of the images are not in {file}")
    tested = sum(example.split == task.test_split for example in examples)
    return [*remarks, f"{len(known):,} are in {file}, whose {task.test_split} split has {tested:,}"]


def _plain(image: str) -> str:
    return image.removeprefix("./")


def _ending(image: str) -> str:
    """Folder and file name: what ./data/Flowers102/jpg/image_00001.jpg and jpg/image_00001.jpg share."""
    return "/".join(image.split("/")[-2:])


def _rows(file: Path) -> list[tuple[int, dict]]:
    """The file's JSON objects with their row numbers."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as text ({error}): name a file of JSON lines.") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{file} row {number} is not JSON ({error}): fix or remove the row.") from None
        if not isinstance(row, dict):
            raise UserError(f"{file} row {number} is not a JSON object: fix or remove the row.")
        rows.append((number, row))
    if not rows:
        raise UserError(f"{file} has no rows: name an output file of the paper's code.")
    return rows


def _prediction(row: dict, number: int, file: Path, setting: PromptSetting) -> Prediction:
    names, where = setting.names, f"{file} row {number}"
    answer, prompt = _answer(row, where), str(row.get("question") or (row.get("output") if "pred" in row else "") or "")
    label, identity = _label(row, names, where), row.get("image") or row.get("custom_id") or f"row {number}"
    index = row.get("label_idx")
    if index is not None and not (isinstance(index, int) and 0 <= index < len(names) and names[index] == label):
        raise UserError(f"{where}: label_idx {index} is not the class {label!r} of the list: fix the row.")
    choices = _choices(row, prompt, names)
    if choices is not None and len(choices) != (setting.count or 0):
        raise UserError(
            f"{where} lists {len(choices)} candidates, --candidates is {setting.candidates}: fix the option."
        )
    if choices is None and setting.count == len(set(names)):
        choices = tuple(dict.fromkeys(names))  # all of them, in an order that the row does not tell
    first = names.index(label) if index is None else index
    return Prediction(str(identity), label, first, prompt, choices, answer, None)


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
    raise UserError(f"{where} has no answer, neither 'pred' nor 'output' nor OpenAI's 'choices': fix or remove it.")


def _label(row: dict, names: Sequence[str], where: str) -> str:
    """The row's label; in a custom_id "...-...-LABEL-..." a label may hold hyphens itself."""
    known = set(names)
    if isinstance(row.get("label"), str):
        label = unicodedata.normalize("NFC", row["label"])  # as the class lists are
        if label in known:
            return label
        near = get_close_matches(row["label"], names, 1, 0.0)[0]
        raise UserError(
            f"{where}: the label {row['label']!r} is not in the class list, where {near!r} is nearest: fix it, or is "
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
    if LIST_START not in prompt:
        return None
    parts = prompt.split(LIST_START, 1)[1].split('"', 1)[0].split(", ")
    most = 1 + max(name.count(", ") for name in names)  # a name may hold a comma itself
    while parts:
        fitting = [size for size in range(min(most, len(parts)), 0, -1) if ", ".join(parts[:size]) in known]
        if not fitting:
            return None  # a list of other names
        found.append(", ".join(parts[: fitting[0]]))
        parts = parts[fitting[0] :]
    return tuple(found)
