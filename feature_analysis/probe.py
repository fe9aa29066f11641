"""Train probes on stored features of the train split and classify the test split with them (section 3.2, Tables 3, 10).

    python feature_analysis/probe.py --train outputs/feature_analysis/llava-1.5-7b-flowers-split_train-features \
        --test outputs/feature_analysis/llava-1.5-7b-flowers-features
    python feature_analysis/probe.py --train DIR --test DIR --features last_token avg_token image_token --method grid
    python feature_analysis/probe.py --train DIR --test DIR --features layers --method logistic
    python feature_analysis/probe.py --train DIR --test DIR --method logistic --shots 1 2 4 8 16 --seeds 0 1 2

--method paper is the paper's probe (Adam 1e-3, batch 512, 500 epochs, ImageNet 100). It gives three runs:
FEATURE-held_out with the epoch chosen on held-out train rows, which is our number; FEATURE-last_epoch; and FEATURE by
the paper's rule, the epoch that is best on the test rows. grid trains 13 learning rates of DINOv2's linear evaluation
for every feature; the other methods are logistic regression, nearest neighbours, the nearest class centroid, and
Tip-Adapter on CLIP's features. All choose their setting on held-out train rows alone. Features, learning rates and
seeds are trained together; rows are read from the shards batch by batch, on a GPU from its memory where they fit.
Writes outputs/feature_analysis/NAME-SETTING/{run.json, predictions.jsonl, scores.csv, classes.csv}; finished runs are
not computed again.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from vlmclassifier import cli
from vlmclassifier.benchmarks import BENCHMARKS
from vlmclassifier.models import MODELS
from vlmclassifier.paths import run_folder
from vlmclassifier.prompts import TEMPLATES
from vlmclassifier.records import UserError
from vlmclassifier.runs.features import Features
from vlmclassifier.runs.record import differing_keys, read_record, refuse_difference
from vlmclassifier.scoring.runs import score_run
from vlmclassifier.tables import label

if TYPE_CHECKING:
    from torch import Tensor

    from vlmclassifier.probing import ProbeData, ProbeResult

METHODS = ("paper", "grid", "logistic", "neighbours", "centroid", "tip_adapter")
EPOCHS = {"imagenet": 100}  # of the paper's probe; 500 elsewhere
CLIP_EPOCHS = {"imagenet": 40}  # of the paper's probe on CLIP's features; 300 elsewhere (Table 3, right)
SAME_KEYS = (
    "model",
    "checkpoint",
    "adapter",
    "control",
    "dtype",
    "template",
    "wording",
    "benchmark",
    "data_root",
    "classes",
)
# Hashes of the images that a probe is trained on and classifies, and the features that the best one was chosen among:
# where only these differ, a probe is computed again from the stored features.
REPLACED_KEYS = ("train_rows", "test_rows", "features")
BEST_FEATURE = "best_feature"  # the setting of the feature that grid chooses among all
PAPERS_CLIP_SETTING = "linear"  # what the paper's table calls the probe on CLIP's image feature
HELD_OUT_SEED = 0  # the held-out rows are the same for every seed, so that seeds can be trained together


@dataclass
class Args:
    train: Path
    """Folder of the features of the train split, by extract_features.py."""
    test: Path
    """Folder of the features to classify, of the same model and benchmark."""
    features: tuple[str, ...] = ("last_token", "avg_token")
    """Features to probe; of a CLIP model and of pixels: image. layers: those of every layer."""
    method: tuple[Literal[METHODS], ...] = ("paper",)
    """paper, grid (13 learning rates), logistic (regression), neighbours (k nearest), centroid (nearest class mean), or
    tip_adapter."""
    mlp: bool = False
    """The paper's probe with one hidden layer as wide as the features, instead of a linear one."""
    epochs: int | None = None
    """Epochs of paper and grid; default: 500, on ImageNet 100, of CLIP's features 300 and 40. Another number is a tag
    in the tables."""
    shots: tuple[int, ...] = ()
    """Only so many train images of every class; several values: one run each."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the weights of paper and grid, and of the drawn shots: one run each."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    out: Path | None = None
    """Run folder, with -SETTING appended; default: outputs/feature_analysis/MODEL-BENCHMARK-probe-SETTING."""


class Answer(NamedTuple):
    """What one probe says: the setting of its run, and the result."""

    setting: str
    result: "ProbeResult"


def main(args: Args) -> None:
    """Check that the features belong together, train the probes, score them."""
    # ---- check
    cli.check_positive(epochs=args.epochs)
    for shots in args.shots:
        cli.check_positive(shots=shots)
    train, test = Features(args.train), Features(args.test)
    check_pair(train, test)
    names = list(args.features) if args.features != ("layers",) else train.layer_names()
    from vlmclassifier.devices import resolve_device  # seconds of torch

    device = resolve_device(args.device)

    # ---- probe
    for shots in args.shots or (None,):
        for method in args.method:
            for end, seeds in ends(args, method, shots):
                wanted = unfinished(args, train, test, names, method, end, shots, seeds)
                if len(wanted) < len(names):
                    print(f"{len(names) - len(wanted)} of {len(names)} features: the {method} probe is finished")
                if not wanted:
                    continue
                rows = train_rows(train, shots, seeds[0])
                source = Source(train, test, rows, device)
                for answer in answers(args, method, wanted, source, end, seeds):
                    write_run(args, train, test, answer, names)


def check_pair(train: Features, test: Features) -> None:
    """Raise UserError for features of two models or data sets, for shared images and for classes without train rows."""
    for key in (*SAME_KEYS, "manifest"):
        if train.config.get(key) != test.config.get(key):
            raise UserError(
                f"{train.folder} and {test.folder} do not belong together: their {key} differs "
                f"({_short(train.config.get(key))}, {_short(test.config.get(key))}); extract both alike."
            )
    train_ids, classes = {row.example_id for row in train.rows}, {row.class_index for row in train.rows}
    if shared := [row.example_id for row in test.rows if row.example_id in train_ids]:
        raise UserError(f"{shared[0]} is among the train rows and the test rows: extract two different splits.")
    if missing := [row.label for row in test.rows if row.class_index not in classes]:
        raise UserError(
            f"The class {missing[0]!r} has test images but no train rows in {train.folder}, and so have "
            f"{len(set(missing)) - 1} others: extract more of the train split."
        )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."


def ends(args: Args, method: str, shots: int | None) -> list[tuple[str, list[int]]]:
    """Groups of seeds that are trained together, each with the end of its settings' names, without the seed.

    Shots are drawn by the seed, so that each seed has train rows of its own; without them only the trained probes
    depend on it.
    """
    parts = ["" if method == "paper" else f"-{method}", "-mlp" if method == "paper" and args.mlp else "",
             "" if shots is None else f"-{shots}_shots"]  # fmt: skip
    seeds = list(dict.fromkeys(args.seeds))
    if shots is not None or method == "grid":
        return [("".join(parts), [seed]) for seed in seeds]
    return [("".join(parts), seeds if method == "paper" else [0])]


def settings_of(name: str, method: str, end: str, shots: int | None, seeds: Sequence[int]) -> list[str]:
    """The settings of the runs of one feature."""
    kinds = [""]
    if method == "paper":
        kinds = ["", "-last_epoch"] + (["-held_out"] if shots != 1 else [])
    return [f"{name}{end}{seed_part(seed)}{kind}" for seed in seeds for kind in kinds]


def seed_part(seed: int) -> str:
    """What a setting's name says of the seed."""
    return f"-seed_{seed}" if seed else ""


