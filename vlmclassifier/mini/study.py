"""Shared parts of the sections' mini_study.py scripts: arguments, run folders, processes, saved answers."""

import os
import runpy
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmclassifier import cli
from vlmclassifier.arguments import BenchmarkName
from vlmclassifier.benchmarks import class_names, find_benchmark
from vlmclassifier.paths import PROJECT_ROOT
from vlmclassifier.prompts import WORDINGS, PromptSetting
from vlmclassifier.records import UserError
from vlmclassifier.runs import read_run
from vlmclassifier.scoring.metrics import Answers

PROCESSES = 2
IMPORTED_ONCE = ("vlmclassifier.clip", "vlmclassifier.ranking.ranker", "vlmclassifier.answering")  # by all workers
VLM, CLIP, BLIP = "mini-llava", "mini-clip", "mini-blip2"

# Image id -> its label, and whether the answer is correct by the paper's metric.
Hits = dict[str, tuple[str, bool]]


@dataclass
class StudyArgs:
    """Arguments of every section's mini_study.py."""

    root: Path
    """Folder of one study, with its checkpoints; the results are written there, too."""
    benchmark: BenchmarkName = "plane_figures"
    classes: Path | None = None
    """Class list of your own manifest: a JSON array of names."""
    data_root: Path | None = None
    """Folder that the manifest's image paths start from; default: ROOT/images where it exists."""
    train: int = 288
    """Number of train images on which the best training-free method and t are chosen."""
    limit: int | None = None
    """Only the first N images of the test split's evaluation order."""
    batch_size: int = 128
    """Images per forward pass."""

    @property
    def names(self) -> tuple[str, ...]:
        """The class list of the benchmark."""
        return class_names(find_benchmark(self.benchmark, self.classes))

    def data_options(self) -> list[str]:
        """The options of a command line that say which data set it is."""
        options = ["--benchmark", str(Path(self.benchmark).resolve() if self.classes else self.benchmark)]
        options += ["--classes", str(self.classes.resolve())] if self.classes else []
        root = self.script_args()["data_root"]
        return options + (["--data-root", str(root.resolve())] if root else [])

    def script_args(self) -> dict[str, Any]:
        """The arguments that are the same for every script of the study."""
        data_root = self.data_root
        if data_root is None and (self.root / "images").is_dir():
            data_root = self.root / "images"
        return {
            "benchmark": self.benchmark, "classes": self.classes, "batch_size": self.batch_size,
            "data_root": data_root,
        }  # fmt: skip


def run_logged(log: Path, command: Sequence[object]) -> None:
    """Run one script on one core, its output in a log file. Raises UserError with its last line where it fails.

    The process is forked from one that has imported the libraries, which takes as long as a short script.
    """
    words = [str(word) for word in command]
    log.touch()  # a process that cannot start writes nothing
    process = cli.worker_context(*IMPORTED_ONCE).Process(target=_run_script, args=(log.resolve(), words))
    process.start()
    process.join()
    if process.exitcode:
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise UserError(f"{words[0]} stopped ({''.join(last)}; all of it: {log}): fix the cause and run it again.")


def _run_script(log: Path, words: list[str]) -> None:
    cli.use_one_core()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that it starts
    os.chdir(PROJECT_ROOT)
    with open(log, "a", encoding="utf-8") as stream:
        for output in (sys.stdout, sys.stderr):
            os.dup2(stream.fileno(), output.fileno())
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def open_world(names: Sequence[str], wording: str = "base") -> PromptSetting:
    """Return the open-world setting with one wording."""
    return PromptSetting(tuple(names), wording=wording)


def with_candidates(names: Sequence[str], candidates: str) -> PromptSetting:
    """Return the setting with a candidate list; `candidates`: a number, or "all"."""
    return PromptSetting(tuple(names), candidates)


def training_free_settings(names: Sequence[str]) -> list[PromptSetting]:
    """Return the settings among which the best one is chosen: every wording, and all names as candidates."""
    settings = [open_world(names, wording) for wording in WORDINGS]
    settings.append(with_candidates(names, "all"))
    return settings


def answers_folder(root: Path, split: str = "test") -> Path:
    """Return the folder that contains the runs of classify_vlm.py and classify_clip.py on one split."""
    return root / "main_results" / "train" if split == "train" else root / "main_results"


def answers_run(root: Path, model: str, setting: PromptSetting, split: str = "test") -> Path:
    """Return the run folder of one setting. `model`: VLM or CLIP."""
    return answers_folder(root, split) / f"{model}-{setting.name}"


def control_run(root: Path, control: str, setting: PromptSetting) -> Path:
    """Return the run folder of a VLM trained with other frequencies. `control`: the name of its checkpoint (vlm-...)"""
    return answers_folder(root) / f"{VLM}-{setting.name}-{control.removeprefix('vlm-')}"


def ranking_run(root: Path, split: str = "test") -> Path:
    """Return the run folder of the ranking of all names on one split."""
    return root / "inference_analysis" / ("ranking-train" if split == "train" else "ranking")


def in_processes(work: Callable[[Any], None], jobs: Any) -> None:
    """Call `work(jobs)` in PROCESSES processes, which divide the jobs among themselves through the run folders."""
    map_in_processes(work, [jobs] * PROCESSES)


def map_in_processes(work: Callable[[Any], None], jobs: Sequence[Any]) -> None:
    """Call `work(job)` for every job, in PROCESSES processes; the first jobs begin first."""
    if PROCESSES == 1:
        for job in jobs:
            work(job)
        return
    context = cli.worker_context(*IMPORTED_ONCE)
    with ProcessPoolExecutor(PROCESSES, context, initializer=cli.use_one_core) as pool:
        list(pool.map(work, jobs))


def read_hits(run: Path) -> Hits:
    """Return the hits of a run. Raises UserError when the run folder has no answers."""
    if not (run / "predictions.jsonl").exists():
        raise UserError(f"{run} contains no answers: run main_results/mini_study.py first.")
    record, predictions = read_run(run)
    answers = Answers(predictions, tuple(record["config"]["classes"]), record["config"]["kind"])
    hits = {}
    for prediction, is_correct in zip(predictions, answers.right, strict=True):
        hits[prediction.example_id] = (prediction.label, is_correct)
    return hits


def common_images(hits: dict[Any, Hits]) -> dict[Any, Hits]:
    """Return the same hits for only the images that every run has.

    Runs have different lengths when an earlier call had another --limit.
    """
    common = set.intersection(*(set(run_hits) for run_hits in hits.values()))
    reduced = {}
    for key, run_hits in hits.items():
        reduced[key] = {image_id: run_hits[image_id] for image_id in common}
    return reduced


def values(hits: Hits) -> list[bool]:
    """Return whether each answer is correct, in the order of the image ids."""
    return [is_correct for _, (_, is_correct) in sorted(hits.items())]
