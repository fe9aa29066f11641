"""transformers' Trainer for vision-language models: answer loss, two learning rates, spikes, accuracy by epoch."""

import csv
import io
import math
import os
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from vlmclassifier.finetuning.loss import row_losses, summed_loss, zero_of
from vlmclassifier.finetuning.parts import LORA_MARK, frozen_modules
from vlmclassifier.finetuning.spikes import SpikeWatch, Step, append_step, keep_steps
from vlmclassifier.finetuning.weights import load_trained, save_trained
from vlmclassifier.records import UserError
from vlmclassifier.runs.record import replace_file
from vlmclassifier.vlm import VLM

COMPLETE_FILE = "complete"  # in a checkpoint of a training whose every file was written
SummedLoss = Callable[[nn.Module, nn.Module, dict[str, Any]], Tensor]


class VlmTrainer(Trainer):
    """Trains the parameters of a VLM that have gradients; everything else stays in evaluation mode.

    `record`: what the folders of weights say they are. `lora_rate`: learning rate of LoRA; the other parameters have
    that of `args`. `objective`: the summed loss of a batch. `skip_spikes`: make no step where the loss jumps.
    """

    def __init__(
        self, vlm: VLM, args: TrainingArguments, collator: Any, rows: Any, record: Mapping[str, Any],
        lora_rate: float | None = None, objective: SummedLoss = summed_loss, skip_spikes: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(model=vlm.model, args=args, data_collator=collator, train_dataset=rows)
        self.vlm, self.record, self.lora_rate, self.objective = vlm, record, lora_rate, objective
        self.model_accepts_loss_kwargs = True  # so that Trainer counts the predicted tokens of a whole batch
        self.loss_is_scaled_for_ga = True
        self.trained = [parameter for parameter in vlm.model.parameters() if parameter.requires_grad]
        self.frozen = frozen_modules(vlm.model)
        self.step_losses: list[Tensor] = []  # of the parts of the current step
        self.step_rows: list[dict[str, Any]] = []
        self.gradient_norm = math.nan
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(LossBar())
        self.add_callback(SpikeCallback(self, Path(args.output_dir) / "loss.csv", skip_spikes))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:  # fmt: skip
        """The summed loss of a part of a batch over the number of items of the whole batch, on all processes."""
        for module in self.frozen:
            module.eval()
        loss = self.objective(model, self.vlm.model, inputs)
        if num_items_in_batch is None:
            raise RuntimeError("Trainer gives no number of predicted tokens")
        loss = loss / num_items_in_batch
        if "pixel_values" not in inputs:
            loss = loss + zero_of(self.trained).to(loss.device)
        # The gradients of the processes are averaged, but each loss is a share of the sum over all of them.
        loss = loss * self.accelerator.num_processes
        self.step_losses.append(loss.detach())
        self.step_rows.append({"rows": inputs["row_ids"], "inputs": inputs})
        return (loss, None) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with one learning rate for LoRA and one for the other parameters."""
        if self.optimizer is None:
            named = [(name, p) for name, p in (model or self.model).named_parameters() if p.requires_grad]
            groups = [
                {"params": [p for name, p in named if LORA_MARK not in name], "lr": self.args.learning_rate},
                {"params": [p for name, p in named if LORA_MARK in name], "lr": self.lora_rate},
            ]
            groups = [group for group in groups if group["params"]]
            options = {"betas": (self.args.adam_beta1, self.args.adam_beta2), "eps": self.args.adam_epsilon}
            self.optimizer = torch.optim.AdamW(groups, weight_decay=self.args.weight_decay, **options)
        return self.optimizer

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: Trainer's estimate holds for text alone."""
        return 0

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        found = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.gradient_norm = float(found)
        return found

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained weights alone."""
        if any(hasattr(parameter, "full_tensor") for parameter in self.trained) or self.args.should_save:
            folder = Path(output_dir or self.args.output_dir) / "weights"
            save_trained(self.vlm.model, folder, self.record, write=self.args.should_save)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(self.vlm.model, Path(resume_from_checkpoint) / "weights")


class LossBar(ProgressCallback):
    """Trainer's progress bar with the loss of the last step, instead of a line per step."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **more: Any) -> None:
        """Show the loss."""
        if state.is_world_process_zero and self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.4g}", refresh=False)