def unfinished(
    args: Args, train: Features, test: Features, names: Sequence[str], method: str, end: str, shots: int | None,
    seeds: Sequence[int],
) -> list[str]:  # fmt: skip
    """The features whose probes must be trained: grid needs all of them to choose the best one.

    Raises UserError, before anything is trained, where a folder holds a run of another configuration.
    """
    settings = {name: settings_of(name, method, end, shots, seeds) for name in names}
    if method == "grid" and len(names) > 1:
        settings[BEST_FEATURE] = settings_of(BEST_FEATURE, method, end, shots, seeds)
    wanted = [name for name in settings if not all(
        is_finished(args, train, test, setting, names) for setting in settings[name]
    )]  # fmt: skip
    for setting in (setting for name in wanted for setting in settings[name]):
        folder, config = run_of(args, train, test, setting, names)
        if differences(folder, config) - {*REPLACED_KEYS}:
            refuse_difference(folder, read_record(folder)["config"] | {"chosen": None}, config | {"chosen": None})
    return list(names) if BEST_FEATURE in settings and wanted else wanted


class Source(NamedTuple):
    """Where probes take their features from."""

    train: Features
    test: Features
    rows: "tuple[Tensor, Tensor, Tensor]"  # of the train rows: indices, classes, whether they are held out; each [rows]
    device: str

    def data(self, name: str) -> "ProbeData":
        """One feature of the train rows and of the test rows."""
        from vlmclassifier.probing import ProbeData

        rows, classes, held_out = self.rows
        train, test = self.train.matrix(name).subset(rows), self.test.matrix(name)
        return ProbeData(train, classes, held_out, test, len(self.train.config["classes"]), self.device)


