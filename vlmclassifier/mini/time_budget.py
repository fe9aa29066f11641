"""Training for a given time: the number of steps that this machine does in some minutes."""

import json
import time
from dataclasses import replace

from vlmclassifier.mini.stages import STAGES, Training, build_clip_training
from vlmclassifier.records import UserError

FITTED_FILE = "fitted.json"
LM_STEP_COST, VLM_STEP_COST = 1.0, 1.2  # duration of a step relative to a step of CLIP
STEPS_SHARE = 0.85  # of the training time; the rest is start-up, decoding and feature extraction
TIMED_STEPS = 12
MIN_STEPS = 20


def seconds_per_step(training: Training) -> float:
    """Return the seconds of one CLIP step on this machine: the median of some steps of a model that is discarded."""
    clip_training, seconds = build_clip_training(training), []
    for number in range(TIMED_STEPS):
        start = time.perf_counter()
        clip_training.step(number)
        clip_training.optimisation.step(1.0)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[TIMED_STEPS // 2]


def fit_steps(training: Training, minutes: float) -> Training:
    """Return the same training with as many steps as this machine does in about `minutes`.

    The steps are recorded in OUT/fitted.json. Raises UserError when a stage is trained already.
    """
    for stage in STAGES:
        if training.folder(stage).exists():
            raise UserError(
                f"--minutes decides the steps before the first stage, but {training.folder(stage)} is trained already: "
                "leave out --minutes or choose another --out."
            )
    recipe = training.recipe
    vlm_steps = recipe.vlm.steps + recipe.vlm.pretrain_steps
    cost = recipe.clip.steps + LM_STEP_COST * recipe.lm.steps + VLM_STEP_COST * vlm_steps  # in steps of CLIP
    factor = 60 * minutes * STEPS_SHARE / (seconds_per_step(training) * cost)
    steps = {stage: max(MIN_STEPS, round(factor * getattr(recipe, stage).steps)) for stage in STAGES}
    file = training.out / FITTED_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"minutes": minutes, "steps": steps}) + "\n", encoding="utf-8")
    print(f"{minutes:g} minutes: " + ", ".join(f"{count} steps of {stage}" for stage, count in steps.items()))
    return with_steps(training, steps)


def with_steps(training: Training, steps: dict[str, int]) -> Training:
    """Return the same training with other numbers of steps. `steps`: stage -> steps."""
    recipe = training.recipe
    pretrain_steps = max(1, round(recipe.vlm.pretrain_steps * steps["vlm"] / recipe.vlm.steps))
    recipe = replace(
        recipe,
        clip=replace(recipe.clip, steps=steps["clip"]),
        lm=replace(recipe.lm, steps=steps["lm"]),
        vlm=replace(recipe.vlm, steps=steps["vlm"], pretrain_steps=pretrain_steps),
    )
    return replace(training, recipe=recipe)


def read_fitted_steps(training: Training, minutes: float) -> Training | None:
    """Return the training with the steps that an earlier call fitted into the same time, or None."""
    file = training.out / FITTED_FILE
    if not file.exists():
        return None
    record = json.loads(file.read_text(encoding="utf-8"))
    return with_steps(training, record["steps"]) if record["minutes"] == minutes else None
