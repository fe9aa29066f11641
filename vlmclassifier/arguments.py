"""The arguments that scripts share, and the configuration that their runs record in run.json.

A script's `Args` inherits the parts it needs and declares what is its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from vlmclassifier.benchmarks import BENCHMARKS, Evaluation, load_evaluation
from vlmclassifier.models import ModelSpec, is_miniature
from vlmclassifier.prompts import ORDERS, WORDINGS, PromptSetting, prompt_settings
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

    def load_evaluation(self) -> Evaluation:
        """The benchmark, its classes and the examples in evaluation order. Raises UserError."""
        return load_evaluation(self.benchmark, self.classes, self.data_root, self.split, self.limit)


@dataclass
class PromptArgs:
    """The prompt settings: several values of the first three make one run per combination."""

    candidates: tuple[str, ...] = ("none",)
    """none (open world), all (closed world: every class name is listed), or K candidates, the true name among them.
    Several values, here and in the next two: one run per combination, with each image encoded once."""
    order: tuple[Literal[ORDERS], ...] = ("random",)
    """Order of the candidates: random per image, or fixed as in the class list."""
    wording: tuple[Literal[tuple(WORDINGS)], ...] = ("base",)
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
    """Images per forward pass; the results do not depend on it."""
    out: Path | None = None
    """Run folder, with -SETTING appended where there are several; default:
    outputs/main_results/MODEL-BENCHMARK-SETTING."""


def values_of(argument: str | Sequence[str]) -> tuple[str, ...]:
    """The values of an argument that takes one or several; from Python a single one may come without a tuple."""
    return (argument,) if isinstance(argument, str) else tuple(dict.fromkeys(argument))


def run_config(
    script: str, kind: str, spec: ModelSpec, task: Evaluation, limit: int | None, *,
    checkpoint: Path | None = None, setting: PromptSetting | None = None, tags: Sequence[str] = (), **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """The configuration of a run, for run.json: everything that decides its rows.

    `kind`: vlm, clip, api or ranking. `tags`: beside those of the model and the images, what a table must know about
    the run; a run with tags is not compared with the paper. `more`: what is the script's own.
    """
    config: dict[str, Any] = {"script": script, "kind": kind, "model": spec.key}
    own_tags: list[str] = []
    if checkpoint is not None:
        own_tags += ["miniature"] if is_miniature(checkpoint) else []
        config["checkpoint"] = fingerprint(checkpoint)
    config |= {"benchmark": task.benchmark.key, "manifest": task.manifest_hash, "split": task.split, "limit": limit}
    if setting is not None:
        config |= setting.config
    return config | more | {"tags": [*own_tags, *task.tags, *tags], "classes": list(task.names)}
