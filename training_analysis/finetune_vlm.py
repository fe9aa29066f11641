"""Fine-tune a vision-language model on classification rows, captions or mixtures (sections 3.2 and 4, Tables 3 and 4).

    python training_analysis/finetune_vlm.py --model llava-1.5-7b --benchmark flowers --train projector
    python training_analysis/finetune_vlm.py --model llava-1.5-7b --benchmark flowers --train projector+lora
    python training_analysis/finetune_vlm.py --model llava-1.5-7b --benchmark flowers --captions captions.jsonl
    python training_analysis/finetune_vlm.py --benchmark imagenet --epochs 1 --mix llava_v1_5_mix665k.json=1 \
        --image-root llava_images
    accelerate launch --num_processes 8 training_analysis/finetune_vlm.py --model llava-1.5-7b --benchmark cars

The loss is that of the answer's tokens and the end token. Before it starts, the script prints which parts are trained
and the effective batch, which is the same on any number of processes. After each epoch it answers the question for
held-out train images; best/ has the weights of the best of these epochs, last/ those of the last one: give either to
main_results/classify_vlm.py as --adapter, or merge it into a checkpoint (merge.py). Writes them with loss.csv (loss,
gradient norm and spikes of every step), epochs.csv and training.json in
outputs/training_analysis/MODEL-BENCHMARK-TRAIN. It can be stopped at any time: the same command continues
from the last checkpoint, after Ctrl-C from the last step.
"""

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlmclassifier import cli
from vlmclassifier.arguments import DataArgs, ModelArgs
from vlmclassifier.benchmarks import BENCHMARKS, Evaluation, find_benchmark
from vlmclassifier.finetuning.settings import (
    accumulated_parts,
    captioner_of,
    check_gpus,
    deviations,
    digest,
    mixed_files,
    paper_epochs,
    processes,
)
from vlmclassifier.identity import checkpoint_tags, read_adapter, training_record
from vlmclassifier.models import ModelSpec, checkpoint_folder, find_model
from vlmclassifier.paths import OUTPUTS
from vlmclassifier.prompts import QUESTIONS, TEMPLATES
from vlmclassifier.records import UserError
from vlmclassifier.runs.provenance import fingerprint, versions
from vlmclassifier.runs.record import replace_file

if TYPE_CHECKING:
    from datasets import Dataset

    from vlmclassifier.finetuning.trainer import VlmTrainer
    from vlmclassifier.vlm import VLM

EVALUATED = 512  # held-out rows, and test rows, that are answered after an epoch
NEW_TOKENS = 64


@dataclass
class Args(DataArgs, ModelArgs):
    """Arguments."""

    train: Literal["projector", "projector+lora", "lora", "qformer", "all"] = "projector"
    """Parts to train; all: everything but the vision encoder, which always stays frozen."""
    wording: Literal[tuple(QUESTIONS)] = "base"
    """Question of the classification rows (vlmclassifier/prompts.py); none: "a photo of CLASS" without a question."""
    objective: Literal["generation", "names", "expected"] = "generation"
    """generation: the answer's tokens; names: cross-entropy over all class names with their exact log-probabilities;
    expected: the expected accuracy of a name drawn by them (both from one pass over the tree of the names' tokens)."""
    captions: Path | None = None
    """Train on captions instead: a file of make_captions.py."""
    mix: tuple[str, ...] = ()
    """Further conversations in LLaVA's format: FILE.json or FILE.json=WEIGHT (1: every row once)."""
    image_root: Path | None = None
    """Folder that the image paths of --mix start from."""
    weight: float = 1.0
    """Weight of the benchmark's own rows beside --mix."""
    epochs: float | None = None
    """Passes over the rows; default: 50, on ImageNet 1; of the Q-Former 100 and 10."""
    steps: int | None = None
    """Steps instead of epochs."""
    learning_rate: float = 2e-5
    """Peak learning rate of everything but LoRA."""
    lora_rate: float = 2e-4
    """Peak learning rate of LoRA."""
    lora_rank: int = 128
    """Rank of LoRA."""
    lora_alpha: int = 256
    """Scale of LoRA, times its rank."""
    lora_dropout: float = 0.05
    """Dropout of LoRA's input."""
    warmup: float = 0.03
    """Share of the steps in which the learning rates rise; behind it they fall as a cosine."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    effective_batch: int = 64
    """Rows per step, over all processes and accumulated parts."""
    batch_size: int = 8
    """Rows per process and forward pass."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time."""
    max_length: int | None = None
    """Longest row in tokens; longer answers are cut. Default: the model's context."""
    template: Literal[tuple(TEMPLATES)] | None = None
    """Prompt template; default: the model's own. Projectors of LLaVA's own code: llava-v1, with --pad-square."""
    pad_square: bool = False
    """Pad images to squares with the mean colour, as LLaVA's own code does."""
    image_size: int | None = None
    """Side of the images in pixels, for BLIP-2 and InstructBLIP (the paper's BLIP-2: 364)."""
    augment: bool = False
    """A random crop and flip of every train image, as in the paper's BLIP-2."""
    held_out: float = 0.1
    """Share of every class's train rows that are not trained on and choose the best epoch; 0: none."""
    evaluate_test: bool = False
    """Also answer test images after each epoch, for the paper's rule (the epoch that is best on the test split)."""
    evaluated: int = EVALUATED
    """Images that are answered after an epoch, of held-out rows and of the test split."""
    skip_spikes: bool = False
    """Leave out steps whose loss jumps or is not finite; otherwise a loss that is not finite ends the training."""
    save_steps: int | None = None
    """Steps between checkpoints; default: once per epoch."""
    workers: int = 0
    """Processes that prepare batches, per training process."""
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where to log to beside loss.csv."""
    export: Path | None = None
    """Only write the training rows in LLaVA's format to this file, for other code."""
    seed: int = 0
    """Seed of the order of the rows, of the held-out rows and of LoRA's start."""
    out: Path | None = None
    """Folder of the training; default: outputs/training_analysis/MODEL-BENCHMARK-TRAIN."""