def train_rows(train: Features, shots: int | None, seed: int) -> "tuple[Tensor, Tensor, Tensor]":
    """Indices, classes and the held-out mask, each [rows], of all train rows or of `shots` of each class."""
    import torch

    from vlmclassifier.probing import few_shot_rows, held_out_rows

    ids, numbers = [row.example_id for row in train.rows], [row.class_index for row in train.rows]
    rows = torch.arange(len(ids)) if shots is None else few_shot_rows(ids, numbers, shots, seed)
    ids, numbers = [ids[row] for row in rows], [numbers[row] for row in rows]
    return rows, torch.tensor(numbers), held_out_rows(ids, numbers, HELD_OUT_SEED)


def answers(
    args: Args, method: str, names: Sequence[str], source: Source, end: str, seeds: Sequence[int]
) -> Iterator[Answer]:
    """Train the probes of one method and yield their answers as they come."""
    from tqdm import tqdm

    from vlmclassifier import probing

    if method not in ("paper", "centroid") and not source.rows[2].any():
        raise UserError(f"With one image a class nothing can be held out for {method} to choose by: use --method "
                        "centroid or paper, or more --shots.")  # fmt: skip
    title = f"{source.test.config['model']}, {method} probe"
    if method in ("paper", "grid"):
        yield from trained_answers(args, method, names, source, end, seeds, title)
        return
    functions = {"logistic": probing.logistic_probe, "neighbours": probing.neighbour_probe,
                 "centroid": probing.centroid_probe}  # fmt: skip
    text = source.test.constant("class_features") if method == "tip_adapter" else None
    if method == "tip_adapter" and text is None:
        raise UserError(f"{source.test.folder} has no class features: --method tip_adapter is for features of CLIP.")
    for name in tqdm(names, title, unit="feature"):
        data = source.data(name)
        result = probing.tip_adapter(data, text) if text is not None else functions[method](data)
        yield Answer(f"{name}{end}{seed_part(seeds[0])}", result)


def trained_answers(
    args: Args, method: str, names: Sequence[str], source: Source, end: str, seeds: Sequence[int], title: str
) -> Iterator[Answer]:  # fmt: skip
    """The answers of probes that are trained by gradient descent, features of one width together."""
    import torch
    from tqdm import tqdm

    from vlmclassifier.probing import grid_probes, groups_of, paper_probes
    from vlmclassifier.probing.gradient import LEARNING_RATES

    test = source.test
    truth, count = torch.tensor([row.class_index for row in test.rows]), len(test.config["classes"])
    epochs = epochs_of(args, test)
    probes = len(seeds) if method == "paper" else len(LEARNING_RATES)
    groups = groups_of([test.width(name) for name in names], count, probes, args.mlp)
    heads = []
    with tqdm(total=(1 + bool(source.rows[2].any())) * epochs * len(groups), desc=title, unit="epoch") as bar:
        for group in groups:
            group_names = [names[number] for number in group]
            data = [source.data(name) for name in group_names]
            if method == "grid":
                found = grid_probes(data, epochs, seeds[0], lambda _: bar.update())
                heads += zip(group_names, found, strict=True)
                continue
            results = paper_probes(data, truth, epochs, args.mlp, seeds, lambda _: bar.update())
            for name, of_seeds in zip(group_names, results, strict=True):
                for seed, result in zip(seeds, of_seeds, strict=True):
                    setting = f"{name}{end}{seed_part(seed)}"
                    if result.held_out is not None:
                        yield Answer(f"{setting}-held_out", result.held_out)
                    yield Answer(f"{setting}-last_epoch", result.last)
                    yield Answer(setting, result.papers)
    for name, head in heads:
        yield Answer(f"{name}{end}{seed_part(seeds[0])}", head.result)
    if len(heads) > 1:
        name, head = max(heads, key=lambda item: item[1].accuracy)
        chosen = replace(head.result, choice=f"{name}, {head.result.choice}")
        yield Answer(f"{BEST_FEATURE}{end}{seed_part(seeds[0])}", chosen)


def epochs_of(args: Args, test: Features) -> int:
    """How many epochs a probe is trained."""
    by_benchmark, otherwise = (CLIP_EPOCHS, 300) if is_clip(test) else (EPOCHS, 500)
    return args.epochs or by_benchmark.get(test.config["benchmark"], otherwise)