class SpikeCallback(TrainerCallback):
    """Writes loss.csv, and looks at the loss of every step before the weights are changed by it."""

    def __init__(self, trainer: VlmTrainer, file: Path, skip: bool) -> None:
        self.trainer, self.file, self.skip = trainer, file, skip
        self.watch = SpikeWatch()
        self.skipped: list[int] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Continue the file where the training continues."""
        kept = keep_steps(self.file, state.global_step) if args.should_save else []
        self.watch = SpikeWatch(gather_object([[step.loss for step in kept]])[0])  # those of the first process

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Raise UserError where loss or gradient is not finite; with `skip` leave the step out, spikes too."""
        trainer = self.trainer
        loss = trainer.accelerator.reduce(torch.stack(trainer.step_losses).sum(), "mean").item()
        parts, trainer.step_losses, trainer.step_rows = trainer.step_rows, [], []
        is_finite = math.isfinite(loss) and math.isfinite(trainer.gradient_norm)
        is_spike = self.watch.is_spike(loss) or not is_finite
        rows = []
        if is_spike:
            rows = gather_object([row for part in parts for row in part["rows"]])
        if args.should_save:
            rate = trainer.optimizer.param_groups[0]["lr"]
            append_step(self.file, Step(state.global_step + 1, state.epoch or 0.0, loss, trainer.gradient_norm, rate,
                                        is_spike, is_spike and self.skip, " ".join(rows)))  # fmt: skip
        if not is_spike:
            return
        if self.skip:
            trainer.optimizer.zero_grad()  # without gradients AdamW changes nothing
            self.skipped.append(state.global_step + 1)
            return
        if not is_finite:
            culprits = gather_object([row for part in parts for row in self._not_finite(part)])
            named = f"row {culprits[0]} has a loss that is" if culprits else "its gradient is"
            raise UserError(
                f"Step {state.global_step + 1} cannot be made: {named} not finite (loss {loss:g}, gradient norm "
                f"{trainer.gradient_norm:g}; all rows of the step are in {self.file}). Look at the image and answer of "
                "the row, lower the learning rate, or leave such steps out with --skip-spikes; the checkpoints before "
                "are kept."
            )
        if args.should_save:
            print(f"Note: the loss jumps to {loss:.3g} at step {state.global_step + 1} (rows in {self.file}).")

    def _not_finite(self, part: dict[str, Any]) -> list[str]:
        """The rows of a part whose losses are not finite."""
        with torch.no_grad():
            losses = row_losses(self.trainer.vlm.model, part["inputs"])
        return [row for row, loss in zip(part["rows"], losses.tolist(), strict=True) if not math.isfinite(loss)]


