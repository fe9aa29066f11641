"""Train probes on stored features of the train split and classify the test split with them (section 3.2, Tables 3, 10).

    python feature_analysis/probe.py --train outputs/feature_analysis/llava-1.5-7b-flowers-split_train-features \
        --test outputs/feature_analysis/llava-1.5-7b-flowers-features
    python feature_analysis/probe.py --train DIR --test DIR --features last_token --method logistic neighbours centroid
    python feature_analysis/probe.py --train DIR --test DIR --features last_token --method logistic --shots 1 2 4 8 16

--method paper is the paper's probe (Adam 1e-3, batch 512, 500 epochs, ImageNet 100). It gives three runs:
FEATURE-held_out with the epoch chosen on held-out train rows, which is our number; FEATURE-last_epoch; and FEATURE by
the paper's rule, the epoch that is best on the test rows. The other methods choose their setting on held-out train rows
alone. Writes outputs/feature_analysis/NAME-SETTING/{run.json, predictions.jsonl, scores.csv, classes.csv}.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlmclassifier import cli
from vlmclassifier.benchmarks import BENCHMARKS
from vlmclassifier.class_lists import first_index
from vlmclassifier.models import MODELS
from vlmclassifier.paths import run_folder
from vlmclassifier.prompts import TEMPLATES
from vlmclassifier.records import Prediction, UserError
from vlmclassifier.runs import open_run
from vlmclassifier.runs.features import Features
from vlmclassifier.scoring.runs import score_run
from vlmclassifier.tables import label

if TYPE_CHECKING:
    from torch import Tensor

METHODS = ("paper", "logistic", "neighbours", "centroid")
EPOCHS = {"imagenet": 100}  # of the paper's probe; 500 elsewhere
CLIP_EPOCHS = {"imagenet": 40}  # of the paper's probe on CLIP's features; 300 elsewhere (Table 3, right)
SAME_KEYS = ("model", "checkpoint", "control", "dtype", "template", "wording", "benchmark", "data_root", "classes")
PAPERS_CLIP_SETTING = "linear"  # what the paper's table calls the probe on CLIP's image feature


@dataclass
class Args:
    train: Path
    """Folder of the features of the train split, by extract_features.py."""
    test: Path
    """Folder of the features to classify, of the same model and benchmark."""
    features: tuple[str, ...] = ("last_token", "avg_token")
    """Features to probe; of a CLIP model: image. layers: those of every layer."""
    method: tuple[Literal[METHODS], ...] = ("paper",)
    """paper, logistic (regression), neighbours (k nearest), centroid (nearest)."""
    mlp: bool = False
    """The paper's probe with one hidden layer as wide as the features, instead of a linear one."""
    epochs: int | None = None
    """Epochs of the paper's probe; default: 500, on ImageNet 100, of CLIP's features 300 and 40."""
    shots: tuple[int, ...] = ()
    """Only so many train images of every class; several values: one run each."""
    seed: int = 0
    """Seed of the probe's weights, of the held-out rows and of the drawn shots."""
    out: Path | None = None
    """Run folder, with -SETTING appended; default: outputs/feature_analysis/MODEL-BENCHMARK-probe-SETTING."""


def main(args: Args) -> None:
    """Check that the features belong together, train the probes, score them."""
    # ---- check
    cli.check_positive(epochs=args.epochs)
    for shots in args.shots:
        cli.check_positive(shots=shots)
    train, test = Features(args.train), Features(args.test)
    check_pair(train, test)

    # ---- probe
    features = args.features if args.features != ("layers",) else train.layer_names()
    for feature in features:
        train_values, test_values = train.load(feature), test.load(feature)  # [rows, width] each
        for method in args.method:
            for shots in args.shots or (None,):
                for setting, predictions, choice in probe(args, train, test, train_values, test_values, method, shots):
                    write_run(args, train, test, f"{feature}{setting}", predictions, choice)


def check_pair(train: Features, test: Features) -> None:
    """Raise UserError for features of two models or data sets, for shared images and for classes without train rows."""
    for key in SAME_KEYS:
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