def is_clip(features: Features) -> bool:
    """Whether the features are a CLIP model's, or pixels'."""
    return "wording" not in features.config


def other_template(config: dict[str, Any]) -> str:
    """The name of the prompt template of the features, where it is not the model's own; else ""."""
    spec = MODELS.get(config["model"])
    names = {text: name for name, text in TEMPLATES.items()}
    name = names.get(config["template"], "")
    return "" if spec is None or spec.template == name else name


def probe_tags(args: Args, train: Features, setting: str) -> list[str]:
    """What makes the train rows or the probe differ from the paper's, for the tables."""
    benchmark = BENCHMARKS.get(train.config["benchmark"])
    papers = benchmark.paper_rows.get("train") if benchmark else None
    tags = [f"{len(train.rows):,} of {papers:,} train images"] if papers not in (None, len(train.rows)) else []
    default = epochs_of(Args(args.train, args.test), train)
    if has_epochs(setting) and args.epochs not in (None, default):
        tags.append(f"{args.epochs} epochs")
    return tags


def has_epochs(setting: str) -> bool:
    """Whether the probe of a setting is trained for a number of epochs."""
    return not any(f"-{method}" in setting for method in METHODS[2:])


def run_of(
    args: Args, train: Features, test: Features, setting: str, names: Sequence[str] = ()
) -> tuple[Path, dict[str, Any]]:  # fmt: skip
    """The folder of a probe's run, and its configuration without what was chosen; `names`: all features."""
    given = {"epochs": args.epochs if has_epochs(setting) else None}
    if setting.startswith(BEST_FEATURE):
        given["features"] = sorted(names)
    if is_clip(train):
        setting = setting if train.config["model"] == "pixels" else setting.replace("image", PAPERS_CLIP_SETTING, 1)
    elif not setting.startswith("position_") and (name := other_template(train.config)):
        setting += f"-{name}"
    keys = (*SAME_KEYS, "verified", "split", "limit", "manifest", "tags")
    config = {"script": "probe", "kind": "probe"} | {key: test.config[key] for key in keys if key in test.config}
    config |= {"setting": setting, **given, "train_rows": train.rows_hash, "test_rows": test.rows_hash}
    config["tags"] = [*config["tags"], *probe_tags(args, train, setting)]
    folder = run_folder(args.out, "feature_analysis", f"{config['model']}-{config['benchmark']}-probe", setting, True)
    return folder, config


def differences(folder: Path, config: dict[str, Any]) -> set[str]:
    """The keys, without `chosen`, in which the run in a folder differs from a configuration; none without a run."""
    if not (folder / "run.json").exists():
        return set()
    return set(differing_keys(read_record(folder)["config"], config)) - {"chosen"}


def is_finished(args: Args, train: Features, test: Features, setting: str, names: Sequence[str] = ()) -> bool:
    """Whether this very run is finished, whatever it has chosen."""
    folder, config = run_of(args, train, test, setting, names)
    exists = (folder / "run.json").exists()
    return exists and bool(read_record(folder)["finished"]) and not differences(folder, config)


def write_run(args: Args, train: Features, test: Features, answer: Answer, names: Sequence[str] = ()) -> None:
    """Write the answers of a probe as a finished run, where there is none yet, and print its scores."""
    from tqdm import tqdm

    from vlmclassifier.probing.runs import save_predictions

    folder, config = run_of(args, train, test, answer.setting, names)
    if not is_finished(args, train, test, answer.setting, names):
        if changed := differences(folder, config):
            if changed <= {*REPLACED_KEYS}:
                tqdm.write(f"Other {'features' if 'features' in changed else 'images'} than in {folder}: its probe is "
                           "replaced.")  # fmt: skip
                shutil.rmtree(folder)
        elif (folder / "run.json").exists():
            shutil.rmtree(folder)  # this very probe, interrupted: all rows are written at once, and now again
        save_predictions(folder, config | {"chosen": answer.result.choice}, test, answer.result.predictions)
    score = score_run(folder).scores[0]
    model, interval = label(score.model, ", ".join(score.tags)), f"[{score.low:.1f}, {score.high:.1f}]"
    chosen = read_record(folder)["config"]["chosen"]
    # Not `print`: a progress bar may be on the screen.
    tqdm.write(f"{model}, {score.setting}, {score.dataset}: accuracy {score.value:.1f}% {interval}, n={score.n} "
               f"({chosen}). Run: {folder}. Next: python feature_analysis/table.py")  # fmt: skip


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