class ShardingCheck(TrainerCallback):
    """Ends a training for which FSDP was asked but is not used: accelerate falls back to DDP on the CPU silently.

    Also refuses options that do not work when parameters are sharded. `evaluates`: whether images are answered after
    each epoch, which sharded processes would have to do in step; `skips`: whether spikes are left out, which DeepSpeed
    cannot do, since its step is part of the backward pass.
    """

    def __init__(self, trainer: VlmTrainer, evaluates: bool, skips: bool) -> None:
        self.trainer, self.vlm, self.evaluates, self.skips = trainer, trainer.vlm, evaluates, skips

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Raise UserError."""
        if self.skips and self.trainer.is_deepspeed_enabled:
            raise UserError("--skip-spikes does not work under DeepSpeed, which steps at once: leave one of them out.")
        is_sharded = any(hasattr(parameter, "full_tensor") for parameter in self.vlm.model.parameters())
        if is_sharded and self.evaluates:
            raise UserError(
                "Sharded processes cannot answer images after an epoch: add --held-out 0, leave out --evaluate-test, "
                "and classify with last/ afterwards."
            )
        asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true", "yes")
        if asked and not is_sharded:
            raise UserError(
                "FSDP was asked for (accelerate's configuration), but the parameters are not sharded: use GPUs, or "
                "leave FSDP out; training_analysis/fsdp2.yaml is a configuration."
            )


class EpochCallback(TrainerCallback):
    """After each epoch: accuracies by generation in epochs.csv, the weights in last/, and in best/ where they are best.

    `evaluate`: data set name -> function that returns right answers and rows of this process. The first one, of
    held-out train rows, chooses the best epoch.
    """

    def __init__(
        self, trainer: VlmTrainer, folder: Path, evaluate: Mapping[str, Callable[[], tuple[int, int]]]
    ) -> None:
        self.trainer, self.folder, self.evaluate = trainer, folder, evaluate
        self.file = folder / "epochs.csv"
        self.interrupted = False
        self._handler: Any = None
        self.rows: list[dict[str, Any]] = []

    def continue_rows(self, state: Any) -> None:
        """Keep the epochs of epochs.csv that were closed before a step."""
        self.rows = [row for row in read_epochs(self.file) if row["step"] <= state.global_step]

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Continue epochs.csv where the training continues; stop at the end of a step after Ctrl-C."""
        self.continue_rows(state)
        if state.global_step and abs(state.epoch - round(state.epoch)) < 1e-6:
            self.close(args, state)  # the checkpoint of an epoch's last step, which was not evaluated any more
        if args.world_size == 1:  # several processes would not see it at the same step
            self._handler = signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, number: int, frame: Any) -> None:
        self.interrupted = True
        signal.signal(signal.SIGINT, self._handler)  # a second one ends the process at once

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Let the batches of this epoch be augmented in their own way."""
        self.trainer.data_collator.epoch = int(state.epoch or 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """After Ctrl-C write a checkpoint and stop."""
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Evaluate and keep the weights; not after Ctrl-C."""
        if not self.interrupted:
            self.close(args, state)

    def close(self, args: Any, state: Any) -> None:
        """Evaluate an epoch and keep its weights, once."""
        if self.rows and self.rows[-1]["step"] == state.global_step:
            return
        row: dict[str, Any] = {"epoch": round(state.epoch, 4), "step": state.global_step}
        self.trainer.vlm.model.eval()
        for name, function in self.evaluate.items():
            counts = torch.tensor(function(), dtype=torch.float32, device=args.device)
            right, n = self.trainer.accelerator.reduce(counts, "sum").tolist()
            row |= {name: 100 * right / n if n else math.nan, f"{name}_n": int(n)}
        chooser = next(iter(self.evaluate), None)
        is_best = chooser is not None and row[chooser] > max((old[chooser] for old in self.rows), default=-1.0)
        self.rows.append(row)
        weights, record = self.trainer.vlm.model, dict(self.trainer.record) | {"epochs": row}
        for name in ("best", "last"):
            if name == "last" or is_best:
                save_trained(weights, self.folder / name, record, write=args.should_save)
        if args.should_save:
            write_epochs(self.file, self.rows)
            shown = ", ".join(f"{name} {row[name]:.1f}% of {row[f'{name}_n']}" for name in self.evaluate)
            print(f"\nepoch {row['epoch']:g}, step {row['step']}: {shown or 'not evaluated'}", flush=True)

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Mark a checkpoint as complete."""
        if args.should_save:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE_FILE).touch()

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Give Ctrl-C back."""
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)


def read_epochs(file: Path) -> list[dict[str, Any]]:
    """The rows of epochs.csv."""
    if not file.exists():
        return []
    with open(file, newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    whole = lambda name: name == "step" or name.endswith("_n")  # noqa: E731
    return [{name: int(value) if whole(name) else float(value) for name, value in row.items()} for row in rows]


def write_epochs(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write epochs.csv."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace_file(file, text.getvalue())


def remove_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of a finished training: its weights are in best/ and last/."""
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def finished_state(checkpoint: Path) -> TrainerState | None:
    """The state of a training whose last step a checkpoint holds; None where steps are left."""
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    return state if state.global_step >= state.max_steps else None


def last_checkpoint(folder: Path) -> Path | None:
    """The latest complete checkpoint of a training; None where it begins anew."""
    found = [file.parent for file in folder.glob(f"checkpoint-*/{COMPLETE_FILE}")]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
