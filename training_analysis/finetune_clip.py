"""Fine-tune CLIP on classification rows: a linear layer on stored features, or the visual tower too (Table 3, right).

    python training_analysis/finetune_clip.py --features TRAIN_DIR --test-features TEST_DIR
    python training_analysis/finetune_clip.py --train full --model clip-vit-l-336 --benchmark flowers \
        --features TRAIN_DIR --test-features TEST_DIR

The features are those of feature_analysis/extract_features.py, of the train and of the test split. linear: Adam 1e-3,
batch 512, 300 epochs (ImageNet 40) on the normalised image feature, the same code as probe.py. full (the reference code
has it, the paper does not): the visual tower and the head, which starts from the linear one, by Adam 2e-5 in batches of
512, for 2 epochs on ImageNet, 10 on Caltech, 20 elsewhere. Both write three runs: SETTING-held_out with the epoch
chosen on held-out train rows, which is our number, SETTING-last_epoch, and SETTING by the paper's rule, the epoch that
is best on the test rows. full also writes best/ and last-N/ (weights of tower and head) and training.json with the
epochs, and continues after its last finished epoch. Default folder: outputs/training_analysis/MODEL-BENCHMARK-SETTING.
"""

import json
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlmclassifier import cli
from vlmclassifier.arguments import DataArgs, ModelArgs
from vlmclassifier.benchmarks import BENCHMARKS, Evaluation
from vlmclassifier.models import find_model
from vlmclassifier.paths import run_folder
from vlmclassifier.records import UserError
from vlmclassifier.runs import read_record
from vlmclassifier.runs.features import Features
from vlmclassifier.scoring.runs import score_run

if TYPE_CHECKING:
    from torch import Tensor

    from vlmclassifier.probing import ProbeData
    from vlmclassifier.probing.gradient import PaperResult

EPOCHS = {"linear": ({"imagenet": 40}, 300), "full": ({"imagenet": 2, "caltech": 10}, 20)}
PARTS = 4  # of a batch of 512 in full fine-tuning
FEATURE = "image"


@dataclass
class Args(DataArgs, ModelArgs):
    """Arguments."""

    model: str = "clip-vit-l-336"
    """full: a key of vlmclassifier/models.py, any open_clip NAME/TAG, or a folder."""
    train: Literal["linear", "full"] = "linear"
    """linear, or full (visual tower and head)."""
    features: Path = Path("features-train")
    """Features of the train split, by feature_analysis/extract_features.py."""
    test_features: Path = Path("features-test")
    """Features of the test split."""
    epochs: int | None = None
    """Epochs; default: the paper's."""
    learning_rate: float = 2e-5
    """full: learning rate of Adam."""
    batch_size: int = 128
    """full: images per forward pass; four are accumulated to a step."""
    workers: int = 4
    """full: processes that open images."""
    seed: int = 0
    """Seed of the head's start and of the order of the images."""
    out: Path | None = None
    """Run folder, with -SETTING appended; default: outputs/training_analysis/MODEL-BENCHMARK-SETTING."""


def main(args: Args) -> None:
    """Check, train the head, and with full the visual tower; score."""
    # ---- check
    cli.check_positive(epochs=args.epochs, batch_size=args.batch_size)
    if args.limit or args.split:
        raise UserError("Which images are used is decided by the features: leave out --limit and --split.")
    if not args.learning_rate > 0:
        raise UserError(f"--learning-rate {args.learning_rate:g} is not above 0: give a larger number.")
    train, test = Features(args.features), Features(args.test_features)
    check_pair(train, test)

    # ---- linear
    from vlmclassifier.devices import resolve_device

    device = resolve_device(args.device)
    data = probe_data(train, test, device)
    if args.train == "linear":
        for setting, predictions, chosen in linear_answers(args, data, test):
            write_run(args, train, test, setting, predictions, chosen)
        return
    finetune_tower(args, data, train, test, device)


def check_pair(train: Features, test: Features) -> None:
    """Raise UserError for features that are not CLIP's, or of two models or data sets."""
    for features in (train, test):
        if FEATURE not in features.names or features.constant("class_features") is None:
            raise UserError(f"{features.folder} has no features of a CLIP model: extract them with --model CLIP.")
    for key in ("model", "checkpoint", "benchmark", "classes", "manifest"):
        if train.config.get(key) != test.config.get(key):
            raise UserError(f"{train.folder} and {test.folder} do not belong together: their {key} differs.")
    shared = {row.example_id for row in train.rows} & {row.example_id for row in test.rows}
    if shared:
        raise UserError(f"{sorted(shared)[0]} is among the train rows and the test rows: extract two different splits.")