def main(args: Args) -> None:
    """Check everything, train, say what comes next."""
    # ---- check
    check_numbers(args)
    spec = find_model(args.model, "vlm")
    task = replace_split(args).load_evaluation()
    checkpoint = checkpoint_folder(spec, args.weights)
    if merged := read_adapter(None, spec, checkpoint):
        args = replace(args, **merged.prompt_options(args.template, args.pad_square, args.image_size))
    if args.template:
        spec = replace(spec, template=args.template)
    folder = args.out or OUTPUTS / "training_analysis" / f"{spec.key}-{task.benchmark.key}-{args.train}"

    from vlmclassifier.devices import resolve_device, resolve_dtype  # seconds of torch
    from vlmclassifier.finetuning.data import export_conversations

    rows, held_out, own_count = training_rows(args, task)
    if args.export:
        export_conversations(rows, args.export)
        print(f"{len(rows)} rows in LLaVA's format: {args.export}")
        return
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    check_gpus(str(device))
    config = configuration(args, spec, task, checkpoint, dtype) | {"train_images": own_count}
    tags = checkpoint_tags(spec, checkpoint)
    if is_finished(folder, config, tags):
        print(f"{folder} is trained. {next_command(args, folder)}")
        return

    # ---- build
    from vlmclassifier.finetuning.collator import check_answers
    from vlmclassifier.finetuning.parts import Lora, checkpoint_activations, parameter_table, select_trained
    from vlmclassifier.vlm import load_vlm

    vlm = load_vlm(args.model, checkpoint, args.device, args.dtype)
    vlm.spec, vlm.pads_square = spec, args.pad_square
    vlm.resize_images(args.image_size)
    check_answers(vlm, sorted(set(task.names)))
    lora = Lora(args.lora_rank, args.lora_alpha, args.lora_dropout)
    select_trained(vlm.model, args.train, lora, args.seed)
    if args.gradient_checkpointing:
        checkpoint_activations(vlm.model)
    trainer = build_trainer(args, vlm, rows, config, folder)
    if cli.is_main_process():
        print(f"{parameter_table(vlm.model)}\n\n{len(rows)} rows, {describe_batch(args)}")

    # ---- train
    from vlmclassifier.finetuning.trainer import (
        EpochCallback,
        ShardingCheck,
        finished_state,
        last_checkpoint,
        remove_checkpoints,
    )
    from vlmclassifier.finetuning.weights import load_trained

    evaluate = evaluations(args, vlm, task, held_out)
    epochs = EpochCallback(trainer, folder, evaluate)
    trainer.add_callback(epochs)
    trainer.add_callback(ShardingCheck(trainer, bool(evaluate), args.skip_spikes))
    resumed = last_checkpoint(folder)
    if resumed and (state := finished_state(resumed)):  # every step was made, and perhaps not evaluated
        load_trained(vlm.model, resumed / "weights")
        trainer.state = state
        epochs.continue_rows(state)
    else:
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    if epochs.interrupted:
        print(f"Stopped at step {trainer.state.global_step}; the same command continues there.")
        raise SystemExit(130)
    epochs.close(trainer.args, trainer.state)
    if cli.is_main_process():
        write_record(folder, config, tags, finished=True)
        remove_checkpoints(folder)
        print(
            f"Weights: {folder}/last" + (f" and {folder}/best" if evaluate else "") + f". {next_command(args, folder)}"
        )


