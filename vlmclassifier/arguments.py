"""The arguments that scripts share, and the configuration that their runs record in run.json.

A script's `Args` inherits the parts it needs and declares what is its own.
"""

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from vlmclassifier.benchmarks import BENCHMARKS, Evaluation, load_evaluation
from vlmclassifier.identity import Adapter, checkpoint_tags, is_verified
from vlmclassifier.images import open_image
from vlmclassifier.models import ModelSpec
from vlmclassifier.paths import run_folder
from vlmclassifier.prompts import ORDERS, QUESTIONS, PromptSetting, default_new_tokens, prompt_settings
from vlmclassifier.records import Example, UserError
from vlmclassifier.runs.provenance import fingerprint

BenchmarkName = Annotated[
    str, tyro.conf.arg(help=f"{', '.join(BENCHMARKS)}, or a manifest FILE.jsonl of your own (with --classes).")
]


@dataclass
class ModelArgs:
    """Which model, on which device."""

    model: str = "llava-1.5-7b"
    """A key of vlmclassifier/models.py (python scripts/list_registry.py), any other hub id OWNER/NAME, or a checkpoint
    folder."""
    weights: Path | None = None
    """Local checkpoint; default: the entry in paths.toml, else the hub."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N. auto: this process's GPU (all GPUs for a model larger than one), else the CPU."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 on a GPU, float32 on the CPU."""


@dataclass
class AdapterArgs:
    """Which fine-tuned weights."""

    adapter: Path | None = None
    """Fine-tuned weights: the folder best or last of training_analysis/finetune_vlm.py."""


@dataclass
class DataArgs:
    """Which images."""

    benchmark: BenchmarkName = "flowers"
    classes: Path | None = None
    """Class list of your own manifest: a JSON array of names."""
    data_root: Path | None = None
    """Folder that the manifest's image paths start from; default: the entry in paths.toml, else the project."""
    split: str | None = None
    """Split to evaluate, or "all"; default: the benchmark's test split."""
    limit: int | None = None
    """Only the first N images of the evaluation order; a larger N later continues the same run."""
    skip_broken_images: bool = False
    """Leave out images that cannot be opened: all are tried first, and run.json and the tables say how many."""

    def load_evaluation(self) -> Evaluation:
        """The benchmark, its classes and the examples in evaluation order. Raises UserError."""
        task = load_evaluation(self.benchmark, self.classes, self.data_root, self.split, self.limit)
        return without_broken_images(task) if self.skip_broken_images else task


@dataclass
class PromptArgs:
    """The prompt settings: several values of the first three make one run per combination."""

    candidates: tuple[str, ...] = ("none",)
    """none (open world), all (closed world: every class name is listed), or K candidates, the true name among them.
    Several values, here and in the next two: one run per combination, with each image encoded once."""
    order: tuple[Literal[ORDERS], ...] = ("random",)
    """Order of the candidates: random per image, or fixed as in the class list."""
    wording: tuple[Literal[tuple(QUESTIONS)], ...] = ("base",)
    """Wording of the question (vlmclassifier/prompts.py)."""
    chain_of_thought: bool = False
    """Add "Let's think step by step."."""
    max_new_tokens: int | None = None
    """Longest answer in tokens; default: 64, with chain of thought 512; of APIs the server's own limit."""
    seed: int = 0
    """Seed of the candidate lists; each list is drawn from (seed, image) alone."""

    def prompt_settings(self, names: Sequence[str]) -> list[PromptSetting]:
        """One setting per combination. Raises UserError for candidates that do not fit the class list."""
        several = (values_of(self.candidates), values_of(self.order), values_of(self.wording))
        return prompt_settings(names, *several, self.chain_of_thought, self.seed)


@dataclass
class RunArgs:
    """How and where the run is made."""

    batch_size: int = 8
    """Images per forward pass. In float32 the answers do not depend on it; in bfloat16 and float16 rounding may change
    a few, so run.json records it."""
    name: str | None = None
    """Name of the run: its folder is outputs/SECTION/NAME-SETTING."""
    out: Path | None = None
    """Run folder, with -SETTING appended where there are several; default: outputs/SECTION/MODEL-BENCHMARK-SETTING,
    with the split where it is not the test split."""

    def run_folder(self, section: str, default_name: str, setting: str, several: bool = False) -> Path:
        """The folder of a run of one setting."""
        return run_folder(self.out, section, self.name or default_name, setting, several)


