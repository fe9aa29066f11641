"""Classify a benchmark with a vision-language model by asking what each image shows (section 2, Table 1).

    python main_results/classify_vlm.py --model llava-1.5-7b --benchmark flowers
    python main_results/classify_vlm.py --model llava-1.5-7b --benchmark flowers --candidates all
    python main_results/classify_vlm.py --model llava-1.5-7b --benchmark flowers --candidates none 2 5 20 all
    python main_results/classify_vlm.py --model blip2-2.7b --benchmark my.jsonl --classes my_classes.json --limit 100

Writes outputs/main_results/NAME/{run.json, predictions.jsonl, scores.csv}. It can be stopped at any time: the same
command continues. Start it several times, or under `accelerate launch`, and the processes share the work.
"""

import sys
from dataclasses import dataclass

from vlmclassifier import cli
from vlmclassifier.arguments import AdapterArgs, DataArgs, ModelArgs, PromptArgs, RunArgs, run_config, run_name
from vlmclassifier.identity import read_adapter
from vlmclassifier.models import checkpoint_folder, find_model, template_of
from vlmclassifier.prompts import default_new_tokens
from vlmclassifier.records import ContextError, images_named
from vlmclassifier.runs import open_run
from vlmclassifier.scoring.runs import score_run


@dataclass
class Args(RunArgs, PromptArgs, DataArgs, AdapterArgs, ModelArgs):
    """Arguments."""


def main(args: Args) -> None:
    """Check everything, answer what is pending, score."""
    # ---- check
    cli.check_positive(limit=args.limit, batch_size=args.batch_size, max_new_tokens=args.max_new_tokens)
    spec = find_model(args.model, "vlm")
    task = args.load_evaluation()
    settings = args.prompt_settings(task.names)
    cli.warn_of_equal_names(task.names)
    checkpoint = checkpoint_folder(spec, args.weights)
    adapter = read_adapter(args.adapter, spec, checkpoint)
    spec = adapter.spec(spec) if adapter else spec
    max_new_tokens = args.max_new_tokens or default_new_tokens(args.chain_of_thought)

    from vlmclassifier.devices import resolve_device, resolve_dtype  # seconds of torch

    # ---- open one run per setting
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    runs = {}
    for setting in settings:
        config = run_config(
            "classify_vlm", "vlm", spec, task, args.limit, checkpoint=checkpoint, adapter=adapter,
            setting=setting, template=template_of(spec), default_dtype=resolve_dtype("auto", device), dtype=dtype,
            max_new_tokens=max_new_tokens,
        )  # fmt: skip
        name = run_name(spec, task, checkpoint, adapter)
        folder = args.run_folder("main_results", name, setting.name, len(settings) > 1)
        runs[setting] = open_run(folder, config, task.order, labels=task.labels, batch_size=args.batch_size)

    # ---- answer
    pending = {setting: run for setting, run in runs.items() if not run.complete}
    too_long = {}  # setting -> why its prompt does not fit
    if pending:
        from vlmclassifier.finetuning.weights import load_adapter
        from vlmclassifier.vlm import load_vlm
        from vlmclassifier.vlm.pending import pending_batches, settings_too_long

        vlm = load_vlm(args.model, checkpoint, args.device, args.dtype)
        load_adapter(vlm, adapter)
        if vlm.opens_thought and cli.is_main_process():
            print(f"warning: {spec.key} thinks before it answers, and its chat template has no switch for that: only "
                  "what follows the thought is scored; --max-new-tokens must hold both.", file=sys.stderr)  # fmt: skip
        too_long = settings_too_long(vlm, task, list(pending), max_new_tokens)
        for setting, reason in too_long.items():
            pending.pop(setting).not_applicable(reason)
    if pending:
        title = f"{spec.key} on {task.benchmark.title}, {', '.join(setting.name for setting in pending)}"
        with cli.progress(list(pending.values()), title) as update:
            for batch in pending_batches(vlm, task, pending, args.batch_size):
                if batch.setting in too_long:
                    continue
                try:
                    with images_named([example.place for example in batch.examples]):
                        answers = vlm.generate(batch.batch, max_new_tokens, batch.image_features)
                except ContextError as error:  # missed by the check, such as an image whose size was not known
                    too_long[batch.setting] = str(error)
                    pending[batch.setting].not_applicable(str(error))
                    continue
                pending[batch.setting].append(batch.predictions(answers))
                update()

    # ---- score
    for setting, run in runs.items():
        if setting in too_long:
            continue
        rows = run.finish()
        if cli.is_main_process():
            cli.report(score_run(run.folder, rows))
    if too_long:
        raise ContextError("; ".join(f"{setting.name}: {reason}" for setting, reason in too_long.items()))


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