def check_numbers(args: Args) -> None:
    """Raise UserError for numbers out of range, and for a batch that cannot be divided."""
    cli.check_positive(limit=args.limit, steps=args.steps, effective_batch=args.effective_batch,
                       batch_size=args.batch_size, lora_rank=args.lora_rank, lora_alpha=args.lora_alpha,
                       max_length=args.max_length, save_steps=args.save_steps, evaluated=args.evaluated,
                       image_size=args.image_size)  # fmt: skip
    for name in ("epochs", "learning_rate", "lora_rate", "weight"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} {value:g} is not above 0: give a larger number.")
    for name in ("warmup", "held_out", "lora_dropout"):
        if not 0 <= getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name):g} is outside 0 to 1.")
    if args.steps and args.epochs:
        raise UserError("--steps and --epochs exclude each other: leave one out.")
    if args.dtype == "float16":
        raise UserError("--dtype float16 has too small a range for training: use bfloat16 or float32.")
    if args.objective != "generation" and args.max_length:
        raise UserError(f"--objective {args.objective} reads whole prompts: leave out --max-length.")
    if args.captions and args.wording != "base":
        raise UserError("--captions has a request of its own: leave out --wording.")
    if args.objective != "generation" and (args.captions or args.mix or args.augment or args.gradient_checkpointing):
        raise UserError(f"--objective {args.objective} is for classification rows alone, without --captions, --mix, "
                        "--augment and --gradient-checkpointing.")  # fmt: skip
    for name in args.report_to:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--report-to {name} needs a package that is not installed: pip install {name}.")
    accumulated_parts(args.effective_batch, args.batch_size)
    mixed_files(args.mix, args.image_root)


def describe_batch(args: Args) -> str:
    """How the rows of a step are divided."""
    parts = accumulated_parts(args.effective_batch, args.batch_size)
    return (
        f"{args.effective_batch} per step: {args.batch_size} per forward pass x {parts} accumulated "
        f"x {processes()} processes"
    )


def replace_split(args: Args) -> Args:
    """The arguments with the train split where no other one is given. Raises UserError for a split with test images."""
    test_split = find_benchmark(args.benchmark, args.classes).test_split
    if args.split in ("all", test_split):
        raise UserError(f"--split {args.split} would train on the test images: choose another split.")
    return replace(args, split=args.split or "train")


def training_rows(args: Args, task: Evaluation) -> tuple["Dataset", "Dataset", int]:
    """The rows to train on, with the mixture, the held-out rows of the benchmark, and the number of its rows."""
    from vlmclassifier.finetuning.data import (
        caption_rows,
        classification_rows,
        conversation_rows,
        held_out_examples,
        mixture,
    )

    examples = task.examples
    if args.captions:
        own = caption_rows(examples, task.root, args.captions)
    else:
        own = classification_rows(examples, task.root, args.wording)
    of_id = {example.id: example for example in examples}
    is_held_out = [False] * len(own)
    if args.held_out:
        is_held_out = held_out_examples([of_id[i] for i in own["id"]], task.names, args.seed, args.held_out)
    held_out = own.select([number for number, is_out in enumerate(is_held_out) if is_out])
    own = own.select([number for number, is_out in enumerate(is_held_out) if not is_out])
    parts = [(own, args.weight)]
    for file, weight in mixed_files(args.mix, args.image_root):
        parts.append((conversation_rows(file, args.image_root), weight))
    return mixture(parts, args.seed), held_out, len(is_held_out)


def configuration(args: Args, spec: ModelSpec, task: Evaluation, checkpoint: Path, dtype: str) -> dict[str, Any]:
    """Everything that decides the trained weights, but not how a step is divided."""
    names = ("train", "objective", "wording", "weight", "epochs", "steps", "learning_rate", "lora_rate", "warmup",
             "weight_decay", "effective_batch", "max_length", "pad_square", "image_size", "augment", "held_out",
             "evaluated", "evaluate_test", "skip_spikes", "seed")  # fmt: skip
    mixed = [[file.name, digest(file), weight] for file, weight in mixed_files(args.mix, args.image_root)]
    lora = {"rank": args.lora_rank, "alpha": args.lora_alpha, "dropout": args.lora_dropout}
    return {
        "model": spec.key, "checkpoint": fingerprint(checkpoint), "benchmark": task.benchmark.key,
        "manifest": task.manifest_hash, "split": task.split, "limit": args.limit, "dtype": dtype,
        "template": spec.template, "captions": digest(args.captions) if args.captions else None,
        "captioner": captioner_of(args.captions), "mix": mixed,
        "lora": lora if "lora" in args.train else None, **{name: getattr(args, name) for name in names},
        "classes": list(task.names), "skipped_images": list(task.skipped),
        "image_root": str(args.image_root.resolve()) if args.mix else None,
        # Of the registered benchmarks the manifest says which images they are.
        "data_root": None if task.benchmark.key in BENCHMARKS else str(task.root.resolve()),
    }  # fmt: skip


