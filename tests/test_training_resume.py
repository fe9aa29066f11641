"""Protects: a training that was stopped anywhere ends with the files of one that was not."""

import csv
import json

import pytest
from test_finetuning import classes_of_colour, finetune

from vlmclassifier.finetuning import trainer

__all__ = ["classes_of_colour"]  # a fixture


def files_of(folder):
    found = {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    return {name: content for name, content in found.items() if not name.name.startswith(".")}


def ctrl_c(patch, step):
    """Ctrl-C during a step."""
    original = trainer.EpochCallback.on_step_end

    def interrupt(self, args, state, control, **more):
        self.interrupted = state.global_step == step
        original(self, args, state, control, **more)

    patch.setattr(trainer.EpochCallback, "on_step_end", interrupt)


def kill(patch, step):
    """The end of the process when a step is made and saved, but its epoch not evaluated."""
    original = trainer.EpochCallback.close

    def end(self, args, state):
        if state.global_step == step:
            raise SystemExit(137)
        original(self, args, state)

    patch.setattr(trainer.EpochCallback, "close", end)


STOPS = {
    "epochs": [*((ctrl_c, step) for step in (1, 2, 3, 4)), (kill, 2), (kill, 4)],  # 2 steps per epoch
    "steps": [(ctrl_c, 2), (ctrl_c, 3), (kill, 3)],  # 3 steps, which end within an epoch
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", STOPS)
def test_a_training_stopped_at_any_step_is_continued(kind, tiny, classes_of_colour, tmp_path, monkeypatch):
    own, options = classes_of_colour, {"train": "projector", "save_steps": 1, "held_out": 0.25}
    options |= {"epochs": 2.0} if kind == "epochs" else {"epochs": None, "steps": 3}
    whole = finetune(tiny, own, tmp_path / "whole", **options)
    with open(whole / "epochs.csv", newline="") as stream:
        assert [int(row["step"]) for row in csv.DictReader(stream)] == ([2, 4] if kind == "epochs" else [2, 3])
    for stop, step in STOPS[kind]:
        folder = tmp_path / f"{stop.__name__}-{step}"
        with monkeypatch.context() as patch:
            stop(patch, step)
            with pytest.raises(SystemExit) as ended:
                finetune(tiny, own, folder, **options)
        assert ended.value.code in (130, 137)
        assert not json.loads((folder / "training.json").read_text())["finished"]
        finetune(tiny, own, folder, **options)
        assert files_of(folder) == files_of(whole), (stop, step)