def probe_data(train: Features, test: Features, device: str) -> "ProbeData":
    """The image feature of both splits, with a tenth of the train rows held out."""
    import torch

    from vlmclassifier.probing import ProbeData, held_out_rows

    ids, numbers = [row.example_id for row in train.rows], [row.class_index for row in train.rows]
    matrices = train.matrix(FEATURE), test.matrix(FEATURE)
    held_out = held_out_rows(ids, numbers, 0)
    return ProbeData(matrices[0], torch.tensor(numbers), held_out, matrices[1], len(train.config["classes"]), device)


def linear_answers(args: Args, data: "ProbeData", test: Features) -> list[tuple[str, "Tensor", str]]:
    """Setting, predictions and choice of the three readings of the linear head."""
    import torch
    from tqdm import tqdm

    from vlmclassifier.probing import paper_probes

    truth = torch.tensor([row.class_index for row in test.rows])
    epochs = epochs_of(args, test)
    with tqdm(total=2 * epochs, desc=f"{test.config['model']}, linear", unit="epoch") as bar:
        results: list[list[PaperResult]] = paper_probes(
            [data], truth, epochs, False, [args.seed], lambda _: bar.update()
        )
    found = results[0][0]
    answers = [("linear-last_epoch", found.last), ("linear", found.papers)]
    answers += [("linear-held_out", found.held_out)] if found.held_out is not None else []
    return [(setting, result.predictions, result.choice) for setting, result in answers]


def epochs_of(args: Args, test: Features) -> int:
    """Epochs of the paper, or those that are given."""
    by_benchmark, otherwise = EPOCHS[args.train]
    return args.epochs or by_benchmark.get(test.config["benchmark"], otherwise)