def is_finished(folder: Path, config: dict[str, Any], tags: Sequence[str]) -> bool:
    """Whether this training is finished; begins it where there is none. Raises UserError for another one there."""
    if not (folder / "training.json").exists():
        # Hidden files are another process's, which is writing the record.
        if folder.exists() and any(not file.name.startswith(".") for file in folder.iterdir()):
            raise UserError(f"{folder} holds something else: choose another --out.")
        if cli.is_main_process():
            folder.mkdir(parents=True, exist_ok=True)
            write_record(folder, config, tags, finished=False)
        return False
    record = training_record(folder)
    old, new = record["config"], json.loads(json.dumps(config))
    if keys := [key for key in {**old, **new} if old.get(key) != new.get(key)]:
        raise UserError(
            f"{folder} holds a training of another configuration ({', '.join(keys)}): choose another --out or remove "
            "it."
        )
    return bool(record["finished"])


def write_record(folder: Path, config: dict[str, Any], tags: Sequence[str], finished: bool) -> None:
    """Write training.json."""
    record = {"config": config, "tags": list(tags), "deviations": deviations(config), "versions": versions(),
              "finished": finished}  # fmt: skip
    replace_file(folder / "training.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def build_trainer(args: Args, vlm: "VLM", rows: "Dataset", config: dict[str, Any], folder: Path) -> "VlmTrainer":
    """The trainer with the paper's schedule."""
    from transformers import TrainingArguments

    from vlmclassifier.finetuning.collator import Collator
    from vlmclassifier.finetuning.loss import summed_loss
    from vlmclassifier.finetuning.objectives import NameCollator, NameObjective
    from vlmclassifier.finetuning.trainer import VlmTrainer

    epochs = args.epochs or paper_epochs(args.train, config["benchmark"])
    options = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=accumulated_parts(args.effective_batch, args.batch_size),
        learning_rate=args.learning_rate, weight_decay=args.weight_decay, warmup_steps=args.warmup,
        lr_scheduler_type="cosine", num_train_epochs=epochs, max_steps=args.steps or -1,
        bf16=config["dtype"] == "bfloat16", logging_steps=1, logging_nan_inf_filter=False,
        remove_unused_columns=False, report_to=list(args.report_to),
        save_strategy="steps" if args.save_steps else "epoch", save_steps=args.save_steps or 500, save_total_limit=2,
        dataloader_num_workers=args.workers, seed=args.seed, use_cpu=vlm.model.device.type == "cpu",
        disable_tqdm=not cli.is_main_process(), average_tokens_across_devices=True,
    )  # fmt: skip
    record = {"config": config, "deviations": deviations(config), "versions": versions(), "lora": config["lora"]}
    if args.objective == "generation":
        collator, objective = Collator(vlm, args.max_length, args.seed if args.augment else None), summed_loss
    else:
        collator = NameCollator(vlm, config["classes"])
        objective = NameObjective(vlm, config["classes"], QUESTIONS[args.wording], args.objective)
    return VlmTrainer(vlm, options, collator, rows, record, args.lora_rate, objective, args.skip_spikes)


def evaluations(args: Args, vlm: "VLM", task: Evaluation, held_out: "Dataset") -> dict[str, Any]:
    """What is answered after each epoch: name -> function."""
    from functools import partial

    from vlmclassifier.finetuning.data import classification_rows
    from vlmclassifier.finetuning.evaluation import count_right

    found = {}
    if len(held_out):
        order = held_out.shuffle(seed=args.seed).select(range(min(args.evaluated, len(held_out))))
        found["held_out"] = partial(count_right, vlm, order, args.batch_size, NEW_TOKENS)
    if args.evaluate_test:
        test = replace(args, split=None, limit=args.evaluated).load_evaluation()
        wording = "caption" if args.captions else args.wording
        rows = classification_rows(test.examples, test.root, wording)
        found["test"] = partial(count_right, vlm, rows, args.batch_size, NEW_TOKENS)
    return found


def next_command(args: Args, folder: Path) -> str:
    """What to run next."""
    wording = "caption" if args.captions else args.wording
    given = "".join(f" --{name.replace('_', '-')} {getattr(args, name)}"
                    for name in ("weights", "classes", "data_root") if getattr(args, name))  # fmt: skip
    asked = f" --wording {wording}" if wording != "base" else ""
    return (
        f"Next: python main_results/classify_vlm.py --model {args.model} --benchmark {args.benchmark}{given}{asked} "
        f"--adapter {folder}/{'best' if args.held_out else 'last'}"
    )


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