def probe(
    args: Args, train: Features, test: Features, train_values: "Tensor", test_values: "Tensor", method: str,
    shots: int | None,
) -> list[tuple[str, "Tensor", str]]:  # fmt: skip
    """Train one probe. Returns (end of the setting's name, class indices [test rows], what was chosen) of its runs."""
    import torch

    from vlmclassifier import probing

    ids, numbers = [row.example_id for row in train.rows], [row.class_index for row in train.rows]
    end = ""
    if shots is not None:
        end = f"-{shots}_shots" + (f"-seed_{args.seed}" if args.seed else "")
        rows = probing.few_shot_rows(ids, numbers, shots, args.seed)
        ids, numbers = [ids[row] for row in rows], [numbers[row] for row in rows]
        train_values = train_values[rows]
    classes = torch.tensor(numbers)
    held_out = probing.held_out_rows(ids, numbers, args.seed)
    if method != "paper":
        if method != "centroid" and not held_out.any():
            raise UserError(f"With {shots} shots nothing can be held out to choose by: use --method centroid or paper.")
        function = getattr(probing, {"logistic": "logistic_probe", "neighbours": "neighbour_probe",
                                     "centroid": "centroid_probe"}[method])  # fmt: skip
        result = function(train_values, classes, held_out, test_values)
        return [(f"-{method}{end}", result.predictions, result.choice)]
    from tqdm import tqdm

    if is_clip(train):
        epochs = args.epochs or CLIP_EPOCHS.get(train.config["benchmark"], 300)
    else:
        epochs = args.epochs or EPOCHS.get(train.config["benchmark"], 500)
    end = f"-mlp{end}" if args.mlp else end
    last = lambda curve: (f"{end}-last_epoch", curve[-1], f"epoch {epochs} of {epochs}")  # noqa: E731
    with tqdm(total=2 * epochs, desc=f"{train.config['model']}, {'MLP' if args.mlp else 'linear'} probe") as bar:
        if not held_out.any():  # one image a class: nothing to choose by
            curve = probing.train_paper_probe(train_values, classes, test_values, epochs, args.mlp, [args.seed],
                                              lambda epoch: bar.update(2))[:, 0]  # fmt: skip
            return [last(curve)]
        result = probing.paper_probe(train_values, classes, held_out, test_values, epochs, args.mlp, args.seed,
                                     lambda epoch: bar.update(1))  # fmt: skip
    truth = torch.tensor([row.class_index for row in test.rows])
    best = int((result.curve == truth).float().mean(dim=1).argmax())
    return [
        (f"{end}-held_out", result.predictions, result.choice), last(result.curve),
        (end, result.curve[best], f"the paper's rule: epoch {best + 1} of {epochs}, the best on these very rows"),
    ]  # fmt: skip


def is_clip(features: Features) -> bool:
    """Whether the features are a CLIP model's."""
    return "wording" not in features.config


def other_template(config: dict[str, Any]) -> str:
    """The name of the prompt template of the features, where it is not the model's own; else ""."""
    spec = MODELS.get(config["model"])
    names = {text: name for name, text in TEMPLATES.items()}
    name = names.get(config["template"], "")
    return "" if spec is None or spec.template == name else name


def train_tags(train: Features) -> list[str]:
    """What makes the train rows differ from the paper's, for the tables."""
    benchmark = BENCHMARKS.get(train.config["benchmark"])
    papers = benchmark.paper_rows.get("train") if benchmark else None
    return [f"{len(train.rows):,} of {papers:,} train images"] if papers not in (None, len(train.rows)) else []


def write_run(args: Args, train: Features, test: Features, setting: str, predictions: "Tensor", choice: str) -> None:
    """Write the answers of a probe as a finished run, and print its scores."""
    if is_clip(train):
        setting = setting.replace("image", PAPERS_CLIP_SETTING, 1)
    elif not setting.startswith("position_") and (name := other_template(train.config)):
        setting += f"-{name}"
    rows = json.dumps([row.example_id for row in train.rows])
    keys = (*SAME_KEYS, "verified", "split", "limit", "manifest", "tags")
    config = {"script": "probe", "kind": "probe"} | {key: test.config[key] for key in keys if key in test.config}
    config |= {"setting": setting, "chosen": choice, "epochs": args.epochs, "seed": args.seed,
               "train_rows": hashlib.sha256(rows.encode()).hexdigest()}  # fmt: skip
    config["tags"] = [*config["tags"], *train_tags(train)]
    names = config["classes"]
    first = first_index(names)  # equal names stand for the first, as in every accuracy by class index
    folder = run_folder(args.out, "feature_analysis", f"{config['model']}-{config['benchmark']}-probe", setting, True)
    run = open_run(folder, config, [row.example_id for row in test.rows])
    if not run.complete:
        run.append([
            Prediction(row.example_id, row.label, row.class_index, "", None, names[index], (first[names[index]],))
            for row, index in zip(test.rows, predictions.tolist(), strict=True)
            if row.example_id not in run.done
        ])  # fmt: skip
    answers = run.finish()
    score = score_run(folder, answers).scores[0]
    model, interval = label(score.model, ", ".join(score.tags)), f"[{score.low:.1f}, {score.high:.1f}]"
    print(f"{model}, {setting}, {score.dataset}: accuracy {score.value:.1f}% {interval}, n={score.n} ({choice}). "
          f"Run: {folder}. Next: python feature_analysis/table.py")  # fmt: skip


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