def finetune_tower(args: Args, data: "ProbeData", train: Features, test: Features, device: str) -> None:
    """Train visual tower and head; write the runs of the three epochs that are reported."""
    import torch

    from vlmclassifier.clip import checkpoint_path, load_clip
    from vlmclassifier.finetuning.clip import LabelledImages, VisualClassifier, predict
    from vlmclassifier.runs.provenance import fingerprint

    spec = find_model(args.model, "clip")
    checkpoint = checkpoint_path(spec, args.weights)
    if train.config["checkpoint"] != fingerprint(checkpoint):
        raise UserError(f"{train.folder} has features of another checkpoint than {checkpoint}: extract them again.")
    tasks = {features.config["split"]: by_id(args, features) for features in (train, test)}
    clip = load_clip(args.model, checkpoint, args.device, args.dtype)
    weight, bias = linear_head(args, data, test)
    torch.manual_seed(args.seed)
    model = VisualClassifier(clip, weight, bias).to(device)
    images = {split: LabelledImages(clip, task.examples, task.root) for split, task in tasks.items()}
    held_out = data.held_out
    split = train.config["split"]
    parts = {
        "train": torch.utils.data.Subset(images[split], (~held_out).nonzero()[:, 0].tolist()),
        "held_out": torch.utils.data.Subset(images[split], held_out.nonzero()[:, 0].tolist()),
        "test": images[test.config["split"]],
    }
    folder = folder_of(args, test, "full")
    truth = {"held_out": data.classes[held_out], "test": torch.tensor([row.class_index for row in test.rows])}

    def loader(name: str, **options: Any) -> Any:
        return torch.utils.data.DataLoader(parts[name], args.batch_size, num_workers=args.workers, **options)

    def moved(batches: Any) -> Any:
        for pixel_values, classes in batches:
            yield pixel_values.to(device), classes.to(device)

    epochs = epochs_of(args, test)
    rows_of = {"train": train.rows_hash, "test": test.rows_hash, "checkpoint": train.config["checkpoint"]}
    rows, state = resume(folder, model, args, epochs, rows_of)
    optimiser = torch.optim.Adam(model.trained().values(), lr=args.learning_rate)
    if state is not None:
        optimiser.load_state_dict(state)
    for epoch in range(len(rows), epochs):
        order = torch.Generator().manual_seed(args.seed * 1000 + epoch)
        loss = train_epoch(args, model, optimiser, moved(loader("train", shuffle=True, generator=order)), device,
                           len(parts["train"]), f"{spec.key}, full, epoch {epoch + 1} of {epochs}")  # fmt: skip
        predictions = {name: predict(model, moved(loader(name))) for name in ("held_out", "test") if len(parts[name])}
        row = {"epoch": epoch + 1, "loss": loss}
        for name, values in predictions.items():
            row[name] = 100 * float((values == truth[name]).float().mean())
        rows.append(row)
        save_epoch(folder, model, optimiser, rows, predictions["test"])
        print(", ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
    report_tower(args, train, test, folder, rows)


def by_id(args: Args, features: Features) -> Evaluation:
    """The examples of stored features, in their order. Raises UserError for features of another benchmark."""
    task = replace(args, split=features.config["split"], limit=None).load_evaluation()
    examples = {example.id: example for example in task.examples}
    if missing := [row.example_id for row in features.rows if row.example_id not in examples]:
        raise UserError(f"{missing[0]} of {features.folder} is not in --benchmark {args.benchmark}: fix one of them.")
    return replace(task, examples=[examples[row.example_id] for row in features.rows])


def linear_head(args: Args, data: "ProbeData", test: Features) -> tuple["Tensor", "Tensor"]:
    """Weight [classes, width] and bias [classes] of the linear head after its last epoch."""
    from tqdm import tqdm

    from vlmclassifier.probing.gradient import Inputs, train_probes

    by_benchmark, otherwise = EPOCHS["linear"]
    epochs = by_benchmark.get(test.config["benchmark"], otherwise)
    matrix, classes = data.inner
    inputs = Inputs([matrix.on_device(data.device)], data.device)
    trained = train_probes(inputs, classes, data.class_count, epochs, seeds=[args.seed])
    for stack in tqdm(trained, "linear head", epochs, unit="epoch"):  # noqa: B007 - the last one is used
        continue
    weight, bias = stack.parameters[0]  # [1, width, classes], [1, 1, classes]
    return weight[0].T.detach().cpu(), bias[0, 0].detach().cpu()


def train_epoch(
    args: Args, model: Any, optimiser: Any, batches: Any, device: str, count: int, title: str
) -> float:  # fmt: skip
    """One pass over the train rows in steps of PARTS batches; returns the mean loss. Raises UserError for a NaN."""
    import torch
    import torch.nn.functional as F
    from tqdm import tqdm

    model.train()
    step_rows, total, steps = args.batch_size * PARTS, 0.0, math.ceil(count / args.batch_size)
    for number, (pixel_values, classes) in enumerate(tqdm(batches, title, steps, unit="batch")):
        in_step = min(step_rows, count - number // PARTS * step_rows)
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=device.startswith("cuda")):
            loss = F.cross_entropy(model(pixel_values).float(), classes, reduction="sum")
        if not torch.isfinite(loss):
            raise UserError(f"The loss of batch {number + 1} is not finite: lower --learning-rate.")
        (loss / in_step).backward()
        total += loss.item()
        if (number + 1) % PARTS == 0 or number + 1 == steps:
            optimiser.step()
            optimiser.zero_grad()
    return total / count


def resume(
    folder: Path, model: Any, args: Args, epochs: int, rows_of: dict[str, str]
) -> tuple[list[dict[str, Any]], Any]:  # fmt: skip
    """The epochs that are finished, and the optimiser's state; the model gets their weights."""
    import torch
    from safetensors.torch import load_file

    file = folder / "training.json"
    names = ("model", "learning_rate", "batch_size", "seed")
    config = {name: getattr(args, name) for name in names} | {"epochs": epochs} | rows_of
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"config": config, "epochs": []}, indent=1) + "\n", encoding="utf-8")
        return [], None
    record = json.loads(file.read_text(encoding="utf-8"))
    if record["config"] != config:
        raise UserError(f"{folder} holds a training of another configuration: choose another --out or remove it.")
    if not record["epochs"]:
        return [], None
    parameters, last = model.trained(), folder / f"last-{len(record['epochs'])}"
    with torch.no_grad():
        for name, value in load_file(last / "visual.safetensors").items():
            parameters[name].copy_(value)
    return record["epochs"], torch.load(last / "optimizer.pt", weights_only=True)