def run_name(
    spec: ModelSpec, task: Evaluation, checkpoint: Path | None = None, adapter: Adapter | None = None
) -> str:  # fmt: skip
    """The default name of a run, by model, benchmark, split, and weights that are not the registered model's."""
    parts = [spec.key]
    if checkpoint is not None:
        is_folder = spec.source is not None and Path(spec.source).is_dir()
        if is_folder or set(checkpoint_tags(spec, checkpoint)) - {"miniature"}:
            parts.append(fingerprint(checkpoint)[:8])
    if adapter is not None:
        parts.append(f"{adapter.record['config']['train']}_{adapter.config['fingerprint'][:8]}")
    parts.append(task.benchmark.key)
    if task.split != task.benchmark.test_split:
        parts.append(f"split_{task.split}")
    return "-".join(parts)


def without_broken_images(task: Evaluation) -> Evaluation:
    """The evaluation without the images that cannot be opened; each is printed with the reason."""
    from tqdm import tqdm

    def problem(example: Example) -> str:
        try:
            open_image(example.image, task.root, example.row)
        except UserError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor() as pool:
        problems = list(tqdm(pool.map(problem, task.examples), "opening all images", len(task.examples), unit="img"))
    for sentence in filter(None, problems):
        print(f"skipped: {sentence}", file=sys.stderr)
    kept = [example for example, sentence in zip(task.examples, problems, strict=True) if not sentence]
    if not kept:
        raise UserError("None of the images can be opened: check --data-root.")
    skipped = tuple(example.id for example, sentence in zip(task.examples, problems, strict=True) if sentence)
    tags = (*task.tags, f"{len(skipped)} broken images skipped") if skipped else task.tags
    return replace(task, examples=kept, skipped=skipped, tags=tags)


def values_of(argument: str | Sequence[str]) -> tuple[str, ...]:
    """The values of an argument that takes one or several; from Python a single one may come without a tuple."""
    return (argument,) if isinstance(argument, str) else tuple(dict.fromkeys(argument))


def run_config(
    script: str, kind: str, spec: ModelSpec, task: Evaluation, limit: int | None, *,
    checkpoint: Path | None = None, adapter: Adapter | None = None, setting: PromptSetting | None = None,
    tags: Sequence[str] = (), default_dtype: str | None = None, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """The configuration of a run, for run.json: everything that decides its rows.

    `kind`: vlm, clip, api or ranking. `tags`: beside those of the model and the images, what a table must know about
    the run; a run with tags is not compared with the paper. `default_dtype`: that of --dtype auto on the device;
    another one is a tag, and so is another token limit than the default. `more`: what is the script's own.
    """
    config: dict[str, Any] = {"script": script, "kind": kind, "model": spec.key}
    own_tags: list[str] = []
    if checkpoint is not None:
        own_tags += checkpoint_tags(spec, checkpoint)
        config["checkpoint"] = fingerprint(checkpoint)
        config["verified"] = is_verified(spec, config["checkpoint"])
    if adapter is not None:
        config["adapter"] = adapter.config
        own_tags += adapter.tags
    config |= {"benchmark": task.benchmark.key, "manifest": task.manifest_hash, "split": task.split, "limit": limit}
    if task.benchmark.key not in BENCHMARKS:  # another manifest of the same name is another benchmark
        config["data_root"] = str(task.root.resolve())
    if task.skipped:
        config["skipped_images"] = list(task.skipped)
    if setting is not None:
        config |= setting.config
        default = None if kind == "api" else default_new_tokens(setting.chain_of_thought)
        if more.get("max_new_tokens", default) != default:
            own_tags.append(f"{more['max_new_tokens']} tokens")
    if default_dtype is not None and more.get("dtype") != default_dtype:
        own_tags.append(more["dtype"])
    return config | more | {"tags": [*own_tags, *task.tags, *tags], "classes": list(task.names)}