def save_epoch(folder: Path, model: Any, optimiser: Any, rows: list[dict[str, Any]], predictions: "Tensor") -> None:
    """Write the weights and answers of an epoch; when all are there training.json counts it, then the old ones go."""
    import torch
    from safetensors.torch import save_file

    from vlmclassifier.runs.record import replace_file

    new = folder / f"last-{len(rows)}"
    shutil.rmtree(new, ignore_errors=True)  # of an epoch that was not counted
    new.mkdir()
    states = {name: value.detach().cpu().contiguous() for name, value in model.trained().items()}
    save_file(states, new / "visual.safetensors")
    torch.save(optimiser.state_dict(), new / "optimizer.pt")
    save_file({"predictions": predictions}, folder / f"epoch-{len(rows)}.safetensors")
    if "held_out" in rows[-1] and rows[-1]["held_out"] > max((row["held_out"] for row in rows[:-1]), default=-1.0):
        shutil.rmtree(folder / "best", ignore_errors=True)
        (folder / "best").mkdir()
        shutil.copyfile(new / "visual.safetensors", folder / "best" / "visual.safetensors")
    record = json.loads((folder / "training.json").read_text(encoding="utf-8")) | {"epochs": rows}
    replace_file(folder / "training.json", json.dumps(record, indent=1) + "\n")
    for old in set(folder.glob("last-*")) - {new}:
        shutil.rmtree(old)


def report_tower(args: Args, train: Features, test: Features, folder: Path, rows: list[dict[str, Any]]) -> None:
    """The runs of the epochs chosen on held-out rows, of the last, and by the paper's rule."""
    from safetensors.torch import load_file

    chosen = {"full-last_epoch": len(rows) - 1,
              "full": max(range(len(rows)), key=lambda epoch: rows[epoch]["test"])}  # fmt: skip
    if "held_out" in rows[0]:
        chosen["full-held_out"] = max(range(len(rows)), key=lambda epoch: rows[epoch]["held_out"])
    for setting, epoch in chosen.items():
        predictions = load_file(folder / f"epoch-{epoch + 1}.safetensors")["predictions"]
        write_run(args, train, test, setting, predictions, f"epoch {epoch + 1} of {len(rows)}")


def training_tags(args: Args, train: Features, test: Features, setting: str) -> list[str]:
    """In what a training differs from the paper's, as tags."""
    benchmark = BENCHMARKS.get(test.config["benchmark"])
    papers = benchmark.train_images if benchmark else None
    tags = [f"{len(train.rows):,} of {papers:,} train images"] if papers not in (None, len(train.rows)) else []
    default = epochs_of(replace(args, epochs=None), test)
    tags += [f"{args.epochs} epochs"] if args.epochs not in (None, default) else []
    if setting.startswith("full"):
        tags += [f"learning_rate {args.learning_rate:g}"] if args.learning_rate != 2e-5 else []
        tags += [f"steps of {args.batch_size * PARTS} images"] if args.batch_size != 128 else []
    return tags


def folder_of(args: Args, test: Features, setting: str) -> Path:
    """The folder of a run or of a training."""
    name = f"{test.config['model']}-{test.config['benchmark']}"
    return run_folder(args.out, "training_analysis", name, setting, True)


def write_run(args: Args, train: Features, test: Features, setting: str, predictions: "Tensor", chosen: str) -> None:
    """Write answers as a run of the kind probe, and print its score."""
    from vlmclassifier.probing.runs import save_predictions

    keys = ("model", "checkpoint", "verified", "benchmark", "manifest", "split", "limit", "classes", "tags")
    config = {"script": "finetune_clip", "kind": "probe"} | {
        key: test.config[key] for key in keys if key in test.config
    }
    config["tags"] = [*config["tags"], *training_tags(args, train, test, setting)]
    config |= {"setting": setting, "epochs": epochs_of(args, test), "train_rows": train.rows_hash,
               "test_rows": test.rows_hash, "seed": args.seed, "chosen": chosen}  # fmt: skip
    folder = folder_of(args, test, setting if setting != "full" else "full-papers_rule")
    if (folder / "run.json").exists():  # it is computed again from the stored features or epochs
        if read_record(folder)["config"].get("script") != "finetune_clip":
            raise UserError(f"{folder} holds another run: choose another --out.")
        shutil.rmtree(folder)
    save_predictions(folder, config, test, predictions)
    score = score_run(folder).scores[0]
    interval = f"[{score.low:.1f}, {score.high:.1f}]"
    print(f"{score.model}, {setting}, {score.dataset}: accuracy {score.value:.1f}% {interval}, n={score.n} ({chosen}). "
          f"Run: {folder}. Next: python training_analysis/table.py")  # fmt: skip


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
